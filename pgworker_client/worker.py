"""The worker as its user sees it: tasks are put in, then it is run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, overload

from pgworker_client.engine import Engine
from pgworker_client.hooks import Hook, HookList, JobEventName, WorkerEventName
from pgworker_client.logs import LOGGER
from pgworker_client.middleware import M, Middleware, check_middleware
from pgworker_client.process_main import NAME
from pgworker_client.settings import Settings, seconds
from pgworker_client.stopping import StopSource, on_signals
from pgworker_client.tasks import Executor, H, Handler, Tasks

K = TypeVar("K", bound=Hook)


class Worker:
    """Claims jobs, calls their handlers and reports what became of them.

    Args:
        dsn: libpq connection string or URL; None: DATABASE_URL, else libpq's PG* variables.
        concurrency: how many handlers run at the same time.
        tasks: handlers by identifier, besides those added with `task`.
        state: anything; handlers find it as ``ctx.state``.
        name: how the worker is called in the database and in logs; None: host name and process id.
        poll_interval: seconds between two looks at the database when nothing says that there is work.
        buffer: at most so many claimed jobs wait for a free runner; short jobs are claimed ahead, long ones are not.
        lease: seconds or a timedelta; for transaction poolers. Presence is then a lease that is renewed three times as
            often, there is no LISTEN, and nothing depends on the database session. None: presence is the session.
        forbidden_flags: jobs that carry one of these flags are passed over.
        grace: seconds that running jobs get after the first stop before they are cancelled.
        logger: where log records go; None: the logger ``pgworker``.

    TypeError or ValueError, naming the argument, for what cannot be.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        concurrency: int = 10,
        tasks: Mapping[str, Handler] | None = None,
        state: Any = None,
        name: str | None = None,
        poll_interval: float = 1.0,
        buffer: int = 1000,
        lease: float | timedelta | None = None,
        forbidden_flags: Sequence[str] | None = None,
        grace: float = 25.0,
        logger: logging.Logger | None = None,
    ) -> None:
        self.settings = Settings(
            dsn=dsn,
            concurrency=concurrency,
            name=name,
            poll_interval=poll_interval,
            buffer=buffer,
            lease=None if lease is None else seconds("lease", lease, least=1.0),
            forbidden_flags=forbidden_flags,
            grace=grace,
        )
        self.state = state
        self.tasks = Tasks(tasks)
        self._logger = logger or logging.getLogger(LOGGER)
        self._hooks = HookList()
        self._middleware: list[Middleware] = []
        self._running: tuple[asyncio.AbstractEventLoop, Engine] | None = None

    @overload
    def task(self, handler: H, /) -> H: ...

    @overload
    def task(
        self,
        identifier: str | None = None,
        /,
        *,
        timeout: float | timedelta | None = None,
        executor: Executor | None = None,
    ) -> Callable[[H], H]: ...

    def task(
        self, given: Any = None, /, *, timeout: float | timedelta | None = None, executor: Executor | None = None
    ) -> Any:
        """Make a function ``(payload, ctx)``, async or not, the handler of a task.

        ``@worker.task`` takes the function's name as the identifier, ``@worker.task("name", timeout=60)`` the one
        given; ``timeout`` (seconds or a timedelta) limits each attempt. ``executor="process"`` runs it in a process,
        for what is CPU-bound or may crash; then it must be a plain function that can be imported. ValueError for an
        identifier that is taken.
        """
        return self.tasks.task(given, timeout=timeout, executor=executor)

    def on(self, *events: JobEventName | WorkerEventName) -> Callable[[K], K]:
        """Have a function ``(event)``, async or not, called at these events: ``@worker.on("failed", "lost")``.

        It gets a `JobEvent`, or at ``worker_started`` and ``worker_stopped`` a `WorkerEvent`. ValueError for any other
        name.
        """

        def decorate(hook: K) -> K:
            self._hooks.add(events, hook)
            return hook

        return decorate

    def middleware(self, middleware: M) -> M:
        """Put an async function ``(ctx, call_next)`` around every handler, inside those registered before it.

        ``await call_next()`` goes on to the handler and gives what it returned; what the middleware returns is taken
        for that, what it raises for what the handler raised.
        """
        check_middleware(middleware)
        self._middleware.append(middleware)
        return middleware

    def run(self, *, once: bool = False) -> None:
        """Work until stopped, or with ``once`` until nothing is due any more.

        In the main thread SIGTERM and SIGINT stop the worker: the first lets running jobs end, the second cancels them.
        Raises NotInstalled for a database without pgworker, psycopg's error when it cannot be reached at the start, and
        WorkerFailed when a part of the worker dies later on.
        """
        self.run_until(on_signals, once=once)

    def run_until(self, stops: StopSource, *, once: bool = False, started: Callable[[], None] = lambda: None) -> None:
        """The same, told to stop by ``stops``; ``started`` is called once the worker is connected and registered."""
        loop = asyncio.new_event_loop()

        async def work() -> None:
            with stops(self.stop):
                await self._work(once=once, started=started)

        try:
            loop.run_until_complete(work())
        finally:
            _close(loop)

    def run_once(self) -> None:
        """Run what is due, and what becomes due meanwhile; then return."""
        self.run(once=True)

    async def run_async(self, *, once: bool = False) -> None:
        """The same inside a running event loop. Signals are left alone: call `stop`. Cancelling it stops at once."""
        await self._work(once=once)

    async def _work(self, *, once: bool, started: Callable[[], None] = lambda: None) -> None:
        if not self.tasks.by_name:
            raise ValueError("this worker has no tasks: add one with @worker.task, or give tasks={name: handler}")
        if self._running is not None:
            raise RuntimeError("this worker is running already")
        if multiprocessing.current_process().name == NAME:
            raise RuntimeError(
                "a process for handlers has come to run a worker while it imported the main module: put the call of "
                "worker.run() below: if __name__ == '__main__'"
            )
        self.tasks.check_places()
        engine = Engine(self.settings, self.tasks.by_name, self.state, self._logger, self._hooks, self._middleware)
        self._running = asyncio.get_running_loop(), engine
        try:
            await engine.run(once=once, started=started)
        finally:
            self._running = None

    def stop(self) -> None:
        """Stop, from any thread: the first call lets running jobs end, the second cancels them."""
        running = self._running
        if running is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                running[0].call_soon_threadsafe(running[1].stop)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Close the loop as asyncio.run does, but without waiting for ever for a handler that ignores its cancellation."""
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=0.5))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
