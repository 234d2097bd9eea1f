"""Threads that run synchronous handlers: one per runner, kept, and left behind when its handler does not end.

Not a ThreadPoolExecutor: that one joins its threads when the interpreter ends, so that a handler which never returns
would keep a stopped worker alive for ever, and it has no way to replace the thread of a handler that was given up.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

_Work = tuple[Callable[[Any, Any], Any], Any, Any, "asyncio.Future[Any]"]


class HandlerThread:
    """A daemon thread that runs one handler at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="pgworker-handler", daemon=True).start()

    def call(self, handler: Callable[[Any, Any], Any], payload: Any, ctx: Any) -> asyncio.Future[Any]:
        """Run ``handler(payload, ctx)``. The future gets its result, or what it raised."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._work.put((handler, payload, ctx, future))
        return future

    def leave(self) -> None:
        """End the thread once its present handler, if any, has returned."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            handler, payload, ctx, future = work
            result, error = None, None
            try:
                result = handler(payload, ctx)
            except BaseException as exc:  # whatever a handler raises, SystemExit too, is its job's and not the thread's
                error = exc
            try:
                self._loop.call_soon_threadsafe(_deliver, future, result, error)
            except RuntimeError:  # the loop is closed: the worker is gone and nobody waits
                return
            del work, handler, payload, ctx, future, result, error  # nothing of a job outlives it here


def _deliver(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # given up meanwhile
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future cannot hold one
        wrapped = RuntimeError("the handler raised StopIteration")
        wrapped.__cause__ = error
        future.set_exception(wrapped)
    else:
        future.set_exception(error)
