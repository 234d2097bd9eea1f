"""Adding and steering jobs with the caller's own connection: its transaction, its settings, sync or async."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import psycopg
import pytest
from psycopg.rows import dict_row

import pgworker_client
from pgworker_client import (
    JobOptions,
    JobRow,
    add_job,
    add_jobs,
    allow_flag,
    cancel_jobs,
    complete_jobs,
    configure,
    forbid_flag,
    permanently_fail_jobs,
    remove_job,
    reschedule_jobs,
    retry_jobs,
)

Db = psycopg.Connection[Any]
AsyncDb = psycopg.AsyncConnection[Any]


@pytest.fixture
async def adb(dsn: str) -> AsyncIterator[AsyncDb]:
    """An async connection in its usual mode: not autocommit."""
    conn = await psycopg.AsyncConnection.connect(dsn)
    yield conn
    await conn.close()


add_anything = cast("Callable[..., JobRow]", add_job)  # for what the type checker would not let pass


def count(db: Db) -> int:
    row = db.execute("select count(*) from pgworker.jobs").fetchone()
    assert row is not None
    return int(row[0])


def test_a_job_comes_back_as_the_view_shows_it(db: Db) -> None:
    job = add_job(
        db,
        "send",
        {"to": ["ä", None, 1.5]},
        queue_name="q",
        run_at=datetime(2100, 1, 1, tzinfo=timezone(timedelta(hours=2))),
        max_attempts=3,
        job_key="k",
        priority=-7,
        flags=["a", "b c"],
        job_key_mode="preserve_run_at",
    )
    row = db.execute("select * from pgworker.jobs").fetchone()
    assert row is not None
    assert dataclasses.astuple(job) == tuple(row[: len(dataclasses.fields(JobRow))])
    assert (job.state, job.payload, job.run_at) == (
        "scheduled",
        {"to": ["ä", None, 1.5]},
        datetime(2099, 12, 31, 22, tzinfo=UTC),
    )


def test_every_column_of_the_view_is_a_field(db: Db) -> None:
    cur = db.execute("select * from pgworker.jobs limit 0")
    assert cur.description is not None
    fields = [field.name for field in dataclasses.fields(JobRow)]
    assert [column.name for column in cur.description][: len(fields)] == fields


def test_arguments_left_out_are_the_databases_defaults(db: Db) -> None:
    job = add_job(db, "t")
    assert (job.payload, job.priority, job.max_attempts, job.state) == ({}, 0, 25, "ready")


def test_the_job_vanishes_with_the_callers_rollback(dsn: str, db: Db) -> None:
    with psycopg.connect(dsn) as conn:
        add_job(conn, "t")
        add_jobs(conn, [{"identifier": "t"}])
        conn.rollback()
    assert count(db) == 0


def test_nothing_is_committed_for_the_caller(dsn: str, db: Db) -> None:
    with psycopg.connect(dsn) as conn:
        add_job(conn, "t")
        assert count(db) == 0
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        conn.commit()
    assert count(db) == 1


def test_the_callers_cursor_and_row_factory_are_left_alone(dsn: str) -> None:
    with psycopg.connect(dsn, row_factory=dict_row) as conn, conn.cursor() as cur:
        cur.execute("select generate_series(1, 3) as n")
        assert cur.fetchone() == {"n": 1}
        assert isinstance(add_job(cur, "t"), JobRow)  # joins the cursor's transaction …
        assert cur.fetchall() == [{"n": 2}, {"n": 3}]  # … and leaves its rows where they were
        assert isinstance(add_job(conn, "t"), JobRow)


def test_a_connection_with_raw_or_client_side_cursors_will_do(dsn: str, db: Db) -> None:
    for factory in (psycopg.RawCursor, psycopg.ClientCursor):
        with psycopg.connect(dsn, cursor_factory=factory) as conn:
            assert add_job(conn, "t", {"percent": "100%"}).payload == {"percent": "100%"}
    assert count(db) == 2


async def test_an_async_connection_gives_an_awaitable(adb: AsyncDb, db: Db) -> None:
    job = await add_job(adb, "t", [1])
    assert (job.payload, count(db)) == ([1], 0)
    await adb.commit()
    async with adb.cursor() as cur:
        jobs = await add_jobs(cur, [{"identifier": "t"}, {"identifier": "t"}])
        assert jobs[0].id < jobs[1].id
    await adb.rollback()
    assert count(db) == 1
    assert await remove_job(adb, "no such key") is None
    assert [one.state for one in await complete_jobs(adb, [job.id])] == ["completed"]


def test_many_jobs_are_added_in_order(db: Db) -> None:
    moment = datetime(2100, 1, 1, tzinfo=UTC)
    jobs = add_jobs(
        db,
        [
            {"identifier": "a", "payload": {"n": 1}, "flags": ("x",)},
            {"identifier": "b", "run_at": moment, "priority": 5, "run_at": moment},  # noqa: F601
            {"identifier": "a", "payload": None, "job_key": "k"},
        ],
    )
    assert [job.task_identifier for job in jobs] == ["a", "b", "a"]
    assert [job.run_at == moment for job in jobs] == [False, True, False]
    assert (jobs[0].flags, jobs[2].payload, jobs[2].key) == (["x"], {}, "k")
    assert add_jobs(db, iter([])) == []


def test_an_unknown_key_of_a_spec_is_refused_by_name(db: Db) -> None:
    with pytest.raises(psycopg.DataError, match="runAt") as refused:
        add_jobs(db, [{"identifier": "t", "runAt": 1}])
    assert refused.value.sqlstate == "22023"
    assert count(db) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda db: add_job(db, "t", float("nan")), "payload of job 't' cannot be written as JSON"),
        (lambda db: add_job(db, "t", {1, 2}), "payload of job 't' cannot be written as JSON: .*set"),
        (lambda db: add_job(db, "t", run_at=datetime(2100, 1, 1)), "run_at must be an aware datetime"),  # noqa: DTZ001
        (lambda db: add_anything(db, "t", run_at="2100-01-01"), "run_at must be a datetime, not '2100-01-01'"),
        (lambda db: add_job(db, "t", flags="abc"), "flags must be a list of flags, not the text 'abc'"),
        (lambda db: add_anything(db, "t", queue="q"), "add_job has no argument 'queue'; it takes queue_name, run_at"),
        (lambda db: add_jobs(db, [{"identifier": "t", "run_at": datetime(2100, 1, 1)}]), "run_at must be"),  # noqa: DTZ001
        (lambda db: add_jobs(db, [{"identifier": "t", "payload": object()}]), "specs cannot be written as JSON"),
        (lambda _: add_anything("dbname=x", "t"), "conn must be a psycopg connection or cursor, not 'dbname=x'"),
        (lambda db: reschedule_jobs(db, [1], datetime(2100, 1, 1)), "run_at must be an aware datetime"),  # noqa: DTZ001
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(db: Db, call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(db)
    assert count(db) == 0


def test_a_limit_of_the_database_is_the_databases_error(db: Db) -> None:
    with pytest.raises(psycopg.DataError) as refused:
        add_job(db, "t", priority=40_000)
    assert refused.value.sqlstate == "22023"


def test_removing_a_job_by_its_key(db: Db) -> None:
    job = add_job(db, "t", job_key="k")
    removed = remove_job(db, "k")
    assert removed is not None
    assert removed.id == job.id
    assert remove_job(db, "k") is None
    assert count(db) == 0


def test_steering_jobs_returns_those_that_changed(db: Db) -> None:
    one, two = add_jobs(db, [{"identifier": "t"}] * 2)
    ids = [one.id, two.id, 10**15]
    later = datetime(2100, 1, 1, tzinfo=UTC)
    assert [job.run_at for job in reschedule_jobs(db, ids, run_at=later, priority=3)] == [later] * 2
    assert [job.last_error for job in permanently_fail_jobs(db, [one.id], "by hand")] == ["by hand"]
    assert [job.state for job in cancel_jobs(db, [two.id], reason="obsolete")] == ["cancelled"]
    assert {job.state for job in retry_jobs(db, ids)} <= {"ready", "scheduled"}
    assert [job.state for job in complete_jobs(db, ids)] == ["completed"] * 2


def test_windows_are_timedeltas_alone_in_specs_and_in_any_dict(db: Db) -> None:
    hour, wide = timedelta(hours=1), timedelta(days=-1, microseconds=-5) * -3
    first = add_job(db, "t", job_key="k", unique_for=wide, limit_key="ada")
    assert (first.unique_until, first.limit_key) == (first.created_at + wide, "ada")
    (again,) = add_jobs(db, [{"identifier": "u", "job_key": "k", "unique_for": hour}])
    assert again == first
    later = datetime(2100, 1, 1, tzinfo=UTC)
    bounded: JobOptions = {"run_at": later, "job_key_mode": "debounce", "debounce_max": hour}
    for job in (add_job(db, "t", **bounded), *add_jobs(db, [{"identifier": "t", **bounded}])):
        assert job.run_at == job.created_at + hour
    with pytest.raises(TypeError, match="unique_for must be a timedelta, not 3600"):
        add_job(db, "t", unique_for=3600)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"specs\[0\].debounce_max must be a timedelta, not '1 hour'"):
        add_jobs(db, [{"identifier": "t", "debounce_max": "1 hour"}])


def test_flags_and_settings_are_changed_from_python_too(db: Db) -> None:
    forbid_flag(db, "slow")
    configure(db, "keep_failed", "1 week")
    assert db.execute("select name from pgworker.forbidden_flags").fetchall() == [("slow",)]
    assert db.execute("select value from pgworker.settings where name = 'keep_failed'").fetchone() == ("1 week",)
    allow_flag(db, "slow")
    configure(db, "keep_failed", None)
    assert db.execute("select count(*) from pgworker.forbidden_flags").fetchone() == (0,)
    assert db.execute("select value from pgworker.settings where name = 'keep_failed'").fetchone() == ("30 days",)


@pytest.mark.parametrize("name", ["add_job", "add_jobs", "remove_job", "cancel_jobs", "retry_jobs"])
def test_the_signature_shows_the_connection_and_the_docstring_says_what_it_does(name: str) -> None:
    function = getattr(pgworker_client, name)
    assert next(iter(inspect.signature(function).parameters)) == "conn"
    assert function.__doc__
