"""reschedule_jobs: null leaves a value as it is, zero is a value, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim, claim_ids, refused, register, seen, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.lifecycle import bring, job_in
from tests.sessions import Background


@pytest.mark.parametrize(
    ("change", "stored"),
    [
        ({"run_at": FUTURE}, {"state": "scheduled"}),
        ({"priority": 0}, {"priority": 0}),
        ({"priority": -32768}, {"priority": -32768}),
        ({"priority": 32767}, {"priority": 32767}),
        ({"attempts": 0}, {"attempts": 0}),
        ({"attempts": 4}, {"attempts": 4}),
        ({"max_attempts": 2}, {"max_attempts": 2}),
        ({"max_attempts": 32767}, {"max_attempts": 32767}),
        ({"attempts": 9, "max_attempts": 10, "priority": 1}, {"attempts": 9, "max_attempts": 10, "priority": 1}),
        ({}, {}),
        ({"run_at": None, "priority": None, "attempts": None, "max_attempts": None}, {}),
    ],
)
def test_only_what_is_given_changes_and_zero_is_given(tx: Conn, change: dict[str, Any], stored: dict[str, Any]) -> None:
    worker = register(tx)
    job = add(tx, priority=7, max_attempts=5, queue_name="q", flags=["x"], job_key="k")["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "fail_job", worker, job, "it broke", retry_at=PAST)
    before = seen(tx, job)
    assert before["attempts"] == 1
    (after,) = call(tx, "reschedule_jobs", [job], **change)
    moved = {"run_at": after["run_at"]} if change.get("run_at") else {}
    assert after == before | stored | moved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"priority": 32768}, "priority must be a whole number from -32768 to 32767, got 32768"),
        ({"priority": -32769}, "priority must be a whole number from -32768 to 32767, got -32769"),
        ({"max_attempts": 0}, "max_attempts must be a whole number from 1 to 32767, got 0"),
        ({"max_attempts": 32768}, "max_attempts must be a whole number from 1 to 32767, got 32768"),
        ({"run_at": "infinity"}, "run_at must lie between the years 1 and 9999, got infinity"),
        ({"run_at": "-infinity"}, "run_at must lie between the years 1 and 9999, got -infinity"),
        ({"attempts": -1}, "attempts must be a whole number from 0 to 32766, got -1"),
        ({"attempts": 32767}, "attempts must be a whole number from 0 to 32766, got 32767"),
    ],
)
def test_the_limits_are_those_of_adding(tx: Conn, change: dict[str, Any], says: str) -> None:
    job = add(tx)["id"]
    with refused(tx, "22023", says):
        call(tx, "reschedule_jobs", [job], **change)
    with refused(tx, "22023", says, hint="to leave it as it is"):  # not what leaving it out means for add_job
        call(tx, "reschedule_jobs", [], **change)


@pytest.mark.parametrize("change", [{"max_attempts": 1}, {"attempts": 5}, {"attempts": 3, "max_attempts": 3}])
def test_a_live_job_is_not_left_without_an_attempt(tx: Conn, change: dict[str, Any]) -> None:
    # It would be neither claimable nor failed.
    fine = add(tx)["id"]
    job = add(tx, "other", max_attempts=5)["id"]
    bring(tx, job, "retrying")
    with refused(tx, "22023", "would leave job ", hint="permanently_fail_jobs"):
        call(tx, "reschedule_jobs", [fine, job], **change)


def test_a_job_moved_to_the_past_is_claimed_next(tx: Conn) -> None:
    worker = register(tx)
    moved, other = add(tx, run_at=FUTURE)["id"], add(tx)["id"]
    call(tx, "reschedule_jobs", [moved], run_at=PAST)
    assert claim_ids(tx, worker, 10) == [moved, other]


def test_a_job_moved_to_the_future_is_not_claimed(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    call(tx, "reschedule_jobs", [job], run_at=FUTURE)
    assert claim_ids(tx, worker, 10) == []


def failed(conn: Conn, attempts: int, max_attempts: int, run_at: str = PAST) -> int:
    """Return a job that has failed in that attempt, for good."""
    job: int = add(conn, "failing", max_attempts=max_attempts, run_at=run_at)["id"]
    worker = register(conn)
    for _ in range(attempts - 1):
        assert claim_ids(conn, worker, tasks=["failing"]) == [job]
        call(conn, "fail_job", worker, job, "it broke", retry_at=run_at)
    assert claim_ids(conn, worker, tasks=["failing"]) == [job]
    call(conn, "fail_job", worker, job, "it broke", permanent=True)
    return job


@pytest.mark.parametrize(
    ("change", "revived"),
    [
        ({}, False),
        ({"priority": 5}, False),
        ({"attempts": 2}, True),
        ({"attempts": 0}, True),
        ({"max_attempts": 4}, True),
        ({"max_attempts": 3}, False),
        ({"attempts": 5, "max_attempts": 6}, True),
        ({"run_at": PAST}, False),
    ],
)
def test_a_failed_job_is_live_again_only_if_attempts_are_left(tx: Conn, change: dict[str, Any], revived: bool) -> None:
    job = failed(tx, 3, 3)
    before = seen(tx, job)
    changed = call(tx, "reschedule_jobs", [job], **change)
    after = seen(tx, job)
    if not revived:
        assert changed == []
        assert after == before
        return
    assert changed == [after]
    assert after["state"] == "ready"
    assert after["attempts"] == change.get("attempts", 3)
    assert after["max_attempts"] == change.get("max_attempts", 3)
    assert after["last_error"] == "it broke"
    assert [claimed["attempts"] for claimed in claim(tx, register(tx))] == [after["attempts"] + 1]


def test_a_failed_job_can_come_back_in_the_future(tx: Conn) -> None:
    job = failed(tx, 1, 2)
    (after,) = call(tx, "reschedule_jobs", [job], run_at=FUTURE)
    assert after["state"] == "scheduled"
    assert claim_ids(tx, register(tx)) == []


def test_a_failed_job_that_comes_back_keeps_its_time_unless_told_otherwise(tx: Conn) -> None:
    # Null leaves a value as it is: nobody asked for next year's job to run now.
    job = add(tx, run_at=FUTURE)["id"]
    call(tx, "permanently_fail_jobs", [job])
    (after,) = call(tx, "reschedule_jobs", [job], priority=5)
    assert str(after["run_at"]) == "2100-01-01 00:00:00+00:00"
    assert after["state"] == "scheduled"


def test_a_job_that_comes_back_runs_and_ends_like_any_other(tx: Conn) -> None:
    worker = register(tx)
    job = failed(tx, 2, 2)
    call(tx, "reschedule_jobs", [job], attempts=0)
    assert claim_ids(tx, worker) == [job]
    call(tx, "fail_job", worker, job, "again", retry_at=PAST)
    assert claim_ids(tx, worker) == [job]
    value(tx, "select pgworker.complete_job(%s, %s, '1')", worker, job)
    assert seen(tx, job)["state"] == "completed"


def test_rescheduling_to_now_in_a_queue_keeps_the_queue_serial(tx: Conn) -> None:
    worker = register(tx)
    move_clock(tx, "2030-01-01")
    first, second = (add(tx, queue_name="q", run_at=FUTURE)["id"] for _ in range(2))
    call(tx, "reschedule_jobs", [second, first], run_at="2029-01-01")
    assert claim_ids(tx, worker, 10) == [first]
    assert call(tx, "reschedule_jobs", [first], run_at=FUTURE) == []
    call(tx, "complete_job", worker, first)
    assert claim_ids(tx, worker, 10) == [second]


def test_the_state_named_in_the_call_is_seen_in_what_it_returns(tx: Conn) -> None:
    jobs = [job_in(tx, "ready"), job_in(tx, "scheduled")]
    changed = call(tx, "reschedule_jobs", jobs, run_at=FUTURE)
    assert [job["state"] for job in changed] == ["scheduled", "scheduled"]


def test_what_comes_to_rest_meanwhile_is_not_waited_for(db: Conn, connect: Connections) -> None:
    """It comes before what is locked already: whoever has it may be waiting for that one."""
    holder, taker, administrator = connect(), connect(), connect()
    worker = register(db)
    running = add(db, priority=-1)["id"]
    assert claim_ids(db, worker) == [running]
    later = add(db)["id"]
    holder.execute("begin")
    holder.execute("select from pgworker.job where id = %s for update", [later])
    query = "select id from pgworker.reschedule_jobs(array[%s::bigint, %s], priority => 5)"
    rescheduling = Background(administrator, query, running, later)
    rescheduling.wait_until_blocked(db)
    call(db, "release_jobs", worker, [running])
    taker.execute("begin")
    taker.execute("select from pgworker.job where id = %s for update", [running])
    holder.execute("rollback")
    assert rescheduling.result() == [{"id": later}]
    taker.execute("rollback")
    assert seen(db, running)["priority"] == -1
