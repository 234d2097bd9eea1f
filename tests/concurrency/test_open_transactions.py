"""A session that keeps its transaction open makes no worker wait, whatever it did; what it commits late is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.connections import Connections
from tests.invariants import assert_consistent
from tests.waiting import until

Conn = psycopg.Connection[Any]

ADD_FIVE = (
    "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object("
    "'identifier', 't', 'queue_name', case when n > 2 then 'q' || n end)) from generate_series(1, 5) n))"
)


@pytest.fixture
def lingering(connect: Connections) -> Iterator[Conn]:
    """A session in an open transaction."""
    conn = connect(autocommit=False)
    yield conn
    conn.rollback()


@pytest.fixture
def hasty(connect: Connections) -> Conn:
    """A session that gives up as soon as it has to wait for a lock."""
    return connect(options="-clock_timeout=1s -cstatement_timeout=20s")


def _register(conn: Conn) -> int:
    row = conn.execute("select pgworker.register_worker()").fetchone()
    assert row is not None
    if not conn.autocommit:
        conn.commit()
    return int(row[0])


def _claim(conn: Conn, worker_id: int, number: int = 100) -> list[int]:
    return [row[0] for row in conn.execute("select id from pgworker.get_jobs(%s, %s)", [worker_id, number])]


def test_an_uncommitted_claim_makes_no_other_claim_wait_also_of_a_queue_that_never_ran(
    db: Conn, lingering: Conn, hasty: Conn
) -> None:
    db.execute(ADD_FIVE)
    first, second = _register(lingering), _register(hasty)
    held = _claim(lingering, first)
    assert len(held) == 5
    # One more for each queue that the open transaction is about to make, one for a queue of its own, one without.
    db.execute(ADD_FIVE)
    db.execute("select pgworker.add_job('t', queue_name => 'other')")
    mine = _claim(hasty, second)
    assert len(mine) == 3
    hasty.execute("select count(*) from pgworker.finish_jobs(%s, %s, null, null, null)", [second, mine])
    lingering.commit()
    assert _claim(hasty, second) == []
    assert_consistent(db)
    lingering.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [first, held])
    lingering.commit()
    assert len(_claim(hasty, second)) == 3
    assert_consistent(db)


def test_an_uncommitted_claim_that_is_rolled_back_leaves_its_jobs_to_others(
    db: Conn, lingering: Conn, hasty: Conn
) -> None:
    db.execute(ADD_FIVE)
    first, second = _register(lingering), _register(hasty)
    held = _claim(lingering, first)
    assert _claim(hasty, second) == []
    lingering.rollback()
    found: list[int] = []

    def look() -> bool:
        found.extend(_claim(hasty, second))
        return len(found) == 5

    until(look, "the five jobs")
    assert sorted(found) == sorted(held)
    assert_consistent(db)


@pytest.mark.parametrize(
    "does",
    [
        "select pgworker.add_job('t')",
        "select pgworker.add_job('t', job_key => 'pending')",
        "select pgworker.add_job('t', queue_name => 'q3')",
        "select pgworker.add_job('t', queue_name => 'brand new')",
        ADD_FIVE,
        "select pgworker.remove_job('pending')",
        "select pgworker.cancel_jobs(array(select id from pgworker.jobs where key = 'pending'))",
        "select pgworker.reschedule_jobs(array(select id from pgworker.jobs where key = 'pending'), priority => 1)",
        "select pgworker.pause_task('never heard of')",
        "select pgworker.pause_queue('never heard of')",
        "select pgworker.pause_queue('q3')",
        "select pgworker.register_worker()",
        "select pgworker.maintain()",
        "select pgworker.cleanup()",
        "select pgworker.next_run_at()",
    ],
)
def test_a_producer_or_administrator_that_lingers_makes_no_worker_wait(
    db: Conn, lingering: Conn, hasty: Conn, does: str
) -> None:
    db.execute("select pgworker.add_job('t', job_key => 'pending')")
    db.execute("select pgworker.add_job('t', queue_name => 'q4')")
    db.execute("select pgworker.add_job('t')")
    worker_id = _register(hasty)
    lingering.execute(does.encode())
    claimed = _claim(hasty, worker_id)
    touches = "pending" in does
    assert len(claimed) == (2 if touches else 3)
    finished = hasty.execute(
        "select outcome from pgworker.finish_jobs(%s, %s, null, %s, '{broken}')", [worker_id, claimed[1:], claimed[:1]]
    )
    assert [row[0] for row in finished] == ["completed"] * (len(claimed) - 1) + ["scheduled"]
    hasty.execute("select pgworker.add_job('t', queue_name => 'q3')")
    hasty.execute("select pgworker.maintain()")
    hasty.execute("select * from pgworker.heartbeat(%s)", [worker_id])
    hasty.execute("select pgworker.unregister_worker(%s)", [worker_id])
    lingering.commit()
    assert_consistent(db)


@pytest.mark.parametrize("queue", [None, "q"])
def test_a_job_that_is_committed_late_is_claimed_soon(
    db: Conn, lingering: Conn, hasty: Conn, queue: str | None
) -> None:
    late = lingering.execute("select id from pgworker.add_job('t', queue_name => %s)", [queue]).fetchone()
    worker_id = _register(hasty)
    # The worker's cursor goes past it, further with each claim, and there is always more to do.
    for _ in range(3):
        db.execute("select pgworker.add_job('t', queue_name => %s) from generate_series(1, 10)", [queue])
        claimed = _claim(hasty, worker_id, 5)
        assert late not in [(job,) for job in claimed]
        hasty.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker_id, claimed])
    lingering.commit()
    found: list[int] = []

    def look() -> bool:
        db.execute("select pgworker.add_job('t', queue_name => %s) from generate_series(1, 2)", [queue])
        batch = _claim(hasty, worker_id, 1)
        hasty.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker_id, batch])
        found.extend(batch)
        return late in [(job,) for job in found]

    until(look, "the late job")


@pytest.mark.parametrize("queue", [None, "q"])
@pytest.mark.parametrize(
    "back",
    [
        "select pgworker.release_jobs(%(worker)s, array[%(job)s::bigint])",
        "select pgworker.fail_job(%(worker)s, %(job)s, 'x', retry_at => now() - interval '1 hour')",
        "select pgworker.force_unlock_workers(array[%(worker)s::bigint])",
        "select pgworker.unregister_worker(%(worker)s)",
        "select pgworker.complete_job(%(worker)s, %(job)s); select pgworker.add_job('t', queue_name => %(queue)s,"
        " run_at => now() - interval '1 day', job_key => 'late')",
        "select pgworker.complete_job(%(worker)s, %(job)s);"
        " select pgworker.reschedule_jobs(array[%(scheduled)s::bigint], now() - interval '1 day')",
        "select pgworker.complete_job(%(worker)s, %(job)s); select pgworker.resume_task('paused')",
        "select pgworker.complete_job(%(worker)s, %(job)s); select pgworker.resume_queue('paused')",
    ],
)
def test_what_comes_back_behind_the_cursor_is_claimed_soon(
    db: Conn, connect: Connections, hasty: Conn, back: str, queue: str | None
) -> None:
    """Given back, failed into the past, taken away, rescheduled to the past, resumed: by another session."""
    db.execute("select pgworker.pause_task('paused'), pgworker.pause_queue('paused')")
    db.execute("select pgworker.add_job('paused', job_key => 'by task', priority => -1)")
    db.execute("select pgworker.add_job('t', queue_name => 'paused', job_key => 'by queue', priority => -1)")
    scheduled = db.execute(
        "select id from pgworker.add_job('t', queue_name => %s, run_at => now() + interval '1 day')", [queue]
    ).fetchone()
    db.execute("select pgworker.add_job('t', queue_name => %s)", [queue])
    first, worker_id = _register(db), _register(hasty)
    (job,) = _claim(db, first, 1)
    for _ in range(3):
        db.execute("select pgworker.add_job('other') from generate_series(1, 10)")
        assert len(_claim(hasty, worker_id, 5)) == 5
    before = set(_claim(hasty, worker_id, 100))
    assert job not in before
    assert scheduled is not None
    for statement in back.split(";"):
        db.execute(statement.encode(), {"worker": first, "job": job, "queue": queue, "scheduled": scheduled[0]})
    other = connect()

    def look() -> list[int]:
        other.execute("select pgworker.add_job('other') from generate_series(1, 3)")
        return [
            row[0]
            for row in hasty.execute(
                "select id from pgworker.get_jobs(%s, 1) where task_identifier <> 'other'", [worker_id]
            )
        ]

    assert until(look, "the job that came back")
    assert_consistent(db)
