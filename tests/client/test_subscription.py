"""`subscribe` gives every change of a job's state, and says when it may have missed some."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import psycopg
import pytest

from pgworker_client import StateChange, Subscription, Worker, add_job, subscribe
from tests.events.witness import publish

Db = psycopg.Connection[Any]
TIMEOUT = 20

_LISTENS = """
select 1 from pg_stat_activity
where application_name = 'pgworker events' and query like 'listen%' and state = 'idle'"""


async def some(changes: Subscription, number: int) -> list[StateChange]:
    """The next changes."""
    async with asyncio.timeout(TIMEOUT):
        return [await anext(changes) for _ in range(number)]


def _terminate(db: Db) -> None:
    db.execute(
        "select pg_terminate_backend(pid, 20000) from pg_stat_activity where application_name = 'pgworker events'"
    )


async def test_it_is_told_of_a_job_from_its_first_to_its_last_state(dsn: str, db: Db) -> None:
    async def work(payload: Any, ctx: Any) -> None:
        pass

    publish(db)
    async with subscribe(dsn) as changes:
        job = await asyncio.to_thread(add_job, db, "t")
        assert await some(changes, 1) == [StateChange(job.id, "t", None, "ready")]
        await Worker(dsn, tasks={"t": work}).run_async(once=True)
        assert await some(changes, 2) == [
            StateChange(job.id, "t", "ready", "running"), StateChange(job.id, "t", "running", "completed"),
        ]  # fmt: skip
        await asyncio.to_thread(add_job, db, "t", job_key="k")
        db.execute("select pgworker.remove_job('k')")
        assert [change.after for change in await some(changes, 2)] == ["ready", None]
    with pytest.raises(StopAsyncIteration):
        await anext(changes)


async def test_many_at_once_come_in_order(dsn: str, db: Db) -> None:
    publish(db)
    async with subscribe(dsn) as changes:
        rows = db.execute("select (pgworker.add_job('t')).id from generate_series(1, 5000)").fetchall()
        assert [change.id for change in await some(changes, 5000)] == [id for (id,) in rows]


async def test_it_listens_from_the_first_step_where_there_is_no_block(dsn: str, db: Db) -> None:
    publish(db)
    changes = subscribe(dsn)
    first = asyncio.create_task(some(changes, 1))
    async with asyncio.timeout(TIMEOUT):
        while db.execute(_LISTENS).fetchone() is None:
            await asyncio.sleep(0.01)
    job = add_job(db, "t")
    assert await first == [StateChange(job.id, "t", None, "ready")]
    await changes.close()


@pytest.mark.parametrize("is_async", [True, False])
async def test_after_a_lost_connection_it_says_that_there_is_a_gap(
    dsn: str, db: Db, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    publish(db)
    gaps: list[Any] = []

    def gap() -> None:
        gaps.append(db.execute("select count(*) from pgworker.jobs").fetchone())
        add_job(db, "after")

    async def gap_async() -> None:
        gap()

    with caplog.at_level(logging.WARNING, "pgworker"):
        async with subscribe(dsn, on_gap=gap_async if is_async else gap) as changes:
            add_job(db, "before")
            assert [change.task for change in await some(changes, 1)] == ["before"]
            _terminate(db)
            add_job(db, "meanwhile")
            assert [change.task for change in await some(changes, 1)] == ["after"]
    assert gaps == [(2,)]
    assert "events connection lost" in caplog.text
    assert "the database works again" in caplog.text


async def test_a_gap_that_nobody_wants_to_know_of_is_passed_over(dsn: str, db: Db) -> None:
    publish(db)
    async with subscribe(dsn) as changes:
        waiting = asyncio.create_task(some(changes, 1))
        _terminate(db)
        async with asyncio.timeout(TIMEOUT):
            while db.execute(_LISTENS).fetchone() is None:
                await asyncio.sleep(0.01)
        job = add_job(db, "t")
        assert await waiting == [StateChange(job.id, "t", None, "ready")]


async def test_a_database_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(psycopg.OperationalError):
        async with subscribe("host=/nowhere"):
            pass
