"""The server's own pg_dump, pg_restore and psql."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pgworker_client.embedded import EmbeddedServer

FORMATS: dict[str, list[str]] = {
    "plain": ["--format=plain"],
    "inserts": ["--format=plain", "--inserts"],
    "custom": ["--format=custom"],
    "directory": ["--format=directory", "--jobs=4"],
}


def dump(server: EmbeddedServer, dbname: str, to: Path, kind: str) -> Path:
    """Dump a database in one of `FORMATS`, and return where it is."""
    target = to / f"dump-{kind}"
    _run(server, "pg_dump", *FORMATS[kind], f"--file={target}", f"--dbname={server.dsn(dbname)}")
    return target


def restore(server: EmbeddedServer, dumped: Path, kind: str, dbname: str) -> None:
    """Restore into a new, empty database; whatever goes wrong on the way is an error."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("create database {} template template0").format(sql.Identifier(dbname)))
    if "--format=plain" in FORMATS[kind]:
        _run(server, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(dumped), "-d", server.dsn(dbname))
    else:
        jobs = ["--jobs=4"] if kind == "directory" else []
        _run(server, "pg_restore", "--exit-on-error", *jobs, f"--dbname={server.dsn(dbname)}", str(dumped))


def drop(server: EmbeddedServer, dbname: str) -> None:
    """Drop the database if it is there."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(dbname)))


@contextmanager
def restoring(
    server: EmbeddedServer, dbname: str, to: Path, copy: str
) -> Iterator[Callable[[str], psycopg.Connection[Any]]]:
    """Dump a database in a format, restore it into ``copy``, and connect to that; as often as one likes."""
    connections: list[psycopg.Connection[Any]] = []

    def take(kind: str) -> psycopg.Connection[Any]:
        drop(server, copy)
        restore(server, dump(server, dbname, to, kind), kind, copy)
        connections.append(psycopg.connect(server.dsn(copy), autocommit=True))
        return connections[-1]

    yield take
    for conn in connections:
        conn.close()
    drop(server, copy)


def _run(server: EmbeddedServer, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [server.installation.bindir / program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{program} {' '.join(arguments)} failed:\n{done.stderr}"
    assert not done.stderr, f"{program} {' '.join(arguments)} complained:\n{done.stderr}"
