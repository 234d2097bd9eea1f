"""Worker processes that can be killed and replaced, or stopped for a while."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.waiting import until

ROOT = Path(__file__).parents[2]


class Fleet:
    """So many ``pgworker run --tasks DIR`` processes; whoever is killed is replaced at once.

    Args:
        dsn: the database.
        tasks: the directory of the tasks.
        size: how many processes.
        arguments: further ones of the command.
        environment: what the processes get beside their parent's.
    """

    def __init__(
        self, dsn: str, tasks: Path, size: int, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "pgworker_client", "run", "--database", dsn, "--tasks", str(tasks)]
        self._command += arguments
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._logs = Path(tempfile.mkdtemp(prefix="logs-", dir=tasks))
        self._started = 0
        self._processes = [self._start() for _ in range(size)]
        self._heard: dict[Path, int] = {}
        self.killed = 0

    def _start(self) -> _Process:
        self._started += 1
        log = self._logs / f"{self._started:04}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return _Process(process, log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.popen.kill()
            process.popen.wait()

    def kill_one(self, chance: random.Random) -> None:
        """Kill some process with SIGKILL and start another in its place."""
        index = chance.randrange(len(self._processes))
        self.check()
        self._processes[index].popen.kill()
        self._processes[index].popen.wait()
        self._processes[index] = self._start()
        self.killed += 1

    def freeze(self, frozen: bool) -> None:
        """Stop all processes with SIGSTOP, or have them go on."""
        for process in self._processes:
            process.popen.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def check(self) -> None:
        """Fail if a worker has ended by itself: nothing but SIGKILL may end one that had begun to work.

        One that met the fault before it got that far says so and gives up; it is started anew, as a supervisor would.
        """
        for index, process in enumerate(self._processes):
            status = process.popen.poll()
            if status is not None:
                assert status != 0, process.said()
                assert "worker started" not in process.said(), f"a worker ended with {status}:\n{process.said()}"
                self._processes[index] = self._start()

    def started(self) -> bool:
        """Return whether all work; see `check` for those that have ended."""
        self.check()
        return all(b"worker started" in process.log.read_bytes() for process in self._processes)

    def stop(self, timeout: float = 30) -> None:
        """Ask all to stop, and fail unless they do so, in good order."""
        until(self.started, "those that were started last work", timeout=60)
        for process in self._processes:
            process.popen.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                status = process.popen.wait(timeout)
            except subprocess.TimeoutExpired as waited:
                raise AssertionError(f"a worker goes on after SIGTERM:\n{process.said()}") from waited
            assert status == 0, f"a worker ended with status {status}:\n{process.said()}"

    def said(self) -> str:
        """Return the end of what the processes wrote that are there now."""
        return "\n".join(process.said(1500) for process in self._processes)

    def forget(self) -> None:
        """What was written so far is not looked at any more by `all_say`."""
        self._heard = {process.log: process.log.stat().st_size for process in self._processes}

    def all_say(self, text: str) -> bool:
        """Return whether each process has written this."""
        return all(text.encode() in p.log.read_bytes()[self._heard.get(p.log, 0) :] for p in self._processes)


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path

    def said(self, most: int = 3000) -> str:
        text = self.log.read_text(errors="replace")
        return text if len(text) <= 2 * most else text[:most] + " [...] " + text[-most:]
