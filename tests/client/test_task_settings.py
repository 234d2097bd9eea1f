"""Settings of tasks from Python, and the timeout that comes with a claim."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from pgworker_client import TaskRow, Worker, configure_task
from tests.calling import Conn, add, call, row, seen

EVERYTHING: dict[str, Any] = {
    "max_attempts": 3,
    "backoff": {"kind": "constant", "base": "00:00:01"},
    "timeout": timedelta(seconds=5),
    "max_concurrency": 4,
    "max_concurrency_per_key": 2,
    "rate_limit": 10,
    "rate_interval": timedelta(seconds=1),
    "rate_limit_per_key": 5,
    "rate_interval_per_key": timedelta(minutes=1),
    "fair": True,
    "keep_completed": timedelta(days=1),
    "keep_failed": timedelta(days=7),
    "paused": True,
}


def test_every_setting_can_be_made_and_reset(db: Conn) -> None:
    made = configure_task(db, "a", **EVERYTHING)
    assert made == TaskRow(identifier="a", **EVERYTHING)
    assert configure_task(db, "a") == made
    after = configure_task(db, "a", max_attempts=5, reset=["backoff", "paused"])
    assert (after.max_attempts, after.backoff, after.paused, after.fair) == (5, None, False, True)
    assert configure_task(db, "a", backoff=["1 second", 60]).backoff == {
        "kind": "list", "delays": ["00:00:01", "00:01:00"],
    }  # fmt: skip


async def _configured(dsn: str) -> TaskRow:
    conn = await psycopg.AsyncConnection.connect(dsn)
    async with conn, conn.cursor() as cursor:
        return await configure_task(cursor, "a", max_concurrency=2)


def test_it_works_on_an_async_cursor_and_in_the_callers_transaction(db: Conn, dsn: str) -> None:
    assert asyncio.run(_configured(dsn)).max_concurrency == 2
    with db.transaction(force_rollback=True):
        configure_task(db, "a", max_concurrency=9)
    assert row(db, "select max_concurrency from pgworker.tasks") == {"max_concurrency": 2}


def test_bad_settings_are_refused(db: Conn) -> None:
    misspelt: Any = {"concurrency": 3}
    with pytest.raises(TypeError, match="no setting 'concurrency'"):
        configure_task(db, "a", **misspelt)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="max_concurrency"):
        configure_task(db, "a", max_concurrency=0)
    wrong: Any
    for wrong in ({"rate_interval": 60}, {"timeout": 1.5}, {"keep_failed": "soon"}):
        with pytest.raises(TypeError, match=f"{min(wrong)} must be a timedelta"):
            configure_task(db, "a", **wrong)
    with pytest.raises(TypeError, match="backoff of task 'a' cannot be written as JSON"):
        configure_task(db, "a", backoff={"kind": "constant", "base": timedelta(seconds=1)})


def test_one_setting_to_reset_need_not_be_in_a_list(db: Conn) -> None:
    configure_task(db, "a", max_attempts=3, max_concurrency=2)
    assert configure_task(db, "a", reset="max_attempts").max_attempts is None
    assert configure_task(db, "a", reset="all").max_concurrency is None


@pytest.mark.parametrize("kind", ["async", "thread"])
def test_a_handler_is_stopped_after_the_timeout_that_the_database_says(db: Conn, dsn: str, kind: str) -> None:
    configure_task(db, "slow", timeout=timedelta(milliseconds=50), max_attempts=1)
    job = add(db, "slow")["id"]
    worker = Worker(dsn, concurrency=1)
    if kind == "async":

        @worker.task("slow")
        async def wait(payload: Any, ctx: Any) -> None:
            await asyncio.sleep(60)
    else:

        @worker.task("slow")
        def block(payload: Any, ctx: Any) -> None:
            threading.Event().wait(0.5)

    worker.run(once=True)
    assert seen(db, job)["state"] == "failed"
    assert "timed out after 0.05 s" in seen(db, job)["last_error"]


def test_a_timeout_of_the_handler_goes_before_that_of_the_task(db: Conn, dsn: str) -> None:
    configure_task(db, "quick", timeout=timedelta(milliseconds=1), max_attempts=1)
    job = add(db, "quick")["id"]
    worker = Worker(dsn, concurrency=1)
    told: list[timedelta | None] = []

    @worker.task("quick", timeout=60)
    async def nap(payload: Any, ctx: Any) -> bool:
        told.append(ctx.job.timeout)
        await asyncio.sleep(0.05)
        return True

    worker.run(once=True)
    assert seen(db, job)["state"] == "completed"
    assert told == [timedelta(milliseconds=1)]
    assert call(db, "configure_task", "quick")[0]["timeout"] == timedelta(milliseconds=1)
