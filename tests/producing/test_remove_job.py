"""remove_job: what is pending goes, what runs loses key and retries, and the caller sees which."""

from __future__ import annotations

import pytest

from tests.calling import Conn, Row, add, call, claim_ids, contents, job_row, register, rows, seen, value
from tests.connections import Connections
from tests.lifecycle import FINISHED, bring
from tests.sessions import Background


def remove(conn: Conn, key: str | None) -> Row:
    (job,) = call(conn, "remove_job", key)
    return job


@pytest.mark.parametrize("state", ["ready", "scheduled", "retrying"])
def test_a_pending_job_is_removed_and_returned_as_it_was(tx: Conn, state: str) -> None:
    job = add(tx, job_key="k", payload='{"n": 1}', queue_name="q")["id"]
    bring(tx, job, state)
    before = seen(tx, job)
    other = add(tx, job_key="l")
    assert remove(tx, "k") == before
    assert rows(tx, "select * from pgworker.jobs") == [other]


@pytest.mark.parametrize("state", ["running", "stopping"])
def test_a_running_job_goes_on_without_key_and_retries(tx: Conn, state: str) -> None:
    worker = register(tx)
    job = add(tx, job_key="k")["id"]
    bring(tx, job, state, worker)
    before = seen(tx, job)
    assert remove(tx, "k") == before | {"key": None, "max_attempts": 1} == seen(tx, job)
    assert remove(tx, "k")["id"] is None
    call(tx, "fail_job", worker, job, "it broke")
    assert seen(tx, job)["state"] == ("failed" if state == "running" else "cancelled")
    assert claim_ids(tx, worker, 10) == []


def test_a_run_that_was_removed_can_still_complete(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, job_key="k")["id"]
    assert claim_ids(tx, worker) == [job]
    remove(tx, "k")
    value(tx, "select pgworker.complete_job(%s, %s)", worker, job)
    assert job_row(tx, job) is None


@pytest.mark.parametrize("state", FINISHED)
def test_a_finished_job_is_not_removed(tx: Conn, state: str) -> None:
    job = add(tx, job_key="k")["id"]
    bring(tx, job, state)
    before = contents(tx)
    assert set(remove(tx, "k").values()) == {None}
    assert contents(tx) == before


@pytest.mark.parametrize("key", ["unknown", "", "K", None])
def test_an_unknown_or_null_key_gives_a_null_row_and_removes_nothing(tx: Conn, key: str | None) -> None:
    add(tx, job_key="k")
    add(tx)  # its key is null, and null is not equal to null
    before = contents(tx)
    assert set(remove(tx, key).values()) == {None}
    assert contents(tx) == before


def test_a_removed_jobs_queue_is_not_kept_busy(tx: Conn) -> None:
    worker = register(tx)
    add(tx, queue_name="q", job_key="k")
    behind = add(tx, queue_name="q")["id"]
    remove(tx, "k")
    assert claim_ids(tx, worker, 10) == [behind]


@pytest.mark.parametrize("commits", [True, False])
def test_a_removal_that_meets_a_claim_waits_and_sees_what_came_of_it(
    db: Conn, connect: Connections, commits: bool
) -> None:
    claimer, remover = connect(), connect()
    worker = register(claimer)
    job = add(db, job_key="k")["id"]
    claimer.execute("begin")
    assert claim_ids(claimer, worker) == [job]
    removing = Background(remover, "select * from pgworker.remove_job('k')")
    removing.wait_until_blocked(db)
    claimer.execute("commit" if commits else "rollback")
    (removed,) = removing.result()
    assert (removed["id"], removed["state"]) == (job, "running" if commits else "ready")
    left = job_row(db, job)
    assert (left is not None) == commits
    assert claim_ids(claimer, worker, 10) == []
