"""What is claimed first: priority, run_at, id, whatever the order of adding and whoever looked before."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.calling import PAST, Conn, add, call, claim, claim_ids, register, rows, seen, value, values
from tests.cursors import sweeps_cost

CLAIMED_JOB = (
    "id", "task_identifier", "payload", "attempts", "max_attempts", "queue_name", "priority", "run_at", "key", "flags",
    "parent_id", "root_id", "progress", "created_at", "timeout",
)  # fmt: skip


def drain(conn: Conn, worker: int, max_jobs: int, **arguments: Any) -> list[int]:
    """Claim until nothing is left; each claim must be in order."""
    ids: list[int] = []
    while jobs := claim(conn, worker, max_jobs, **arguments):
        keys = [(job["priority"], job["run_at"], job["id"]) for job in jobs]
        assert keys == sorted(keys)
        ids += [job["id"] for job in jobs]
    return ids


def in_claim_order(conn: Conn, where: str = "true") -> list[int]:
    found: list[int] = value(
        conn, f"select array_agg(id order by priority, run_at, id) from pgworker.jobs where {where}"
    )
    return found


def test_a_claimed_row_tells_all_that_the_worker_needs(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, "a", payload='{"n": 1}', queue_name="q", run_at=PAST, max_attempts=3, job_key="k", priority=-2,
              flags=["x"])  # fmt: skip
    (claimed,) = claim(tx, worker)
    assert tuple(claimed) == CLAIMED_JOB
    assert claimed == {name: job.get(name) for name in CLAIMED_JOB} | {"attempts": 1}
    after = seen(tx, job["id"])
    since = after["locked_at"]
    assert after == job | {
        "attempts": 1, "state": "running", "locked_by": worker, "locked_at": since, "started_at": since,
    }  # fmt: skip
    assert value(tx, "select %s between now() and clock_timestamp()", after["locked_at"])


@pytest.mark.parametrize("max_jobs", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_order_is_priority_run_at_id(tx: Conn, max_jobs: int, seed: int) -> None:
    chosen = random.Random(seed)
    for _ in range(60):
        add(tx, priority=chosen.choice([-32768, -1, 0, 1, 7, 32767]), run_at=f"20{chosen.randint(10, 24)}-01-01")
    assert drain(tx, register(tx), max_jobs) == in_claim_order(tx)


@pytest.mark.parametrize("max_jobs", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_queued_and_unqueued_jobs_are_one_order(tx: Conn, max_jobs: int, seed: int) -> None:
    chosen = random.Random(seed)
    for n in range(60):
        queue = f"q{n}" if chosen.random() < 0.5 else None
        add(tx, priority=chosen.choice([-1, 0, 1]), run_at=f"20{chosen.randint(10, 24)}-01-01", queue_name=queue)
    assert drain(tx, register(tx), max_jobs) == in_claim_order(tx)


@pytest.mark.parametrize("queued", [False, True])
def test_a_job_added_later_with_a_lower_number_comes_first_at_once(db: Conn, queued: bool) -> None:
    worker = register(db)
    later = [add(db, priority=0, queue_name=f"q{n}" if queued else None)["id"] for n in range(4)]
    assert claim_ids(db, worker) == later[:1]
    for priority in (-5, -3, -5, -32768, -4):  # seen before or not, between others or before them
        urgent = add(db, priority=priority, queue_name=f"urgent{random.random()}" if queued else None)["id"]
        sweeps_cost(db, 0)
        assert claim_ids(db, worker) == [urgent]
    between, most = (add(db, priority=p, queue_name=f"two{p}" if queued else None)["id"] for p in (-1, -9))
    sweeps_cost(db, 0)
    assert claim_ids(db, worker, 2) == [most, between]
    assert claim_ids(db, worker, 10) == later[1:]


@pytest.mark.parametrize("queued", [False, True])
def test_a_job_added_later_with_an_earlier_time_comes_first_at_once(db: Conn, queued: bool) -> None:
    worker = register(db)
    first = [add(db, queue_name=f"q{n}" if queued else None)["id"] for n in range(4)]
    assert claim_ids(db, worker) == first[:1]
    earlier = add(db, run_at=PAST, queue_name="e1" if queued else None)["id"]
    sweeps_cost(db, 0)
    assert claim_ids(db, worker) == [earlier]
    a_moment_ago = value(
        db,
        "select (pgworker.add_job('a', run_at := now() - interval '1 minute', queue_name := %s)).id",
        "e2" if queued else None,
    )
    sweeps_cost(db, 0)
    assert claim_ids(db, worker, 10) == [a_moment_ago, *first[1:]]


@pytest.mark.parametrize("run_at", ["0001-01-02", "1970-01-01", "1999-12-31 23:59:59.999999+00"])
def test_no_time_is_too_early(tx: Conn, run_at: str) -> None:
    worker = register(tx)
    now = add(tx)["id"]
    early = [add(tx, run_at=run_at)["id"] for _ in range(3)]
    assert claim_ids(tx, worker) == early[:1]
    assert claim_ids(tx, worker, 2) == early[1:]
    assert claim_ids(tx, worker, 9) == [now]


@pytest.mark.parametrize("run_at", ["9999-12-30", "2100-01-01"])
def test_a_job_of_the_future_is_not_claimed_and_hides_none_behind_it(tx: Conn, run_at: str) -> None:
    worker = register(tx)
    future = add(tx, run_at=run_at, priority=-1)["id"]
    due = add(tx)["id"]
    assert claim_ids(tx, worker, 10) == [due]
    assert claim_ids(tx, worker, 10) == []
    assert seen(tx, future)["state"] == "scheduled"


@pytest.mark.parametrize("max_jobs", [1, 9])
@pytest.mark.parametrize("queued", [False, True])
def test_fifty_priorities_are_served_completely_and_in_order(db: Conn, max_jobs: int, queued: bool) -> None:
    worker = register(db)
    db.execute(
        "select pgworker.add_job('a', priority := n * 7 %% 50 - 25, queue_name := case when %s then 'q' || n end) "
        "from generate_series(1, 100) n",
        [queued],
    )
    expected = in_claim_order(db)
    assert drain(db, worker, max_jobs) == expected
    sweeps_cost(db, 0)
    late = add(db, priority=24, queue_name="late" if queued else None)["id"]
    assert claim_ids(db, worker, 10) == [late]
    sweeps_cost(db, 0)
    first = add(db, priority=-26, queue_name="first" if queued else None)["id"]
    last = add(db, priority=32767, queue_name="last" if queued else None)["id"]
    assert claim_ids(db, worker, 10) == [first, last]


def test_priorities_that_have_run_dry_leave_room_for_others(db: Conn) -> None:
    worker = register(db)
    for low in (0, 60, 120):  # always new ones, ascending: nothing more comes of those that the session knows
        ids = values(
            db,
            "select (pgworker.add_job('a', priority := n)).id from generate_series(%s::int, %s::int) n",
            low,
            low + 59,
        )
        if low:
            sweeps_cost(db, 0)
        assert drain(db, worker, 8) == ids


def test_a_batch_is_full_while_jobs_are_there(tx: Conn) -> None:
    worker = register(tx)
    ids = [add(tx, priority=n % 3)["id"] for n in range(30)]
    sizes = [len(claim(tx, worker, 7)) for _ in range(6)]
    assert sizes == [7, 7, 7, 7, 2, 0]
    assert len(rows(tx, "select from pgworker.jobs where state = 'running'")) == len(ids)


def test_get_job_is_get_jobs_for_one(tx: Conn) -> None:
    worker = register(tx)
    first, second, third = (add(tx, name, flags=[name])["id"] for name in "abc")
    (job,) = call(tx, "get_job", worker)
    assert tuple(job) == CLAIMED_JOB
    assert (job["id"], job["attempts"]) == (first, 1)
    assert call(tx, "get_job", worker, tasks=["z"]) == []
    assert call(tx, "get_job", worker, tasks=["b", "c"], forbidden_flags=["b"])[0]["id"] == third
    assert call(tx, "get_job", worker)[0]["id"] == second
    assert call(tx, "get_job", worker) == []


def test_the_attempt_counts_from_the_claim(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    for attempt in (1, 2, 3):
        assert [claimed["attempts"] for claimed in claim(tx, worker)] == [attempt]
        assert seen(tx, job)["attempts"] == attempt
        call(tx, "fail_job", worker, job, "it broke", retry_at=PAST)
