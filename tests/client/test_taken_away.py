"""Jobs that an administrator takes away from a live worker, who may well claim them again itself."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg

from pgworker_client import Context, Worker, add_job
from tests.client.background import running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]


def test_a_job_that_its_own_worker_claims_again_ends(dsn: str, db: Db) -> None:
    runs: list[int] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        runs.append(ctx.job.attempts)
        if ctx.job.attempts == 1:
            await asyncio.sleep(60)

    add_job(db, "t")
    with running(Worker(dsn, tasks={"t": handler}, poll_interval=0.1)):
        until(lambda: runs == [1], "the first attempt runs")
        db.execute("select count(*) from pgworker.force_unlock_workers(array(select id from pgworker.worker))")
        until(lambda: db.execute("select from pgworker.jobs").fetchone() is None, "the job has ended")
    assert len(runs) >= 2


def test_the_run_of_a_job_that_its_own_worker_claims_again_is_stopped(dsn: str, db: Db) -> None:
    stopped = asyncio.Event()

    async def handler(_payload: Any, ctx: Context) -> None:
        if ctx.job.attempts > 1:  # by now the job is this worker's again, and no heartbeat says that it was lost
            await stopped.wait()
            return
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    add_job(db, "t")
    with running(Worker(dsn, tasks={"t": handler}, poll_interval=0.1)):
        until_row(db, "select 1 from pgworker.jobs where state = 'running'")
        # In one transaction, so that the worker claims it again before a heartbeat can say anything else.
        db.execute("select count(*) from pgworker.force_unlock_workers(array(select id from pgworker.worker))")
        until(lambda: db.execute("select from pgworker.jobs").fetchone() is None, "the job has ended")
