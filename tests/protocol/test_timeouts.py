"""Runs that are long overdue are taken from workers that do not stop them, however present these are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import PAST, Conn, add, call, claim, claim_ids, refused, register, rows, seen, state, value
from tests.clock import at, maintain
from tests.connections import Connections
from tests.invariants import assert_consistent
from tests.trees.planting import node, plant, states


def _register(conn: Conn, timeouts: str | None) -> int:
    worker: int = value(conn, "select pgworker.register_worker('w', timeouts => %s::text::jsonb)", timeouts)
    return worker


def _deadlines(conn: Conn) -> list[dict[str, Any]]:
    return rows(conn, "select worker_id, timeout::text, job_ids from pgworker.deadline order by ends_at")


def test_an_overdue_run_fails_and_its_worker_learns_that_it_is_lost(db: Conn, connect: Connections) -> None:
    hung, other = connect(), connect()
    call(db, "configure_task", "a", timeout="1 minute")
    at(db, 0)
    at(hung, 0)
    job = add(db, "a", run_at=PAST)["id"]
    worker = _register(hung, None)
    assert claim_ids(hung, worker) == [job]
    maintain(db, 69.9)
    assert state(db, job) == "running"
    maintain(db, 70.1)
    now = seen(db, job)
    assert (now["state"], now["attempts"], now["last_error"]) == (
        "scheduled", 1, f"timed out after 60 s; worker {worker} (w) did not stop it",
    )  # fmt: skip
    assert call(hung, "heartbeat", worker) == [{"job_id": job, "notice": "lost"}]
    with refused(hung, "PW001"):
        call(hung, "complete_job", worker, job)
    at(other, 1000)
    assert claim_ids(other, register(other)) == [job]
    assert _deadlines(db)[-1:] == [{"worker_id": worker + 1, "timeout": "00:01:00", "job_ids": [job]}]


def test_the_timeouts_of_a_worker_come_before_those_of_the_task(db: Conn) -> None:
    call(db, "configure_task", "a", timeout="1 minute")
    call(db, "configure_task", "b", timeout="1 minute")
    at(db, 0)
    jobs = {name: add(db, name, run_at=PAST)["id"] for name in ("a", "b", "c", "d")}
    worker = _register(db, '{"a": 1.5, "c": 100}')
    claim(db, worker, 10)
    assert _deadlines(db) == [
        {"worker_id": worker, "timeout": "00:00:01.5", "job_ids": [jobs["a"]]},
        {"worker_id": worker, "timeout": "00:01:00", "job_ids": [jobs["b"]]},
        {"worker_id": worker, "timeout": "00:01:40", "job_ids": [jobs["c"]]},
    ]
    maintain(db, 11.6)
    assert [state(db, job) for job in jobs.values()] == ["scheduled", "running", "running", "running"]
    maintain(db, 70.1)
    assert [state(db, job) for job in jobs.values()] == ["ready", "scheduled", "running", "running"]
    maintain(db, 110.1)
    assert [state(db, job) for job in jobs.values()] == ["ready", "ready", "scheduled", "running"]


def test_a_claim_of_jobs_without_timeout_writes_no_deadline(tx: Conn) -> None:
    call(tx, "configure_task", "a", timeout="1 minute")
    worker = _register(tx, '{"b": 1}')
    add(tx, "c")
    assert len(claim(tx, worker, 10)) == 1
    assert _deadlines(tx) == []
    assert claim(tx, worker, 10) == []
    assert _deadlines(tx) == []


def test_what_has_ended_in_time_is_forgotten_within_a_minute(db: Conn) -> None:
    """However long the timeout is: deadlines must not pile up."""
    at(db, 0)
    worker = _register(db, '{"a": 1000000}')
    jobs = [add(db, "a", run_at=PAST)["id"] for _ in range(3)]
    assert claim_ids(db, worker, 3) == jobs
    call(db, "complete_job", worker, jobs[0])
    call(db, "release_jobs", worker, [jobs[1]])
    maintain(db, 61)
    assert _deadlines(db) == [{"worker_id": worker, "timeout": "277:46:40", "job_ids": [jobs[2]]}]
    call(db, "complete_job", worker, jobs[2])
    maintain(db, 122)
    assert _deadlines(db) == []


def test_a_run_of_another_attempt_is_not_taken_for_the_overdue_one(db: Conn) -> None:
    at(db, 0)
    worker = _register(db, '{"a": 5}')
    job = add(db, "a", run_at=PAST)["id"]
    claim(db, worker)
    call(db, "fail_job", worker, job, "broken", retry_at=PAST)
    at(db, 10)
    claim(db, worker)
    maintain(db, 16)
    assert state(db, job) == "running"
    maintain(db, 26)
    assert state(db, job) == "scheduled"


def test_a_run_after_one_that_was_given_back_has_its_own_time(db: Conn) -> None:
    """Its attempt does not count, so the next one has the same number."""
    at(db, 0)
    worker = _register(db, '{"a": 5}')
    job = add(db, "a", run_at=PAST)["id"]
    claim(db, worker)
    call(db, "release_jobs", worker, [job])
    at(db, 10)
    assert claim_ids(db, worker) == [job]
    maintain(db, 16)
    assert (state(db, job), seen(db, job)["attempts"]) == ("running", 1)
    maintain(db, 26)
    assert state(db, job) == "scheduled"


def test_a_parent_that_waited_for_its_children_has_its_own_time(db: Conn) -> None:
    at(db, 0)
    worker = _register(db, '{"parent": 5}')
    parent = add(db, "parent", run_at=PAST)["id"]
    claim(db, worker)
    (child,) = call(db, "add_children", worker, parent, '[{"identifier": "child"}]')
    assert value(db, "select pgworker.wait_for_children(%s, %s)", worker, parent)
    call(db, "complete_jobs", [child["id"]])
    at(db, 10)
    assert claim_ids(db, worker) == [parent]
    maintain(db, 16)
    assert state(db, parent) == "running"


def test_the_last_attempt_fails_for_good_and_the_parent_hears_of_it(db: Conn) -> None:
    at(db, 0)
    ids = plant(db, node("root", node("a", max_attempts=1, run_at=PAST)))
    claim(db, _register(db, '{"a": 5}'))
    maintain(db, 16)
    assert states(db, ids) == {"root": "failed", "a": "failed"}
    assert seen(db, ids["a"])["last_error"].startswith("timed out after 5 s; worker")
    assert_consistent(db)


def test_an_overdue_run_that_was_to_be_cancelled_ends_as_cancelled(db: Conn) -> None:
    at(db, 0)
    job = add(db, "a", run_at=PAST)["id"]
    claim(db, _register(db, '{"a": 5}'))
    call(db, "cancel_jobs", [job], "not needed")
    maintain(db, 16)
    assert (state(db, job), seen(db, job)["last_error"]) == ("cancelled", "not needed")


def test_a_row_that_somebody_holds_is_looked_at_a_second_later(db: Conn, connect: Connections) -> None:
    """It may be the report that ends it; nobody waits for that."""
    at(db, 0)
    job = add(db, "a", run_at=PAST)["id"]
    claim(db, _register(db, '{"a": 5}'))
    holder = connect(autocommit=False)
    holder.execute("select from pgworker.job where id = %s for update", [job])
    maintain(db, 16)
    assert state(db, job) == "running"
    holder.rollback()
    maintain(db, 16.5)
    assert state(db, job) == "running"
    maintain(db, 17.1)
    assert state(db, job) == "scheduled"
    maintain(db, 18.2)
    assert _deadlines(db) == []


def test_the_grace_is_a_setting(db: Conn) -> None:
    call(db, "configure", "timeout_grace", "1 hour")
    at(db, 0)
    job = add(db, "a", run_at=PAST)["id"]
    claim(db, _register(db, '{"a": 5}'))
    maintain(db, 3600)
    assert state(db, job) == "running"
    maintain(db, 3606)
    assert state(db, job) == "scheduled"


def test_the_queue_of_an_overdue_run_goes_on(db: Conn) -> None:
    at(db, 0)
    first, second = (add(db, name, run_at=PAST, queue_name="q")["id"] for name in ("a", "b"))
    worker = _register(db, '{"a": 5}')
    assert claim_ids(db, worker, 2) == [first]
    maintain(db, 16)
    at(db, 17)
    assert claim_ids(db, worker, 2) == [second]


@pytest.mark.parametrize(
    "timeouts", ["[]", "5", '{"a": 0}', '{"a": -1}', '{"a": "5"}', '{"a": null}', '{"a": 1e10}', '{"b": 1, "a": {}}']
)
def test_timeouts_that_are_none_are_refused(tx: Conn, timeouts: str) -> None:
    with refused(tx, "22023", "timeouts must be an object of seconds", hint="Write"):
        _register(tx, timeouts)
    assert value(tx, "select count(*) from pgworker.worker") == 0


def test_the_time_of_a_run_that_has_not_begun_counts_from_when_that_was_said_last(db: Conn) -> None:
    call(db, "configure_task", "b", timeout="5 seconds")
    at(db, 0)
    waiting, begun, other = (add(db, name, run_at=PAST)["id"] for name in ("a", "a", "b"))
    worker = _register(db, '{"a": 5}')
    assert claim_ids(db, worker, 3) == [waiting, begun, other]
    for seconds in (10, 20, 30):
        at(db, seconds)
        call(db, "restart_timeouts", worker, [other, waiting, waiting, None, 12345678])
        maintain(db, seconds + 4)
    assert [state(db, job) for job in (waiting, begun, other)] == ["running", "ready", "running"]
    maintain(db, 44.9)
    assert state(db, waiting) == "running"
    maintain(db, 45.1)
    assert [seen(db, job)["last_error"] for job in (waiting, other)] == [
        f"timed out after 5 s; worker {worker} (w) did not stop it"
    ] * 2


def test_nobody_restarts_the_time_of_what_he_does_not_hold(db: Conn) -> None:
    at(db, 0)
    worker = _register(db, '{"a": 5}')
    job, free = add(db, "a", run_at=PAST)["id"], add(db, "b", run_at=PAST)["id"]
    assert claim_ids(db, worker) == [job]
    at(db, 10)
    call(db, "restart_timeouts", register(db), [job, free])
    call(db, "restart_timeouts", worker, [job], [2])
    call(db, "restart_timeouts", worker, None)
    call(db, "restart_timeouts", 12345678, [job])
    assert state(db, free) == "ready"
    with refused(db, "22023", "attempts must name one attempt per job: 2 for 1 jobs"):
        call(db, "restart_timeouts", worker, [job], [1, 1])
    maintain(db, 16)
    assert state(db, job) == "scheduled"


def test_the_time_of_a_run_whose_row_somebody_holds_is_not_waited_for(db: Conn, connect: Connections) -> None:
    at(db, 0)
    worker = _register(db, '{"a": 5}')
    jobs = [add(db, "a", run_at=PAST)["id"] for _ in range(2)]
    assert claim_ids(db, worker, 2) == jobs
    holder = connect(autocommit=False)
    holder.execute("select from pgworker.job where id = %s for update", [jobs[0]])
    at(db, 10)
    call(db, "restart_timeouts", worker, jobs, [1, 1])
    holder.rollback()
    maintain(db, 16)
    assert [state(db, job) for job in jobs] == ["scheduled", "running"]
