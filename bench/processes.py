"""Child processes that are measured: started, told what to do on standard input, and heard through ``@`` lines."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

PATIENCE = 1800.0
"""Seconds after which a measurement that does not end is given up; 10 million jobs may take half of it."""


class Child:
    """A worker or a producer of either side, from the start of a ``with`` block to its end.

    Args:
        command: the program and its arguments.
        environment: added to this process's own, less what would lead libpq elsewhere.

    Attributes:
        handled: jobs that this worker has run.
        delays: milliseconds from sending a job to its handler's first line, for jobs that say when they were sent.
        added: jobs that this producer has added from the last order to add them steadily to the one to stop.
        pid: the process's number.

    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.handled = self.added = 0
        self.delays: list[float] = []
        self._name = " ".join(command[-2:])
        self._killed = False
        self._answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        inherited.pop("DATABASE_URL", None)
        self._process = subprocess.Popen(
            command,
            env={**inherited, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for the measuring process, which then closes their input
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        """Nothing more to start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End its input, upon which it ends by itself; kill it where it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30 if kind is None else 3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        if kind is None and self._process.returncode and not self._killed:
            raise self._failed()
        self._said.close()

    def wait_until_ready(self) -> None:
        """Wait until a producer is connected."""
        self._answer()

    def ask(self, *words: object) -> float:
        """Have a producer do something; returns the seconds that it took."""
        self.tell(*words)
        return self.done()

    def tell(self, *words: object) -> None:
        """Have a producer begin to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def done(self) -> float:
        """Wait until it has done what it was told; returns the seconds that it took."""
        return self._answer() / 1e9

    def check(self) -> None:
        """RuntimeError, with the end of what it said, if the process has ended."""
        if self._process.poll() is not None:
            raise self._failed()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._killed = True
        self._process.kill()
        self._process.wait()

    def _answer(self) -> int:
        try:
            answer = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"{self._name}: no answer within {PATIENCE:g} s") from None
        if answer is None:
            self._process.wait()
            raise self._failed()
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match line.split():
                case ["@", "handled", count]:
                    self.handled = int(count)
                case ["@", "delays", *delays]:
                    self.delays += [int(delay) / 1e6 for delay in delays]
                case ["@", "added", count]:
                    self.added = int(count)
                case ["@", "took", nanoseconds]:
                    self._answers.put(int(nanoseconds))
                case ["@", "ready"]:
                    self._answers.put(0)
                case _:
                    pass  # a library's own words
        self._answers.put(None)

    def _failed(self) -> RuntimeError:
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")[-2000:]
        return RuntimeError(f"{self._name} ended with status {self._process.returncode} and said:\n{said}")


def wait_until(look: Callable[[], bool], workers: Sequence[Child], what: str, pause: float = 0.001) -> None:
    """Look every ``pause`` seconds until it is so. Raises when a worker dies or nothing comes of it."""
    deadline = time.monotonic() + PATIENCE
    while not look():
        for worker in workers:
            worker.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:g} s in vain for: {what}")
        time.sleep(pause)
