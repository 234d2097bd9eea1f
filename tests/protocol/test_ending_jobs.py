"""How one job ends: completed, failed and tried again, failed for good, cancelled, given back; what is kept of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from math import exp
from typing import Any

import pytest

from tests.calling import (
    FUTURE,
    PAST,
    Conn,
    add,
    call,
    claim,
    claim_ids,
    job_row,
    refused,
    register,
    seen,
    state,
    value,
)
from tests.clock import move_clock
from tests.connections import Connections


def claimed(conn: Conn, worker: int, **arguments: Any) -> int:
    """Return the id of a new job that the worker holds."""
    job: int = add(conn, **arguments)["id"]
    assert claim_ids(conn, worker) == [job]
    return job


def test_a_result_is_kept_with_the_job(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker, payload='{"n": 1}', queue_name="q", job_key="k", flags=["x"], priority=2)
    running = seen(tx, job)
    value(tx, "select pgworker.complete_job(%s, %s, %s)", worker, job, '{"sent": true}')
    done = seen(tx, job)
    assert done["finished_at"] is not None
    assert done == running | {
        "state": "completed", "result": {"sent": True}, "locked_at": None, "locked_by": None,
        "finished_at": done["finished_at"],
    }  # fmt: skip


def test_a_job_without_result_leaves_nothing(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    call(tx, "complete_job", worker, job)
    assert job_row(tx, job) is None


@pytest.mark.parametrize("result", ["null", "false", "[]", "{}", '"text"', "0"])
def test_any_json_is_a_result(tx: Conn, result: str) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    value(tx, "select pgworker.complete_job(%s, %s, %s::jsonb)", worker, job, result)
    assert value(tx, "select result = %s::jsonb from pgworker.jobs where id = %s", result, job) is True


@pytest.mark.parametrize("attempts", [1, 2, 9, 10, 11, 40, 32765])
@pytest.mark.parametrize("run_at", [PAST, "now"])
def test_a_failure_retries_after_exactly_the_documented_time(tx: Conn, attempts: int, run_at: str) -> None:
    worker = register(tx)
    move_clock(tx, "2030-01-01 00:00+00")
    job = add(tx, max_attempts=32767, run_at="2030-01-01 00:00+00" if run_at == "now" else run_at)["id"]
    call(tx, "reschedule_jobs", [job], attempts=attempts - 1)
    assert [found["attempts"] for found in claim(tx, worker)] == [attempts]
    move_clock(tx, "2030-01-01 01:00+00")  # it ran for an hour
    (failed,) = call(tx, "fail_job", worker, job, "it broke")
    assert failed == seen(tx, job)
    assert (failed["state"], failed["attempts"], failed["last_error"]) == ("scheduled", attempts, "it broke")
    assert (failed["locked_by"], failed["locked_at"]) == (None, None)
    waits = failed["run_at"] - datetime.fromisoformat("2030-01-01 01:00:00+00:00")
    assert abs(waits - timedelta(seconds=exp(min(attempts, 10)))) < timedelta(microseconds=2)


def test_a_retry_counts_from_when_it_was_due_if_that_is_later(tx: Conn) -> None:
    # Whoever runs ahead of its time (a clock that went back) must not be tried again before it was due at all.
    worker = register(tx)
    move_clock(tx, "2030-01-02 00:00+00")
    job = claimed(tx, worker, run_at="2030-01-01 12:00+00")
    move_clock(tx, "2030-01-01 00:00+00")
    (failed,) = call(tx, "fail_job", worker, job, "it broke")
    waits = failed["run_at"] - datetime.fromisoformat("2030-01-01 12:00:00+00:00")
    assert abs(waits - timedelta(seconds=exp(1))) < timedelta(microseconds=2)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_job_is_tried_max_attempts_times_and_then_failed_with_its_last_error(tx: Conn, bulk: bool) -> None:
    worker = register(tx)
    job = add(tx, max_attempts=3)["id"]
    for attempt in (1, 2, 3):
        assert claim_ids(tx, worker) == [job]
        if bulk:
            (told,) = call(tx, "finish_jobs", worker, None, None, [job], [f"error {attempt}"])
            assert told == {"job_id": job, "outcome": "failed" if attempt == 3 else "scheduled"}
        else:
            call(tx, "fail_job", worker, job, f"error {attempt}")
        after = seen(tx, job)
        assert (after["state"], after["attempts"], after["last_error"]) == (
            "failed" if attempt == 3 else "scheduled", attempt, f"error {attempt}",
        )  # fmt: skip
        assert claim_ids(tx, worker) == []
        if attempt < 3:
            call(tx, "reschedule_jobs", [job], run_at=PAST)
    assert seen(tx, job)["finished_at"] is not None


def test_one_attempt_means_one(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker, max_attempts=1)
    (failed,) = call(tx, "fail_job", worker, job, "it broke")
    assert (failed["state"], failed["attempts"]) == ("failed", 1)


def test_a_retry_can_be_given_its_time(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    (failed,) = call(tx, "fail_job", worker, job, "later", retry_at=FUTURE)
    assert str(failed["run_at"]) == "2100-01-01 00:00:00+00:00"
    assert failed["state"] == "scheduled"


def test_a_retry_of_the_past_is_due_at_once(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    (failed,) = call(tx, "fail_job", worker, job, "again", retry_at=PAST)
    assert failed["state"] == "ready"
    assert [found["attempts"] for found in claim(tx, worker)] == [2]


@pytest.mark.parametrize("retry_at", ["infinity", "-infinity", "10000-01-01 00:00+00"])
def test_a_retry_at_a_time_that_no_client_can_read_is_refused(tx: Conn, retry_at: str) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    with refused(tx, "22023", "retry_at must lie between the years 1 and 9999, got "):
        call(tx, "fail_job", worker, job, "later", retry_at=retry_at)


def test_a_permanent_failure_is_not_tried_again(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    (failed,) = call(tx, "fail_job", worker, job, "hopeless", permanent=True, retry_at=PAST)
    assert failed == seen(tx, job)
    assert (failed["state"], failed["attempts"], failed["max_attempts"], failed["last_error"]) == (
        "failed", 1, 25, "hopeless",
    )  # fmt: skip
    assert claim_ids(tx, worker) == []


def test_a_null_permanent_is_not_permanent(tx: Conn) -> None:
    worker = register(tx)
    (failed,) = call(tx, "fail_job", worker, claimed(tx, worker), "it broke", permanent=None)
    assert failed["state"] == "scheduled"


@pytest.mark.parametrize("permanent", [False, True])
def test_what_is_left_of_a_batch_replaces_the_payload(tx: Conn, permanent: bool) -> None:
    worker = register(tx)
    job = claimed(tx, worker, payload="[1, 2, 3]")
    (failed,) = call(tx, "fail_job", worker, job, "2 of 3", payload="[2]", permanent=permanent)
    assert failed["payload"] == seen(tx, job)["payload"] == [2]


def test_without_a_payload_a_failure_keeps_the_jobs(tx: Conn) -> None:
    worker = register(tx)
    (failed,) = call(tx, "fail_job", worker, claimed(tx, worker, payload="[1]"), "it broke", payload=None)
    assert failed["payload"] == [1]


def test_a_failure_without_a_message_has_one_nevertheless(tx: Conn) -> None:
    worker = register(tx)
    (failed,) = call(tx, "fail_job", worker, claimed(tx, worker), None)
    assert failed["last_error"]


def test_a_success_after_failures_keeps_the_last_error_readable(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    call(tx, "fail_job", worker, job, "it broke", retry_at=PAST)
    assert claim_ids(tx, worker) == [job]
    value(tx, "select pgworker.complete_job(%s, %s, '1')", worker, job)
    assert (seen(tx, job)["state"], seen(tx, job)["last_error"], seen(tx, job)["attempts"]) == (
        "completed", "it broke", 2,
    )  # fmt: skip


@pytest.mark.parametrize(("reason", "shown"), [("not wanted", "not wanted"), (None, "cancelled by its handler")])
def test_a_handler_can_cancel_its_job(tx: Conn, reason: str | None, shown: str) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    (cancelled,) = call(tx, "cancel_job", worker, job, reason)
    assert cancelled == seen(tx, job)
    assert (cancelled["state"], cancelled["last_error"]) == ("cancelled", shown)


def test_released_jobs_get_their_attempt_back_and_nothing_else_changes(tx: Conn) -> None:
    worker = register(tx)
    ids = [add(tx, queue_name="q")["id"], add(tx, max_attempts=1)["id"], add(tx)["id"]]
    before = [seen(tx, job) for job in ids]
    assert claim_ids(tx, worker, 3) == ids
    call(tx, "release_jobs", worker, [ids[0], ids[1], None, 2**40])
    assert [seen(tx, job) for job in ids[:2]] == before[:2]
    assert seen(tx, ids[2])["state"] == "running"
    again = claim(tx, worker, 10)
    assert [(job["id"], job["attempts"]) for job in again] == [(ids[0], 1), (ids[1], 1)]


def test_a_released_retry_keeps_what_its_last_attempt_left(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    call(tx, "set_progress", worker, job, '{"page": 3}')
    call(tx, "fail_job", worker, job, "it broke", retry_at=PAST)
    before = seen(tx, job)
    assert claim_ids(tx, worker) == [job]
    call(tx, "release_jobs", worker, [job])
    assert seen(tx, job) == before
    assert (before["last_error"], before["attempts"], before["progress"]) == ("it broke", 1, {"page": 3})


def test_progress_is_seen_at_once_and_by_the_next_attempt(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    for progress in ('{"page": 1}', "[2]", '{"page": 3}'):
        call(tx, "set_progress", worker, job, progress)
        assert value(tx, "select progress = %s::jsonb from pgworker.jobs where id = %s", progress, job) is True
    call(tx, "fail_job", worker, job, "it broke", retry_at=PAST)
    assert [found["progress"] for found in claim(tx, worker)] == [{"page": 3}]
    call(tx, "set_progress", worker, job, None)
    assert seen(tx, job)["progress"] is None


def test_progress_is_seen_from_another_session_while_the_job_runs(db: Conn, connect: Connections) -> None:
    other = connect()
    worker = register(db)
    job = claimed(db, worker)
    for progress in (1, 2):
        call(db, "set_progress", worker, job, str(progress))
        assert (state(other, job), seen(other, job)["progress"]) == ("running", progress)


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_progress_is_kept_when_the_job_ends(tx: Conn, end: str) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    call(tx, "set_progress", worker, job, '{"page": 3}')
    if end == "completed":
        value(tx, "select pgworker.complete_job(%s, %s, '1')", worker, job)
    elif end == "failed":
        call(tx, "fail_job", worker, job, "it broke", permanent=True)
    else:
        call(tx, "cancel_job", worker, job)
    assert (seen(tx, job)["state"], seen(tx, job)["progress"]) == (end, {"page": 3})


def test_without_children_there_is_nothing_to_wait_for(tx: Conn) -> None:
    worker = register(tx)
    job = claimed(tx, worker)
    before = seen(tx, job)
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, job) is False
    assert seen(tx, job) == before
