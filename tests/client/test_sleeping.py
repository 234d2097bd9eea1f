"""Sleeping: woken by a notification, at the moment a job becomes due, or by the poll interval; never in vain."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, Retry, Worker, add_job
from pgworker_client.connection import Link
from tests.client.background import running
from tests.client.test_connections import echoing
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]

_ASLEEP = (
    "select 1 from pg_stat_activity where application_name like 'pgworker %%' and query like '%%next_run_at%%'"
    " and state = 'idle' and now() - state_change > '0.2 s'"
)


def test_a_sleeping_worker_is_woken_by_a_new_job(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, poll_interval=600)
    with running(worker):
        for n in range(3):
            until_row(db, _ASLEEP)
            add_job(db, "t", n)
            until(functools.partial(seen.__contains__, n), "the notified job")


def test_a_sleeping_worker_wakes_when_a_job_becomes_due(dsn: str, db: Db) -> None:
    worker, late = Worker(dsn, poll_interval=600), []

    @worker.task
    async def t(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            cur = await conn.execute("select extract(epoch from clock_timestamp() - %s)::float8", [ctx.job.run_at])
            late.append((await cur.fetchone())[0])  # type: ignore[index]

    for delay in (0.7, 1.2, 1.7):
        db.execute("select pgworker.add_job('t', run_at := clock_timestamp() + %s * interval '1 s')", [delay])
    with running(worker):
        until(lambda: len(late) == 3, "the delayed jobs")
    assert min(late) >= 0
    assert sorted(late)[1] < 0.5  # of the median: the machine may be busy


def test_a_job_of_an_unknown_task_does_not_keep_the_worker_awake(dsn: str, db: Db) -> None:
    worker, _ = echoing(dsn, poll_interval=600)
    add_job(db, "somebody else's")
    with running(worker):
        until_row(db, _ASLEEP)


def test_a_short_retry_is_not_slept_through(dsn: str, db: Db) -> None:
    worker, times = Worker(dsn, poll_interval=600), []

    @worker.task
    async def t(_payload: Any, ctx: Context) -> None:
        times.append(time.monotonic())
        if ctx.job.attempts == 1:
            raise Retry(in_=0.5)

    with running(worker):
        until_row(db, _ASLEEP)
        add_job(db, "t")
        until(lambda: len(times) == 2, "the second attempt")
    assert times[1] - times[0] >= 0.5


def test_polling_alone_is_enough(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, poll_interval=0.05)
    with running(worker):
        until_row(db, _ASLEEP.replace("> '0.2 s'", "> '0 s'"))
        # A replica's replay, a pooler, a session that notifies nobody: the job is simply there.
        db.execute(
            "insert into pgworker.job (run_at, created_at, task_identifier, payload) values (now(), now(), 't', '7')"
        )
        until(lambda: seen == [7], "the job found by polling")


def test_jobs_of_one_queue_follow_each_other_without_waiting_for_the_poll(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, poll_interval=600)
    for n in range(20):
        add_job(db, "t", n, queue_name="q")
    with running(worker):
        until(lambda: len(seen) == 20, "the queue is worked off")
    assert seen == list(range(20))


def test_an_idle_worker_asks_about_once_a_second(dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, asked = Link.fetch, list[str]()

    async def counting(self: Link, query: str, params: Any = (), **options: Any) -> Any:
        asked.append(self.part)
        return await fetch(self, query, params, **options)

    worker, _ = echoing(dsn, poll_interval=1.0)
    with running(worker):
        until_row(db, _ASLEEP)
        monkeypatch.setattr(Link, "fetch", counting)
        began = time.monotonic()
        until(lambda: asked.count("presence") >= 6, "three rounds")
        rounds = time.monotonic() - began
    assert asked.count("claim") <= 2 * (rounds + 2)  # a claim and the question when the next job is due
    assert asked.count("presence") <= 2 * (rounds + 2)
    assert asked.count("finish") == 0


def test_run_once_does_what_is_due_and_what_that_makes_due(dsn: str, db: Db) -> None:
    worker, seen = Worker(dsn), []

    @worker.task
    async def chain(payload: Any, ctx: Context) -> None:
        await asyncio.sleep(0.01)
        seen.append(payload["n"])
        if payload["n"] < 5:
            await ctx.add_job("chain", {"n": payload["n"] + 1})

    add_job(db, "chain", {"n": 0})
    db.execute("select pgworker.add_job('chain', '{\"n\": 99}', run_at := now() + interval '1 hour')")
    worker.run_once()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert db.execute("select state, payload from pgworker.jobs").fetchall() == [("scheduled", {"n": 99})]


def test_run_once_with_nothing_to_do_returns(dsn: str, db: Db) -> None:
    worker, _ = echoing(dsn, poll_interval=600)
    worker.run_once()
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)


def test_a_worker_can_be_run_again(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn)
    for n in range(3):
        add_job(db, "t", n)
        worker.run_once()
    assert seen == [0, 1, 2]
