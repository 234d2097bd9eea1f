"""The demo as its user starts it, in a terminal's session of its own, and what is left when it is gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import until

_ROOT = Path(__file__).resolve().parents[2]


class DemoProcess:
    """``pgworker demo`` with a temporary directory of its own; everything that it prints is kept."""

    def __init__(self, temporary: Path, *arguments: str, stdout: int = subprocess.PIPE) -> None:
        self.temporary = temporary
        self.said = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgworker_client", "demo", *arguments],
            cwd=_ROOT,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read_until(self, text: str) -> None:
        """Read what it prints until a line has that text in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"never said {text!r}, but:\n{self.said}{self.process.communicate()[1]}")

    def end(self, timeout: float = 90) -> tuple[int, str]:
        """Wait for its end; the status and what it said on standard error."""
        out, err = self.process.communicate(timeout=timeout)
        self.said += out or ""
        return self.process.returncode, err

    def press_ctrl_c(self) -> None:
        """What the terminal does: the signal goes to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    @property
    def server_directory(self) -> Path:
        """Where its server's data was, by its own words."""
        found = re.search(r"its data is in (\S+) until", self.said)
        assert found, self.said
        return Path(found[1])

    @property
    def files(self) -> list[Path]:
        """The directories that it made for its files."""
        return sorted(self.temporary.glob("pgworker-demo-*"))

    def table(self) -> dict[str, list[int]]:
        """The table of what happened: done, failed, attempts, retried, by task."""
        rows = re.findall(r"^  (\w+) +(\d+) +(\d+) +(\d+) +(\d+)$", self.said, re.MULTILINE)
        return {task: [int(number) for number in numbers] for task, *numbers in rows}


@contextlib.contextmanager
def running(temporary: Path, *arguments: str) -> Iterator[DemoProcess]:
    """A demo that does not outlive the block, even when the test fails."""
    demo = DemoProcess(temporary, *arguments)
    try:
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.process.communicate()


def nobody_works_in(*directories: Path) -> None:
    """Wait until no process has one of these directories, or one below, as its working directory."""

    def gone() -> bool:
        return not any(place.is_relative_to(one) for place in _working_directories() for one in directories)

    until(gone, f"no process in {directories}")


def _working_directories() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # A directory that was removed is shown with this behind its name.
            yield Path(os.readlink(process / "cwd").removesuffix(" (deleted)"))
