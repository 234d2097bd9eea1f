"""Workers of plain SQL whose session or lease ends: their jobs come back, once, with the attempt counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.clock import move_clock
from tests.connections import Connections
from tests.invariants import assert_all_claimable, assert_consistent
from tests.waiting import until, until_gone

Conn = psycopg.Connection[Any]


@pytest.fixture
def db(db: Conn) -> Conn:
    db.execute("insert into pgworker.setting values ('rescue_grace', '50 ms')")
    return db


def _register(conn: Conn, lease: str | None = None) -> int:
    row = conn.execute("select pgworker.register_worker('w', %s)", [lease]).fetchone()
    assert row is not None
    return int(row[0])


def _claim(conn: Conn, worker_id: int, number: int = 100) -> list[int]:
    return [row[0] for row in conn.execute("select id from pgworker.get_jobs(%s, %s)", [worker_id, number])]


def _states(conn: Conn) -> list[tuple[Any, ...]]:
    return conn.execute("select id, state, attempts from pgworker.jobs order by id").fetchall()


def _until_given_up(conn: Conn, worker_id: int) -> None:
    def gone() -> bool:
        conn.execute("select pgworker.maintain()")
        return conn.execute("select from pgworker.worker where id = %s", [worker_id]).fetchone() is None

    until(gone, f"worker {worker_id} being given up")


def _add(conn: Conn, number: int) -> list[int]:
    rows = conn.execute(
        "select (pgworker.add_job('t', queue_name => case when n = 1 then 'q' end)).id from generate_series(1, %s) n",
        [number],
    )
    return [row[0] for row in rows]


@pytest.mark.parametrize("how", ["terminated", "closed"])
def test_jobs_of_a_session_that_died_between_claim_and_finish_are_run_again(
    db: Conn, connect: Connections, how: str
) -> None:
    jobs = _add(db, 3)
    victim = connect()
    worker_id = _register(victim)
    assert _claim(victim, worker_id) == jobs
    pid = victim.info.backend_pid
    if how == "terminated":
        db.execute("select pg_terminate_backend(%s)", [pid])
    else:
        victim.close()
    until_gone(db, pid)
    # Not at once: it may be coming back.
    db.execute("select pgworker.maintain()")
    assert _states(db) == [(job, "running", 1) for job in jobs]
    _until_given_up(db, worker_id)
    assert _states(db) == [(job, "ready", 1) for job in jobs]
    assert_consistent(db)
    errors = db.execute("select distinct last_error from pgworker.jobs").fetchall()
    assert errors == [(f"worker {worker_id} (w) vanished while it ran this job",)]
    assert assert_all_claimable(db) == jobs


def test_a_claim_whose_transaction_was_cut_off_leaves_nothing_behind(db: Conn, connect: Connections) -> None:
    jobs = _add(db, 3)
    victim = connect()
    worker_id = _register(victim)
    victim.execute("begin")
    assert _claim(victim, worker_id) == jobs
    db.execute("select pg_terminate_backend(%s)", [victim.info.backend_pid])
    until_gone(db, victim.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        victim.execute("commit")
    assert _states(db) == [(job, "ready", 0) for job in jobs]
    assert_consistent(db)
    assert assert_all_claimable(db) == jobs


def test_a_live_session_is_never_given_up_however_long_its_job_takes(db: Conn, connect: Connections) -> None:
    jobs = _add(db, 2)
    patient = connect()
    worker_id = _register(patient)
    _claim(patient, worker_id)
    db.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    for days in range(1, 5):
        db.execute("select set_config('pgworker.fake_now', (now() + %s * interval '1 day')::text, false)", [days])
        db.execute("select pgworker.maintain()")
    assert [state for _, state, _ in _states(db)] == ["running"] * 2
    for job in jobs:
        patient.execute("select pgworker.complete_job(%s, %s)", [worker_id, job])


def test_a_lease_that_lapsed_gives_its_jobs_back_and_fences_the_late_finish(db: Conn, connect: Connections) -> None:
    jobs = _add(db, 3)
    lost, other = connect(), connect()
    worker_id = _register(lost, "1 hour")
    assert _claim(lost, worker_id) == jobs
    db.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    db.execute("select set_config('pgworker.fake_now', (now() + interval '59 minutes')::text, false)")
    db.execute("select pgworker.maintain()")
    assert [state for _, state, _ in _states(db)] == ["running"] * 3
    db.execute("select set_config('pgworker.fake_now', (now() + interval '61 minutes')::text, false)")
    db.execute("select pgworker.maintain()")
    assert_consistent(db)
    second = _register(other)
    assert _claim(other, second) == jobs
    with pytest.raises(psycopg.Error) as refused:
        lost.execute("select pgworker.complete_job(%s, %s)", [worker_id, jobs[0]])
    assert refused.value.sqlstate == "PW001"
    outcomes = lost.execute(
        "select outcome from pgworker.finish_jobs(%s, %s, null, %s, '{x}')", [worker_id, jobs[:2], jobs[2:]]
    ).fetchall()
    assert outcomes == [("lost",)] * 3
    for call in ("pgworker.heartbeat(%s)", "pgworker.get_jobs(%s)"):
        with pytest.raises(psycopg.Error) as refused:
            lost.execute(f"select {call}".encode(), [worker_id])
        assert refused.value.sqlstate == "PW002"
    assert [state for _, state, _ in _states(db)] == ["running"] * 3
    assert other.execute("select count(*) from pgworker.held_jobs(%s)", [second]).fetchone() == (3,)


def test_a_worker_that_comes_back_before_it_could_be_forgotten_learns_what_it_lost(
    db: Conn, connect: Connections
) -> None:
    first, second = _add(db, 2)
    frozen, holder = connect(), connect()
    worker_id = _register(frozen, "1 hour")
    assert _claim(frozen, worker_id) == [first, second]
    holder.execute("begin")
    holder.execute("select from pgworker.job where id = %s for update", [second])  # a transaction of its handler's
    move_clock(db, (datetime.now(UTC) + timedelta(hours=2)).isoformat())
    db.execute("select pgworker.maintain()")
    assert [state for _, state, _ in _states(db)] == ["ready", "running"]
    holder.execute("rollback")
    assert frozen.execute("select * from pgworker.heartbeat(%s)", [worker_id]).fetchall() == [(first, "lost")]
    assert frozen.execute("select * from pgworker.heartbeat(%s)", [worker_id]).fetchall() == []
    frozen.execute("select pgworker.complete_job(%s, %s)", [worker_id, second])
    assert_consistent(db)


def test_a_worker_that_vanished_on_the_last_attempt_leaves_a_reason(db: Conn, connect: Connections) -> None:
    db.execute("select pgworker.add_job('t', max_attempts => 1)")
    victim = connect()
    worker_id = _register(victim)
    (job,) = _claim(victim, worker_id)
    victim.close()
    _until_given_up(db, worker_id)
    assert db.execute("select id, state, last_error from pgworker.jobs").fetchall() == [
        (job, "failed", f"worker {worker_id} (w) vanished while it ran this job")
    ]


def test_a_dead_worker_is_given_up_by_any_number_of_sessions_at_once_only_once(db: Conn, connect: Connections) -> None:
    jobs = _add(db, 5)
    victim = connect()
    worker_id = _register(victim)
    _claim(victim, worker_id)
    victim.close()
    rescuers = [connect(autocommit=False) for _ in range(5)]
    for rescuer in rescuers:
        rescuer.execute("select pgworker.maintain()")  # none waits for another
    for rescuer in rescuers:
        rescuer.commit()
    _until_given_up(db, worker_id)
    assert _states(db) == [(job, "ready", 1) for job in jobs]


def test_a_crash_of_the_server_loses_no_job_and_returning_workers_keep_theirs(own_server: EmbeddedServer) -> None:
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        jobs = _add(conn, 4)
        stays, leaves = _register(conn), _register(conn)
        kept = _claim(conn, stays, 2)
        _claim(conn, leaves, 2)
    own_server.restart("immediate")
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        assert sorted(job for job, state, _ in _states(conn) if state == "running") == jobs
        conn.execute("select pgworker.heartbeat(%s)", [stays])  # its first call after it has connected again
        conn.execute("insert into pgworker.setting values ('rescue_grace', '50 ms')")
        _until_given_up(conn, leaves)
        for job in kept:
            conn.execute("select pgworker.complete_job(%s, %s)", [stays, job])
        assert_consistent(conn)
        conn.execute("select pgworker.unregister_worker(%s)", [stays])
        assert assert_all_claimable(conn) == [job for job in jobs if job not in kept]
