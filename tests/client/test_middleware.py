"""Middleware is around every handler, in the order in which it was put there, and may do what a handler may."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from pgworker_client import Cancel, Context, Fail, Node, Retry, Worker, add_job, add_job_tree
from pgworker_client.middleware import CallNext
from tests.calling import retry_in_an_hour
from tests.client.background import running
from tests.waiting import until_row

Db = psycopg.Connection[Any]


def job(db: Db, columns: str = "state, last_error") -> tuple[Any, ...]:
    """The only job that the database knows."""
    (row,) = db.execute(f"select {columns} from pgworker.jobs").fetchall()
    return tuple(row)


async def answer(payload: Any, ctx: Any) -> Any:
    """A handler."""
    return payload["n"] + 1


def answer_in_thread(payload: Any, ctx: Any) -> Any:
    """The same, not async."""
    return payload["n"] + 1


@pytest.mark.parametrize("handler", [answer, answer_in_thread])
@pytest.mark.parametrize("timeout", [None, 60])
def test_the_first_is_outermost_and_sees_payload_and_result(dsn: str, db: Db, handler: Any, timeout: Any) -> None:
    worker = Worker(dsn)
    worker.task("t", timeout=timeout)(handler)
    order: list[Any] = []

    def record(name: str) -> None:
        @worker.middleware
        async def middleware(ctx: Context, call_next: CallNext) -> Any:
            order.append((name, "before", ctx.job.payload))
            result = await call_next()
            order.append((name, "after", result))
            return result * 10

    record("first")
    record("second")
    add_job(db, "t", {"n": 1})
    worker.run_once()
    assert order == [
        ("first", "before", {"n": 1}), ("second", "before", {"n": 1}), ("second", "after", 2), ("first", "after", 20),
    ]  # fmt: skip
    assert job(db, "state, result") == ("completed", 200)


@pytest.mark.parametrize(
    ("error", "state"),
    [(Retry(in_=60), "scheduled"), (Fail("no"), "failed"), (Cancel("no"), "cancelled"), (KeyError("no"), "scheduled")],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_it_raises_decides_about_the_job(dsn: str, db: Db, error: Exception, state: str, when: str) -> None:
    called: list[Any] = []
    worker = Worker(dsn, tasks={"t": lambda payload, ctx: called.append(payload)})

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        if when == "after":
            await call_next()
        raise error

    add_job(db, "t")
    retry_in_an_hour(db, "t")
    worker.run_once()
    assert job(db, "state") == (state,)
    assert called == ([{}] if when == "after" else [])


@pytest.mark.parametrize("is_async", [True, False])
def test_it_sees_what_the_handler_raises_and_may_make_a_result_of_it(dsn: str, db: Db, is_async: bool) -> None:
    def broken(payload: Any, ctx: Any) -> Any:
        raise KeyError("colour")

    async def broken_async(payload: Any, ctx: Any) -> Any:
        raise KeyError("colour")

    worker = Worker(dsn, tasks={"t": broken_async if is_async else broken})

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        try:
            return await call_next()
        except KeyError as error:
            return {"instead": error.args[0]}

    add_job(db, "t")
    worker.run_once()
    assert job(db, "state, result") == ("completed", {"instead": "colour"})


def test_it_may_answer_without_the_handler_or_call_it_again(dsn: str, db: Db) -> None:
    calls: list[Any] = []

    async def flaky(payload: Any, ctx: Any) -> Any:
        calls.append(payload)
        if len(calls) == 1:
            raise OSError("once")
        return len(calls)

    worker = Worker(dsn, tasks={"t": flaky})

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        if ctx.job.payload.get("known"):
            return "known"
        try:
            return await call_next()
        except OSError:
            return await call_next()

    with db.transaction():
        add_job(db, "t", {"known": True})
        add_job(db, "t")
    worker.run_once()
    results = db.execute("select result from pgworker.jobs order by id").fetchall()
    assert (results, len(calls)) == ([("known",), (2,)], 2)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_timeout_is_the_handlers_and_middleware_sees_it(dsn: str, db: Db, is_async: bool) -> None:
    async def slow(payload: Any, ctx: Context) -> None:
        await ctx.cancelled.wait()

    def slow_in_thread(payload: Any, ctx: Any) -> None:
        ctx.cancelled.wait()

    worker = Worker(dsn)
    worker.task("t", timeout=0.05)(slow if is_async else slow_in_thread)
    seen: list[str] = []

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        try:
            return await call_next()
        except Exception as error:
            seen.append(type(error).__name__)
            raise

    add_job(db, "t")
    retry_in_an_hour(db, "t")
    worker.run_once()
    assert seen == ["TimedOut"]
    assert job(db) == ("scheduled", "timed out after 0.05 s")


def test_a_job_is_cancelled_while_it_is_in_middleware(dsn: str, db: Db) -> None:
    worker = Worker(dsn, tasks={"t": answer_in_thread})
    inside = asyncio.Event()

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        await ctx.progress("in middleware")
        await inside.wait()

    added = add_job(db, "t", {"n": 1})
    with running(worker):
        until_row(db, "select 1 from pgworker.jobs where progress is not null")
        db.execute("select pgworker.cancel_jobs(%s)", [[added.id]])
        until_row(db, "select 1 from pgworker.jobs where state = 'cancelled'")


def test_waiting_for_children_and_failing_in_part_go_through_it(dsn: str, db: Db) -> None:
    async def parent(payload: Any, ctx: Context) -> Any:
        if not await ctx.children():
            await ctx.add_children([Node("child", [1, "two"])])
        await ctx.wait_for_children()
        return "done"

    def child(payload: Any, ctx: Any) -> Any:
        return [None if isinstance(item, int) else ValueError("no number") for item in payload]

    worker = Worker(dsn, tasks={"parent": parent, "child": child})

    @worker.middleware
    async def middleware(ctx: Context, call_next: CallNext) -> Any:
        return await call_next()

    add_job_tree(db, Node("parent"))
    worker.run_once()
    rows = dict(db.execute("select task_identifier, state || ' ' || payload from pgworker.jobs").fetchall())
    assert rows == {"parent": "waiting {}", "child": 'scheduled ["two"]'}


async def _too_few(ctx: Any) -> None:
    pass


@pytest.mark.parametrize("wrong", [lambda ctx, call_next: None, _too_few, "text"])
def test_what_cannot_be_middleware_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(TypeError, match="middleware must"):
        Worker().middleware(wrong)


def test_an_object_with_an_async_call_will_do(dsn: str, db: Db) -> None:
    class Doubling:
        async def __call__(self, ctx: Context, call_next: CallNext) -> Any:
            return 2 * await call_next()

    worker = Worker(dsn, tasks={"t": answer})
    worker.middleware(Doubling())
    add_job(db, "t", {"n": 1})
    worker.run_once()
    assert job(db, "result") == (4,)
