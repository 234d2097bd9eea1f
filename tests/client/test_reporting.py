"""Reports: nothing that one job returns or raises may harm another, and nothing is lost or counted twice."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Cancel, Context, Fail, Retry, Worker, add_jobs
from pgworker_client.connection import Link
from pgworker_client.errors import LinkDown
from pgworker_client.reports import Cancelled, Finish, Outbox, Special
from tests.calling import retry_in_an_hour
from tests.client.background import Background
from tests.connections import Connections
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]

POISON: dict[str, Any] = {
    "not a number": float("nan"),
    "infinity": [float("inf")],
    "nul": "a\x00b",
    "nul key": {"\x00": 1},
    "surrogate": "\ud800",
    "unserialisable": object(),
    "set": {1, 2},
}


@pytest.mark.parametrize("poisons", [list(POISON), ["nul"], ["surrogate"] * 20])
def test_a_poisonous_result_fails_its_own_job_only(dsn: str, db: Db, poisons: list[str]) -> None:
    async def handler(payload: Any, _ctx: Context) -> Any:
        if "poison" in payload:
            return POISON[payload["poison"]]
        if payload["n"] % 3 == 0:
            raise ValueError(payload["n"])
        return payload if payload["n"] % 3 == 1 else None

    good = [{"identifier": "t", "payload": {"n": n}} for n in range(90)]
    bad = [{"identifier": "t", "payload": {"poison": name}} for name in poisons]
    add_jobs(db, [*good[:45], *bad, *good[45:]])
    Worker(dsn, tasks={"t": handler}).run_once()

    failed = db.execute(
        "select payload ->> 'poison', last_error from pgworker.jobs where payload ? 'poison' and state = 'scheduled'"
    ).fetchall()
    assert sorted(row[0] for row in failed) == sorted(poisons)
    assert all("result" in error for _, error in failed)
    kept = "select count(*) from pgworker.jobs where state = 'completed' and result = payload"
    assert db.execute(kept).fetchone() == (30,)
    errors = "select count(*) from pgworker.jobs where payload ? 'n' and last_error like 'ValueError%'"
    assert db.execute(errors).fetchone() == (30,)
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (60 + len(poisons),)
    assert db.execute("select count(*) from pgworker.jobs where attempts <> 1").fetchone() == (0,)


def test_a_report_that_is_refused_is_halved_until_the_one_job_is_found() -> None:
    rows = [(n, "t", "{}", 1) for n in range(7)]
    report = Finish(list(rows[:4]), ["1", None, "3", None], list(rows[4:]), ["a", "b", "c"])
    leaves: list[Finish] = []

    def split(part: Finish) -> None:
        if len(part.rows()) == 1:
            leaves.append(part)
            return
        for half in part.halves():
            split(half)

    split(report)
    assert [leaf.rows()[0][0] for leaf in leaves] == list(range(7))
    assert [leaf.results for leaf in leaves[:4]] == [["1"], [None], ["3"], [None]]
    assert [leaf.errors for leaf in leaves[4:]] == [["a"], ["b"], ["c"]]


def test_huge_results_are_sent_in_several_statements() -> None:
    box = Outbox(1)
    for n in range(5):
        box.complete((n, "t", "{}", 1), '"' + "x" * 7_000_000 + '"')
    reports = list(box.take())
    assert [len(report.rows()) for report in reports] == [2, 2, 1]
    assert not len(box)


def test_a_failure_that_says_more_is_a_report_of_its_own() -> None:
    box = Outbox(1)
    row = (1, "t", "{}", 1)
    box.complete(row, None)
    box.fail(row, Retry(), "plain")
    box.fail(row, Retry(in_=3), "later")
    box.fail(row, Fail("x"), "x")
    finish, special = box.take()
    assert isinstance(finish, Finish)
    assert (finish.results, finish.errors) == (None, ["plain"])
    assert isinstance(special, Special)
    assert [(entry.delay, entry.permanent) for entry in special.entries] == [(3.0, False), (None, True)]


@contextlib.contextmanager
def answers_lost(monkeypatch: pytest.MonkeyPatch, function: str, times: int = 1) -> Iterator[list[str]]:
    """The answers of the first statements that call the function are lost on the way: executed, but nobody knows."""
    fetch, lost = Link.fetch, list[str]()

    async def unreliable(self: Link, query: str, params: Any = (), **options: Any) -> Any:
        rows = await fetch(self, query, params, **options)
        if function in query and len(lost) < times and (rows or function != "get_jobs"):
            lost.append(query)
            raise LinkDown("cut", unknown=True)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(Link, "fetch", unreliable)
        yield lost


def test_a_report_whose_answer_was_lost_is_sent_again_and_counts_once(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[int] = []

    async def handler(payload: Any, _ctx: Context) -> Any:
        ran.append(payload)
        if payload == 3:
            raise ValueError("x")
        return payload

    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(5)])
    with answers_lost(monkeypatch, "finish_jobs") as lost:
        Worker(dsn, tasks={"t": handler}).run_once()
    assert len(lost) == 1
    assert sorted(ran) == list(range(5))
    assert db.execute("select array_agg(result order by id) from pgworker.finished").fetchone() == ([0, 1, 2, 4],)
    assert db.execute("select attempts, locked_by from pgworker.job").fetchall() == [(1, None)]
    assert "was lost" not in caplog.text  # nothing was: no alarm


def test_jobs_whose_claim_was_answered_to_nobody_are_given_back(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[int] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        attempts.append(ctx.job.attempts)

    add_jobs(db, [{"identifier": "t"}] * 5)
    with answers_lost(monkeypatch, "get_jobs") as lost:
        Worker(dsn, tasks={"t": handler}).run_once()
    assert len(lost) == 1
    assert attempts == [1] * 5  # none was started before: the attempt came back
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)
    assert "5 jobs were claimed as the connection broke; they go back" in caplog.text


def wrapped(db: Db, function: str, body: str) -> None:
    """Put ``body`` before that function of the protocol: what happens to the statement that calls it."""
    found = db.execute(
        "select pg_get_function_arguments(oid), pg_get_function_result(oid),"
        " (select string_agg('$' || n, ', ') from generate_series(1, pronargs) n), proretset"
        " from pg_proc where oid = ('pgworker.' || %s)::regproc",
        [function],
    ).fetchone()
    assert found is not None
    arguments, result, passed, many = found
    call = f"select * from wrapped.{function}({passed})"
    db.execute("create schema wrapped")
    db.execute(f"alter function pgworker.{function} set schema wrapped")
    db.execute(
        f"create function pgworker.{function}({arguments}) returns {result} language plpgsql as $$ declare one record;"
        f" begin {body}; {f'return query {call}' if many else f'{call} into one; return one'}; end $$"
    )


@pytest.mark.parametrize("sqlstate", ["40P01", "40001"])
@pytest.mark.parametrize("function", ["finish_jobs", "fail_job", "cancel_job"])
def test_a_report_that_meets_somebody_elses_locks_is_sent_again_whole(
    dsn: str, db: Db, function: str, sqlstate: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    async def handler(payload: int, _ctx: Context) -> int:
        ran.append(payload)
        if payload % 4 == 1:
            raise ValueError("again")
        if payload % 4 == 2:
            raise Fail("never")
        if payload % 4 == 3:
            raise Cancel("no need")
        return payload

    def halves(_report: Any) -> Any:
        raise AssertionError("its jobs are not the reason")

    for kind in (Finish, Special, Cancelled):
        monkeypatch.setattr(kind, "halves", halves)
    db.execute("create sequence refusals")  # counts what is rolled back, too
    refusal = f"raise exception using errcode = '{sqlstate}', message = 'passing'"
    wrapped(db, function, f"if nextval('public.refusals') <= 3 then {refusal}; end if")
    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(40)])
    retry_in_an_hour(db, "t")
    Worker(dsn, tasks={"t": handler}).run_once()

    assert sorted(ran) == list(range(40))
    ended = "select state, count(*), min(attempts), max(attempts) from pgworker.jobs group by 1 order by 1"
    assert db.execute(ended).fetchall() == [
        (state, 10, 1, 1) for state in ("cancelled", "completed", "failed", "scheduled")
    ]
    assert db.execute("select last_value > 3 from refusals").fetchone() == (True,)
    assert caplog.text.count("finish connection works, but its statement failed: passing; trying again") == 1
    assert "was lost" not in caplog.text
    assert "refused" not in caplog.text


def test_a_report_that_is_a_deadlocks_victim_is_sent_again(
    dsn: str, db: Db, connect: Connections, start: Callable[[Worker], Background], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pgworker_client.finishing.PATIENCE", "60000")  # longer than the server takes to notice
    gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    first, second = add_jobs(db, [{"identifier": "t"}] * 2)

    async def handler(_payload: Any, _ctx: Context) -> str:
        if not gates:
            gates.append((asyncio.get_running_loop(), asyncio.Event()))
        await gates[0][1].wait()  # both end in one turn of the loop, so that one report is about both
        return "done"

    worker = Worker(dsn, tasks={"t": handler})
    background = start(worker)
    until_row(db, "select 1 from pgworker.jobs having count(*) filter (where state = 'running') = 2")
    until(lambda: gates, "the handlers run")
    other = connect(options="-cdeadlock_timeout=1min")  # the worker is the one who notices
    lock = "select from pgworker.job where id = %s for update"
    with other.transaction():
        other.execute(lock, [second.id])
        loop, gate = gates[0]
        loop.call_soon_threadsafe(gate.set)
        until_row(db, "select 1 from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'finish_jobs'")
        other.execute(lock, [first.id])
    until_row(db, "select 1 from pgworker.jobs having count(*) filter (where state = 'completed') = 2")
    worker.stop()
    background.join()
    assert db.execute("select result, attempts from pgworker.jobs").fetchall() == [("done", 1)] * 2
    assert "finish connection works, but its statement failed: deadlock detected" in caplog.text


def test_a_job_that_was_taken_away_is_told_in_the_log_and_harms_no_other(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(payload: Any, ctx: Context) -> int:
        if payload == 2:
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute(
                    "update pgworker.job set locked_by = null, locked_at = null, run_at = 'tomorrow' where id = %s",
                    [ctx.job.id],
                )
        return 1

    jobs = add_jobs(db, [{"identifier": "t", "payload": n} for n in range(5)])
    Worker(dsn, tasks={"t": handler}).run_once()
    assert db.execute("select count(*) from pgworker.finished").fetchone() == (4,)
    assert caplog.text.count(f"job {jobs[2].id} was lost") == 1
    assert caplog.text.count("was lost") == 1


def test_an_older_run_of_a_job_cannot_end_a_newer_one(dsn: str, db: Db) -> None:
    """The same worker claims a job again while its first run still goes on: the first one's outcome is dropped."""
    runs: list[int] = []

    def handler(_payload: Any, ctx: Any) -> str:
        runs.append(ctx.job.attempts)
        if ctx.job.attempts == 1:
            with psycopg.connect(dsn, autocommit=True) as conn:  # as if it had been rescued
                conn.execute("update pgworker.job set locked_by = null, locked_at = null where id = %s", [ctx.job.id])
            until(lambda: 2 in runs, "the second run began")
            return "first"
        until(lambda: db.execute("select 1").fetchone(), "the database answers")
        return "second"

    add_jobs(db, [{"identifier": "t"}])
    Worker(dsn, tasks={"t": handler}, poll_interval=0.05, concurrency=2).run_once()
    assert runs == [1, 2]
    assert db.execute("select state, result from pgworker.jobs").fetchall() == [("completed", "second")]


