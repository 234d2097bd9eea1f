"""Workers that vanish lose their jobs to others, and only they: presence by session, and by lease."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.calling import PAST, Conn, add, call, claim, claim_ids, refused, register, rows, seen, state, value
from tests.clock import at, maintain
from tests.connections import Connections
from tests.waiting import until_gone


def leave(db: Conn, conn: Conn) -> None:
    """End the session without a word."""
    pid = conn.info.backend_pid
    conn.close()
    until_gone(db, pid)


def test_a_dead_workers_jobs_and_queues_go_back_after_the_grace(db: Conn, connect: Connections) -> None:
    dying, other = connect(), connect()
    worker, heir = register(dying, "first"), register(other)
    held, queued, behind = add(db)["id"], add(db, queue_name="q")["id"], add(db, queue_name="q")["id"]
    assert claim_ids(dying, worker, 10) == [held, queued]
    maintain(db, 0)
    leave(db, dying)
    maintain(db, 0)  # noticed
    maintain(db, 4.9)
    assert claim_ids(other, heir, 10) == []
    maintain(db, 5.1)
    again = claim(other, heir, 10)
    assert [(job["id"], job["attempts"]) for job in again] == [(held, 2), (queued, 2)]  # the attempt stays counted
    assert state(db, behind) == "ready"
    with refused(db, "PW002", f"worker {worker} is unknown"):
        call(db, "get_jobs", worker)


def test_a_job_lost_on_its_last_attempt_fails_and_says_with_whom(db: Conn, connect: Connections) -> None:
    dying, nameless = connect(), connect()
    worker, unnamed = register(dying, "build-7"), register(nameless)
    last, other = add(db, max_attempts=1)["id"], add(db, max_attempts=1)["id"]
    retried = add(db, max_attempts=2)["id"]
    assert claim_ids(dying, worker) == [last]
    assert claim_ids(nameless, unnamed) == [other]
    assert claim_ids(dying, worker) == [retried]
    leave(db, dying)
    leave(db, nameless)
    maintain(db, 0)
    maintain(db, 10)
    lost = seen(db, last)
    assert (lost["state"], lost["attempts"], lost["locked_by"]) == ("failed", 1, None)
    assert lost["last_error"] == f"worker {worker} (build-7) vanished while it ran this job"
    assert seen(db, other)["last_error"] == f"worker {unnamed} vanished while it ran this job"
    assert (state(db, retried), seen(db, retried)["last_error"]) == ("ready", lost["last_error"])


def test_a_dead_workers_job_that_was_to_be_cancelled_is_cancelled_not_repeated(db: Conn, connect: Connections) -> None:
    dying = connect()
    worker = register(dying)
    job = add(db)["id"]
    assert claim_ids(dying, worker) == [job]
    call(db, "cancel_jobs", [job], reason="no need")
    leave(db, dying)
    maintain(db, 0)
    maintain(db, 10)
    assert (state(db, job), seen(db, job)["last_error"]) == ("cancelled", "no need")


def test_a_run_of_any_length_is_never_taken_from_a_live_worker(db: Conn, connect: Connections) -> None:
    busy = connect()
    worker = register(busy)
    job = add(db)["id"]
    assert claim_ids(busy, worker) == [job]
    for hours in range(5):
        maintain(db, hours * 100 * 3600)
    assert (state(db, job), seen(db, job)["attempts"]) == ("running", 1)
    assert call(busy, "heartbeat", worker) == []
    call(busy, "complete_job", worker, job)


def test_a_worker_that_comes_back_within_the_grace_keeps_its_jobs(db: Conn, connect: Connections) -> None:
    first = connect()
    worker = register(first)
    job = add(db)["id"]
    assert claim_ids(first, worker) == [job]
    leave(db, first)
    maintain(db, 0)
    second = connect()
    assert call(second, "heartbeat", worker) == []
    for seconds in (6, 12, 3600):
        maintain(db, seconds)
    assert state(db, job) == "running"
    assert rows(second, "select * from pgworker.held_jobs(%s)", worker) == [{"job_id": job, "attempts": 1}]
    leave(db, second)  # presence is this session's now
    maintain(db, 7200)
    maintain(db, 7204)
    assert state(db, job) == "running"  # the grace begins anew
    maintain(db, 7206)
    assert state(db, job) == "ready"


def test_the_grace_begins_anew_though_nobody_looked_while_the_worker_was_back(db: Conn, connect: Connections) -> None:
    """As when the server crashes twice."""
    first, second = connect(), connect()
    worker = register(first)
    job = add(db)["id"]
    assert claim_ids(first, worker) == [job]
    leave(db, first)
    maintain(db, 0)
    assert call(second, "heartbeat", worker) == []
    leave(db, second)
    maintain(db, 6)
    assert state(db, job) == "running"
    maintain(db, 11)
    assert state(db, job) == "ready"


def test_a_worker_may_hold_two_sessions_while_the_old_one_dies(db: Conn, connect: Connections) -> None:
    first, second = connect(), connect()
    worker = register(first)
    second.execute("set lock_timeout = '2s'")
    assert call(second, "heartbeat", worker) == []  # the server has not noticed yet that the old session is gone
    leave(db, first)
    maintain(db, 0)
    maintain(db, 10)
    assert call(second, "heartbeat", worker) == []


PRESENCE = """
select from pg_locks where pid = %s and locktype = 'advisory' and classid = 1886874482 and objid = %s and objsubid = 2
"""


def test_presence_is_one_session_lock_and_nothing_is_written_while_the_worker_lives(db: Conn) -> None:
    worker = register(db)
    assert len(rows(db, PRESENCE, db.info.backend_pid, worker)) == 1
    before = rows(db, "select ctid, xmin from pgworker.worker")
    for _ in range(3):
        call(db, "heartbeat", worker)
        call(db, "maintain")
        claim_ids(db, worker)
    assert rows(db, "select ctid, xmin from pgworker.worker") == before
    call(db, "unregister_worker", worker)  # one goodbye, however many heartbeats
    assert rows(db, PRESENCE, db.info.backend_pid, worker) == []


def test_a_worker_with_a_lease_leaves_no_lock_in_the_poolers_session(db: Conn) -> None:
    worker = register(db, lease="1 minute")
    call(db, "heartbeat", worker)
    assert rows(db, PRESENCE, db.info.backend_pid, worker) == []
    call(db, "unregister_worker", worker)
    assert rows(db, "select from pg_locks where pid = %s and locktype = 'advisory'", db.info.backend_pid) == []


def test_the_grace_is_an_option(db: Conn, connect: Connections) -> None:
    db.execute("insert into pgworker.setting values ('rescue_grace', '1 minute')")
    dying = connect()
    worker = register(dying)
    job = add(db)["id"]
    assert claim_ids(dying, worker) == [job]
    leave(db, dying)
    maintain(db, 0)
    maintain(db, 59)
    assert state(db, job) == "running"
    maintain(db, 61)
    assert state(db, job) == "ready"


def test_a_worker_is_not_declared_dead_in_the_middle_of_its_claim(db: Conn, connect: Connections) -> None:
    claiming, presence = connect(), connect()
    worker = register(presence)
    job = add(db)["id"]
    leave(db, presence)
    maintain(db, 0)
    claiming.execute("begin")
    assert claim_ids(claiming, worker) == [job]
    maintain(db, 10)
    claiming.execute("commit")
    assert state(db, job) == "running"
    maintain(db, 20)  # now it is, and its job with it: nothing is left that nobody would give back
    assert state(db, job) == "ready"
    assert rows(db, "select from pgworker.worker where id = %s", worker) == []


def test_a_lease_keeps_a_worker_alive_as_long_as_it_is_renewed(db: Conn, connect: Connections) -> None:
    conn = connect()
    at(db, 0)
    at(conn, 0)
    worker = register(conn, lease="30 seconds")
    job = add(db)["id"]
    assert claim_ids(conn, worker) == [job]
    leave(db, conn)  # a pooler's session says nothing about the worker
    for seconds in (29, 58, 87):
        maintain(db, seconds)
        assert call(db, "heartbeat", worker) == []
    assert state(db, job) == "running"
    maintain(db, 87 + 29.9)
    assert state(db, job) == "running"
    maintain(db, 87 + 30)
    assert state(db, job) == "ready"
    with refused(db, "PW002", f"worker {worker} is unknown", hint="register anew"):
        call(db, "heartbeat", worker)


def test_a_lease_that_lapsed_unnoticed_can_still_be_renewed(db: Conn) -> None:
    at(db, 0)
    worker = register(db, lease="30 seconds")
    job = add(db)["id"]
    assert claim_ids(db, worker) == [job]
    at(db, 100)
    call(db, "heartbeat", worker)
    maintain(db, 101)
    assert state(db, job) == "running"


def test_a_worker_with_a_lease_needs_no_session(db: Conn, connect: Connections) -> None:
    at(db, 0)
    worker = register(db, lease="1 hour")
    job, queued = add(db, run_at=PAST)["id"], add(db, run_at=PAST, queue_name="q")["id"]
    # Each statement through another session, as a transaction pooler may deal them out.
    assert claim_ids(connect(), worker, 10) == [job, queued]
    call(connect(), "set_progress", worker, job, "1")
    assert call(connect(), "heartbeat", worker) == []
    told = call(connect(), "finish_jobs", worker, [job], None, [queued], ["it broke"])
    assert [line["outcome"] for line in told] == ["completed", "scheduled"]
    call(connect(), "unregister_worker", worker)


@pytest.mark.parametrize("lease", ["0", "-1 second"])
def test_a_lease_of_nothing_is_refused(tx: Conn, lease: str) -> None:
    with refused(tx, "22023", "lease must be longer than nothing"):
        register(tx, lease=lease)


def test_worker_ids_are_never_used_twice(tx: Conn) -> None:
    ids = []
    for _ in range(3):
        ids.append(register(tx))
        call(tx, "unregister_worker", ids[-1])
    assert ids == sorted(set(ids))


def test_saying_goodbye_gives_everything_back_with_its_attempt(tx: Conn) -> None:
    leaving, staying = register(tx), register(tx)
    ids = [add(tx, max_attempts=1)["id"], add(tx, queue_name="q")["id"]]
    assert claim_ids(tx, leaving, 10) == ids
    call(tx, "unregister_worker", leaving)
    assert [(job["id"], job["attempts"]) for job in claim(tx, staying, 10)] == [(ids[0], 1), (ids[1], 1)]
    for function in ("unregister_worker", "heartbeat", "get_jobs"):
        with refused(tx, "PW002", f"worker {leaving} is unknown"):
            call(tx, function, leaving)


@pytest.mark.parametrize("worker", [0, 2**40, None])
@pytest.mark.parametrize("function", ["heartbeat", "unregister_worker"])
def test_an_unknown_worker_is_told_so(tx: Conn, function: str, worker: int | None) -> None:
    with refused(tx, "PW002", f"worker {'null' if worker is None else worker} is unknown"):
        call(tx, function, worker)


def test_a_heartbeat_says_what_to_stop_until_it_is_stopped(tx: Conn) -> None:
    worker, other = register(tx), register(tx)
    one, two, theirs = (add(tx)["id"] for _ in range(3))
    assert claim_ids(tx, worker, 2) == [one, two]
    assert claim_ids(tx, other) == [theirs]
    assert call(tx, "heartbeat", worker) == []
    call(tx, "cancel_jobs", [two, one, theirs])
    stop = [{"job_id": one, "notice": "cancel"}, {"job_id": two, "notice": "cancel"}]
    assert call(tx, "heartbeat", worker) == stop
    assert call(tx, "heartbeat", worker) == stop  # the first answer may have been lost on the way
    call(tx, "complete_job", worker, one)
    assert call(tx, "heartbeat", worker) == stop[1:]
    call(tx, "release_jobs", worker, [two])
    assert call(tx, "heartbeat", worker) == []
    assert call(tx, "heartbeat", other) == [{"job_id": theirs, "notice": "cancel"}]


def test_a_heartbeat_says_what_was_taken_away_once(tx: Conn) -> None:
    worker, heir = register(tx), register(tx)
    job = add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "force_unlock_workers", [worker])
    assert claim_ids(tx, heir) == [job]
    assert call(tx, "heartbeat", worker) == [{"job_id": job, "notice": "lost"}]
    assert call(tx, "heartbeat", worker) == []
    assert call(tx, "heartbeat", heir) == []


def test_a_worker_whose_connection_broke_can_ask_what_it_holds(tx: Conn) -> None:
    worker, other = register(tx), register(tx)
    ids = [add(tx)["id"] for _ in range(3)]
    assert claim_ids(tx, worker, 2) == ids[:2]
    assert claim_ids(tx, other) == ids[2:]
    assert call(tx, "held_jobs", worker) == [{"job_id": job, "attempts": 1} for job in ids[:2]]
    assert call(tx, "held_jobs", 2**40) == call(tx, "held_jobs", None) == []


def test_maintenance_by_many_at_once_neither_waits_nor_counts_twice(db: Conn, connect: Connections) -> None:
    dying, other = connect(), connect()
    worker = register(dying)
    job = add(db)["id"]
    assert claim_ids(dying, worker) == [job]
    leave(db, dying)
    maintain(db, 0)
    at(db, 10)
    at(other, 10)
    other.execute("set lock_timeout = '2s'")
    with db.transaction():
        call(db, "maintain")
        assert value(other, "select pgworker.maintain()") > timedelta(0)
    call(other, "maintain")
    assert (state(db, job), seen(db, job)["attempts"]) == ("ready", 1)


def test_maintenance_says_when_it_is_useful_again(db: Conn, connect: Connections) -> None:
    dying = connect()
    register(dying)
    assert timedelta(0) < maintain(db, 0) <= timedelta(minutes=1)
    leave(db, dying)
    maintain(db, 0)
    assert maintain(db, 4.8) <= timedelta(seconds=0.2)


@pytest.mark.parametrize(("ended", "kept"), [("completed", 1), ("failed", 30), ("cancelled", 30)])
def test_finished_jobs_are_forgotten_when_their_time_has_come(tx: Conn, ended: str, kept: int) -> None:
    at(tx, 0)
    worker = register(tx)
    job = add(tx)["id"]
    live = add(tx, run_at="2099-01-01")["id"]
    assert claim_ids(tx, worker) == [job]
    if ended == "completed":
        call(tx, "complete_job", worker, job, "1")
    elif ended == "failed":
        call(tx, "fail_job", worker, job, "it broke", permanent=True)
    else:
        call(tx, "cancel_job", worker, job)
    assert state(tx, job) == ended
    maintain(tx, kept * 86400 - 1)
    assert state(tx, job) == ended
    maintain(tx, kept * 86400 + 1)
    assert state(tx, job) is None
    assert state(tx, live) == "scheduled"


@pytest.mark.parametrize(("protocol", "cure"), [(0, "client"), (2, "extension"), (None, "")])
def test_a_client_of_another_age_is_refused(tx: Conn, protocol: int | None, cure: str) -> None:
    with refused(tx, "PW004", f"protocol {'null' if protocol is None else protocol}", hint=cure):
        call(tx, "check_client", protocol)


def test_a_client_of_this_age_is_welcome(tx: Conn) -> None:
    call(tx, "check_client", 1)


def test_registering_waits_for_nobody(db: Conn, connect: Connections) -> None:
    other = connect()
    other.execute("set lock_timeout = '2s'")
    with db.transaction():
        register(db)
        register(other)
