"""job_attempts: every run that ended, with its times, its worker and its error, as long as its job is known."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, add, call, claim_ids, contents, register, rows, state, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.waiting import until_gone, until_locks_free


def attempts(conn: Conn, job: int) -> list[tuple[int, str, str | None, str | None]]:
    return [
        (row["attempt"], row["outcome"], row["worker_name"], row["error"])
        for row in rows(
            conn, "select * from pgworker.job_attempts where job_id = %s order by started_at, ended_at", job
        )
    ]


def at(conn: Conn, hour: int, minute: int = 0) -> None:
    move_clock(conn, f"2030-01-01 {hour:02}:{minute:02}:00+00")


def test_each_failed_run_is_recorded_with_its_times_and_its_worker(tx: Conn) -> None:
    at(tx, 10)
    one, two, job = register(tx, "one"), register(tx, "two"), add(tx, max_attempts=3)["id"]
    assert claim_ids(tx, one) == [job]
    at(tx, 10, 5)
    call(tx, "finish_jobs", one, None, None, [job], ["first"])
    at(tx, 11)
    assert claim_ids(tx, two) == [job]
    at(tx, 11, 5)
    call(tx, "fail_job", two, job, "second")
    at(tx, 12)
    assert claim_ids(tx, one) == [job]
    call(tx, "finish_jobs", one, None, None, [job], ["third"])
    assert state(tx, job) == "failed"
    assert attempts(tx, job) == [
        (1, "failed", "one", "first"), (2, "failed", "two", "second"), (3, "failed", "one", "third"),
    ]  # fmt: skip
    first = rows(tx, "select * from pgworker.job_attempts where job_id = %s order by started_at", job)[0]
    assert (str(first["started_at"]), str(first["ended_at"]), first["worker_id"]) == (
        "2030-01-01 10:00:00+00:00", "2030-01-01 10:05:00+00:00", one,
    )  # fmt: skip
    call(tx, "retry_jobs", [job])  # what was is not forgotten
    assert claim_ids(tx, two) == [job]
    value(tx, "select pgworker.complete_job(%s, %s, '1')", two, job)
    assert attempts(tx, job)[3:] == [(1, "completed", "two", None)]


def test_a_run_that_completes_its_job_is_seen_as_long_as_the_job_is_kept(tx: Conn) -> None:
    worker, job = register(tx, "one"), add(tx)["id"]
    call(tx, "configure", "keep_completed", "1 hour")
    assert claim_ids(tx, worker) == [job]
    call(tx, "finish_jobs", worker, [job], None, None, None)
    assert attempts(tx, job) == [(1, "completed", "one", None)]
    assert contents(tx)["attempt"] == []  # it is not written twice


def test_a_cancelled_run_is_recorded_and_a_cancelled_job_that_did_not_run_has_none(tx: Conn) -> None:
    worker, job, other, third = register(tx), add(tx)["id"], add(tx)["id"], add(tx)["id"]
    assert claim_ids(tx, worker, 2) == [job, other]
    call(tx, "cancel_jobs", [job, third], reason="not wanted")
    call(tx, "finish_jobs", worker, [job], None, None, None)
    call(tx, "cancel_job", worker, other, "by itself")
    assert attempts(tx, job) == [(1, "cancelled", None, "not wanted")]
    assert attempts(tx, other) == [(1, "cancelled", None, "by itself")]
    assert attempts(tx, third) == []


def test_a_run_whose_worker_vanished_is_recorded_the_last_one_too(db: Conn, connect: Connections) -> None:
    call(db, "configure", "rescue_grace", "0")
    job = add(db, max_attempts=2)["id"]
    for _ in range(2):
        gone = connect()
        worker = register(gone, "gone")
        assert claim_ids(gone, worker) == [job]
        pid = gone.info.backend_pid
        gone.close()
        until_gone(db, pid)
        until_locks_free(db, pid)
        for _ in range(3):
            call(db, "maintain")
    assert state(db, job) == "failed"
    (first, last) = attempts(db, job)
    assert (first[:3], last[:3]) == ((1, "rescued", "gone"), (2, "rescued", "gone"))
    assert "(gone) vanished while it ran this job" in str(first[3])


def test_work_given_back_and_work_taken_away_is_recorded(tx: Conn) -> None:
    worker, job = register(tx, "one"), add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "release_jobs", worker, [job])
    assert claim_ids(tx, worker) == [job]
    call(tx, "force_unlock_workers", [worker])
    assert claim_ids(tx, worker) == [job]
    call(tx, "unregister_worker", worker)
    assert [(one[0], one[1]) for one in attempts(tx, job)] == [(1, "released"), (1, "rescued"), (2, "released")]
    assert attempts(tx, job)[0][3] is None


def test_nothing_is_recorded_when_history_is_off(tx: Conn) -> None:
    call(tx, "configure", "history", "off")
    worker = register(tx)
    retried, failed, released = (add(tx)["id"] for _ in range(3))
    assert claim_ids(tx, worker, 3) == [retried, failed, released]
    call(tx, "fail_job", worker, retried, "broke")
    call(tx, "fail_job", worker, failed, "broke", permanent=True)
    call(tx, "release_jobs", worker, [released])
    assert contents(tx)["attempt"] == []
    assert value(tx, "select count(*) from pgworker.job_attempts") == 0


@pytest.mark.parametrize("how", ["completed", "removed", "pruned", "cleaned", "deleted", "not kept"])
def test_a_job_that_is_forgotten_takes_its_attempts_along(tx: Conn, how: str) -> None:
    at(tx, 10)
    if how == "not kept":
        call(tx, "configure", "keep_failed", "0")
    worker, job, other = register(tx), add(tx, job_key="k")["id"], add(tx, queue_name="q")["id"]
    assert claim_ids(tx, worker, 2) == [job, other]
    for each in (job, other):
        call(tx, "fail_job", worker, each, "broke", retry_at="2030-01-01 10:00:00+00")
    assert len(contents(tx)["attempt"]) == 2
    if how == "removed":
        call(tx, "remove_job", "k")
    elif how == "deleted":
        tx.execute("delete from pgworker.job where id = %s", [job])
    else:
        assert job in claim_ids(tx, worker, 1)
        if how == "completed":
            call(tx, "finish_jobs", worker, [job], None, None, None)
        else:
            call(tx, "fail_job", worker, job, "again", permanent=True)
            if how == "pruned":
                at(tx, 10, 30)
                call(tx, "maintain")
                assert len(attempts(tx, job)) == 2
                move_clock(tx, "2030-02-01 10:00:00+00")
                call(tx, "maintain")
            elif how == "not kept":
                at(tx, 10, 30)
                call(tx, "maintain")
            elif how == "cleaned":
                call(tx, "cleanup", ["delete_failed_jobs"])
    assert attempts(tx, job) == []
    assert [one["job_id"] for one in rows(tx, "select job_id from pgworker.attempt")] == [other]


def test_a_child_that_is_removed_with_its_tree_takes_its_attempts_along(tx: Conn) -> None:
    worker = register(tx)
    call(tx, "add_job_tree", Jsonb({"identifier": "p", "children": [{"identifier": "c", "on_failure": "remove"}]}))
    (job,) = claim_ids(tx, worker)
    call(tx, "fail_job", worker, job, "broke", permanent=True)
    assert (state(tx, job), contents(tx)["attempt"]) == (None, [])


def test_a_batch_of_failures_is_recorded_by_one_statement(db: Conn) -> None:
    worker = register(db)
    call(db, "add_jobs", Jsonb([{"identifier": "t", "max_attempts": 1 + n % 2} for n in range(1000)]))
    ids = claim_ids(db, worker, 1000)
    calls = "select coalesce(sum(n_tup_ins), 0) from pg_stat_xact_user_tables where relname = 'attempt'"
    with db.transaction():
        call(db, "finish_jobs", worker, None, None, ids, [f"e{n}" for n in range(1000)])
        assert value(db, calls) == 1000
    found: list[Any] = rows(db, "select job_id, error from pgworker.job_attempts order by job_id")
    assert [(row["job_id"], row["error"]) for row in found] == [(job, f"e{n}") for n, job in enumerate(ids)]
