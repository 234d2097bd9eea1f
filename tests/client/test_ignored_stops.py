"""Handlers that do not stop when they are told to: reported, left behind, and never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Context, JobLost, Worker, add_job
from tests.client.background import running, stop
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]

_ENDED = "select last_error, attempts from pgworker.jobs where id = %s and state = %s"


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgworker_client.running.PATIENCE", 0.2)


class Stubborn:
    """A worker for one job at a time; task ``async`` and ``thread`` do not stop before ``go`` is set."""

    def __init__(self, dsn: str, *, grace: float = 30, **options: Any) -> None:
        self.worker = Worker(dsn, concurrency=1, poll_interval=0.05, grace=grace)
        self.go = threading.Event()
        self.begun: list[str] = []
        self.ended: list[Any] = []
        self.worker.task("async", **options)(self._coroutine)
        self.worker.task("thread", **options)(self._function)
        self.worker.task("next")(lambda _payload, _ctx: "done")

    async def _coroutine(self, _payload: Any, ctx: Context) -> str:
        self.begun.append("async")
        while not self.go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        self.ended.append(ctx.cancelled.is_set())
        try:
            await ctx.progress("late")
        except JobLost:
            self.ended.append("lost")
        return "late"

    def _function(self, _payload: Any, ctx: BlockingContext) -> str:
        self.begun.append("thread")
        assert self.go.wait(60)
        self.ended.append(ctx.cancelled.is_set())
        return "late"


@contextlib.contextmanager
def stubborn(dsn: str, **options: Any) -> Iterator[Stubborn]:
    """One that runs; it is let go at the end."""
    one = Stubborn(dsn, **options)
    with running(one.worker):
        try:
            yield one
        finally:
            one.go.set()


@pytest.mark.parametrize("how", ["async", "thread"])
def test_a_cancelled_job_ends_though_its_handler_does_not(
    dsn: str, db: Db, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with stubborn(dsn) as one:
        job = add_job(db, how)
        until(lambda: one.begun == [how], "the handler")
        db.execute("select pgworker.cancel_jobs(%s, 'not needed')", [[job.id]])
        until_row(db, _ENDED, job.id, "cancelled")
        following = add_job(db, "next")
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", following.id)
        one.go.set()
        until(lambda: one.ended, "the end of the handler")
        following = add_job(db, "next")
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", following.id)
    assert one.ended == ([True, "lost"] if how == "async" else [True])
    row = db.execute("select state, result, progress, last_error from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == ("cancelled", None, None, "not needed")
    assert "left behind" in caplog.text


@pytest.mark.parametrize("how", ["async", "thread"])
def test_a_job_is_timed_out_though_its_handler_does_not_stop(dsn: str, db: Db, how: str) -> None:
    with stubborn(dsn, timeout=0.1) as one:
        job = add_job(db, how, max_attempts=1)
        row = until_row(db, _ENDED, job.id, "failed")
        assert row == ("timed out after 0.1 s", 1)
        following = add_job(db, "next")
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", following.id)
        one.go.set()
        until(lambda: one.ended, "the end of the handler")


@pytest.mark.parametrize("how", ["async", "thread"])
def test_a_lost_job_keeps_nobody_though_its_handler_does_not_stop(dsn: str, db: Db, how: str) -> None:
    with stubborn(dsn) as one:
        job = add_job(db, how, max_attempts=1)
        until(lambda: one.begun == [how], "the handler")
        db.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
        following = add_job(db, "next")
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", following.id)
        one.go.set()
        until(lambda: one.ended, "the end of the handler")
    row = db.execute("select state, result from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == ("failed", None)


@pytest.mark.parametrize("how", ["async", "thread"])
def test_a_stopped_worker_does_not_wait_for_what_is_given_up_meanwhile(dsn: str, db: Db, how: str) -> None:
    with stubborn(dsn, grace=3600) as one:
        job = add_job(db, how)
        until(lambda: one.begun == [how], "the handler")
        stop(one.worker)
        db.execute("select pgworker.cancel_jobs(%s, 'not needed')", [[job.id]])
        until(lambda: one.worker._running is None, "the end of the worker")
        assert one.ended == []
    row = db.execute("select state, last_error from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == ("cancelled", "not needed")


def test_any_number_can_be_left_behind(dsn: str, db: Db) -> None:
    with stubborn(dsn, timeout=0.05) as one:
        for number in range(4):
            job = add_job(db, "async", max_attempts=1)
            until_row(db, _ENDED, job.id, "failed")
            assert len(one.begun) == number + 1
        following = add_job(db, "next")
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", following.id)
        one.go.set()
        until(lambda: one.ended == [True, "lost"] * 4, "the end of all")


def test_a_worker_whose_event_loop_hangs_loses_the_job_at_its_timeout(dsn: str, db: Db) -> None:
    """It can neither stop the handler nor report: the database does, and tells it."""
    db.execute("select pgworker.configure('timeout_grace', '0')")
    worker, go, fates = Worker(dsn, poll_interval=0.05), threading.Event(), list[Any]()

    @worker.task("t", timeout=0.5)
    async def t(_payload: Any, ctx: Context) -> str:
        assert go.wait(60)  # blocks the event loop
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        fates.append(ctx.cancelled.is_set())
        return "late"

    with running(worker):
        job = add_job(db, "t", max_attempts=1)
        row = until_row(db, _ENDED, job.id, "failed")
        assert str(row[0]).startswith("timed out after 0.5 s; worker")
        go.set()
        until(lambda: fates == [True], "the handler")
    assert db.execute("select state, result from pgworker.jobs where id = %s", [job.id]).fetchone() == ("failed", None)
