"""The demo's worker: the command that everybody would use, in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pgworker_client.demo.files import Files

TASKS = Path(__file__).parent / "tasks"
_PACKAGE_HOME = str(Path(__file__).parents[2])
_PR_SET_PDEATHSIG = 1
_STARTED = "worker started"


class WorkerError(Exception):
    """The worker ended, or did not start; the text has the end of its log."""


class WorkerProcess:
    """``pgworker run --tasks …``, in the directory where the files go; its log goes there too."""

    def __init__(self, dsn: str, files: Files, concurrency: int) -> None:
        self._files = files
        parent = os.getpid()
        command = [sys.executable, "-m", "pgworker_client", "run", "--tasks", str(TASKS), "-j", str(concurrency)]
        path = os.pathsep.join(filter(None, [_PACKAGE_HOME, os.environ.get("PYTHONPATH")]))
        with files.log.open("wb") as log:
            # A session of its own: the terminal's Ctrl-C is ours to answer, in the right order. The connection string,
            # which may hold a password, goes by the environment: command lines can be read by everybody.
            self._process = subprocess.Popen(
                [*command, "--name", "demo"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=files.path,
                env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": path},
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait_until_started(self, timeout: float = 60) -> None:
        """Return when the worker has registered and listens."""
        deadline = time.monotonic() + timeout
        while _STARTED not in self._files.log.read_text(errors="replace"):
            self.check()
            if time.monotonic() > deadline:
                raise WorkerError(f"the worker did not start within {timeout:g} s{self._tail()}")
            time.sleep(0.02)

    def check(self) -> None:
        """Raise WorkerError if the worker has ended."""
        status = self._process.poll()
        if status is not None:
            raise WorkerError(f"the worker ended with status {status}{self._tail()}")

    def stop(self, timeout: float = 10) -> int:
        """Stop the worker as an operator would, by SIGTERM, and return its exit status; kill one that does not end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End the worker at once: its database is about to go."""
        self._process.kill()
        self._process.wait()

    def _tail(self) -> str:
        lines = self._files.log.read_text(errors="replace").splitlines()[-15:]
        return "; its log ends with:\n  " + "\n  ".join(lines) if lines else "; it logged nothing"


def _die_with(parent: int) -> None:
    """In the new process: have the kernel end it when the demo is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that took effect
            os._exit(1)
