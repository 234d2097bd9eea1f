"""What a session that claims remembers: the numbers in the setting pgworker.cursor, which carry their own hash."""

from __future__ import annotations

from typing import Any

import psycopg

Conn = psycopg.Connection[Any]

#: Where among them: since when, and for how many microseconds, the last sweep went on.
SWEPT, COST = 2, 3


def numbers(conn: Conn) -> list[str]:
    """Return the numbers; none before the first claim."""
    row = conn.execute("select split_part(current_setting('pgworker.cursor', true), '#', 1)").fetchone()
    return row[0].split(" ") if row and row[0] else []


def sweeps_cost(conn: Conn, microseconds: int, ago: int = 0) -> None:
    """Let the session believe that it looked everywhere so many microseconds ago, at that cost.

    Below a cost of 1,000 microseconds every claim does.
    """
    if seen := numbers(conn):
        row = conn.execute("select pgworker.cursor_at(clock_timestamp()) - %s", [ago]).fetchone()
        assert row is not None
        seen[SWEPT], seen[COST] = str(row[0]), str(microseconds)
        text = " ".join(seen)
        conn.execute("select set_config('pgworker.cursor', %s || '#' || hashtext(%s), false)", [text, text])
