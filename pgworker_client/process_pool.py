"""Processes for CPU-bound handlers, ``@worker.task(executor="process")``: the worker's side.

Not a ProcessPoolExecutor: when one of its processes dies it breaks as a whole, all that is running in it fails, and it
cannot end a single one when its time is over. Here each run has a process and a pipe of its own, so that what becomes
of a process is that job's affair alone.

The calling of a process is a blocking function in a runner's thread, as if it was the handler: the event loop only
steps in to end it early.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from multiprocessing import resource_tracker
from typing import Any

from pgworker_client.context import BlockingContext, Context, Surroundings
from pgworker_client.exit_status import how_it_ended
from pgworker_client.importable import Place
from pgworker_client.outcome import ProcessDied, RemoteTraceback
from pgworker_client.process_main import NAME, serve

#: Seconds that a handler gets to end by itself after it was told to stop. Less than what a stopping worker waits for.
_MOMENT = 2.0
#: Seconds between two looks whether a process still lives whose pipe says nothing.
_LOOK = 1.0

_SPAWN = multiprocessing.get_context("spawn")


class HandlerProcess:
    """A process that runs one handler at a time. To be made, told and killed in the event loop."""

    def __init__(self) -> None:
        self._pipe, pipe = _SPAWN.Pipe()
        control, self._control = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=serve, args=(pipe, control), name=NAME)
        with _signals_held_back():
            self._process.start()
        pipe.close()
        control.close()
        self._run = 0
        self._idle = True
        self._killed = False

    @property
    def usable(self) -> bool:
        """Whether it waits for the next run."""
        return self._idle and not self._killed

    def reserve(self) -> None:
        """The next run begins: what is told from now on is for that one."""
        self._run += 1
        self._idle = False

    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def call(self, place: Place, payload: Any, ctx: ProcessRun) -> Any:
        """Have it call the handler, and return or raise what that does; ProcessDied if it ends. Blocks."""
        begun = False
        logger = ctx.logger
        run = (
            self._run,
            place,
            payload,
            ctx.job,
            logger.logger.name,
            logger.getEffectiveLevel(),
            dict(logger.extra or {}),
        )
        try:
            self._pipe.send(run)
            while True:
                kind, *rest = self._receive()
                if kind == "begun":
                    begun = True
                    ctx.begun()
                elif kind == "log":
                    _log(logger.logger, rest[0])
                elif kind == "progress":
                    self._pipe.send(_outcome(ctx.progress, rest[0]))
                else:
                    break
        except (EOFError, OSError):
            when = "" if begun else " before it began; its standard error may say why"
            raise ProcessDied(f"the process of the handler {self._end()}{when}") from None
        self._idle = True
        if kind == "returned":
            return pickle.loads(rest[0])
        error, text = rest
        raise pickle.loads(error) from RemoteTraceback(text)

    def tell(self) -> None:
        """Have ``ctx.cancelled`` set in the present run."""
        with contextlib.suppress(OSError):  # it is dead
            self._control.send(self._run)

    def kill(self) -> None:
        """End it, now."""
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """End it, and leave nothing behind."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()
        self._control.close()

    def _end(self) -> str:
        """Wait for the end of the process, which is near, and say how it ended."""
        self._process.join(_LOOK)
        self._process.kill()
        self._process.join()
        deadline = time.monotonic() + _LOOK
        while (status := self._process.exitcode) is None and time.monotonic() < deadline:
            time.sleep(0.001)  # the start of another process looks after all; the loop's thread has the answer already
        return "ended" if status is None else how_it_ended(status)

    def _receive(self) -> Any:
        # Whatever the handler forked may hold the pipe open, so its closing is not the only sign of an end.
        while not self._pipe.poll(_LOOK):
            if not self._process.is_alive() and not self._pipe.poll():
                raise EOFError
        return self._pipe.recv()


class ProcessPool:
    """The processes of a worker, made when needed and kept: no more than there are processors, or runners."""

    def __init__(self, runners: int) -> None:
        self._free = asyncio.Semaphore(min(runners, processors()))
        self._idle: list[HandlerProcess] = []

    @asynccontextmanager
    async def process(self) -> AsyncIterator[HandlerProcess]:
        """A process for one run; waits until one is free."""
        async with self._free:
            process = self._take()
            process.reserve()
            try:
                yield process
            finally:
                if process.usable:
                    self._idle.append(process)
                else:
                    process.kill()

    def close(self) -> None:
        """End all processes; none may be in use."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> HandlerProcess:
        while self._idle:
            process = self._idle.pop()
            if process.alive():
                return process
            process.close()
        return HandlerProcess()


class ProcessRun(BlockingContext):
    """The context of a run in a process, on this side: told to stop, it tells, and soon kills, the process."""

    __slots__ = ("_is_over", "_killing", "_limit", "_on_begun", "_process", "_timer", "timed_out")

    def __init__(
        self,
        context: Context,
        around: Surroundings,
        process: HandlerProcess,
        limit: float | None,
        on_begun: Callable[[], None],
    ) -> None:
        super().__init__(context, around)
        self._process = process
        self._limit = limit
        self._on_begun = on_begun
        self._timer: asyncio.TimerHandle | None = None
        self._killing: asyncio.TimerHandle | None = None
        self._is_over = False
        self.timed_out = False

    def begun(self) -> None:
        """Called by the thread: the handler is being called, after its process was started and has imported it."""
        if self._limit is not None:
            self._around.loop.call_soon_threadsafe(self._start_timer)

    def stop(self, fate: str) -> None:
        """Called by the worker: the run is to end early."""
        super().stop(fate)
        if self._killing is None:
            self._process.tell()
            self._killing = self._around.loop.call_later(_MOMENT, self._process.kill)

    def _start_timer(self) -> None:
        if self._limit is not None and not self._is_over:
            self._on_begun()
            self._timer = self._around.loop.call_later(self._limit, self._time_out)

    def _time_out(self) -> None:
        self.timed_out = True
        self.stop(self._async.fate or "timeout")

    def over(self) -> None:
        """The run has ended; the process is somebody else's."""
        self._is_over = True
        for timer in (self._timer, self._killing):
            if timer is not None:
                timer.cancel()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(function: Callable[[Any], Any], argument: Any) -> BaseException | None:
    try:
        function(argument)
    except Exception as exc:
        return exc
    return None


def _log(logger: logging.Logger, record: logging.LogRecord) -> None:
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What is started inside gets no SIGINT or SIGTERM, meant for the worker, until it is ready for them."""
    resource_tracker.ensure_running()  # which would let them through when it is started by the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
