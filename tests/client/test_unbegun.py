"""What was claimed and waits for its handler to be called: its time does not count yet, and a stop gives it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, Worker, add_job, add_jobs
from pgworker_client.middleware import CallNext
from pgworker_client.process_pool import processors
from tests.client import process_handlers as handlers
from tests.client.background import Background, running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
Start = Callable[[Worker], Background]

_RUNS = "select 1 from pgworker.jobs where id = %s and state = 'running'"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgworker_client.unbegun.EVERY", 0.05)


def until_its_time_counts_anew(db: Db, times: int = 3) -> None:
    """Wait until the time of the only run with a timeout has been restarted so often."""
    since = None
    for _ in range(times + 1):
        (since,) = until_row(
            db,
            "select locked_at from pgworker.job where task_identifier = 'limited' and locked_at > %s"
            " and locked_at in (select locked_at from pgworker.deadline)",
            since or "-infinity",
        )


def waiting(dsn: str, db: Db, start: Start, go: Path) -> tuple[Background, int]:
    """A worker whose processes are all at work until there is that file, and a job that waits for one."""
    most = processors()
    worker = Worker(dsn, concurrency=most + 1, poll_interval=0.05)
    worker.task("until_file", executor="process")(handlers.until_file)
    worker.task("limited", executor="process", timeout=600)(handlers.pid)
    add_jobs(db, [{"identifier": "until_file", "payload": str(go)}] * most)
    background = start(worker)
    until(lambda: len(list(go.parent.iterdir())) == most, "all processes are at work")
    job = add_job(db, "limited")
    until_row(db, _RUNS, job.id)
    return background, job.id


def test_no_time_counts_while_a_job_waits_for_a_process(dsn: str, db: Db, start: Start, tmp_path: Path) -> None:
    background, job_id = waiting(dsn, db, start, tmp_path / "go")
    until_its_time_counts_anew(db)
    (tmp_path / "go").touch()
    assert until_row(db, "select attempts from pgworker.jobs where id = %s and state = 'completed'", job_id) == (1,)
    background.worker.stop()
    background.join()


@pytest.mark.parametrize("kind", ["async", "thread", "process"])
def test_no_time_counts_before_the_handler_is_called_and_all_does_from_then_on(dsn: str, db: Db, kind: str) -> None:
    worker = Worker(dsn, poll_interval=0.05)
    gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        await ctx.progress("called")
        await ctx.cancelled.wait()

    def in_thread(_payload: Any, ctx: Any) -> None:
        ctx.progress("called")
        ctx.cancelled.wait()

    if kind == "process":
        worker.task("limited", timeout=600, executor="process")(handlers.spin)
    else:
        worker.task("limited", timeout=600)(handler if kind == "async" else in_thread)

    @worker.middleware
    async def middleware(_ctx: Context, call_next: CallNext) -> Any:
        gate = asyncio.Event()
        gates.append((asyncio.get_running_loop(), gate))
        await gate.wait()
        return await call_next()

    job = add_job(db, "limited")
    with running(worker) as background:
        until_its_time_counts_anew(db)
        ((loop, gate),) = gates
        loop.call_soon_threadsafe(gate.set)
        until_row(db, "select 1 from pgworker.jobs where id = %s and progress is not null", job.id)
        assert worker._running is not None
        (runner,) = [runner for runner in worker._running[1]._runners if runner.job_id is not None]
        assert runner.unbegun is None
        background.worker.stop()
        background.worker.stop()


def test_what_waits_for_a_process_goes_back_at_the_first_stop(dsn: str, db: Db, start: Start, tmp_path: Path) -> None:
    background, job_id = waiting(dsn, db, start, tmp_path / "go")
    background.worker.stop()
    until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'ready' and attempts = 0", job_id)
    assert not background.ended
    (tmp_path / "go").touch()
    background.join()
    ended = "select state, count(*) from pgworker.jobs where id <> %s group by 1"
    assert db.execute(ended, [job_id]).fetchall() == [("completed", processors())]