@pytest.mark.parametrize(
    "does",
    [
        "select pgworker.cancel_jobs(array(select id from pgworker.jobs where key = 'k'))",
        "select pgworker.pause_queue('q')",
        "select pgworker.add_job('later', job_key => 'k')",
        "select from pgworker.job where key = 'k' for update",
    ],
)
def test_a_job_that_somebody_holds_keeps_no_other_from_being_reported(
    dsn: str, db: Db, connect: Connections, start: Callable[[Worker], Background], does: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    begun, go = threading.Event(), threading.Event()
    worker = Worker(dsn, poll_interval=0.05)

    @worker.task
    def held(payload: Any, _ctx: BlockingContext) -> Any:
        begun.set()
        assert go.wait(60)
        return payload

    @worker.task
    async def t(payload: int, _ctx: Context) -> Any:
        if payload % 3 == 1:
            raise Fail("never")
        if payload % 3 == 2:
            raise Cancel("no need")

    (job,) = add_jobs(db, [{"identifier": "held", "queue_name": "q", "job_key": "k"}])
    background = start(worker)
    assert begun.wait(20)
    lingering = connect(autocommit=False)
    lingering.execute(does.encode())
    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(100)])
    go.set()
    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(1000)])
    until_row(db, "select 1 where not exists (select from pgworker.job where task_identifier = 't')")
    until(lambda: "its report waits" in caplog.text, "the report that waits")
    assert db.execute("select state from pgworker.jobs where id = %s", [job.id]).fetchone() == ("running",)
    lingering.commit()
    until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", job.id)
    assert caplog.text.count("its report waits") == 1
    assert "trying again" not in caplog.text
    worker.stop()
    background.join()


