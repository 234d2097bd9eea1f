"""Hooks are told what becomes of each job, once, and whatever they do, no job suffers from it or waits for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import psycopg
import pytest

from pgworker_client import Cancel, Context, Fail, JobEvent, Node, Retry, Worker, WorkerEvent, add_job, add_job_tree
from pgworker_client import hooks as hooks_module
from tests.calling import retry_in_an_hour
from tests.client.background import Background, running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
JOB_EVENTS = ("started", "completed", "retried", "failed", "cancelled", "lost", "released", "waiting")


def told(worker: Worker) -> list[tuple[str, str | None]]:
    """The names and errors of the job events from now on, as they are told."""
    seen: list[tuple[str, str | None]] = []

    @worker.on(*JOB_EVENTS)  # type: ignore[arg-type]
    def hook(event: JobEvent) -> None:
        seen.append((event.name, event.error))

    return seen


async def fine(payload: Any, ctx: Context) -> Any:
    """Complete, with or without a result."""
    return payload.get("result")


def raising(error: BaseException) -> Any:
    """A handler that raises it."""

    async def handler(payload: Any, ctx: Context) -> None:
        raise error

    return handler


async def in_transaction(payload: Any, ctx: Context) -> None:
    """Complete the job itself."""
    async with ctx.transaction():
        pass


async def in_transaction_then_raise(payload: Any, ctx: Context) -> None:
    """Complete the job itself, and raise all the same."""
    async with ctx.transaction():
        pass
    raise ValueError("too late")


async def lost(payload: Any, ctx: Context) -> None:
    """Be unlocked by somebody while it runs."""
    await ctx.add_job("unlock")
    async with ctx.connection() as conn:
        await conn.execute("update pgworker.job set locked_by = -1 where id = %s", [ctx.job.id])
    await ctx.progress(1)


@pytest.mark.parametrize(
    ("handler", "name", "error"),
    [
        (fine, "completed", None),
        (raising(ValueError("no")), "retried", "ValueError: no"),
        (raising(Retry(in_=60, reason="later")), "retried", "later"),
        (raising(Fail("never")), "failed", "never"),
        (raising(Cancel("no need")), "cancelled", "no need"),
        (in_transaction, "completed", None),
        (in_transaction_then_raise, "completed", None),
        (lost, "lost", None),
    ],
    ids=["completed", "error", "Retry", "Fail", "Cancel", "transaction", "raises after its transaction", "lost"],
)
def test_each_run_is_told_of_twice(dsn: str, handler: Any, name: str, error: str | None) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        add_job(conn, "t")
    worker = Worker(dsn, tasks={"t": handler})
    seen = told(worker)
    worker.run_once()
    assert [event for event, _ in seen] == ["started", name]
    assert error is None or (seen[1][1] or "").startswith(error)


def test_a_result_and_the_last_attempt_are_told_right(dsn: str, db: Db) -> None:
    add_job(db, "fine", {"result": 1})
    add_job(db, "broken", max_attempts=1)
    worker = Worker(dsn, tasks={"fine": fine, "broken": raising(ValueError("no"))}, state="the state")
    seen: dict[str, JobEvent] = {}

    @worker.on("completed", "failed")
    async def hook(event: JobEvent) -> None:
        seen[event.name] = event

    worker.run_once()
    assert seen["completed"].job.payload == {"result": 1}
    assert (seen["completed"].error, seen["completed"].state) == (None, "the state")
    assert (seen["failed"].job.task_identifier, seen["failed"].job.attempts) == ("broken", 1)
    # It is told when the database has taken note, with what it has noted.
    assert (seen["failed"].error,) == db.execute(
        "select last_error from pgworker.jobs where state = 'failed'"
    ).fetchone()


def test_a_job_that_waits_for_its_children_is_told_of(dsn: str, db: Db) -> None:
    async def parent(payload: Any, ctx: Context) -> None:
        if not await ctx.children():
            await ctx.add_children([Node("child")])
        await ctx.wait_for_children()

    async def stubborn(payload: Any, ctx: Context) -> None:
        try:
            await parent(payload, ctx)
        except BaseException:
            return

    for handler in (parent, stubborn):
        add_job_tree(db, Node("parent"))
        worker = Worker(dsn, tasks={"parent": handler, "child": fine}, concurrency=1)
        seen: dict[str, list[str]] = {"parent": [], "child": []}

        @worker.on("started", "waiting", "completed")
        def hook(event: JobEvent) -> None:
            seen[event.job.task_identifier].append(event.name)  # noqa: B023

        worker.run_once()
        assert seen == {"parent": ["started", "waiting", "started", "completed"], "child": ["started", "completed"]}


@pytest.mark.parametrize("obedient", [True, False])
def test_a_job_that_is_stopped_with_its_worker_is_told_to_be_released(dsn: str, db: Db, obedient: bool) -> None:
    async def endless(payload: Any, ctx: Context) -> None:
        await ctx.progress("runs")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if obedient:
                raise

    worker = Worker(dsn, tasks={"t": endless})
    seen = told(worker)
    add_job(db, "t")
    background = Background(worker)
    until_row(db, "select 1 from pgworker.jobs where progress is not null")
    worker.stop()
    worker.stop()
    background.join()
    assert [name for name, _ in seen] == ["started", "released"]


def test_a_job_that_is_lost_and_returns_all_the_same_is_told_to_be_lost(dsn: str, db: Db) -> None:
    async def stubborn(payload: Any, ctx: Context) -> None:
        try:
            await lost(payload, ctx)
        except Exception:
            return

    worker = Worker(dsn, tasks={"t": stubborn})
    seen = told(worker)
    add_job(db, "t")
    worker.run_once()
    assert [name for name, _ in seen] == ["started", "lost"]


def test_the_worker_itself_is_told_of(dsn: str, db: Db) -> None:
    worker = Worker(dsn, tasks={"t": fine}, name="shop 1")
    seen: list[tuple[str, str]] = []

    @worker.on("worker_started", "worker_stopped")
    def hook(event: WorkerEvent) -> None:
        seen.append((event.name, event.worker))

    worker.run_once()
    worker.run_once()
    assert seen == [("worker_started", "shop 1"), ("worker_stopped", "shop 1")] * 2


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), asyncio.CancelledError()], ids=repr)
def test_what_a_hook_raises_is_logged_and_harms_nothing(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture, error: BaseException, is_async: bool
) -> None:
    worker = Worker(dsn, tasks={"t": fine})
    seen = told(worker)

    async def broken_async(event: JobEvent) -> None:
        raise error

    def broken(event: JobEvent) -> None:
        raise error

    worker.on("started", "completed")(broken_async if is_async else broken)
    add_job(db, "t", {"result": 1})
    with caplog.at_level(logging.ERROR, "pgworker"):
        worker.run_once()
    assert db.execute("select state from pgworker.jobs").fetchall() == [("completed",)]
    assert [name for name, _ in seen] == ["started", "completed"]
    says = [record.getMessage() for record in caplog.records]
    assert len(says) == 2
    assert "broken" in says[0]
    assert "raised at 'started'" in says[0]


@pytest.mark.parametrize("is_async", [True, False])
def test_jobs_and_other_hooks_wait_for_no_slow_hook(dsn: str, db: Db, is_async: bool) -> None:
    free = threading.Event()
    worker = Worker(dsn, tasks={"t": fine})
    seen = told(worker)
    late: list[int] = []

    async def slow_async(event: JobEvent) -> None:
        await asyncio.to_thread(free.wait)
        late.append(event.job.id)

    def slow(event: JobEvent) -> None:
        free.wait()
        late.append(event.job.id)

    worker.on("started")(slow_async if is_async else slow)
    with running(worker):
        ids = [add_job(db, "t", {"result": n}).id for n in range(20)]
        until_row(db, "select 1 from pgworker.jobs where state = 'completed' having count(*) = 20")
        until(lambda: len(seen) == 40, "the other hook was told of everything")
        assert late == []
        free.set()
    assert sorted(late) == ids  # a worker that stops lets its hooks come to their end


def test_a_hook_that_does_not_end_is_left_behind(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgworker_client.engine._LAST_WAIT", 0.2)
    free = threading.Event()
    worker = Worker(dsn, tasks={"t": fine})

    @worker.on("completed")
    def endless(event: JobEvent) -> None:
        free.wait()

    add_job(db, "t", {"result": 1})
    add_job(db, "t", {"result": 2})
    with caplog.at_level(logging.ERROR, "pgworker"):
        worker.run_once()
    free.set()
    assert db.execute("select distinct state from pgworker.jobs").fetchall() == [("completed",)]
    (says,) = [record.getMessage() for record in caplog.records]
    assert "endless did not end; it is left behind, with 1 events" in says


def test_a_hook_that_cannot_keep_up_loses_events_and_it_is_said_how_many(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "_LIMIT", 3)
    free = threading.Event()
    worker = Worker(dsn, tasks={"t": fine}, concurrency=1)
    late: list[int] = []

    @worker.on("completed")
    def slow(event: JobEvent) -> None:
        free.wait()
        late.append(event.job.id)

    def state(id: int) -> bool:
        row = db.execute("select state from pgworker.jobs where id = %s", [id]).fetchone()
        return row == ("completed",)

    with caplog.at_level(logging.ERROR, "pgworker"), running(worker):
        ids = []
        for n in range(10):
            ids.append(add_job(db, "t", {"result": n}).id)
            until(lambda: state(ids[-1]), "the job is done")
        until(lambda: "told of no more" in caplog.text, "the hook is behind")
        free.set()
        until(lambda: len(late) == 4, "the hook has caught up")
        last = add_job(db, "t", {"result": 10}).id
        until(lambda: len(late) == 5, "it is told of more")
    assert late == [*ids[:4], last]  # one in its hands, and three behind
    assert "slow is 3 events behind" in caplog.text
    assert "slow was not told of 6 events" in caplog.text


def test_an_event_that_cannot_be_made_harms_nothing(dsn: str, db: Db, caplog: pytest.LogCaptureFixture) -> None:
    db.execute("select pgworker.add_job('t', format('%s', repeat('9', 5000))::jsonb)")  # more digits than Python reads
    retry_in_an_hour(db, "t")
    worker = Worker(dsn, tasks={"t": fine})
    seen = told(worker)
    with caplog.at_level(logging.ERROR, "pgworker"):
        worker.run_once()
    assert seen == []
    assert "no hook is told" in caplog.text
    assert db.execute("select state from pgworker.jobs").fetchall() == [("scheduled",)]


def _no_argument() -> None:
    pass


def test_what_cannot_be_a_hook_is_refused_at_once() -> None:
    worker = Worker()
    with pytest.raises(ValueError, match=r"not \['explodes'\]; they are started, completed"):
        worker.on("explodes")(print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not nothing"):
        worker.on()(print)
    with pytest.raises(TypeError, match="must take one argument"):
        worker.on("failed")(_no_argument)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="must be a function"):
        worker.on("failed")("text")  # type: ignore[type-var]


def test_hooks_of_a_worker_that_cannot_start_end_with_it() -> None:
    worker = Worker("host=/nowhere", tasks={"t": fine})
    seen = told(worker)
    with pytest.raises(psycopg.OperationalError):
        worker.run()
    assert seen == []
