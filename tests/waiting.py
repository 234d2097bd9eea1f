"""Waiting for something that another session does: by looking, with a deadline, never by sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")

_PAUSE = 0.005


def until(look: Callable[[], T], what: str, timeout: float = 20) -> T:
    """Call ``look`` until it returns something true, and return that; fail after ``timeout`` s, naming ``what``."""
    deadline = time.monotonic() + timeout
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain for: {what} (last seen: {seen!r})")
        time.sleep(_PAUSE)
    return seen


def until_row(conn: psycopg.Connection[Any], query: str, *parameters: Any, timeout: float = 20) -> tuple[Any, ...]:
    """Run ``query`` until it returns a row, and return the first. The connection must be in autocommit."""

    def look() -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = conn.execute(query, parameters, prepare=False).fetchone()
        return row

    found = until(look, f"a row of {query!r} with {parameters!r}", timeout)
    assert found is not None
    return found


def until_blocked(conn: psycopg.Connection[Any], waiting: psycopg.Connection[Any], timeout: float = 20) -> list[int]:
    """Wait until the session of ``waiting`` waits for a lock; return the process ids of those that hold it."""
    row = until_row(
        conn,
        "select pg_blocking_pids(pid) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
        " and cardinality(pg_blocking_pids(pid)) > 0",
        waiting.info.backend_pid,
        timeout=timeout,
    )
    holders: list[int] = row[0]
    return holders


def until_idle(conn: psycopg.Connection[Any], pid: int, timeout: float = 20) -> None:
    """Wait until the session with that process id has nothing to do."""
    until_row(conn, "select 1 from pg_stat_activity where pid = %s and state like 'idle%%'", pid, timeout=timeout)


def until_gone(conn: psycopg.Connection[Any], pid: int, timeout: float = 20) -> None:
    """Wait until no session with that process id is left."""
    until_row(conn, "select 1 where not exists (select from pg_stat_activity where pid = %s)", pid, timeout=timeout)


def until_locks_free(conn: psycopg.Connection[Any], pid: int, timeout: float = 20) -> None:
    """Wait until the session with that process id holds no advisory lock."""
    until_row(
        conn,
        "select 1 where not exists (select from pg_locks where pid = %s and locktype = 'advisory')",
        pid,
        timeout=timeout,
    )