def test_progress_of_a_job_that_somebody_holds_keeps_no_other_from_being_reported(
    dsn: str, db: Db, connect: Connections, start: Callable[[Worker], Background]
) -> None:
    begun, go = threading.Event(), threading.Event()
    worker = Worker(dsn, poll_interval=0.05)

    @worker.task
    def held(_payload: Any, ctx: BlockingContext) -> None:
        begun.set()
        assert go.wait(60)
        ctx.progress("at last")
        ctx.wait_for_children()

    @worker.task
    async def t(_payload: Any, _ctx: Context) -> None:
        pass

    (job,) = add_jobs(db, [{"identifier": "held"}])
    background = start(worker)
    assert begun.wait(20)
    lingering = connect(autocommit=False)
    lingering.execute("select from pgworker.job where id = %s for update", [job.id])
    go.set()
    for _ in range(3):
        add_jobs(db, [{"identifier": "t"}] * 10)
        until_row(db, "select 1 where not exists (select from pgworker.job where task_identifier = 't')")
    lingering.commit()
    until_row(db, "select 1 where not exists (select from pgworker.job where id = %s)", job.id)
    worker.stop()
    background.join()


def test_many_jobs_that_somebody_holds_are_reported_when_they_are_free(
    dsn: str, db: Db, connect: Connections, start: Callable[[Worker], Background], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgworker_client.finishing._TRIES", 3)  # not enough to find out which of them
    gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    worker = Worker(dsn, poll_interval=0.05, concurrency=41)

    @worker.task
    async def held(_payload: Any, _ctx: Context) -> None:
        if not gates:
            gates.append((asyncio.get_running_loop(), asyncio.Event()))
        await gates[0][1].wait()

    @worker.task
    async def t(_payload: Any, _ctx: Context) -> None:
        pass

    add_jobs(db, [{"identifier": "held"}] * 40)
    background = start(worker)
    until_row(db, "select 1 from pgworker.jobs having count(*) filter (where state = 'running') = 40")
    until(lambda: gates, "the handlers run")
    lingering = connect(autocommit=False)
    lingering.execute("select from pgworker.job for update")
    loop, gate = gates[0]
    loop.call_soon_threadsafe(gate.set)
    for _ in range(3):
        add_jobs(db, [{"identifier": "t"}] * 10)
        until_row(db, "select 1 where not exists (select from pgworker.job where task_identifier = 't')")
    lingering.commit()
    until_row(db, "select 1 where not exists (select from pgworker.job)")
    worker.stop()
    background.join()
