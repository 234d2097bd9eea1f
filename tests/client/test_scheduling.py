"""Schedules from Python and from the command line, and workers that run them in time."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg.rows import dict_row

from pgworker_client import (
    Context,
    ScheduleRow,
    Worker,
    add_job,
    cron_preview,
    load_crontab,
    pause_schedule,
    resume_schedule,
    schedule_job,
    schedules,
    unschedule_job,
)
from tests.client.background import running
from tests.client.command import Spawn, ended
from tests.clock import move_clock
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
AsyncDb = psycopg.AsyncConnection[Any]


@pytest.fixture
async def adb(dsn: str) -> AsyncIterator[AsyncDb]:
    conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
    yield conn
    await conn.close()


schedule_anything = cast("Callable[..., ScheduleRow]", schedule_job)  # for what the type checker would not let pass


def test_a_schedule_comes_back_as_the_view_shows_it(db: Db) -> None:
    made = schedule_job(
        db,
        "report",
        "0 8 * * mon-fri",
        "make_report",
        {"pages": [1, None]},
        timezone="Europe/Berlin",
        backfill=timedelta(hours=3),
        queue_name="q",
        max_attempts=3,
        job_key="k",
        job_key_mode="unsafe_dedupe",
        priority=-7,
        flags=("a", "b"),
    )
    row = db.execute("select * from pgworker.schedules").fetchone()
    assert row is not None
    assert dataclasses.astuple(made) == tuple(row[: len(dataclasses.fields(ScheduleRow))])
    assert (made.timezone, made.backfill, made.flags) == ("Europe/Berlin", timedelta(hours=3), ["a", "b"])
    assert (made.payload, made.paused, made.last_tick) == ({"pages": [1, None]}, False, None)


def test_what_is_left_out_is_the_databases_default(db: Db) -> None:
    made = schedule_job(db, "s", "@daily", "t")
    assert (made.payload, made.timezone, made.backfill, made.job_key_mode) == ({}, "UTC", timedelta(0), "replace")


def test_every_function_on_a_sync_connection(dsn: str) -> None:
    with psycopg.connect(dsn, row_factory=dict_row) as conn, conn.cursor() as cur:
        schedule_job(cur, "s", "@daily", "t")
        assert pause_schedule(conn, "s").paused
        assert [one.next_tick for one in schedules(conn)] == [None]
        assert not resume_schedule(cur, "s").paused
        gone = unschedule_job(conn, "s")
        assert gone is not None
        assert gone.name == "s"
        assert unschedule_job(conn, "s") is None
        made = load_crontab(conn, "0 4 * * * a\n0 4 * * * b ?id=c")
        assert [(one.name, one.identifier, one.from_crontab) for one in made] == [("a", "a", True), ("c", "b", True)]
        assert load_crontab(conn, "", prune=True) == schedules(conn) == []
        after = datetime(2026, 3, 28, 12, tzinfo=UTC)
        assert cron_preview(conn, "30 2 * * *", 2, after, "Europe/Berlin") == [
            datetime(2026, 3, 29, 1, tzinfo=UTC),
            datetime(2026, 3, 30, 0, 30, tzinfo=UTC),
        ]
        assert len(cron_preview(conn, "@daily")) == 10


async def test_an_async_connection_gives_awaitables(adb: AsyncDb) -> None:
    assert (await schedule_job(adb, "s", "@daily", "t")).name == "s"
    assert (await pause_schedule(adb, "s")).paused
    assert len(await load_crontab(adb, "0 4 * * * a")) == 1
    assert [one.name for one in await schedules(adb)] == ["a", "s"]
    assert await unschedule_job(adb, "x") is None


def test_mistakes_that_python_sees_and_those_of_the_database(db: Db) -> None:
    with pytest.raises(TypeError, match="schedule_job has no argument 'run_at'; it takes timezone, backfill"):
        schedule_anything(db, "s", "@daily", "t", run_at=None)
    with pytest.raises(TypeError, match="flags must be a list"):
        schedule_anything(db, "s", "@daily", "t", flags="slow")
    with pytest.raises(TypeError, match="payload of schedule 's' cannot be written as JSON"):
        schedule_job(db, "s", "@daily", "t", {"x": object()})
    with pytest.raises(TypeError, match="backfill must be a timedelta, not 3600"):
        schedule_anything(db, "s", "@daily", "t", backfill=3600)
    with pytest.raises(ValueError, match="after must be an aware datetime"):
        cron_preview(db, "@daily", after=datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="payload must be an object, got array"):
        schedule_anything(db, "s", "@daily", "t", [1])
    assert schedules(db) == []


def test_a_tick_wakes_the_worker_that_sleeps_until_its_next_poll(dsn: str, db: Db) -> None:
    worker, seen = Worker(dsn, poll_interval=600), []

    @worker.task
    async def t(payload: Any, _ctx: Context) -> None:
        seen.append(payload["_cron"])

    schedule_job(db, "s", "* * * * *", "t")
    tick = schedules(db)[0].next_tick
    assert tick is not None
    with running(worker):
        until_row(
            db,
            "select 1 from pg_stat_activity where application_name like 'pgworker %%' and query like '%%next_run_at%%'"
            " and state = 'idle'",
        )
        # As if it were a minute later: the schedule is as old as that now, and its tick is due.
        db.execute(
            "update pgworker.schedule set next_tick = next_tick - interval '1 minute',"
            " due_at = due_at - interval '1 minute'"
        )
        until(lambda: len(seen) == 1, "the job of the tick")
    expected = (tick - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert seen == [{"ts": expected, "backfilled": False}]


def test_a_worker_under_a_moved_clock_does_today_what_is_due_in_three_days(dsn: str, db: Db) -> None:
    move_clock(db, "")
    later = datetime.now(UTC) + timedelta(days=3)
    job = add_job(db, "t", run_at=later)
    seen: list[int] = []

    async def t(_payload: Any, ctx: Context) -> None:
        seen.append(ctx.job.id)

    Worker(dsn, tasks={"t": t}).run_once()
    assert seen == []
    Worker(f"{dsn} options='-c pgworker.fake_now={later.isoformat()}'", tasks={"t": t}).run_once()
    assert seen == [job.id]


def test_the_crontab_command(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    (tmp_path / "crontab").write_text('0 4 * * * cleanup ?fill=1d {"all": true}\n* * * * * ping\n')
    status, out, err = ended(spawn("crontab", "crontab"))
    assert (status, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == ["cleanup", "ping"]
    assert [(one.name, one.payload) for one in schedules(db)] == [("cleanup", {"all": True}), ("ping", {})]
    assert str(schedules(db)[0].next_tick) in out

    pause_schedule(db, "ping")
    (tmp_path / "crontab").write_text("* * * * * ping\n")
    assert ended(spawn("crontab", "crontab")) == (0, "ping  paused\n", "")
    assert len(schedules(db)) == 2
    assert ended(spawn("crontab", "--prune", "crontab")) == (0, "ping  paused\n", "")
    assert [one.name for one in schedules(db)] == ["ping"]

    (tmp_path / "crontab").write_text("* * * * * ping\n60 * * * * pong\n")
    status, out, err = ended(spawn("crontab", "--prune", "crontab"))
    assert (status, out) == (1, "")
    assert err.startswith("pgworker: crontab line 2: cron '60 * * * *': minute must be 0 to 59, got '60' (")
    assert len(err.splitlines()) == 1
    status, _, err = ended(spawn("crontab", "missing"))
    assert status == 2
    assert "missing" in err
