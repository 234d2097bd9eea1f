"""Only the holder ends a job: what anybody else reports changes nothing and is told so."""

from __future__ import annotations

import pytest

from tests.calling import PAST, Conn, add, call, claim_ids, contents, refused, register, rows, seen, state, value
from tests.connections import Connections
from tests.lifecycle import STATES, bring
from tests.sessions import Background

REPORTS = {
    "complete_job": "select pgworker.complete_job(%(worker)s, %(job)s, '{\"n\": 1}')",
    "fail_job": "select pgworker.fail_job(%(worker)s, %(job)s, 'no')",
    "fail_job permanent": "select pgworker.fail_job(%(worker)s, %(job)s, 'no', permanent := true, payload := '[1]')",
    "cancel_job": "select pgworker.cancel_job(%(worker)s, %(job)s, 'no')",
    "set_progress": "select pgworker.set_progress(%(worker)s, %(job)s, '1')",
    "wait_for_children": "select pgworker.wait_for_children(%(worker)s, %(job)s)",
}

IN_BULK = {
    "completed": "select outcome from pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], null, null, null)",
    "with result": (
        "select outcome from pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], array['1'::jsonb], null, null)"
    ),
    "failed": "select outcome from pgworker.finish_jobs(%(worker)s, null, null, array[%(job)s::bigint], array['no'])",
}

report = pytest.mark.parametrize("report", list(REPORTS))
in_bulk = pytest.mark.parametrize("report", list(IN_BULK))


def refuses(conn: Conn, query: str, worker: int | None, job: int | None) -> None:
    shown = ["null" if number is None else str(number) for number in (job, worker)]
    with refused(conn, "PW001", f"job {shown[0]} is not held by worker {shown[1]}"):
        conn.execute(query, {"worker": worker, "job": job})


def is_lost(conn: Conn, query: str, worker: int | None, job: int | None) -> None:
    before = contents(conn)
    assert [outcome for (outcome,) in conn.execute(query, {"worker": worker, "job": job}).fetchall()] == ["lost"]
    assert contents(conn) == before


@report
@pytest.mark.parametrize("state", STATES)
def test_a_stranger_cannot_report_on_a_job_in_any_state(tx: Conn, state: str, report: str) -> None:
    stranger = register(tx)
    job = add(tx, queue_name="q")["id"]
    bring(tx, job, state)
    refuses(tx, REPORTS[report], stranger, job)


@in_bulk
@pytest.mark.parametrize("state", STATES)
def test_a_stranger_cannot_finish_jobs_in_any_state(tx: Conn, state: str, report: str) -> None:
    stranger = register(tx)
    job = add(tx, queue_name="q")["id"]
    bring(tx, job, state)
    is_lost(tx, IN_BULK[report], stranger, job)


@report
@pytest.mark.parametrize("state", [state for state in STATES if state not in ("running", "stopping")])
def test_a_former_holder_cannot_report_once_more(tx: Conn, state: str, report: str) -> None:
    worker = register(tx)
    job = add(tx, queue_name="q")["id"]
    bring(tx, job, state, worker)
    refuses(tx, REPORTS[report], worker, job)


@report
def test_what_never_was_cannot_be_reported_on(tx: Conn, report: str) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    for someone, something in [(worker, 2**40), (worker, None), (None, job), (-1, job), (None, None)]:
        refuses(tx, REPORTS[report], someone, something)


@in_bulk
def test_what_never_was_is_lost(tx: Conn, report: str) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    for someone, something in [(worker, 2**40), (worker, None), (None, job), (-1, job), (None, None)]:
        is_lost(tx, IN_BULK[report], someone, something)


@report
def test_who_had_the_job_before_cannot_end_the_run_of_who_has_it_now(tx: Conn, report: str) -> None:
    old, new = register(tx), register(tx)
    job = add(tx, queue_name="q")["id"]
    assert claim_ids(tx, old) == [job]
    call(tx, "force_unlock_workers", [old])
    assert claim_ids(tx, new) == [job]
    refuses(tx, REPORTS[report], old, job)
    assert (seen(tx, job)["state"], seen(tx, job)["locked_by"]) == ("running", new)


