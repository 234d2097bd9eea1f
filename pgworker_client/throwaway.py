"""Directories that go away with the process, even when it was killed: the next one that makes some removes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "pgworker-"  # short: the path of a socket may have 107 bytes
_MARK = "owner"


class ThrowawayDirectory:
    """A new directory, closed to other users, that `close` removes.

    Args:
        places: where it may lie, the preferred one first; abandoned ones are removed from all of them.

    """

    def __init__(self, places: list[Path]) -> None:
        for place in places:
            _remove_abandoned(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=places[0]))
        fresh = self.path / f"{_MARK}.new"
        self._mark = fresh.open("wb")
        fcntl.flock(self._mark, fcntl.LOCK_EX)  # until closed, or until this process ends
        fresh.rename(self.path / _MARK)  # so it appears locked: nobody can take it for abandoned

    def close(self) -> None:
        """Remove the directory with all that is in it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._mark.close()


def places(*, on_disk: bool) -> list[Path]:
    """Return where throwaway data may lie, the best place first.

    In memory there, creating a database is ten times faster; a container's default of 64 MB is too little for it.
    """
    if on_disk:
        return [Path("/var/tmp")]  # /tmp may be in memory
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    return [memory, Path("/tmp")] if roomy else [Path("/tmp")]


def _remove_abandoned(place: Path) -> None:
    for mark in place.glob(f"{_PREFIX}*/{_MARK}"):
        with contextlib.suppress(OSError), mark.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            shutil.rmtree(mark.parent, ignore_errors=True)
