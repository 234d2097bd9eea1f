"""Handlers with children: what they see of them, adding some, and waiting for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgworker_client import (
    BlockingContext,
    Context,
    Fail,
    JobLost,
    Node,
    WaitsForChildren,
    Worker,
    add_job,
    add_job_tree,
    cancel_jobs,
    children,
)
from pgworker_client.connection import Link
from pgworker_client.errors import LinkDown
from tests.client.background import running
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]


pytestmark = pytest.mark.usefixtures("consistent_afterwards")


# With one runner a child cannot be done before its parent waits for it.


async def square(payload: Any, _ctx: Context) -> int:
    return int(payload) ** 2


def job(db: Db, job_id: int, columns: str = "state, result, attempts") -> tuple[Any, ...]:
    row = db.execute(f"select {columns} from pgworker.jobs where id = %s", [job_id]).fetchone()
    assert row is not None
    return tuple(row)


async def _sum_async(payload: Any, ctx: Context) -> Any:
    ctx.state.append(("run", ctx.job.attempts, ctx.recover()))
    if not await ctx.children():
        added = await ctx.add_children([Node("square", n) for n in payload])
        await ctx.progress([child.id for child in added])
    await ctx.wait_for_children()
    values = await ctx.children_values()
    assert list(values) == ctx.recover()
    ctx.state.append("went on")
    return sum(values.values())


def _sum_sync(payload: Any, ctx: BlockingContext) -> Any:
    ctx.state.append(("run", ctx.job.attempts, ctx.recover()))
    if not ctx.children():
        added = ctx.add_children([{"identifier": "square", "payload": n} for n in payload])
        ctx.progress([child.id for child in added])
    ctx.wait_for_children()
    values = ctx.children_values()
    assert list(values) == ctx.recover()
    ctx.state.append("went on")
    return sum(values.values())


@pytest.mark.parametrize("handler", [_sum_async, _sum_sync])
def test_a_job_waits_for_the_children_that_it_added_and_starts_again(
    dsn: str, db: Db, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    root = add_job(db, "sum", {"a": 1, "b": 2}, max_attempts=1)
    db.execute("update pgworker.job set payload = '[1, 2, 3]'")
    worker = Worker(dsn, tasks={"sum": handler, "square": square}, state=seen, concurrency=1)
    worker.run_once()
    ids = [child.id for child in children(db, root.id)]
    assert seen == [("run", 1, None), ("run", 1, ids), "went on"]  # no attempt was used up by waiting
    assert job(db, root.id) == ("completed", 14, 1)
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def _look_async(_payload: Any, ctx: Context) -> Any:
    await ctx.wait_for_children()
    named = {child.id: child.name for child in await ctx.children()}
    values, failed = await ctx.children_values(), await ctx.failed_children_values()
    return [{named[i]: v for i, v in values.items()}, {named[i]: v for i, v in failed.items()}]


def _look_sync(_payload: Any, ctx: BlockingContext) -> Any:
    ctx.wait_for_children()
    named = {child.id: child.name for child in ctx.children()}
    values, failed = ctx.children_values(), ctx.failed_children_values()
    return [{named[i]: v for i, v in values.items()}, {named[i]: v for i, v in failed.items()}]


@pytest.mark.parametrize("handler", [_look_async, _look_sync])
def test_a_parent_finds_results_and_what_failed_children_left(dsn: str, db: Db, handler: Any) -> None:
    async def bad(_payload: Any, ctx: Context) -> None:
        await ctx.progress({"page": 3})
        raise Fail("no more")

    nodes = [Node("square", 4, name="four"), Node("bad", name="bad", on_failure="ignore"), Node("none", name="none")]

    async def none(_payload: Any, _ctx: Context) -> None: ...

    root = add_job_tree(db, Node("look", children=nodes))
    Worker(dsn, tasks={"look": handler, "square": square, "bad": bad, "none": none}).run_once()
    assert job(db, root.id) == ("completed", [{"four": 16, "none": None}, {"bad": {"page": 3}}], 1)


def test_children_that_nobody_waits_for_are_their_own(dsn: str, db: Db) -> None:
    async def handler(_payload: Any, ctx: Context) -> str:
        await ctx.add_children([Node("square", 2)])
        return "done"

    root = add_job(db, "t")
    Worker(dsn, tasks={"t": handler, "square": square}).run_once()
    (child,) = children(db, root.id)
    assert (job(db, root.id, "state, result"), child.result) == (("completed", "done"), 4)


def test_a_child_that_fails_for_good_fails_the_parent_that_waits(dsn: str, db: Db) -> None:
    async def handler(_payload: Any, ctx: Context) -> None:
        await ctx.add_children([Node("bad")])
        await ctx.wait_for_children()

    async def bad(_payload: Any, _ctx: Context) -> None:
        raise Fail("out of paper")

    root = add_job(db, "t")
    Worker(dsn, tasks={"t": handler, "bad": bad}).run_once()
    state, error = job(db, root.id, "state, last_error")
    assert state == "failed"
    assert "out of paper" in error


async def _work_on_async(_payload: Any, ctx: Context) -> None:
    await ctx.add_children([Node("bad")])
    try:
        await asyncio.sleep(60)
    finally:
        ctx.state.append(ctx.cancelled.is_set())


def _work_on_sync(_payload: Any, ctx: BlockingContext) -> None:
    ctx.add_children([Node("bad")])
    ctx.state.append(ctx.cancelled.wait(20))
    ctx.wait_for_children()  # nothing to wait for: it goes on, and ends as it was told


@pytest.mark.parametrize("handler", [_work_on_async, _work_on_sync])
def test_a_child_that_fails_for_good_stops_the_parent_that_runs(dsn: str, db: Db, handler: Any) -> None:
    async def bad(_payload: Any, _ctx: Context) -> None:
        raise Fail("out of paper")

    seen: list[bool] = []
    root = add_job(db, "t")
    with running(Worker(dsn, tasks={"t": handler, "bad": bad}, state=seen, poll_interval=0.1)):
        until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'failed'", root.id)
    assert seen == [True]
    assert "out of paper" in job(db, root.id, "last_error")[0]


def test_a_bad_child_is_refused_in_the_handler_with_its_place(dsn: str, db: Db) -> None:
    said: list[str] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        for nodes in ([Node("a"), Node("b", after=["x"])], [Node("a", {1})]):
            try:
                await ctx.add_children(nodes)
            except (psycopg.Error, TypeError) as exc:
                said.append(str(exc).splitlines()[0])

    add_job(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()
    assert said[0].startswith("children[1].after names 'x'")
    assert said[1].startswith("children[0] cannot be written as JSON")


async def _tidy_async(_payload: Any, ctx: Context) -> None:
    try:
        try:
            async with ctx.connection() as conn:
                await conn.execute("insert into effect values (1)")
                await ctx.wait_for_children()
        except Exception:
            ctx.state.append("caught")
    finally:
        ctx.state.append("tidied")


def _tidy_sync(_payload: Any, ctx: BlockingContext) -> None:
    try:
        try:
            with ctx.connection() as conn:
                conn.execute("insert into effect values (1)")
                ctx.wait_for_children()
        except Exception:
            ctx.state.append("caught")
    finally:
        ctx.state.append("tidied")


@pytest.mark.parametrize("handler", [_tidy_async, _tidy_sync])
def test_what_ends_the_run_passes_except_exception_and_rolls_back(dsn: str, db: Db, handler: Any) -> None:
    db.execute("create table effect (n int)")
    seen: list[str] = []

    async def first(payload: Any, ctx: Context) -> None:
        if not await ctx.children():
            await ctx.add_children([Node("square", 1)])
            await handler(payload, ctx)

    def first_sync(payload: Any, ctx: BlockingContext) -> None:
        if not ctx.children():
            ctx.add_children([Node("square", 1)])
            handler(payload, ctx)

    root = add_job(db, "t")
    tasks = {"t": first if handler is _tidy_async else first_sync, "square": square}
    Worker(dsn, tasks=tasks, state=seen, concurrency=1).run_once()
    assert seen == ["tidied"]
    assert db.execute("select count(*) from effect").fetchone() == (0,)
    assert job(db, root.id, "state") == ("completed",)


async def _swallow_async(payload: Any, ctx: Context) -> str:
    if await ctx.children():
        return "second run"
    await ctx.add_children([Node("square", 1)])
    try:
        await ctx.wait_for_children()
    except BaseException as exc:
        ctx.state.append((type(exc), ctx.cancelled.is_set()))
    for call in (ctx.progress(1), ctx.wait_for_children(), ctx.add_children([])):
        try:
            await call
        except BaseException as exc:
            ctx.state.append(type(exc))
    if payload["raises"]:
        raise ValueError("first run")
    return "first run"


def _swallow_sync(payload: Any, ctx: BlockingContext) -> str:
    if ctx.children():
        return "second run"
    ctx.add_children([Node("square", 1)])
    try:
        ctx.wait_for_children()
    except BaseException as exc:
        ctx.state.append((type(exc), ctx.cancelled.is_set()))
    for call in (lambda: ctx.progress(1), ctx.wait_for_children, lambda: ctx.add_children([])):
        try:
            call()
        except BaseException as exc:
            ctx.state.append(type(exc))
    if payload["raises"]:
        raise ValueError("first run")
    return "first run"


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("handler", [_swallow_async, _swallow_sync])
def test_a_run_that_does_not_let_its_end_pass_changes_nothing_any_more(
    dsn: str, db: Db, handler: Any, raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    root = add_job(db, "t", {"raises": raises})
    Worker(dsn, tasks={"t": handler, "square": square}, state=seen, concurrency=1).run_once()
    assert seen == [(WaitsForChildren, True), WaitsForChildren, WaitsForChildren, WaitsForChildren]
    assert job(db, root.id, "state, result, attempts, progress, last_error") == (
        "completed",
        "second run",
        1,
        None,
        None,
    )
    said = [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]
    assert [record.job_id for record in said] == [root.id]  # type: ignore[attr-defined]
    expected = "raised after its job had begun to wait" if raises else "did not let WaitsForChildren pass"
    assert expected in said[0].getMessage()


def test_waiting_whose_answer_was_lost_is_waiting_all_the_same(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch, lost = Link.fetch, list[str]()

    async def unreliable(self: Link, query: str, params: Any = (), **options: Any) -> Any:
        rows = await fetch(self, query, params, **options)
        if "wait_for_children" in query and not lost:
            lost.append(query)
            raise LinkDown("cut", unknown=True)
        return rows

    monkeypatch.setattr(Link, "fetch", unreliable)
    seen: list[Any] = []
    root = add_job(db, "sum", {})
    db.execute("update pgworker.job set payload = '[5]'")
    # The child has a task of its own, so that it is not done before the lost call is repeated.
    Worker(dsn, tasks={"sum": _sum_async}, state=seen).run_once()
    assert job(db, root.id, "state, attempts") == ("waiting", 0)
    Worker(dsn, tasks={"sum": _sum_async, "square": square}, state=seen, concurrency=1).run_once()
    assert len(lost) == 1
    assert job(db, root.id) == ("completed", 25, 1)
    assert "lost" not in caplog.text


def test_a_job_that_waits_can_be_cancelled_with_its_children(dsn: str, db: Db) -> None:
    async def handler(_payload: Any, ctx: Context) -> None:
        await ctx.add_children([Node("unknown here")])
        await ctx.wait_for_children()

    root = add_job(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()
    assert job(db, root.id, "state, locked_by") == ("waiting", None)
    cancel_jobs(db, [root.id])
    assert [row[0] for row in db.execute("select state from pgworker.jobs")] == ["cancelled"] * 2


def test_the_next_run_is_not_touched_by_what_is_said_of_the_last(dsn: str, db: Db) -> None:
    """A run that lingers after its end, while the next one, of the same worker, is cancelled."""
    waiting, let_go = threading.Event(), threading.Event()
    seen: list[str] = []

    def child(_payload: Any, _ctx: BlockingContext) -> None:
        assert waiting.wait(20)

    def handler(_payload: Any, ctx: BlockingContext) -> None:
        if not ctx.children():
            ctx.add_children([Node("child")])
            try:
                ctx.wait_for_children()
            finally:
                waiting.set()
                let_go.wait(20)
                seen.append("first ended")
        seen.append("second began")
        assert ctx.cancelled.wait(20)
        seen.append("second cancelled")

    root = add_job(db, "t")
    with running(Worker(dsn, tasks={"t": handler, "child": child}, concurrency=2, poll_interval=0.1)):
        until(lambda: seen == ["second began"], "the second run began")
        cancel_jobs(db, [root.id], "enough")
        until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'cancelled'", root.id)
        let_go.set()
        until(lambda: "first ended" in seen, "the first run ended")
    assert seen == ["second began", "second cancelled", "first ended"]
    assert job(db, root.id, "state, last_error") == ("cancelled", "enough")


def test_a_worker_that_stops_leaves_a_waiting_job_alone(dsn: str, db: Db) -> None:
    began = threading.Event()

    async def handler(_payload: Any, ctx: Context) -> None:
        await ctx.add_children([Node("unknown here")])
        try:
            await ctx.wait_for_children()
        finally:
            began.set()
            await asyncio.sleep(60)

    root = add_job(db, "t")
    with running(Worker(dsn, tasks={"t": handler}, grace=0.05)):
        until(began.is_set, "the run has ended, almost")
    assert job(db, root.id, "state, attempts, locked_by") == ("waiting", 0, None)


def test_a_lost_job_gets_no_children(dsn: str, db: Db) -> None:
    raised: list[str] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            await conn.execute("update pgworker.job set locked_by = null, locked_at = null, run_at = 'tomorrow'")
        for call in (ctx.add_children([Node("square", 1)]), ctx.wait_for_children()):
            try:
                await call
            except JobLost as exc:
                raised.append(str(exc))
        raise JobLost

    root = add_job(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()
    assert raised == [f"job {root.id} is not held by this worker any more"] * 2
    assert children(db, root.id) == []


def test_a_role_that_may_work_and_nothing_else_is_enough(dsn: str, db: Db, role: Callable[..., str]) -> None:
    db.execute(f"select pgworker.grant_worker('{role('hand')}')")
    root = add_job(db, "sum", {})
    db.execute("update pgworker.job set payload = '[1, 2]'")
    tasks: dict[str, Any] = {"sum": _sum_sync, "square": square}
    Worker(make_conninfo(dsn, user="hand"), tasks=tasks, state=[], concurrency=1).run_once()
    assert job(db, root.id) == ("completed", 5, 1)
