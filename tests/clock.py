"""Moving the database's clock, as pgworker sees it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg


def move_clock(conn: psycopg.Connection[Any], to: str) -> None:
    """Make it ``to`` (a timestamp as PostgreSQL reads it) for pgworker in this session, until moved again.

    An empty text gives the real time back. The connection's role must be allowed to write pgworker's settings; other
    sessions of that database may call ``pgworker.fake_now`` themselves from then on.
    """
    conn.execute(
        "insert into pgworker.setting (name, value) values ('allow_fake_now', 'on') "
        "on conflict (name) do update set value = excluded.value where setting.value <> excluded.value"
    )
    conn.execute("select pgworker.fake_now(nullif(%s, '')::timestamptz)", [to])


START = "2030-01-01 00:00:00+00"


def at(conn: psycopg.Connection[Any], seconds: float) -> None:
    """Make it so many seconds after START in this session."""
    (moment,) = conn.execute("select (%s::timestamptz + make_interval(secs => %s))::text", [START, seconds]).fetchone()  # type: ignore[misc]
    move_clock(conn, moment)


def maintain(conn: psycopg.Connection[Any], seconds: float) -> timedelta:
    """Call ``maintain()`` as if so long after START, and return what it returns."""
    at(conn, seconds)
    (useful,) = conn.execute("select pgworker.maintain()").fetchone()  # type: ignore[misc]
    assert isinstance(useful, timedelta)
    return useful