ATTEMPTS = {
    "complete_job": "select pgworker.complete_job(%(worker)s, %(job)s, attempt := %(attempt)s)",
    "fail_job": "select pgworker.fail_job(%(worker)s, %(job)s, 'no', attempt := %(attempt)s)",
    "cancel_job": "select pgworker.cancel_job(%(worker)s, %(job)s, attempt := %(attempt)s)",
}

BULK_ATTEMPTS = {
    name: query.replace("])", "], array[%(attempt)s::int])").replace(
        "null, null)", "null, null, array[%(attempt)s::int])"
    )
    for name, query in IN_BULK.items()
}


def second_attempt(conn: Conn) -> tuple[int, int]:
    """Return a worker, and a job that it holds in its second attempt after it lost the first."""
    worker = register(conn)
    job = add(conn, queue_name="q")["id"]
    assert claim_ids(conn, worker) == [job]
    call(conn, "force_unlock_workers", [worker])
    assert claim_ids(conn, worker) == [job]
    return worker, job


@pytest.mark.parametrize("query", list(ATTEMPTS))
def test_a_worker_cannot_end_its_second_attempt_with_the_outcome_of_its_first(tx: Conn, query: str) -> None:
    worker, job = second_attempt(tx)
    for attempt in (1, 3, 0):
        with refused(tx, "PW001", f"job {job} is not held by worker {worker}"):
            tx.execute(ATTEMPTS[query], {"worker": worker, "job": job, "attempt": attempt})
    tx.execute(ATTEMPTS[query], {"worker": worker, "job": job, "attempt": 2})
    assert value(tx, "select count(*) from pgworker.jobs where state = 'running'") == 0


@pytest.mark.parametrize("query", list(BULK_ATTEMPTS))
def test_finishing_many_is_fenced_by_attempt_too(tx: Conn, query: str) -> None:
    worker, job = second_attempt(tx)
    for attempt in (1, 3, 0):
        before = contents(tx)
        outcome = tx.execute(BULK_ATTEMPTS[query], {"worker": worker, "job": job, "attempt": attempt}).fetchall()
        assert outcome == [("lost",)]
        assert contents(tx) == before
    outcome = tx.execute(BULK_ATTEMPTS[query], {"worker": worker, "job": job, "attempt": 2}).fetchall()
    assert outcome == [("scheduled" if query == "failed" else "completed",)]


def test_releasing_what_another_holds_changes_nothing(tx: Conn) -> None:
    worker, stranger = register(tx), register(tx)
    held, free = add(tx, queue_name="q")["id"], add(tx)["id"]
    assert claim_ids(tx, worker) == [held]
    before = contents(tx)
    call(tx, "release_jobs", stranger, [held, free, 2**40, None])
    call(tx, "release_jobs", None, [held])
    call(tx, "release_jobs", worker, [])
    assert contents(tx) == before


def test_a_job_replaced_by_key_is_still_its_holders_to_end(tx: Conn) -> None:
    worker = register(tx)
    old = add(tx, job_key="k")["id"]
    assert claim_ids(tx, worker) == [old]
    new = add(tx, job_key="k")["id"]
    call(tx, "complete_job", worker, old)
    assert rows(tx, "select id, state from pgworker.jobs") == [{"id": new, "state": "ready"}]


def test_a_job_given_back_by_its_worker_is_not_its_own_any_more(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, run_at=PAST)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "release_jobs", worker, [job])
    for query in REPORTS.values():
        refuses(tx, query, worker, job)


def test_a_late_report_that_waits_does_not_end_the_next_attempt(db: Conn, connect: Connections) -> None:
    """The row that it has looked up is another one when the wait is over, and held by the same worker."""
    again, late = connect(), connect()
    worker = register(again)
    job = add(db)["id"]
    assert claim_ids(again, worker) == [job]
    with again.transaction():
        call(again, "fail_job", worker, job, "x", retry_at=PAST)
        assert claim_ids(again, worker) == [job]
        report = Background(
            late, "select outcome from pgworker.finish_jobs(%s, %s, null, null, null, '{1}')", worker, [job]
        )
        report.wait_until_blocked(db)
    assert report.result() == [{"outcome": "lost"}]
    assert state(db, job) == "running"
