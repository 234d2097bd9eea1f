"""Where the demo's files go: receipts, mails, and the worker's log."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_MARK = ".pgworker-demo"
_OURS = ("receipts", "mails", "worker.log")


class FilesError(Exception):
    """The directory cannot be used; the text says why, and the way out."""


class Files:
    """The directory, empty at the start.

    Args:
        wanted: the directory that the user named; what an earlier demo left there is replaced. None: a new one in the
            system's temporary directory.
    """

    def __init__(self, wanted: Path | None) -> None:
        self.temporary = wanted is None
        if wanted is None:
            self.path = Path(tempfile.mkdtemp(prefix="pgworker-demo-"))
        else:
            self.path = wanted.absolute()
            self._take_over()
        (self.path / _MARK).touch()
        for name in ("receipts", "mails"):
            (self.path / name).mkdir()

    @property
    def log(self) -> Path:
        """The worker's log."""
        return self.path / "worker.log"

    def count(self, name: str) -> int:
        """How many files there are in ``receipts`` or ``outbox``."""
        return sum(1 for _ in (self.path / name).iterdir())

    def discard(self) -> bool:
        """Remove a temporary directory; false for one that the user named, which stays as it is."""
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        return self.temporary

    def _take_over(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()) and not (self.path / _MARK).exists():
                raise FilesError(f"{self.path} is not empty and no demo's directory: name a new one with --directory")
            for name in _OURS:
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as refused:
            raise FilesError(f"{self.path} cannot be used: {refused}; name another with --directory") from refused
