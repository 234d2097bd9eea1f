"""Moving the database's clock, as pgworker sees it."""

from __future__ import annotations

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
