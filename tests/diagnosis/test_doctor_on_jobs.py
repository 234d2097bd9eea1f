"""doctor() about workers and jobs: each finding is made by the real thing, and goes when that goes."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.calling import Conn, add, call, claim_ids, register, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.diagnosis.examined import found
from tests.lifecycle import STATES, job_in
from tests.trees.planting import leftovers, node, plant
from tests.waiting import until_gone

NOON = "2031-05-17 12:00:00+00"
THIRTY_SECONDS_LATER = "2031-05-17 12:00:30+00"
TWO_MINUTES_LATER = "2031-05-17 12:02:00+00"
AN_HOUR_LATER = "2031-05-17 13:00:01+00"


def gone(observer: Conn, session: Conn) -> None:
    """Close a session, and wait until the server has noticed."""
    pid = session.info.backend_pid
    session.close()
    until_gone(observer, pid)


def test_nothing_is_found_on_a_healthy_installation(db: Conn) -> None:
    assert found(db) == []
    move_clock(db, NOON)
    worker = register(db, "by session")
    register(db, "by lease", "10 minutes")
    for state in STATES:
        job_in(db, state, worker)
    plant(db, node("root", node("first"), node("second", after=["first"])))
    call(db, "pause_task", "a")
    call(db, "pause_queue", "q")
    add(db)
    call(db, "forbid_flag", "never")
    add(db, "b", queue_name="q")
    add(db, "b", flags=["never"])
    claim_ids(db, worker, tasks=[])
    assert found(db) == []
    claim_ids(db, worker, 2)
    move_clock(db, TWO_MINUTES_LATER)
    assert found(db) == []


def test_jobs_are_due_and_no_worker_is_live(db: Conn, connect: Connections) -> None:
    move_clock(db, NOON)
    add(db)
    add(db, "b")
    assert found(db) == []  # a worker may come yet
    move_clock(db, TWO_MINUTES_LATER)
    finding = "2 jobs due, since 2031-05-17 12:00:00+00, and no worker is live"
    assert found(db) == [("error", "workers", finding)]
    session = connect()
    move_clock(session, NOON)
    claim_ids(session, register(session))
    assert found(db) == []
    gone(db, session)
    assert found(db, "workers") == [("error", "workers", finding.replace("2 jobs", "1 job"))]


def test_jobs_of_a_task_that_no_live_worker_knows(db: Conn) -> None:
    move_clock(db, NOON)
    worker = register(db)
    add(db)
    add(db, "b")
    claim_ids(db, worker, tasks=["b"])
    move_clock(db, TWO_MINUTES_LATER)
    finding = "1 job due, since 2031-05-17 12:00:00+00, and no live worker knows the task"
    assert found(db) == [("error", "task a", finding)]
    claim_ids(db, worker, tasks=["b", "a"])
    assert found(db) == []


def test_jobs_whose_flags_all_live_workers_forbid(db: Conn) -> None:
    move_clock(db, NOON)
    worker = register(db)
    for flags in (["slow"], ["slow", "big"]):
        add(db, flags=flags)
    claim_ids(db, worker, forbidden_flags=["slow"])
    move_clock(db, TWO_MINUTES_LATER)
    finding = "2 jobs due, since 2031-05-17 12:00:00+00, and all live workers that know the task forbid their flags"
    assert found(db) == [("error", "task a", finding)]
    claim_ids(db, worker)
    assert found(db) == []


def test_a_lease_about_to_lapse_and_one_that_has(db: Conn) -> None:
    move_clock(db, NOON)
    worker = register(db, "pooled", "45 seconds")
    add(db)
    claim_ids(db, worker)
    move_clock(db, "2031-05-17 12:00:29+00")
    assert found(db) == []
    move_clock(db, "2031-05-17 12:00:31+00")
    finding = "has not been heard of for a while: its lease of 00:00:45 is over at 2031-05-17 12:00:45+00"
    assert found(db) == [("warning", f"worker {worker} (pooled)", finding)]
    call(db, "heartbeat", worker)
    assert found(db) == []
    move_clock(db, "2031-05-17 12:01:20+00")
    assert found(db) == []  # maintain() is about to see to it
    move_clock(db, AN_HOUR_LATER)
    finding = "is gone since 2031-05-17 12:01:16+00, and what it held (1 job) was not given back"
    assert found(db) == [("error", f"worker {worker} (pooled)", finding)]
    call(db, "maintain")
    assert found(db, "worker ") == []


def test_a_worker_that_died_and_nobody_is_there_to_give_its_jobs_back(db: Conn, connect: Connections) -> None:
    session = connect()
    worker = register(session)
    add(db)
    claim_ids(session, worker)
    gone(db, session)
    finding = "is gone, and no worker is there to give back what it held (1 job)"
    assert found(db) == [("error", f"worker {worker}", finding)]
    move_clock(db, NOON)
    call(db, "maintain")
    assert found(db) == []  # its grace runs
    move_clock(db, TWO_MINUTES_LATER)
    finding = "is gone since 2031-05-17 12:00:00+00, and what it held (1 job) was not given back"
    assert found(db) == [("error", f"worker {worker}", finding)]
    call(db, "maintain")
    assert found(db, "worker ") == []


def test_workers_made_for_another_version(db: Conn) -> None:
    worker = value(db, "select pgworker.register_worker('old', version := '0.0.9')")
    register(db, "says nothing")
    value(db, "select pgworker.register_worker('new', version := pgworker.version())")
    finding = f"was made for pgworker 0.0.9, this is {value(db, 'select pgworker.version()')}"
    assert found(db) == [("warning", f"worker {worker} (old)", finding)]
    call(db, "unregister_worker", worker)
    assert found(db) == []


def test_failures_that_become_more(db: Conn) -> None:
    move_clock(db, NOON)
    worker = register(db)

    def fail(jobs: int, error: str) -> None:
        for _ in range(jobs):
            job = add(db)["id"]
            assert claim_ids(db, worker) == [job]
            call(db, "fail_job", worker, job, error, permanent=True)

    fail(5, "as ever")
    assert found(db) == []
    move_clock(db, AN_HOUR_LATER)
    fail(10, "as ever")
    assert found(db) == []  # twice as many: that happens
    fail(1, "no such table")
    finding = "11 jobs failed for good within the last hour, 5 in the hour before; the last one: no such table"
    assert found(db) == [("warning", "task a", finding)]
    move_clock(db, "2031-05-17 14:00:02+00")
    assert found(db) == []


def test_work_in_trees_that_is_left_undone_though_maintain_tries(db: Conn, connect: Connections) -> None:
    move_clock(db, NOON)
    worker = register(db)
    claim_ids(db, worker)
    ids = plant(db, node("root", node("child")))
    holder = connect(autocommit=False)
    holder.execute("select from pgworker.job where id = %s for update", [ids["root"]])
    call(db, "complete_jobs", [ids["child"]])
    assert found(db, "trees") == []
    for moment in (THIRTY_SECONDS_LATER, TWO_MINUTES_LATER):
        move_clock(db, moment)
        call(db, "maintain")
    finding = "what the end of jobs means for others in their trees is left undone, 1 job concerned, since"
    finding += " 2031-05-17 12:00:00+00"
    assert found(db, "trees") == [("warning", "trees", finding)]
    holder.rollback()
    move_clock(db, AN_HOUR_LATER)
    leftovers(db)
    assert found(db, "trees") == []


def test_schedules_that_nobody_runs_and_such_as_cannot_be_run(db: Conn) -> None:
    move_clock(db, "2031-05-17 11:59:30+00")
    call(db, "schedule_job", "nightly", "0 12 * * *", "report", job_key="report")
    worker = register(db)
    claim_ids(db, worker)
    move_clock(db, THIRTY_SECONDS_LATER)
    assert found(db) == []
    move_clock(db, TWO_MINUTES_LATER)
    finding = "is due since 2031-05-17 12:00:00+00 and was not run"
    assert found(db) == [("error", "schedule nightly", finding)]
    db.execute("alter table pgworker.job add constraint closed check (task_identifier <> 'report') not valid")
    call(db, "maintain")
    ((severity, subject, finding),) = found(db)
    assert (severity, subject) == ("error", "schedule nightly")
    assert finding.startswith("its tick of 2031-05-17 12:00:00+00 could not be run: new row for relation")
    db.execute("alter table pgworker.job drop constraint closed")
    move_clock(db, "2031-05-17 12:02:30+00")
    call(db, "maintain")
    assert found(db) == []


def test_errors_come_first(db: Conn) -> None:
    move_clock(db, NOON)
    add(db)
    value(db, "select pgworker.register_worker('old', version := '0.0.9')")
    move_clock(db, TWO_MINUTES_LATER)
    assert [severity for severity, _, _ in found(db)] == ["error", "warning"]


def test_observers_may_ask_and_producers_may_not(db: Conn, connect: Connections, role: Callable[..., str]) -> None:
    db.execute(f"select pgworker.grant_observer('{role('watcher')}')".encode())
    db.execute(f"select pgworker.grant_producer('{role('shop')}')".encode())
    job = add(db)["id"]
    watcher, shop = connect(user="watcher"), connect(user="shop")
    assert found(watcher) == []
    assert value(watcher, "select pgworker.why(%s)", job) == "no worker is live"
    for query in ("select pgworker.why(1)", "select pgworker.doctor()"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            shop.execute(query.encode())
