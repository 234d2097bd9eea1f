"""finish_jobs: many outcomes in one call, each told, none harmed by another."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, add, call, claim_ids, contents, job_row, refused, register, rows, seen, state
from tests.clock import move_clock
from tests.connections import Connections
from tests.sessions import Background


def finish(
    conn: Conn,
    worker: int | None,
    completed: list[Any] | None = None,
    results: list[Any] | None = None,
    failed: list[Any] | None = None,
    errors: list[Any] | None = None,
    *attempts: list[Any] | None,
) -> list[tuple[int | None, str]]:
    wrapped = None if results is None else [None if result is None else Jsonb(result) for result in results]
    told = call(conn, "finish_jobs", worker, completed, wrapped, failed, errors, *attempts)
    return [(line["job_id"], line["outcome"]) for line in told]


def held(conn: Conn, worker: int, count: int, **arguments: Any) -> list[int]:
    """Return the ids of so many new jobs that the worker holds."""
    ids = [add(conn, **arguments)["id"] for _ in range(count)]
    assert claim_ids(conn, worker, count) == ids
    return ids


def test_every_outcome_in_one_call_is_told_in_the_order_given(tx: Conn) -> None:
    worker, other = register(tx), register(tx)
    again, again_too, plain, result, cancelled, cancelled_too = held(tx, worker, 6)
    (last,) = held(tx, worker, 1, max_attempts=1)
    (foreign,) = held(tx, other, 1)
    free = add(tx)["id"]
    call(tx, "cancel_jobs", [cancelled, cancelled_too], reason="no need")
    before = [seen(tx, job) for job in (foreign, free)]
    told = finish(
        tx, worker,
        [result, foreign, plain, cancelled, 2**40], [{"n": 1}, {"n": 2}, None, {"n": 3}, {"n": 4}],
        [last, again, free, cancelled_too, again_too], ["l", "a", "f", "c", None],
    )  # fmt: skip
    assert told == [
        (result, "completed"), (foreign, "lost"), (plain, "completed"), (cancelled, "cancelled"), (2**40, "lost"),
        (last, "failed"), (again, "scheduled"), (free, "lost"), (cancelled_too, "cancelled"), (again_too, "scheduled"),
    ]  # fmt: skip
    assert [seen(tx, job) for job in (foreign, free)] == before
    assert (state(tx, result), seen(tx, result)["result"]) == ("completed", {"n": 1})
    assert job_row(tx, plain) is None
    assert [(state(tx, job), seen(tx, job)["last_error"]) for job in (cancelled, cancelled_too)] == [
        ("cancelled", "no need"), ("cancelled", "no need"),
    ]  # fmt: skip
    assert (state(tx, last), seen(tx, last)["last_error"]) == ("failed", "l")
    assert (state(tx, again), seen(tx, again)["last_error"]) == ("scheduled", "a")
    assert seen(tx, again_too)["last_error"]


def test_completions_without_results_leave_nothing_and_harm_no_other(tx: Conn) -> None:
    worker, other = register(tx), register(tx)
    ids = held(tx, worker, 5)
    (foreign,) = held(tx, other, 1)
    kept = add(tx)["id"]
    assert finish(tx, worker, [ids[3], foreign, ids[0]]) == [
        (ids[3], "completed"), (foreign, "lost"), (ids[0], "completed"),
    ]  # fmt: skip
    left = [(job["id"], job["state"]) for job in rows(tx, "select id, state from pgworker.jobs order by id")]
    assert left == [(job, "running") for job in (ids[1], ids[2], ids[4], foreign)] + [(kept, "ready")]


def test_a_cancelled_job_among_plain_completions_is_cancelled(tx: Conn) -> None:
    worker = register(tx)
    ids = held(tx, worker, 3)
    call(tx, "cancel_jobs", [ids[1]])
    assert finish(tx, worker, ids) == [(ids[0], "completed"), (ids[1], "cancelled"), (ids[2], "completed")]
    assert [state(tx, job) for job in ids] == [None, "cancelled", None]


@pytest.mark.parametrize("results", [None, [{"n": 1}, {"n": 1}, {"n": 1}]])
def test_a_job_named_twice_ends_once_and_is_told_once(tx: Conn, results: list[Any] | None) -> None:
    worker = register(tx)
    one, two = held(tx, worker, 2)
    assert finish(tx, worker, [one, two, one], results) == [(one, "completed"), (two, "completed")]
    assert finish(tx, worker, [one, two, one], results) == [(one, "lost"), (two, "lost")]


def test_a_failure_named_twice_counts_once(tx: Conn) -> None:
    worker = register(tx)
    (job,) = held(tx, worker, 1)
    assert finish(tx, worker, None, None, [job, job], ["first", "second"]) == [(job, "scheduled")]
    assert seen(tx, job)["attempts"] == 1
    assert seen(tx, job)["last_error"] in ("first", "second")


def test_a_job_that_was_both_completed_and_failed_ends_once_and_is_not_repeated(tx: Conn) -> None:
    worker = register(tx)
    (job,) = held(tx, worker, 1)
    assert finish(tx, worker, [job], None, [job], ["it broke"]) == [(job, "completed")]
    assert job_row(tx, job) is None


@pytest.mark.parametrize(
    "arguments", [(None, None, None, None), ([], [], [], []), (None, [], None, None), ([], None, None, [])]
)
def test_nothing_is_nothing(tx: Conn, arguments: tuple[Any, ...]) -> None:
    worker = register(tx)
    held(tx, worker, 1)
    before = contents(tx)
    assert finish(tx, worker, *arguments) == []
    assert contents(tx) == before


def test_null_ids_are_lost_and_harm_no_other(tx: Conn) -> None:
    worker = register(tx)
    one, two = held(tx, worker, 2)
    assert finish(tx, worker, [None, one, None], None, [None, two], ["x", "y"]) == [
        (None, "lost"), (one, "completed"), (two, "scheduled"),
    ]  # fmt: skip
    assert seen(tx, two)["last_error"] == "y"


def test_results_and_errors_that_are_left_out_at_the_end_are_none(tx: Conn) -> None:
    worker = register(tx)
    ids = held(tx, worker, 4)
    assert finish(tx, worker, ids[:2], [{"n": 1}], ids[2:], ["x"]) == [
        (ids[0], "completed"), (ids[1], "completed"), (ids[2], "scheduled"), (ids[3], "scheduled"),
    ]  # fmt: skip
    assert seen(tx, ids[0])["result"] == {"n": 1}
    assert job_row(tx, ids[1]) is None
    assert seen(tx, ids[2])["last_error"] == "x"
    assert seen(tx, ids[3])["last_error"]


def test_more_results_than_jobs_end_no_other_job(tx: Conn) -> None:
    worker = register(tx)
    one, two = held(tx, worker, 2)
    finish(tx, worker, [one], [{"n": 1}, {"n": 2}], [], ["x"])
    assert state(tx, two) == "running"
    assert len(rows(tx, "select from pgworker.jobs")) == 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_attempts_that_do_not_match_the_jobs_are_refused(tx: Conn, count: int) -> None:
    worker = register(tx)
    one, two = held(tx, worker, 2)
    with refused(tx, "22023", f"{count} for 1 completed and 1 failed"):
        finish(tx, worker, [one], None, [two], ["x"], [1] * count)


def test_attempts_belong_to_the_completed_first_and_then_to_the_failed(tx: Conn) -> None:
    worker = register(tx)
    ids = held(tx, worker, 4)
    assert finish(tx, worker, ids[:2], None, ids[2:], ["x", "y"], [1, 2, 2, 1]) == [
        (ids[0], "completed"), (ids[1], "lost"), (ids[2], "lost"), (ids[3], "scheduled"),
    ]  # fmt: skip
    assert finish(tx, worker, [ids[1]], None, [ids[2]], ["x"], [None, None]) == [
        (ids[1], "completed"), (ids[2], "scheduled"),
    ]  # fmt: skip


def test_of_completed_jobs_in_several_attempts_each_is_told_by_its_own(tx: Conn) -> None:
    worker = register(tx)
    first, again, late, other = held(tx, worker, 4)
    finish(tx, worker, None, None, [again], ["x"])
    tx.execute("select count(*) from pgworker.reschedule_jobs(%s, run_at => now() - interval '1 second')", [[again]])
    assert claim_ids(tx, worker) == [again]
    assert finish(tx, worker, [again, first, late], None, None, None, [2, 1, 2]) == [
        (again, "completed"), (first, "completed"), (late, "lost"),
    ]  # fmt: skip
    assert finish(tx, worker, [late, other], None, None, None, [1, None]) == [
        (late, "completed"), (other, "completed"),
    ]  # fmt: skip
    assert rows(tx, "select from pgworker.jobs") == []


def test_completed_jobs_are_locked_in_the_order_of_ids_wherever_they_lie(db: Conn, connect: Connections) -> None:
    """As configure_task locks all jobs of a task, also those that run: the two would wait for each other."""
    holder, reporting, admin = connect(), connect(), connect()
    worker = register(reporting)
    first, second = add(db, priority=2)["id"], add(db, priority=0)["id"]
    held_up = add(db, "b", priority=1)["id"]
    for job in (second, held_up, first):  # the first is written last
        assert claim_ids(reporting, worker) == [job]
    completed = [second, held_up, first]
    with holder.transaction():
        holder.execute("select from pgworker.job where id = %s for update", [held_up])
        report = Background(
            reporting, "select outcome from pgworker.finish_jobs(%s, %s, null, null, null)", worker, completed
        )
        report.wait_until_blocked(db)
        limit = Background(admin, "select pgworker.configure_task('a', max_concurrency => 1)")
        limit.wait_until_blocked(db)
    assert report.result() == [{"outcome": "completed"}] * 3
    limit.result()


def test_a_batch_of_thousands_ends_at_once(tx: Conn) -> None:
    move_clock(tx, "2030-01-01 00:00:00+00")  # it stands still: what failed is not due again before it is looked at
    worker = register(tx)
    tx.execute("select pgworker.add_job('a', queue_name := case when n % 2 = 0 then 'q' || n end) "
               "from generate_series(1, 4000) n")  # fmt: skip
    ids: list[int] = []
    while more := claim_ids(tx, worker, 1000):
        ids += more
    assert len(ids) == 4000
    told = finish(tx, worker, ids[:3000], None, ids[3000:], ["x"] * 1000)
    assert [job for job, _ in told] == ids
    assert [outcome for _, outcome in told] == ["completed"] * 3000 + ["scheduled"] * 1000
    assert rows(tx, "select state, count(*) as n from pgworker.jobs group by 1") == [{"state": "scheduled", "n": 1000}]
    assert rows(tx, "select from pgworker.queue where job_id is not null") == []


def test_a_finish_that_is_rolled_back_has_not_happened(tx: Conn) -> None:
    worker = register(tx)
    one, two = held(tx, worker, 2, queue_name=None)
    before = contents(tx)
    with tx.transaction(force_rollback=True):
        finish(tx, worker, [one], None, [two], ["x"])
    assert contents(tx) == before
    assert finish(tx, worker, [one, two]) == [(one, "completed"), (two, "completed")]
