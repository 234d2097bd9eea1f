"""Named queues: one job at a time each, in order, and none of them in another's way."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim, claim_ids, register, rows, seen, value
from tests.clock import move_clock
from tests.connections import Connections


def queue_of(conn: Conn, name: str, count: int, **arguments: Any) -> list[int]:
    return [add(conn, queue_name=name, **arguments)["id"] for _ in range(count)]


def test_a_queue_runs_one_job_at_a_time_in_order(tx: Conn) -> None:
    worker = register(tx)
    ids = queue_of(tx, "q", 4)
    for job in ids:
        assert claim_ids(tx, worker, 10) == [job]
        assert claim_ids(tx, worker, 10) == []
        call(tx, "complete_job", worker, job)
    assert claim_ids(tx, worker, 10) == []


def test_one_call_takes_one_job_of_each_queue(tx: Conn) -> None:
    worker = register(tx)
    q, r = queue_of(tx, "q", 3), queue_of(tx, "r", 3)
    plain = [add(tx)["id"] for _ in range(2)]
    assert claim_ids(tx, worker, 100) == [q[0], r[0], *plain]


def test_another_worker_does_not_get_past_the_running_job(db: Conn, connect: Connections) -> None:
    other = connect()
    one, two = register(db), register(other)
    first, second = queue_of(db, "q", 2)
    with db.transaction():
        assert claim_ids(db, one) == [first]
        assert claim_ids(other, two, 10) == []  # not even before the claim is committed
    assert claim_ids(other, two, 10) == []
    call(db, "complete_job", one, first)
    assert claim_ids(other, two, 10) == [second]


def test_two_claims_of_a_queue_that_never_ran_do_not_both_get_it(db: Conn, connect: Connections) -> None:
    other = connect()
    one, two = register(db), register(other)
    first, second = queue_of(db, "new", 2)
    other.execute("set lock_timeout = '2s'")
    with db.transaction(force_rollback=True):
        assert claim_ids(db, one) == [first]
        assert claim_ids(other, two, 10) == []
    assert claim_ids(other, two, 10) == [first]
    assert seen(db, second)["state"] == "ready"


ENDINGS = {
    "complete_job": "select pgworker.complete_job(%(worker)s, %(job)s)",
    "fail_job": "select pgworker.fail_job(%(worker)s, %(job)s, 'no')",
    "fail for good": "select pgworker.fail_job(%(worker)s, %(job)s, 'no', permanent := true)",
    "cancel_job": "select pgworker.cancel_job(%(worker)s, %(job)s)",
    "finish_jobs completed": "select pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], null, null, null)",
    "finish_jobs with result": (
        "select pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], array['1'::jsonb], null, null)"
    ),
    "finish_jobs failed": "select pgworker.finish_jobs(%(worker)s, null, null, array[%(job)s::bigint], array['no'])",
    "release_jobs": "select pgworker.release_jobs(%(worker)s, array[%(job)s::bigint])",
    "unregister_worker": "select pgworker.unregister_worker(%(worker)s)",
    "force_unlock_workers": "select count(*) from pgworker.force_unlock_workers(array[%(worker)s::bigint])",
    "deleted by its owner": "delete from pgworker.job where id = %(job)s",
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_however_its_job_ends_the_queue_goes_on_at_once(tx: Conn, ending: str) -> None:
    worker, other = register(tx), register(tx)
    first, second = queue_of(tx, "q", 2)
    assert claim_ids(tx, worker) == [first]
    assert claim_ids(tx, other) == []
    tx.execute(ENDINGS[ending], {"worker": worker, "job": first})
    back_in_front = ending in ("release_jobs", "unregister_worker", "force_unlock_workers")
    assert claim_ids(tx, other, 10) == [first if back_in_front else second]


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_a_queue_comes_free_for_a_session_that_has_long_passed_it(db: Conn, connect: Connections, ending: str) -> None:
    holder = connect()
    worker, other = register(holder), register(db)
    first, second = queue_of(db, "q", 2)
    assert claim_ids(holder, worker) == [first]
    plain = [add(db)["id"] for _ in range(50)]
    assert claim_ids(db, other, 20) == plain[:20]
    holder.execute(ENDINGS[ending], {"worker": worker, "job": first})
    back_in_front = ending in ("release_jobs", "unregister_worker", "force_unlock_workers")
    assert claim_ids(db, other, 2) == [first if back_in_front else second, plain[20]]


def test_a_failed_job_goes_behind_and_blocks_nobody(tx: Conn) -> None:
    worker = register(tx)
    first, second, third = queue_of(tx, "q", 3)
    assert claim_ids(tx, worker) == [first]
    call(tx, "fail_job", worker, first, "it broke")
    assert claim_ids(tx, worker) == [second]
    call(tx, "complete_job", worker, second)
    move_clock(tx, value(tx, "select (now() + interval '1 minute')::text"))
    assert claim_ids(tx, worker) == [third]  # was due earlier
    call(tx, "complete_job", worker, third)
    assert [(job["id"], job["attempts"]) for job in claim(tx, worker)] == [(first, 2)]


def test_a_head_of_the_future_does_not_block_what_is_due(tx: Conn) -> None:
    worker = register(tx)
    add(tx, queue_name="q", run_at=FUTURE, priority=-10)
    due = add(tx, queue_name="q", priority=10)["id"]
    assert claim_ids(tx, worker, 10) == [due]


def test_within_a_queue_order_is_priority_run_at_id(tx: Conn) -> None:
    worker = register(tx)
    chosen = random.Random(1)
    for _ in range(30):
        add(tx, queue_name="q", priority=chosen.choice([-1, 0, 1]), run_at=f"20{chosen.randint(10, 24)}-01-01")
    expected = value(tx, "select array_agg(id order by priority, run_at, id) from pgworker.jobs")
    ran = []
    while jobs := claim_ids(tx, worker, 10):
        ran += jobs
        call(tx, "complete_job", worker, jobs[0])
    assert ran == expected


def test_what_is_added_in_front_of_a_queue_runs_next(db: Conn) -> None:
    worker = register(db)
    first, second = queue_of(db, "q", 2)
    assert claim_ids(db, worker) == [first]
    urgent = add(db, queue_name="q", priority=-1)["id"]
    early = add(db, queue_name="q", run_at=PAST)["id"]
    for job, following in [(first, urgent), (urgent, early), (early, second)]:
        call(db, "complete_job", worker, job)
        assert claim_ids(db, worker, 10) == [following]


def test_a_worker_that_knows_one_task_is_not_stopped_by_another_task_at_the_head(tx: Conn) -> None:
    one, two = register(tx), register(tx)
    unknown, known = add(tx, "unknown", queue_name="q")["id"], add(tx, "known", queue_name="q")["id"]
    assert claim_ids(tx, one, 10, tasks=["known"]) == [known]
    assert claim_ids(tx, two, 10, tasks=["unknown"]) == []  # still one at a time
    call(tx, "complete_job", one, known)
    assert claim_ids(tx, one, 10, tasks=["known"]) == []
    assert claim_ids(tx, two, 10, tasks=["unknown"]) == [unknown]


def test_forbidden_flags_at_the_head_stop_neither_queue_nor_worker(tx: Conn) -> None:
    worker = register(tx)
    flagged, plain = add(tx, queue_name="q", flags=["x"])["id"], add(tx, queue_name="q")["id"]
    assert claim_ids(tx, worker, 10, forbidden_flags=["x"]) == [plain]
    call(tx, "complete_job", worker, plain)
    assert claim_ids(tx, worker, 10) == [flagged]


@pytest.mark.parametrize("max_jobs", [1, 10, 1000])
def test_a_long_line_behind_a_busy_queue_hides_no_other_job(db: Conn, max_jobs: int) -> None:
    worker = register(db)
    db.execute("select pgworker.add_job('a', queue_name := 'busy') from generate_series(1, 3000)")
    busy = value(db, "select min(id) from pgworker.jobs")
    assert claim_ids(db, worker, max_jobs) == [busy]
    others = [*queue_of(db, "other", 1), add(db)["id"], add(db, priority=5)["id"]]
    found: list[int] = []
    while jobs := claim_ids(db, worker, max_jobs):
        found += jobs
    assert found == others
    call(db, "complete_job", worker, busy)
    assert claim_ids(db, worker, max_jobs) == [busy + 1]


@pytest.mark.parametrize("max_jobs", [1, 30, 1000])
def test_more_queues_than_one_batch_are_all_served(db: Conn, max_jobs: int) -> None:
    worker = register(db)
    db.execute("select pgworker.add_job('a', queue_name := 'q' || n % 70) from generate_series(1, 210) n")
    ran: list[dict[str, Any]] = []
    claims = 0
    while jobs := claim(db, worker, max_jobs):
        claims += 1
        assert len({job["queue_name"] for job in jobs}) == len(jobs)
        ran += jobs
        ids = [job["id"] for job in jobs]
        call(db, "finish_jobs", worker, ids, None, None, None)
    assert len({job["id"] for job in ran}) == 210
    for name in {job["queue_name"] for job in ran}:
        of_queue = [job["id"] for job in ran if job["queue_name"] == name]
        assert of_queue == sorted(of_queue)
    assert rows(db, "select from pgworker.jobs") == []


def test_many_sessions_never_run_two_jobs_of_a_queue_at_once(db: Conn, connect: Connections) -> None:
    sessions = [connect() for _ in range(6)]
    workers = [register(session) for session in sessions]
    db.execute("select pgworker.add_job('a', queue_name := 'q' || n % 4) from generate_series(1, 200) n")
    chosen = random.Random(7)
    running: dict[int, tuple[int, str]] = {}
    ended = 0
    while ended < 200:
        which = chosen.randrange(6)
        if running and chosen.random() < 0.5:
            job = chosen.choice(list(running))
            holder, _ = running.pop(job)
            call(sessions[holder], "complete_job", workers[holder], job)
            ended += 1
        else:
            jobs = claim(sessions[which], workers[which], chosen.choice([1, 3]))
            assert jobs or running, "all queues are free, and a worker gets nothing"
            for claimed in jobs:
                assert claimed["queue_name"] not in {queue for _, queue in running.values()}
                running[claimed["id"]] = (which, claimed["queue_name"])
