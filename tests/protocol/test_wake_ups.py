"""Wake-ups: one notification a transaction, when something is due and somebody may be asleep, and none otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim_ids, register, seen
from tests.connections import Connections
from tests.lifecycle import bring
from tests.waiting import until_gone


class Listener:
    """Hears what is said on channel pgworker, in order."""

    def __init__(self, connect: Connections) -> None:
        self._conn = connect()
        self._conn.execute("listen pgworker")
        self._conn.execute("listen marker")
        self._speaker = connect()

    def heard(self) -> list[str]:
        """Return the payloads that came since the last call: notifications come in the order of commits."""
        self._speaker.execute("notify marker")
        payloads: list[str] = []
        for notification in self._conn.notifies(timeout=20):
            if notification.channel == "marker":
                return payloads
            payloads.append(notification.payload)
        raise AssertionError("the marker was not heard")


@pytest.fixture
def listener(connect: Connections) -> Listener:
    return Listener(connect)


@pytest.fixture
def sleeper(connect: Connections) -> tuple[Conn, int]:
    """Return a session that found no work, and its worker."""
    conn = connect()
    worker = register(conn)
    assert claim_ids(conn, worker) == []
    return conn, worker


Sleeper = tuple[Conn, int]


def test_a_due_job_wakes_once_with_an_empty_payload(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    add(db)
    assert listener.heard() == [""]
    add(db, queue_name="q", run_at=PAST, job_key="k")
    assert listener.heard() == [""]


def test_many_jobs_of_one_transaction_wake_once(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    with db.transaction():
        for _ in range(5):
            add(db)
        db.execute("select pgworker.add_job('a') from generate_series(1, 50)")
        call(db, "add_jobs", '[{"identifier": "a"}, {"identifier": "b"}]')
        assert listener.heard() == []  # and not before the commit
    assert listener.heard() == [""]


def test_a_transaction_that_is_rolled_back_wakes_nobody(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    with db.transaction(force_rollback=True):
        add(db)
    assert listener.heard() == []


def test_a_notification_undone_by_a_savepoint_is_not_taken_for_sent(
    db: Conn, listener: Listener, sleeper: Sleeper
) -> None:
    with db.transaction():
        with db.transaction(force_rollback=True):
            add(db)
        add(db)
    assert listener.heard() == [""]


@pytest.mark.parametrize("how", ["add_job", "add_jobs", "key"])
def test_a_job_of_the_future_wakes_nobody(db: Conn, listener: Listener, sleeper: Sleeper, how: str) -> None:
    if how == "add_job":
        add(db, run_at=FUTURE)
    elif how == "add_jobs":
        call(
            db, "add_jobs", '[{"identifier": "a", "run_at": "2100-01-01"}, {"identifier": "b", "run_at": "2100-01-01"}]'
        )
    else:
        add(db, run_at=FUTURE, job_key="k")
        add(db, run_at=FUTURE, job_key="k")
    assert listener.heard() == []


def test_nobody_is_woken_while_nobody_sleeps(db: Conn, connect: Connections, listener: Listener) -> None:
    worker_session = connect()
    worker = register(worker_session)
    add(db)
    assert listener.heard() == []  # nobody has looked for work yet
    job = add(db)["id"]
    assert len(claim_ids(worker_session, worker, 10)) == 2
    add(db)
    call(db, "retry_jobs", [job])
    call(db, "add_jobs", '[{"identifier": "a"}]')
    assert listener.heard() == []  # it found work, so it will look again


def test_who_finds_work_again_is_not_asleep_any_more(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    conn, worker = sleeper
    add(db)
    assert listener.heard() == [""]
    assert len(claim_ids(conn, worker)) == 1
    add(db)
    assert listener.heard() == []
    assert len(claim_ids(conn, worker)) == 1
    assert claim_ids(conn, worker) == []
    add(db)
    assert listener.heard() == [""]


def test_one_sleeper_of_two_is_enough(db: Conn, connect: Connections, listener: Listener, sleeper: Sleeper) -> None:
    conn, worker = sleeper
    other = connect()
    other_worker = register(other)
    assert claim_ids(other, other_worker) == []
    add(db)
    assert listener.heard() == [""]
    assert len(claim_ids(conn, worker)) == 1
    add(db)
    assert listener.heard() == [""]


def test_a_sleeper_that_left_is_not_woken(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    conn, worker = sleeper
    pid = conn.info.backend_pid
    call(conn, "unregister_worker", worker)
    conn.close()
    until_gone(db, pid)
    add(db)
    assert listener.heard() == []


def test_a_sleeper_that_adds_a_job_itself_wakes_the_others(
    db: Conn, connect: Connections, listener: Listener, sleeper: Sleeper
) -> None:
    other = connect()
    assert claim_ids(other, register(other)) == []
    add(sleeper[0])
    assert listener.heard() == [""]


def _held(db: Conn, sleeper: Sleeper, **arguments: Any) -> int:
    """Return a job that another worker holds, while the sleeper sleeps."""
    job: int = add(db, "held", **arguments)["id"]
    worker = register(db)
    assert claim_ids(db, worker, tasks=["held"]) == [job]
    assert claim_ids(sleeper[0], sleeper[1]) == []
    return worker


def _released(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    worker = _held(db, sleeper)
    (job,) = call(db, "held_jobs", worker)
    return lambda: call(db, "release_jobs", worker, [job["job_id"]])


def _unregistered(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    worker = _held(db, sleeper)
    return lambda: call(db, "unregister_worker", worker)


def _unlocked(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    worker = _held(db, sleeper)
    return lambda: call(db, "force_unlock_workers", [worker])


def _retry_at_once(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    worker = _held(db, sleeper)
    (job,) = call(db, "held_jobs", worker)
    return lambda: call(db, "fail_job", worker, job["job_id"], "again", retry_at=PAST)


def _queue_freed(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    worker = _held(db, sleeper, queue_name="q")
    (job,) = call(db, "held_jobs", worker)
    add(db, queue_name="q")
    assert claim_ids(sleeper[0], sleeper[1]) == []
    return lambda: call(db, "complete_job", worker, job["job_id"])


def _rescheduled(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    job = add(db, run_at=FUTURE)["id"]
    return lambda: call(db, "reschedule_jobs", [job], run_at=PAST)


def _failed_rescheduled(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    job = add(db, "held")["id"]
    bring(db, job, "failed")
    return lambda: call(db, "reschedule_jobs", [job], run_at=PAST)


def _retried(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    job = add(db, "held")["id"]
    bring(db, job, "failed")
    return lambda: call(db, "retry_jobs", [job])


def _queue_resumed(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    call(db, "pause_queue", "q")
    add(db, queue_name="q")
    return lambda: call(db, "resume_queue", "q")


def _task_resumed(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    call(db, "pause_task", "a")
    add(db)
    return lambda: call(db, "resume_task", "a")


def _key_moved_to_now(db: Conn, sleeper: Sleeper) -> Callable[[], Any]:
    add(db, job_key="k", run_at=FUTURE)
    return lambda: add(db, job_key="k")


@pytest.mark.parametrize(
    "prepared",
    [
        _released, _unregistered, _unlocked, _retry_at_once, _queue_freed, _rescheduled, _failed_rescheduled, _retried,
        _queue_resumed, _task_resumed, _key_moved_to_now,
    ],
    ids=lambda prepared: prepared.__name__.strip("_"),
)  # fmt: skip
def test_whatever_makes_a_job_claimable_wakes_once(
    db: Conn, listener: Listener, sleeper: Sleeper, prepared: Callable[[Conn, Sleeper], Callable[[], Any]]
) -> None:
    act = prepared(db, sleeper)
    assert claim_ids(*sleeper) == []
    # Whoever prepared it may have looked for work in this session: it must not count as the one that sleeps.
    listener.heard()
    with db.transaction():
        act()
    assert listener.heard() == [""]
    assert len(claim_ids(*sleeper, 10)) == 1


def test_moving_a_job_within_the_future_wakes_nobody(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    job = add(db, run_at=FUTURE)["id"]
    call(db, "reschedule_jobs", [job], run_at="2090-01-01", priority=3)
    assert listener.heard() == []


def test_a_retry_that_has_to_wait_wakes_nobody(db: Conn, listener: Listener, sleeper: Sleeper) -> None:
    worker = _held(db, sleeper)
    (job,) = call(db, "held_jobs", worker)
    listener.heard()
    call(db, "fail_job", worker, job["job_id"], "it broke")
    assert seen(db, job["job_id"])["state"] == "scheduled"
    assert listener.heard() == []


def test_everything_is_right_without_listening_at_all(db: Conn, connect: Connections) -> None:
    polling = connect()
    worker = register(polling, lease="1 minute")
    assert claim_ids(polling, worker) == []
    ids = [add(db)["id"] for _ in range(3)]
    assert claim_ids(polling, worker, 10) == ids
