"""Handlers: how they are called, what their context offers, what becomes of what they return."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgworker_client import BlockingContext, Cancel, Context, Fail, Job, JobLost, Worker, add_job, add_jobs
from pgworker_client.job import moment
from tests.calling import retry_in_an_hour
from tests.client.background import running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]


def result_of(db: Db, job_id: int) -> Any:
    row = db.execute("select state, result from pgworker.jobs where id = %s", [job_id]).fetchone()
    assert row is not None
    assert row[0] == "completed"
    return row[1]


def test_an_async_handler_gets_the_payload_and_its_result_is_kept(dsn: str, db: Db) -> None:
    worker = Worker(dsn)

    @worker.task
    async def double(payload: Any, _ctx: Context) -> Any:
        return {"twice": payload["n"] * 2}

    job = add_job(db, "double", {"n": 21})
    worker.run_once()
    assert result_of(db, job.id) == {"twice": 42}


def test_a_sync_handler_runs_in_a_thread_and_does_not_block_the_others(dsn: str, db: Db) -> None:
    worker = Worker(dsn, concurrency=2)
    met = threading.Barrier(2, timeout=20)
    names = set()

    @worker.task
    def meet(_payload: Any, _ctx: BlockingContext) -> str:
        met.wait()  # both run at the same time, or this fails
        names.add(threading.current_thread().name)
        return "met"

    jobs = add_jobs(db, [{"identifier": "meet"}, {"identifier": "meet"}])
    worker.run_once()
    assert [result_of(db, job.id) for job in jobs] == ["met", "met"]
    assert names == {"pgworker-handler"}


def test_a_sync_wrapper_around_an_async_handler_is_awaited(dsn: str, db: Db) -> None:
    async def work(payload: Any) -> Any:
        return payload + 1

    def wrapper(payload: Any, _ctx: Any) -> Any:
        return work(payload)

    job = add_job(db, "t", 1)
    Worker(dsn, tasks={"t": wrapper}).run_once()
    assert result_of(db, job.id) == 2


def test_concurrency_limits_how_many_handlers_run(dsn: str, db: Db) -> None:
    worker = Worker(dsn, concurrency=3)
    now, most = 0, 0

    @worker.task
    async def count(_payload: Any, _ctx: Context) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1

    add_jobs(db, [{"identifier": "count"}] * 12)
    worker.run_once()
    assert most == 3


def test_handlers_that_never_suspend_do_not_starve_those_that_do(dsn: str, db: Db) -> None:
    worker = Worker(dsn, concurrency=2)
    done: list[str] = []

    @worker.task
    async def patient(_payload: Any, _ctx: Context) -> None:
        await asyncio.sleep(0)
        done.append("patient")

    @worker.task
    async def greedy(_payload: Any, _ctx: Context) -> None:
        done.append("greedy")

    add_job(db, "patient")
    add_jobs(db, [{"identifier": "greedy"}] * 2000)
    worker.run_once()
    assert len(done) == 2001
    assert done.index("patient") < 1000


def test_ctx_job_is_the_claimed_job(dsn: str, db: Db) -> None:
    worker = Worker(dsn)
    seen: list[Job] = []

    @worker.task
    async def look(_payload: Any, ctx: Context) -> None:
        seen.append(ctx.job)

    added = add_job(
        db,
        "look",
        {"a": [1, None]},
        queue_name="q",
        max_attempts=3,
        job_key="k",
        priority=-5,
        flags=["x", 'quo"te'],
        run_at=datetime.fromisoformat("2020-02-29T12:34:56.789012+02:00"),
    )
    worker.run_once()
    (job,) = seen
    for name in ("id", "task_identifier", "payload", "queue_name", "priority", "run_at", "key", "flags", "created_at"):
        assert getattr(job, name) == getattr(added, name), name
    assert (job.attempts, job.max_attempts, job.progress, job.parent_id) == (1, 3, None, None)
    with pytest.raises(AttributeError):
        job.attempts = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("microseconds", "expected"),
    [
        (0, datetime(2000, 1, 1, tzinfo=UTC)),
        (-1, datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        (-(2**63), datetime.min.replace(tzinfo=UTC)),  # how PostgreSQL says -infinity
        (2**63 - 1, datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_a_time_that_python_cannot_hold_becomes_the_nearest_one(microseconds: int, expected: datetime) -> None:
    assert moment(microseconds.to_bytes(8, "big", signed=True)) == expected


def test_state_is_shared_by_all_handlers(dsn: str, db: Db) -> None:
    shared: dict[str, int] = {"seen": 0}

    async def one(_payload: Any, ctx: Context) -> None:
        ctx.state["seen"] += 1

    def other(_payload: Any, ctx: BlockingContext) -> None:
        ctx.state["seen"] += 10

    add_jobs(db, [{"identifier": "one"}, {"identifier": "other"}])
    Worker(dsn, tasks={"one": one, "other": other}, state=shared).run_once()
    assert shared == {"seen": 11}


async def _keep_async(_payload: Any, ctx: Context) -> Any:
    if ctx.job.attempts == 1:
        await ctx.progress({"page": 7})
        raise ValueError("on the way")
    return ctx.recover()


def _keep_sync(_payload: Any, ctx: BlockingContext) -> Any:
    if ctx.job.attempts == 1:
        ctx.progress({"page": 7})
        raise ValueError("on the way")
    return ctx.recover()


@pytest.mark.parametrize("handler", [_keep_async, _keep_sync])
def test_progress_is_seen_from_outside_and_recovered_by_the_next_attempt(dsn: str, db: Db, handler: Any) -> None:
    job = add_job(db, "keep")
    retry_in_an_hour(db, "keep")
    worker = Worker(dsn, tasks={"keep": handler})
    worker.run_once()
    assert db.execute("select state, progress from pgworker.jobs").fetchall() == [("scheduled", {"page": 7})]
    db.execute("select pgworker.reschedule_jobs(array[%s::bigint], now())", [job.id])
    worker.run_once()
    assert result_of(db, job.id) == {"page": 7}


def test_progress_that_is_not_json_is_an_error_in_the_handler(dsn: str, db: Db) -> None:
    worker = Worker(dsn)
    errors: list[str] = []

    @worker.task
    async def keep(_payload: Any, ctx: Context) -> None:
        for value in (float("nan"), {1, 2}, "\x00"):
            try:
                await ctx.progress(value)
            except (TypeError, ValueError, psycopg.DataError) as exc:
                errors.append(str(exc))

    add_job(db, "keep")
    worker.run_once()
    assert [error.split(" cannot")[0] for error in errors[:2]] == ["progress", "progress"]
    assert "Unicode" in errors[2]


async def _add_async(_payload: Any, ctx: Context) -> Any:
    return (await ctx.add_job("child", {"n": 1}, priority=3)).priority


def _add_sync(_payload: Any, ctx: BlockingContext) -> Any:
    return ctx.add_job("child", {"n": 1}, priority=3).priority


@pytest.mark.parametrize("handler", [_add_async, _add_sync])
def test_ctx_add_job_adds_a_job_at_once(dsn: str, db: Db, handler: Any) -> None:
    job = add_job(db, "parent")
    Worker(dsn, tasks={"parent": handler}).run_once()
    assert result_of(db, job.id) == 3
    row = db.execute("select state, payload from pgworker.jobs where task_identifier = 'child'").fetchone()
    assert row == ("ready", {"n": 1})


async def _write_async(payload: Any, ctx: Context) -> None:
    async with ctx.connection() as conn:
        await conn.execute("set statement_timeout = '7s'")
        await conn.execute("insert into effect values (%s)", [payload["n"]])
        if payload["n"] == 2:
            raise ValueError("roll it back")


def _write_sync(payload: Any, ctx: BlockingContext) -> None:
    with ctx.connection() as conn:
        conn.execute("set statement_timeout = '7s'")
        conn.execute("insert into effect values (%s)", [payload["n"]])
        if payload["n"] == 2:
            raise ValueError("roll it back")


@pytest.mark.parametrize("handler", [_write_async, _write_sync])
def test_ctx_connection_commits_at_the_end_and_rolls_back_on_an_error(dsn: str, db: Db, handler: Any) -> None:
    db.execute("create table effect (n int)")
    add_jobs(db, [{"identifier": "write", "payload": {"n": n}} for n in (1, 2, 3)])
    Worker(dsn, tasks={"write": handler}, concurrency=1).run_once()
    assert db.execute("select n from effect order by n").fetchall() == [(1,), (3,)]


def test_what_a_handler_sets_on_a_connection_does_not_reach_the_next(dsn: str, db: Db) -> None:
    seen: list[tuple[int, str]] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            cur = await conn.execute("select pg_backend_pid(), current_setting('statement_timeout')")
            seen.append(await cur.fetchone())  # type: ignore[arg-type]
            await conn.execute("set statement_timeout = '7s'")

    add_jobs(db, [{"identifier": "t"}] * 2)
    Worker(dsn, tasks={"t": handler}, concurrency=1).run_once()
    assert seen[0] == seen[1]  # the same session, as good as new
    assert seen[0][1] == "0"


async def _once_async(_payload: Any, ctx: Context) -> str:
    async with ctx.transaction(result={"written": True}) as conn:
        await conn.execute("insert into effect values (1)")
    return "ignored"


def _once_sync(_payload: Any, ctx: BlockingContext) -> str:
    with ctx.transaction(result={"written": True}) as conn:
        conn.execute("insert into effect values (1)")
    return "ignored"


@pytest.mark.parametrize("handler", [_once_async, _once_sync])
def test_ctx_transaction_completes_the_job_with_the_writes(
    dsn: str, db: Db, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("create table effect (n int)")
    job = add_job(db, "once")
    Worker(dsn, tasks={"once": handler}).run_once()
    assert result_of(db, job.id) == {"written": True}
    assert db.execute("select count(*) from effect").fetchone() == (1,)
    assert "lost" not in caplog.text  # nothing was reported a second time


async def _stolen_async(payload: Any, ctx: Context) -> None:
    async with ctx.transaction() as conn:
        await conn.execute("insert into effect values (1)")
        await asyncio.to_thread(payload["steal"] and _steal, ctx.state, ctx.job.id)


def _stolen_sync(_payload: Any, ctx: BlockingContext) -> None:
    with ctx.transaction() as conn:
        conn.execute("insert into effect values (1)")
        _steal(ctx.state, ctx.job.id)


def _steal(dsn: str, job_id: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            "update pgworker.job set locked_by = null, locked_at = null, run_at = 'tomorrow' where id = %s", [job_id]
        )


@pytest.mark.parametrize("handler", [_stolen_async, _stolen_sync])
def test_ctx_transaction_rolls_back_when_the_job_was_lost(
    dsn: str, db: Db, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("create table effect (n int)")
    add_job(db, "stolen", {"steal": True})
    Worker(dsn, tasks={"stolen": handler}, state=dsn).run_once()
    assert db.execute("select count(*) from effect").fetchone() == (0,)
    assert db.execute("select state, last_error from pgworker.jobs").fetchone() == ("scheduled", None)
    assert "the job was lost while it ran" in caplog.text


def test_progress_of_a_lost_job_raises_job_lost(dsn: str, db: Db) -> None:
    raised: list[BaseException] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        await asyncio.to_thread(_steal, dsn, ctx.job.id)
        try:
            await ctx.progress(1)
        except JobLost as exc:
            raised.append(exc)
            raise

    job = add_job(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()
    assert str(raised[0]) == f"job {job.id} is not held by this worker any more"


def test_a_job_that_raises_after_its_transaction_stays_completed(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_payload: Any, ctx: Context) -> None:
        async with ctx.transaction(result=1):
            pass
        raise ValueError("too late")

    job = add_job(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()
    assert result_of(db, job.id) == 1
    assert "raised after its transaction had completed the job" in caplog.text


async def _slow_async(_payload: Any, ctx: Context) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        ctx.state.append("ended")


def _slow_sync(_payload: Any, ctx: BlockingContext) -> None:
    assert ctx.cancelled.wait(20)
    ctx.state.append("ended")


@pytest.mark.parametrize("handler", [_slow_async, _slow_sync])
def test_a_handler_that_takes_too_long_is_stopped_and_its_job_failed(dsn: str, db: Db, handler: Any) -> None:
    ended: list[str] = []
    worker = Worker(dsn, state=ended, concurrency=1)
    worker.task("slow", timeout=0.1)(handler)
    worker.task("next")(_nothing)
    add_job(db, "slow")
    add_job(db, "next", priority=1)
    worker.run_once()
    assert db.execute("select task_identifier, last_error from pgworker.jobs").fetchall() == [
        ("slow", "timed out after 0.1 s")
    ]
    until(lambda: ended, "the handler ended")


async def _nothing(_payload: Any, _ctx: Any) -> None: ...


def test_a_thread_that_ignores_its_timeout_is_left_behind_and_cannot_touch_its_job(dsn: str, db: Db) -> None:
    go, outcome = threading.Event(), []

    def stubborn(_payload: Any, ctx: BlockingContext) -> None:
        go.wait(20)
        try:
            with ctx.transaction():
                pass
        except JobLost as exc:
            outcome.append(str(exc))

    worker = Worker(dsn, concurrency=1)
    worker.task(timeout=0.1)(stubborn)
    job = add_job(db, "stubborn", max_attempts=1)
    worker.run_once()
    assert db.execute("select state, last_error from pgworker.jobs").fetchone() == ("failed", "timed out after 0.1 s")
    go.set()
    until(lambda: outcome, "the thread came to its end")
    assert outcome == [f"job {job.id} was given up after its timeout"]


def test_a_timeout_error_of_the_handlers_own_is_an_error_like_any_other(dsn: str, db: Db) -> None:
    async def handler(_payload: Any, _ctx: Context) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(20)

    worker = Worker(dsn)
    worker.task("t", timeout=30)(handler)
    add_job(db, "t")
    worker.run_once()
    row = db.execute("select last_error from pgworker.jobs").fetchone()
    assert row is not None
    assert row[0].startswith("TimeoutError")


def test_a_cancelled_job_stops_its_async_handler_and_no_other(dsn: str, db: Db) -> None:
    worker, stopped, finished = Worker(dsn, concurrency=1), [], []

    @worker.task
    async def wait(payload: Any, ctx: Context) -> None:
        if payload:
            task = asyncio.current_task()
            finished.append((ctx.cancelled.is_set(), task.cancelling() if task else None))
            return
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(ctx.cancelled.is_set())

    job = add_job(db, "wait")
    add_job(db, "wait", {"quick": True}, priority=1)
    with running(worker):
        until_row(db, "select 1 from pgworker.jobs where state = 'running'")
        db.execute("select pgworker.cancel_jobs(array[%s::bigint], 'not wanted')", [job.id])
        until(lambda: finished, "the next job of the same runner ran")
    assert (stopped, finished) == ([True], [(False, 0)])  # no trace of the cancellation in the next job
    row = db.execute("select state, last_error from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == ("cancelled", "not wanted")


def test_a_cancelled_job_tells_its_sync_handler(dsn: str, db: Db) -> None:
    worker = Worker(dsn)

    @worker.task
    def wait(_payload: Any, ctx: BlockingContext) -> bool:
        return ctx.cancelled.wait(20)

    job = add_job(db, "wait")
    with running(worker):
        until_row(db, "select 1 from pgworker.jobs where state = 'running'")
        db.execute("select pgworker.cancel_jobs(array[%s::bigint])", [job.id])
        until_row(db, "select 1 from pgworker.jobs where state = 'cancelled'")


def test_a_partial_function_can_be_a_handler(dsn: str, db: Db) -> None:
    async def scale(factor: int, payload: Any, _ctx: Context) -> int:
        return factor * int(payload)

    job = add_job(db, "scale", 5)
    Worker(dsn, tasks={"scale": functools.partial(scale, 3)}).run_once()
    assert result_of(db, job.id) == 15


def test_a_role_that_may_work_and_nothing_else_is_enough(dsn: str, db: Db, role: Callable[..., str]) -> None:
    db.execute(f"select pgworker.grant_worker('{role('hand')}')")
    outcomes: dict[str, Any] = {"good": 1, "bad": ValueError("x"), "never": Fail("y"), "not": Cancel("z")}
    worker = Worker(make_conninfo(dsn, user="hand"))

    async def handler(payload: Any, ctx: Context) -> Any:
        await ctx.progress(payload)
        outcome = outcomes[payload]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    worker.task("t")(handler)
    add_jobs(db, [{"identifier": "t", "payload": name} for name in outcomes])
    retry_in_an_hour(db, "t")
    worker.run_once()
    rows = db.execute("select payload #>> '{}', state from pgworker.jobs").fetchall()
    assert dict(rows) == {"good": "completed", "bad": "scheduled", "never": "failed", "not": "cancelled"}
