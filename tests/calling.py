"""Calling pgworker from a test: a line per call, rows as dictionaries, refusals looked at closely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row, scalar_row

Conn = psycopg.Connection[Any]
Row = dict[str, Any]

PAST = "2020-01-01 00:00:00+00"
FUTURE = "2100-01-01 00:00:00+00"


def rows(conn: Conn, query: str, *parameters: Any) -> list[Row]:
    """Return what the query returns."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters or None).fetchall()


def row(conn: Conn, query: str, *parameters: Any) -> Row:
    """Return the one row that the query returns."""
    (found,) = rows(conn, query, *parameters)
    return found


def values(conn: Conn, query: str, *parameters: Any) -> list[Any]:
    """Return the first column of what the query returns."""
    with conn.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(query, parameters or None).fetchall()


def value(conn: Conn, query: str, *parameters: Any) -> Any:
    """Return the one value that the query returns."""
    (found,) = values(conn, query, *parameters)
    return found


def call(conn: Conn, function: str, *positional: Any, columns: str = "*", **named: Any) -> list[Row]:
    """Return the rows of ``pgworker.function(…)``; an argument that is not given is left out of the call."""
    arguments = [sql.Placeholder() for _ in positional]
    arguments += [sql.SQL("{} := {}").format(sql.Identifier(name), sql.Placeholder()) for name in named]  # type: ignore[misc]
    query = sql.SQL("select {} from pgworker.{}({})").format(
        sql.SQL(columns), sql.Identifier(function), sql.SQL(", ").join(arguments)
    )
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, [*positional, *named.values()]).fetchall()


def add(conn: Conn, identifier: str = "a", **arguments: Any) -> Row:
    """Return the job that ``add_job`` returns."""
    (job,) = call(conn, "add_job", identifier, **arguments)
    return job


def register(conn: Conn, name: str | None = None, lease: str | None = None) -> int:
    """Return the id of a new worker, present as long as the session is unless it has a lease."""
    worker: int = value(conn, "select pgworker.register_worker(%s, %s::interval)", name, lease)
    return worker


def claim(conn: Conn, worker: int, max_jobs: int = 1, **arguments: Any) -> list[Row]:
    """Return what ``get_jobs`` returns.

    Where that is nothing, the session forgets its cursor and looks everywhere, to be certain: a claim does so by itself
    unless that takes long, as on a machine that stands still for a moment.
    """
    found = call(conn, "get_jobs", worker, max_jobs, **arguments)
    if not found:
        conn.execute("select pg_catalog.set_config('pgworker.cursor', '', false)")
        found = call(conn, "get_jobs", worker, max_jobs, **arguments)
    return found


def claim_ids(conn: Conn, worker: int, max_jobs: int = 1, **arguments: Any) -> list[int]:
    """Return the ids of what `claim` returns, in its order."""
    return [job["id"] for job in claim(conn, worker, max_jobs, columns="id", **arguments)]


def retry_in_an_hour(conn: Conn, task: str) -> None:
    """Let what fails of this task be due again in an hour: on a slow machine it might be before it is looked at."""
    conn.execute("select pgworker.configure_task(%s, backoff => '[3600]')", [task])


def job_row(conn: Conn, job_id: int) -> Row | None:
    """Return the job as the view shows it, or None if it is not known any more."""
    found = rows(conn, "select * from pgworker.jobs where id = %s", job_id)
    return found[0] if found else None


def seen(conn: Conn, job_id: int) -> Row:
    """Return the job as the view shows it; it must be there."""
    return row(conn, "select * from pgworker.jobs where id = %s", job_id)


def state(conn: Conn, job_id: int) -> str | None:
    """Return the job's state, or None if it is not known any more."""
    found = job_row(conn, job_id)
    return found["state"] if found else None


def contents(conn: Conn) -> dict[str, list[str]]:
    """Return every row of every table of pgworker as text: what a call that changes nothing must leave alone."""
    tables = values(
        conn,
        "select relname from pg_class where relnamespace = 'pgworker'::regnamespace and relkind = 'r' order by relname",
    )
    each = (f"select '{name}', t::text from pgworker.{name} t" for name in tables)  # the catalog's own names
    found: dict[str, list[str]] = {name: [] for name in tables}
    for name, text in sorted(conn.execute(" union all ".join(each).encode()).fetchall()):
        found[name].append(text)
    return found


@contextmanager
def refused(
    conn: Conn, sqlstate: str, *says: str, hint: str | None = None
) -> Iterator[pytest.ExceptionInfo[psycopg.Error]]:
    """Expect an error with that SQLSTATE, those words in its message, a hint, and no row changed anywhere."""
    before = contents(conn)
    with pytest.raises(psycopg.Error) as caught, conn.transaction():
        yield caught
    assert caught.value.sqlstate == sqlstate, caught.value
    for words in says:
        assert words in (caught.value.diag.message_primary or "")
    assert caught.value.diag.message_hint, "an error without a way out"
    if hint is not None:
        assert hint in caught.value.diag.message_hint
    assert contents(conn) == before
