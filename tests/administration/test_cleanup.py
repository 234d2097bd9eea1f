"""cleanup: what is not used any more is forgotten, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import Conn, add, call, claim_ids, contents, refused, register, rows, value
from tests.connections import Connections
from tests.lifecycle import job_in


def cleaned(conn: Conn, *tasks: str | None) -> None:
    call(conn, "cleanup", list(tasks))


ENDED = {"completed", "failed", "cancelled"}


def test_cleaning_up_forgets_failed_jobs_and_no_others(tx: Conn) -> None:
    for name in ("ready", "scheduled", "retrying", "running", "stopping", *ENDED):
        job_in(tx, name)
    cleaned(tx, "delete_failed_jobs")
    left = value(tx, "select array_agg(distinct state order by state) from pgworker.jobs")
    assert left == ["cancelled", "completed", "ready", "running", "scheduled"]
    assert value(tx, "select count(*) from pgworker.jobs") == 7


def test_failed_jobs_that_are_being_retried_are_neither_waited_for_nor_forgotten(
    db: Conn, connect: Connections
) -> None:
    """Whoever waited for one while holding another could be waited for by who retries both."""
    failed = [job_in(db, "failed") for _ in range(3)]
    retrying = connect(autocommit=False)
    call(retrying, "retry_jobs", [failed[1]])
    db.execute("set lock_timeout = '1 s'")
    cleaned(db, "delete_failed_jobs")
    assert rows(db, "select id from pgworker.jobs") == [{"id": failed[1]}]
    retrying.rollback()
    cleaned(db, "delete_failed_jobs")
    assert rows(db, "select id from pgworker.jobs") == []


def test_queues_in_use_or_paused_survive_a_cleanup(tx: Conn) -> None:
    worker = register(tx)
    running, waiting, gone = (add(tx, queue_name=name)["id"] for name in ("running", "pending", "gone"))
    assert claim_ids(tx, worker, 10) == [running, waiting, gone]
    call(tx, "release_jobs", worker, [waiting])
    call(tx, "complete_job", worker, gone)
    call(tx, "pause_queue", "paused")
    following = add(tx, queue_name="running")["id"]
    cleaned(tx, "gc_job_queues")
    assert value(tx, "select array_agg(name order by name) from pgworker.queue") == ["paused", "pending", "running"]
    assert claim_ids(tx, worker, 10) == [waiting]
    call(tx, "complete_job", worker, running)
    assert claim_ids(tx, worker, 10) == [following]
    add(tx, queue_name="paused")
    assert claim_ids(tx, worker, 10) == []


def test_a_pause_of_a_task_survives_a_cleanup(tx: Conn) -> None:
    worker = register(tx)
    call(tx, "pause_task", "paused")
    call(tx, "pause_task", "resumed")
    call(tx, "resume_task", "resumed")
    cleaned(tx, "gc_task_identifiers")
    assert value(tx, "select array_agg(identifier) from pgworker.task") == ["paused"]
    add(tx, "paused")
    other = add(tx, "resumed")["id"]
    assert claim_ids(tx, worker, 10) == [other]


def test_a_queue_works_again_after_it_was_forgotten(tx: Conn) -> None:
    worker = register(tx)
    first = add(tx, queue_name="q")["id"]
    assert claim_ids(tx, worker) == [first]
    call(tx, "complete_job", worker, first)
    cleaned(tx, "gc_job_queues")
    second, third = (add(tx, queue_name="q")["id"] for _ in range(2))
    assert claim_ids(tx, worker, 10) == [second]
    call(tx, "complete_job", worker, second)
    assert claim_ids(tx, worker, 10) == [third]


def test_a_queue_that_is_being_claimed_is_not_forgotten_under_the_claim(db: Conn, connect: Connections) -> None:
    claimer = connect()
    worker = register(claimer)
    first, second = (add(db, queue_name="q")["id"] for _ in range(2))
    assert claim_ids(claimer, worker) == [first]
    call(claimer, "complete_job", worker, first)
    db.execute("set lock_timeout = '2s'")
    with claimer.transaction():
        assert claim_ids(claimer, worker) == [second]
        cleaned(db, "gc_job_queues")
    assert value(db, "select job_id from pgworker.queue where name = 'q'") == second


def test_a_claim_during_a_cleanup_takes_nothing_from_a_limit(db: Conn, connect: Connections) -> None:
    cleaner = connect()
    call(db, "configure_task", "a", max_concurrency_per_key=2)
    worker = register(db)

    def claimed() -> list[int]:
        ids = claim_ids(db, worker, 10)
        call(db, "finish_jobs", worker, ids, None, None, None)
        return ids

    first = add(db, limit_key="k")["id"]
    assert claimed() == [first]
    with cleaner.transaction():
        cleaned(cleaner, "gc_job_queues")
        ids = [add(db, limit_key="k")["id"] for _ in range(4)]
        assert claim_ids(db, worker, 10) == []  # a permit made now would have a number that leaves a gap
    assert [claimed(), claimed()] == [ids[:2], ids[2:]]


def test_by_default_everything_is_cleaned_up(tx: Conn) -> None:
    job_in(tx, "failed", queue_name="q")
    kept = job_in(tx, "completed")
    call(tx, "pause_task", "t")
    call(tx, "resume_task", "t")
    call(tx, "cleanup")
    assert rows(tx, "select id from pgworker.jobs") == [{"id": kept}]
    assert contents(tx)["queue"] == contents(tx)["task"] == []


def test_cleaning_up_nothing_does_nothing(tx: Conn) -> None:
    job_in(tx, "failed", queue_name="q")
    before = contents(tx)
    cleaned(tx)
    assert contents(tx) == before


@pytest.mark.parametrize("tasks", [["everything"], ["delete_failed_jobs", "Delete_failed_jobs"], [None], [""], None])
def test_an_unknown_cleanup_task_is_refused_before_anything_is_cleaned(tx: Conn, tasks: list[Any] | None) -> None:
    job_in(tx, "failed")
    with refused(tx, "22023", "tasks must be cleanup tasks, got ", hint="delete_failed_jobs, gc_task_identifiers"):
        call(tx, "cleanup", tasks)
