"""The presence thread: a worker stays present, and hears what it must stop, whatever its event loop is busy with."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pgworker_client.database import Database
from pgworker_client.feed import Feed
from pgworker_client.logs import Log
from pgworker_client.loop_watch import LoopWatch
from pgworker_client.presence import Presence
from pgworker_client.settings import Settings

T = TypeVar("T")

#: Seconds to wait for the end of the thread, which has nothing left to do by then.
_END = 5.0


class PresenceThread:
    """A `Presence` in a thread and an event loop of its own. Its callbacks are called in the worker's event loop."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        log: Log,
        feed: Feed,
        timeouts: dict[str, float],
        *,
        on_worker_id: Callable[[int], None],
        on_notice: Callable[[int, str], None],
        on_unsure: Callable[[], None],
    ) -> None:
        here = asyncio.get_running_loop()

        def call(callback: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the worker's loop has ended: nobody is left to be told
                here.call_soon_threadsafe(callback, *arguments)

        self._presence = Presence(
            settings,
            database,
            log,
            timeouts,
            on_worker_id=lambda worker_id: call(on_worker_id, worker_id),
            on_notice=lambda job_id, notice: call(on_notice, job_id, notice),
            on_unsure=lambda: call(on_unsure),
            watch=LoopWatch(call, feed, log),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pgworker-presence", daemon=True)
        self._thread.start()

    async def start(self) -> None:
        """See `Presence.start`."""
        await self._there(self._presence.start())

    async def run(self) -> None:
        """See `Presence.run`."""
        await self._there(self._presence.run())

    async def leave(self) -> None:
        """See `Presence.leave`."""
        await self._there(self._presence.leave())

    async def close(self) -> None:
        """Close the connections and end the thread."""
        await self._there(self._presence.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END)
        if not self._thread.is_alive():
            self._loop.close()

    async def _there(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it in the thread. When cancelled, cancel it there, and return once it has ended: no sooner."""
        here = asyncio.get_running_loop()
        ended: asyncio.Future[T] = here.create_future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: here.call_soon_threadsafe(end, task))

        def end(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                ended.cancel()
            elif (error := task.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(task.result())

        self._loop.call_soon_threadsafe(begin)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            await asyncio.wait({ended})
            raise
