"""Schedules under a clock that the test moves."""

from __future__ import annotations

from typing import Any

from tests.calling import Conn, Row, call, row, rows, value
from tests.clock import move_clock

START = "2030-05-10 10:20:30+00"  # a Friday


def schedule(conn: Conn, cron: str = "* * * * *", name: str = "s", identifier: str = "t", **others: Any) -> Row:
    """Return the schedule that ``schedule_job`` returns."""
    (made,) = call(conn, "schedule_job", name, cron, identifier, **others)
    return made


def at(conn: Conn, moment: str) -> None:
    """Make it that time of the day on which everything begins, or that day and time."""
    move_clock(conn, moment if "-" in moment else f"2030-05-10 {moment}+00")


def maintain(conn: Conn) -> float:
    """Call ``maintain``; return in how many seconds it wants to be called again."""
    seconds: float = value(conn, "select extract(epoch from pgworker.maintain())::float8")
    return seconds


def shown(conn: Conn, name: str = "s") -> Row:
    """Return the schedule as the view shows it."""
    return row(conn, "select * from pgworker.schedules where name = %s", name)


def ticks(conn: Conn, identifier: str = "t") -> list[str]:
    """Return the ticks for which there are jobs, in the order in which they were added, as times of the day."""
    return [
        found["tick"]
        for found in rows(
            conn,
            "select to_char(run_at at time zone 'UTC', 'HH24:MI') as tick from pgworker.jobs"
            " where task_identifier = %s order by id",
            identifier,
        )
    ]
