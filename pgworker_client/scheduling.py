"""Schedules: jobs that the database adds again and again, at the ticks of a cron expression.

The meaning of every argument is that of the SQL function of the same name; None leaves it to its default there.
``conn``, the first argument, is any psycopg connection or cursor; with an async one the call returns an awaitable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypedDict, Unpack

from pgworker_client.enqueue import KeyMode, aware, flag_list, refuse_unknown, span
from pgworker_client.job import to_json
from pgworker_client.on_connection import Request, on_connection


class ScheduleOptions(TypedDict, total=False):
    """The optional arguments of `schedule_job`; see there."""

    timezone: str | None
    backfill: timedelta | None
    queue_name: str | None
    max_attempts: int | None
    job_key: str | None
    job_key_mode: KeyMode | None
    priority: int | None
    flags: Sequence[str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A row of the view ``pgworker.schedules``: a schedule as it was set, with its last tick and its next."""

    name: str
    cron: str
    timezone: str
    identifier: str
    payload: Any
    backfill: timedelta
    queue_name: str | None
    max_attempts: int | None
    job_key: str | None
    job_key_mode: str
    priority: int | None
    flags: list[str] | None
    paused: bool
    last_tick: datetime | None
    next_tick: datetime | None
    last_error: str | None
    from_crontab: bool
    created_at: datetime
    changed_at: datetime


#: Named one by one: a newer schema may append columns.
_COLUMNS = ", ".join(field.name for field in dataclasses.fields(ScheduleRow))


def _all(rows: list[tuple[Any, ...]]) -> list[ScheduleRow]:
    return [ScheduleRow(*row) for row in rows]


def _one(rows: list[tuple[Any, ...]]) -> ScheduleRow:
    return ScheduleRow(*rows[0])


def _if_any(rows: list[tuple[Any, ...]]) -> ScheduleRow | None:
    return _one(rows) if rows[0][0] is not None else None


@on_connection
def schedule_job(
    name: str,
    cron: str,
    identifier: str,
    payload: Mapping[str, Any] | None = None,
    **options: Unpack[ScheduleOptions],
) -> Request[ScheduleRow]:
    """Add a job at each tick of a cron expression from now on; a schedule of that name is changed.

    Args:
        name: how the schedule is changed and removed later, 1 to 128 characters.
        cron: ``minute hour date month weekday``, or ``@daily`` and the like.
        identifier: the task that is to handle the jobs.
        payload: a dict; each job gets it with ``_cron`` in it: ``{"ts": "2026-10-01T08:00:00Z", "backfilled": false}``.
        **options: ``timezone`` (``"Europe/Berlin"``; UTC if left out), ``backfill`` (how far back missed ticks are made
            up for), and `add_job`'s ``queue_name``, ``max_attempts``, ``job_key`` with ``job_key_mode``, ``priority``
            and ``flags``.
    """
    refuse_unknown("schedule_job", options, known=ScheduleOptions)
    return Request(
        f"select {_COLUMNS} from pgworker.schedule_job(%s::text, %s::text, %s::text, %s::jsonb, %s::text, %s::interval,"
        " %s::text, %s::int, %s::text, %s::text, %s::int, %s::text[])",
        (
            name,
            cron,
            identifier,
            None if payload is None else to_json(f"payload of schedule {name!r}", payload),
            options.get("timezone"),
            span("backfill", options.get("backfill")),
            options.get("queue_name"),
            options.get("max_attempts"),
            options.get("job_key"),
            options.get("job_key_mode"),
            options.get("priority"),
            flag_list(options.get("flags")),
        ),
        _one,
    )


@on_connection
def unschedule_job(name: str) -> Request[ScheduleRow | None]:
    """Remove a schedule and return it; None if there is none of that name. Jobs that it has added stay."""
    return Request(f"select {_COLUMNS} from pgworker.unschedule_job(%s::text)", (name,), _if_any)


@on_connection
def pause_schedule(name: str) -> Request[ScheduleRow]:
    """Let a schedule rest: its ticks are not run, nor made up for later."""
    return Request(f"select {_COLUMNS} from pgworker.pause_schedule(%s::text)", (name,), _one)


@on_connection
def resume_schedule(name: str) -> Request[ScheduleRow]:
    """A paused schedule goes on from now."""
    return Request(f"select {_COLUMNS} from pgworker.resume_schedule(%s::text)", (name,), _one)


@on_connection
def schedules() -> Request[list[ScheduleRow]]:
    """All schedules, by name."""
    return Request(f"select {_COLUMNS} from pgworker.schedules order by name", (), _all)


@on_connection
def load_crontab(crontab: str, prune: bool = False) -> Request[list[ScheduleRow]]:
    """Make the schedules of the text of a crontab, as Graphile Worker reads it, and return them in its order.

    ``prune`` removes those that an earlier call made and that are not in it any more.
    """
    return Request(f"select {_COLUMNS} from pgworker.load_crontab(%s::text, %s::boolean)", (crontab, prune), _all)


@on_connection
def cron_preview(
    cron: str, ticks: int | None = None, after: datetime | None = None, timezone: str | None = None
) -> Request[list[datetime]]:
    """The next ticks of a cron expression: ten after now in UTC, if nothing else is said."""
    return Request(
        "select pgworker.cron_preview(%s::text, %s::int, %s::timestamptz, %s::text)",
        (cron, ticks, aware("after", after), timezone),
        lambda rows: [tick for (tick,) in rows],
    )
