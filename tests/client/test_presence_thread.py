"""Presence does not depend on the event loop: a handler that blocks it loses no job and keeps no other waiting."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, Worker, add_job, add_jobs
from tests.client.background import running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]


def blocking(dsn: str, **settings: Any) -> tuple[Worker, threading.Event, list[tuple[Any, int]]]:
    """A worker whose async task ``t`` blocks the event loop at payload 0 until the event is set, and what it ran."""
    worker, go, ran = Worker(dsn, **settings), threading.Event(), list[tuple[Any, int]]()

    @worker.task
    async def t(payload: Any, ctx: Context) -> None:
        ran.append((payload, ctx.job.attempts))
        if payload == 0:
            assert go.wait(60)

    return worker, go, ran


def test_the_lease_is_renewed_while_the_event_loop_is_blocked(dsn: str, db: Db) -> None:
    worker, go, ran = blocking(dsn, lease=1.5, poll_interval=0.05)
    with running(worker):
        job = add_job(db, "t", 0)
        until(lambda: ran, "the handler that blocks")
        until_row(
            db,
            "select 1 from pgworker.worker, pgworker.maintain() where now() > registered_at + 2 * lease"
            " and lease_until > now()",
        )
        go.set()
        until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", job.id)
    assert ran == [(0, 1)]


def test_what_a_blocked_event_loop_cannot_start_goes_to_others(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    worker, go, ran = blocking(dsn, concurrency=1, buffer=100, poll_interval=0.05)
    with running(worker):
        # Quick ones first, so that the worker claims ahead.
        add_jobs(db, [{"identifier": "t", "payload": n} for n in range(1, 2000)])
        add_jobs(db, [{"identifier": "t", "payload": n} for n in (0, *range(2000, 2040))])
        until(lambda: (0, 1) in ran, "the handler that blocks")
        # What waited for its turn is free again, with its attempt. (A claim may be under way: its answer is not read.)
        until(lambda: "the event loop has been blocked" in caplog.text, "the event loop is seen to be blocked")
        until_row(db, "select 1 from pgworker.jobs where payload::int >= 2000 and state = 'ready' and attempts = 0")
        other = Worker(dsn, concurrency=1)
        seen: list[Any] = []
        other.task("t")(lambda payload, _ctx: seen.append(payload))
        other.run_once()
        assert seen
        assert min(seen) >= 2000
        go.set()
        until_row(db, "select 1 where not exists (select from pgworker.job)")
        add_job(db, "t", -1)
        until(lambda: ran[-1] == (-1, 1), "the next job")
    assert sorted([payload for payload, _ in ran] + seen) == list(range(-1, 2040))
    assert {attempts for _, attempts in ran} == {1}
    assert caplog.text.count("the event loop has been blocked") == 1


def test_a_connection_that_hears_nothing_is_told(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a transaction pooler, where a session that listens belongs to others a moment later."""
    monkeypatch.setattr(psycopg.AsyncConnection, "add_notify_handler", lambda _self, _handler: None)
    worker, _, ran = blocking(dsn, poll_interval=0.05)
    with running(worker):
        add_job(db, "t", 1)
        until(lambda: ran == [(1, 1)], "the job, found by polling")
    assert caplog.text.count("notifications do not arrive") == 1


def test_a_worker_that_can_hear_says_nothing(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    worker, _, _ = blocking(dsn)
    worker.run_once()
    assert "notifications" not in caplog.text
