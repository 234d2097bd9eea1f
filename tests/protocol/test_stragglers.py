"""What appears behind a session that has passed it is claimed by that session within a second, however busy it is.

That is, where a look at everything takes 40 ms, which with a backlog as here it takes on no machine that is awake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim_ids, register, state, value
from tests.connections import Connections
from tests.cursors import sweeps_cost

BACKLOG = 4000

Appear = Callable[[], Any]
Prepare = Callable[[Conn, Connections], tuple[int, Appear]]


def late_commit(db: Conn, connect: Connections, **arguments: Any) -> tuple[int, Appear]:
    late = connect()
    late.execute("begin")
    job = add(late, **arguments)["id"]
    return job, lambda: late.execute("commit")


def late_commit_in_a_queue(db: Conn, connect: Connections) -> tuple[int, Appear]:
    return late_commit(db, connect, queue_name="late")


def late_commit_of_a_new_priority(db: Conn, connect: Connections) -> tuple[int, Appear]:
    return late_commit(db, connect, priority=-7)


def held_by_another(db: Conn, connect: Connections, **arguments: Any) -> tuple[int, int, Conn]:
    other = connect()
    worker = register(other)
    job = add(db, **arguments)["id"]
    assert claim_ids(other, worker) == [job]
    return job, worker, other


def released(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job, worker, other = held_by_another(db, connect)
    return job, lambda: call(other, "release_jobs", worker, [job])


def released_in_a_queue(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job, worker, other = held_by_another(db, connect, queue_name="q")
    return job, lambda: call(other, "release_jobs", worker, [job])


def unlocked_by_force(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job, worker, _ = held_by_another(db, connect)
    return job, lambda: call(db, "force_unlock_workers", [worker])


def given_back_by_a_goodbye(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job, worker, other = held_by_another(db, connect)
    return job, lambda: call(other, "unregister_worker", worker)


def failed_with_a_retry_in_the_past(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job, worker, other = held_by_another(db, connect)
    return job, lambda: call(other, "fail_job", worker, job, "again", retry_at=PAST)


def a_claim_rolled_back(db: Conn, connect: Connections) -> tuple[int, Appear]:
    other = connect()
    worker = register(other)
    job = add(db)["id"]
    other.execute("begin")
    assert claim_ids(other, worker) == [job]
    return job, lambda: other.execute("rollback")


def a_queues_claim_rolled_back(db: Conn, connect: Connections) -> tuple[int, Appear]:
    other = connect()
    worker = register(other)
    job = add(db, queue_name="q")["id"]
    other.execute("begin")
    assert claim_ids(other, worker) == [job]
    return job, lambda: other.execute("rollback")


def a_lock_let_go(db: Conn, connect: Connections) -> tuple[int, Appear]:
    other = connect()
    job = add(db)["id"]
    other.execute("begin")
    call(other, "reschedule_jobs", [job], max_attempts=3)
    return job, lambda: other.execute("commit")


def a_cancellation_rolled_back(db: Conn, connect: Connections) -> tuple[int, Appear]:
    other = connect()
    job = add(db)["id"]
    other.execute("begin")
    call(other, "cancel_jobs", [job])
    return job, lambda: other.execute("rollback")


def rescheduled_to_the_past(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job = add(db, run_at=FUTURE)["id"]
    return job, lambda: call(db, "reschedule_jobs", [job], run_at=PAST)


def added_for_the_past(db: Conn, connect: Connections) -> tuple[int, Appear]:
    def added() -> None:
        db.execute("select setval('pgworker.job_id', 1000000)")
        add(db, run_at=PAST)

    return 1000001, added


def replaced_by_key_for_the_past(db: Conn, connect: Connections) -> tuple[int, Appear]:
    job = add(db, run_at=FUTURE, job_key="k")["id"]
    return job, lambda: add(db, run_at=PAST, job_key="k")


def a_queue_resumed(db: Conn, connect: Connections) -> tuple[int, Appear]:
    call(db, "pause_queue", "q")
    job = add(db, queue_name="q")["id"]
    return job, lambda: call(db, "resume_queue", "q")


def a_task_resumed(db: Conn, connect: Connections) -> tuple[int, Appear]:
    call(db, "pause_task", "paused")
    job = add(db, "paused")["id"]
    return job, lambda: call(db, "resume_task", "paused")


def a_queued_task_resumed(db: Conn, connect: Connections) -> tuple[int, Appear]:
    call(db, "pause_task", "paused")
    job = add(db, "paused", queue_name="q")["id"]
    return job, lambda: call(db, "resume_task", "paused")


def a_queue_freed(db: Conn, connect: Connections) -> tuple[int, Appear]:
    running, worker, other = held_by_another(db, connect, queue_name="q")
    job = add(db, queue_name="q")["id"]
    return job, lambda: call(other, "complete_job", worker, running)


def the_holders_session_killed(db: Conn, connect: Connections) -> tuple[int, Appear]:
    db.execute("insert into pgworker.setting values ('rescue_grace', '0')")
    job, _, other = held_by_another(db, connect)

    def killed_and_noticed() -> None:
        db.execute("select pg_terminate_backend(%s, 20000)", [other.info.backend_pid])
        call(db, "maintain")
        call(db, "maintain")

    return job, killed_and_noticed


CAUSES: list[Prepare] = [
    late_commit, late_commit_in_a_queue, late_commit_of_a_new_priority, released, released_in_a_queue,
    unlocked_by_force, given_back_by_a_goodbye, failed_with_a_retry_in_the_past, a_claim_rolled_back,
    a_queues_claim_rolled_back, a_lock_let_go, a_cancellation_rolled_back, rescheduled_to_the_past, added_for_the_past,
    replaced_by_key_for_the_past, a_queue_resumed, a_task_resumed, a_queued_task_resumed, a_queue_freed,
    the_holders_session_killed,
]  # fmt: skip


def a_second_later(session: Conn, worker: int, most: int = 1) -> list[int]:
    """What a session claims that last looked everywhere a second ago."""
    sweeps_cost(session, 40_000, ago=1_000_000)
    return [job["id"] for job in call(session, "get_jobs", worker, most, columns="id")]


def test_where_sweeps_are_dear_an_idle_session_stays_further_behind(db: Conn) -> None:
    """What is committed late is found without a sweep then, if it did not take longer than one."""
    worker = register(db)

    def added(seconds: int) -> int:
        job: int = add(db, run_at=value(db, f"select now() - interval '{seconds} seconds'"))["id"]
        return job

    first = added(20)
    assert claim_ids(db, worker) == [first]
    sweeps_cost(db, 10_000_000)
    assert call(db, "get_jobs", worker) == []  # and the cursor has moved on
    added(15)
    late = added(8)
    assert [job["id"] for job in call(db, "get_jobs", worker, 2)] == [late]


@pytest.fixture
def bystander(connect: Connections) -> tuple[Conn, int]:
    conn = connect()
    return conn, register(conn)


@pytest.mark.parametrize("prepare", CAUSES, ids=lambda prepare: prepare.__name__)
def test_a_busy_session_finds_what_appeared_behind_it(
    db: Conn, connect: Connections, bystander: tuple[Conn, int], prepare: Prepare
) -> None:
    session, worker = bystander
    straggler, appear = prepare(db, connect)
    db.execute(
        "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object('identifier', 'a')) "
        "from generate_series(1, %s)))",
        [BACKLOG],
    )
    passed = [job for _ in range(20) for job in claim_ids(session, worker, 5)]
    assert len(passed) == 100
    assert straggler not in passed

    appear()
    assert straggler in (got := a_second_later(session, worker)), got
    assert state(db, straggler) == "running"


@pytest.mark.parametrize("prepare", CAUSES, ids=lambda prepare: prepare.__name__)
def test_an_idle_session_finds_what_appeared_behind_it(
    db: Conn, connect: Connections, bystander: tuple[Conn, int], prepare: Prepare
) -> None:
    session, worker = bystander
    straggler, appear = prepare(db, connect)
    later = [add(db)["id"] for _ in range(3)]
    assert claim_ids(session, worker, 10) == later
    assert claim_ids(session, worker, 10) == []

    appear()
    assert a_second_later(session, worker, 10) == [straggler]


def test_a_killed_session_leaves_no_claim_half_done(db: Conn, connect: Connections) -> None:
    dying, other = connect(), connect()
    dying_worker, worker = register(dying), register(other)
    ids = [add(db)["id"], add(db, queue_name="q")["id"]]
    dying.execute("begin")
    assert claim_ids(dying, dying_worker, 10) == ids
    db.execute("select pg_terminate_backend(%s, 20000)", [dying.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        dying.execute("commit")
    assert a_second_later(other, worker, 10) == ids
