"""Stopping: what runs may end, what was not started goes back with its attempt, and nobody is waited for for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Context, Worker, add_job, add_jobs
from tests.client.background import Background, stop
from tests.connections import Connections
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
Start = Callable[[Worker], Background]


def states(db: Db) -> Any:
    """State and attempts of all jobs, by id."""
    return db.execute("select state, attempts from pgworker.jobs order by id").fetchall()


def test_the_first_stop_lets_running_jobs_end_and_gives_the_others_back(dsn: str, db: Db, start: Start) -> None:
    worker = Worker(dsn, concurrency=1, buffer=100)
    first, go = threading.Event(), threading.Event()

    @worker.task
    def t(payload: Any, _ctx: BlockingContext) -> Any:
        if payload == 40:
            first.set()
            assert go.wait(20)
        return payload

    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(100)])
    background = start(worker)
    assert first.wait(20)  # forty quick ones before it: by then some are claimed ahead
    claimed = db.execute("select count(*) from pgworker.job where locked_by is not null").fetchone()
    worker.stop()
    until_row(db, "select 1 where (select count(*) from pgworker.job where locked_by is not null) = 1")
    assert not background.ended
    go.set()
    background.join()
    assert claimed is not None
    assert claimed[0] > 1  # else this shows nothing
    assert states(db) == [("completed", 1)] * 41 + [("ready", 0)] * 59


def test_after_a_stop_nothing_is_claimed(dsn: str, db: Db, start: Start) -> None:
    worker = Worker(dsn)
    running, go = threading.Event(), threading.Event()

    @worker.task
    def t(_payload: Any, _ctx: BlockingContext) -> int:
        running.set()
        assert go.wait(20)
        return 1

    add_job(db, "t")
    background = start(worker)
    assert running.wait(20)
    stop(worker)
    add_job(db, "t")
    go.set()
    background.join()
    assert states(db) == [("completed", 1), ("ready", 0)]


def test_the_second_stop_cancels_what_runs_and_gives_it_back_with_its_attempt(dsn: str, db: Db, start: Start) -> None:
    worker, begun, ended = Worker(dsn), [], []

    @worker.task
    async def patient(_payload: Any, ctx: Context) -> None:
        begun.append("patient")
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(ctx.cancelled.is_set())

    @worker.task
    def attentive(_payload: Any, ctx: BlockingContext) -> str:
        begun.append("attentive")
        ended.append(ctx.cancelled.wait(20))
        return "cut short"

    add_job(db, "patient")
    add_job(db, "attentive")
    background = start(worker)
    until(lambda: len(begun) == 2, "both run")
    stop(worker)
    assert not ended
    worker.stop()
    background.join()
    assert ended == [True, True]
    # The thread that returned because it was told to is not taken for one that had done its work.
    assert states(db) == [("ready", 0), ("ready", 0)]


def test_the_grace_time_does_what_a_second_stop_does(dsn: str, db: Db, start: Start) -> None:
    worker, begun = Worker(dsn, grace=0.1), threading.Event()

    @worker.task
    async def t(_payload: Any, _ctx: Context) -> None:
        begun.set()
        await asyncio.sleep(600)

    add_job(db, "t")
    background = start(worker)
    assert begun.wait(20)
    worker.stop()
    background.join()
    assert states(db) == [("ready", 0)]


def test_handlers_that_ignore_everything_are_left_behind(
    dsn: str, db: Db, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgworker_client.engine._LAST_WAIT", 0.2)
    worker, begun, go = Worker(dsn, grace=0.1), [], threading.Event()

    @worker.task
    def deaf(_payload: Any, _ctx: BlockingContext) -> None:
        begun.append("deaf")
        go.wait(60)

    @worker.task
    async def stubborn(_payload: Any, _ctx: Context) -> None:
        begun.append("stubborn")
        while not go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    add_job(db, "deaf")
    stubborn_job = add_job(db, "stubborn")
    background = start(worker)
    until(lambda: len(begun) == 2, "both run")
    began = time.monotonic()
    worker.stop()
    background.join()
    assert time.monotonic() - began < 15
    go.set()
    assert states(db) == [("ready", 0), ("ready", 0)]
    assert "its thread is left behind" in caplog.text
    assert f"job {stubborn_job.id} ignored its cancellation; it is left behind" in caplog.text


def test_a_stop_while_connecting_is_heard(dsn: str, db: Db, start: Start, connect: Connections) -> None:
    blocker = connect()
    with blocker.transaction():
        blocker.execute("lock table pgworker.worker")  # it cannot register
        background = start(Worker(dsn, tasks={"t": print}))
        until_row(
            db, "select 1 from pg_stat_activity where query like '%%register_worker%%' and wait_event_type = 'Lock'"
        )
        background.worker.stop()
        background.join()
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)


def test_jobs_that_wait_here_too_long_go_back_to_other_workers(dsn: str, db: Db, start: Start) -> None:
    slow, other = Worker(dsn, concurrency=1, buffer=100), Worker(dsn, concurrency=1)
    stuck, go, helped = threading.Event(), threading.Event(), []

    @slow.task("t")
    def quick_then_stuck(payload: Any, _ctx: BlockingContext) -> None:
        if payload == 40:
            stuck.set()
            assert go.wait(30)

    @other.task("t")
    async def helping(payload: Any, _ctx: Context) -> None:
        helped.append(payload)

    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(100)])
    one = start(slow)
    assert stuck.wait(20)
    two = start(other)
    until(lambda: len(helped) == 59, "the other worker does all the rest")
    go.set()
    for background in (one, two):
        background.worker.stop()
        background.join()
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


def test_long_jobs_are_not_claimed_ahead(dsn: str, db: Db, start: Start) -> None:
    worker, go = Worker(dsn, concurrency=2), threading.Event()

    @worker.task
    def t(_payload: Any, _ctx: BlockingContext) -> None:
        go.wait(30)

    add_jobs(db, [{"identifier": "t"}] * 10)
    background = start(worker)
    until_row(db, "select 1 where (select count(*) from pgworker.job where locked_by is not null) >= 2")
    until_row(db, "select 1 from pg_stat_activity where query like '%%heartbeat%%' and state = 'idle'")
    assert db.execute("select count(*) from pgworker.job where locked_by is not null").fetchone() == (2,)
    go.set()
    worker.stop()
    background.join()


async def test_run_async_works_inside_a_loop_and_its_cancellation_is_an_orderly_stop(dsn: str, db: Db) -> None:
    worker, started = Worker(dsn), asyncio.Event()

    @worker.task
    async def t(_payload: Any, _ctx: Context) -> None:
        started.set()
        await asyncio.sleep(600)

    add_job(db, "t")
    task = asyncio.create_task(worker.run_async())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert states(db) == [("ready", 0)]
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)


async def test_a_worker_that_runs_cannot_be_run_twice(dsn: str, db: Db) -> None:
    worker = Worker(dsn, tasks={"t": print})
    task = asyncio.create_task(worker.run_async())
    await asyncio.to_thread(until_row, db, "select 1 from pgworker.worker")
    with pytest.raises(RuntimeError, match="this worker is running already"):
        await worker.run_async()
    worker.stop()
    await task
