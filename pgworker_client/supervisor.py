"""``pgworker run --processes N``: a supervisor that keeps N worker processes running.

Each process is the same command once more, a worker with connections and a registration of its own; nothing is forked,
so no connection is shared. The supervisor itself never connects. It speaks with each process over a socket:

* to it: one byte for each stop that is wanted. The signal that goes with it only speeds things up: a terminal or a
  service manager may have sent the same signal to all processes, and a stop that arrives twice must not count twice.
* from it: one byte once it works. Whoever dies before that, time after time, will not come up by being restarted.
* its closing, when the supervisor is gone however that happened, stops the process in good order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from pgworker_client.errors import WorkerFailed
from pgworker_client.exit_status import how_it_ended
from pgworker_client.stopping import on_signals

#: So many processes in a row that ended before they could work, and the supervisor gives up.
_FAILED_STARTS = 5
#: Seconds before the first restart of a process; twice as many before each further one, up to the second figure.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: A process that has worked for so many seconds was a good one: the next restart is a first one again.
_STEADY = 60.0


class _Process:
    """A running process and the way to it."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket, works: Callable[[], None]) -> None:
        self.process = process
        self._line = line
        self._works = works
        self._loop = asyncio.get_running_loop()
        self._told = 0
        #: When it said that it works.
        self.working_since: float | None = None
        self._loop.add_reader(line, self._hear)

    async def wait(self) -> int:
        """Wait for its end and return its exit status."""
        status = await self.process.wait()
        self._hear()
        self._loop.remove_reader(self._line)
        self._line.close()
        return status

    def tell(self, stops: int) -> None:
        """Tell it that so many stops are wanted by now."""
        missing, self._told = stops - self._told, stops
        with contextlib.suppress(OSError):  # it is dead already
            self._line.send(b"s" * missing)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def _hear(self) -> None:
        try:
            said = self._line.recv(1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._loop.remove_reader(self._line)
        elif self.working_since is None:
            self.working_since = self._loop.time()
            self._works()


class Supervisor:
    """Starts the processes, restarts those that die, passes stops on, and gives up when none can be started.

    Args:
        python: what Python is called with to be the command ``pgworker``.
        arguments: those of the command, beginning with ``run``.
        processes: how many.
        once: a process that ends well has done its part and is not started again.
        logger: where restarts are logged.
    """

    def __init__(
        self, python: Sequence[str], arguments: Sequence[str], processes: int, *, once: bool, logger: logging.Logger
    ) -> None:
        if not 1 <= processes <= 1000:
            raise ValueError(f"processes must be between 1 and 1000, not {processes}")
        self._python = python
        self._run_command, *self._arguments = arguments
        self._count = processes
        self._once = once
        self._log = logger
        self._running: dict[int, _Process] = {}
        self._stops = 0
        self._stopping = asyncio.Event()
        self._failed_starts = 0
        self._failure: str | None = None

    def run(self) -> None:
        """Until all have ended, because they were told to or, with ``once``, are done. WorkerFailed if not all well."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        with on_signals(self._stop):
            await asyncio.gather(*[self._keep(number) for number in range(1, self._count + 1)])
        if self._failure is not None:
            raise WorkerFailed(self._failure)

    def _stop(self) -> None:
        self._stops += 1
        self._stopping.set()
        for process in self._running.values():
            process.tell(self._stops)

    async def _keep(self, number: int) -> None:
        """Have process ``number`` running, one after the other, until it is not wanted any more."""
        deaths = 0
        while not self._stopping.is_set():
            worked, end = await self._one(number)
            if end is None:
                return
            if worked is None:
                self._failed_starts += 1
            elif worked >= _STEADY:
                deaths = 0
            if self._stopping.is_set():
                self._failure = self._failure or f"process {number} {end} instead of stopping in good order"
                return
            if self._failed_starts >= _FAILED_STARTS:
                self._failure = (
                    f"gave up after {self._failed_starts} processes in a row that ended before they could work; the "
                    f"last one, process {number}, {end}"
                )
                self._log.error("%s", self._failure)
                self._stop()
                return
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**deaths) * random.uniform(0.5, 1.0)
            deaths = min(deaths + 1, 10)
            self._log.warning("process %d %s; another one is started in %.1f s", number, end, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _one(self, number: int) -> tuple[float | None, str | None]:
        """Run a process: for how many seconds it worked, None if it never did, and its bad end, None for a good one."""
        try:
            process = await self._start(number)
        except OSError as exc:
            return None, f"could not be started: {exc}"
        self._running[number] = process
        if self._stops:  # meanwhile
            process.tell(self._stops)
        status = await process.wait()
        del self._running[number]
        since = process.working_since
        # While it works it handles these signals. They end it only before or after: there is nothing to bring in order.
        if self._stopping.is_set():
            well = status in (0, 130, -signal.SIGTERM, -signal.SIGINT)
        else:
            well = self._once and status == 0
        end = None if well else how_it_ended(status)
        return None if since is None else asyncio.get_running_loop().time() - since, end

    async def _start(self, number: int) -> _Process:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._python,
                self._run_command,
                "--supervised",
                str(theirs.fileno()),
                str(number),
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Process(process, ours, self._one_works)

    def _one_works(self) -> None:
        self._failed_starts = 0
