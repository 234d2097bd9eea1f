"""Limits that are set, changed and taken away while jobs wait and run: from then on they hold, and nothing is stuck."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import Conn, add, call, claim_ids, register, row, rows, seen, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.invariants import assert_all_claimable, assert_consistent
from tests.limits.test_concurrency import many
from tests.limits.test_rates import at
from tests.sessions import Background


def test_what_runs_when_a_limit_is_set_counts(tx: Conn) -> None:
    worker = register(tx)
    ids = many(tx, 6, limit_key="k")
    assert claim_ids(tx, worker, 2) == ids[:2]
    call(tx, "configure_task", "a", max_concurrency=3, max_concurrency_per_key=3)
    assert_consistent(tx)
    assert claim_ids(tx, worker, 10) == ids[2:3]
    call(tx, "complete_job", worker, ids[0])
    assert claim_ids(tx, worker, 10) == ids[3:4]
    assert_consistent(tx)


def test_a_limit_below_what_runs_lets_nothing_through_until_it_fits(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=5)
    worker = register(tx)
    ids = many(tx, 8)
    assert claim_ids(tx, worker, 10) == ids[:5]
    call(tx, "configure_task", "a", max_concurrency=2)
    assert_consistent(tx)
    for job in ids[:3]:
        assert claim_ids(tx, worker, 10) == []
        call(tx, "complete_job", worker, job)
    running = value(tx, "select count(*) from pgworker.jobs where state = 'running'")
    assert running == 2
    for job in ids[3:5]:
        call(tx, "complete_job", worker, job)
    assert claim_ids(tx, worker, 10) == ids[5:7]
    assert_consistent(tx)


def test_whoever_ends_first_after_a_lowered_limit_nothing_overlaps_it(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=4)
    worker = register(tx)
    ids = many(tx, 8)
    claimed = claim_ids(tx, worker, 10)
    call(tx, "configure_task", "a", max_concurrency=2)
    running = set(claimed)
    for job in reversed(claimed):
        call(tx, "complete_job", worker, job)
        running.discard(job)
        running.update(claim_ids(tx, worker, 10))
        assert len(running) <= max(2, len(running & set(claimed)))
    assert running
    assert_consistent(tx)
    assert seen(tx, ids[-1])["state"] == "ready"


def test_a_raised_limit_holds_at_once_for_keys_too(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=1, max_concurrency_per_key=1)
    worker = register(tx)
    ids = many(tx, 6, limit_key="k")
    assert claim_ids(tx, worker, 10) == ids[:1]
    call(tx, "configure_task", "a", max_concurrency=4, max_concurrency_per_key=3)
    assert claim_ids(tx, worker, 10) == ids[1:3]
    assert_consistent(tx)


@pytest.mark.parametrize("settings", [
    {"max_concurrency": 1}, {"max_concurrency_per_key": 1}, {"fair": True},
    {"rate_limit": 1, "rate_interval": "1 h"}, {"rate_limit_per_key": 1, "rate_interval_per_key": "1 h"},
])  # fmt: skip
def test_a_limit_that_is_taken_away_lets_everything_go(tx: Conn, settings: dict[str, Any]) -> None:
    call(tx, "configure_task", "a", **settings)
    worker = register(tx)
    ids = many(tx, 5, limit_key="k")
    claim_ids(tx, worker, 1)
    call(tx, "configure_task", "a", reset=["all"])
    assert_consistent(tx)
    assert rows(tx, "select * from pgworker.permit") == []
    assert claim_ids(tx, worker, 10) == ids[1:]
    call(tx, "finish_jobs", worker, ids, None, None, None)
    assert_consistent(tx)


def test_an_idle_worker_hears_of_a_limit_that_was_raised(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=1)
    many(db, 2)
    sleeper = connect()
    sleeper.execute("listen pgworker")
    worker = register(sleeper)
    assert len(claim_ids(sleeper, worker, 5)) == 1
    assert claim_ids(sleeper, worker, 5) == []
    call(db, "configure_task", "a", max_concurrency=2)
    assert [note.channel for note in sleeper.notifies(timeout=10, stop_after=1)] == ["pgworker"]
    assert len(claim_ids(sleeper, worker, 5)) == 1


def test_a_longer_interval_counts_what_started_before(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=2, rate_interval="10 seconds")
    worker = register(tx)
    ids = many(tx, 6)
    assert claim_ids(tx, worker, 10) == ids[:2]
    at(tx, 30)
    call(tx, "configure_task", "a", rate_interval="60 seconds")
    assert claim_ids(tx, worker, 10) == []
    at(tx, 60)
    call(tx, "configure_task", "a", rate_limit=3)
    assert claim_ids(tx, worker, 10) == ids[2:5]
    call(tx, "configure_task", "a", rate_interval="5 seconds", rate_limit=1)
    at(tx, 64.999)
    assert claim_ids(tx, worker, 10) == []
    at(tx, 65)
    assert claim_ids(tx, worker, 10) == ids[5:]


def test_jobs_change_lines_when_keys_begin_and_cease_to_matter(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=2)
    worker = register(tx)
    ids = many(tx, 3, limit_key="k")
    assert claim_ids(tx, worker, 1) == ids[:1]
    call(tx, "configure_task", "a", max_concurrency_per_key=1)
    assert_consistent(tx)
    assert claim_ids(tx, worker, 10) == []
    call(tx, "configure_task", "a", reset=["max_concurrency_per_key"])
    assert_consistent(tx)
    assert claim_ids(tx, worker, 10) == ids[1:2]


def test_settings_without_limits_leave_live_jobs_alone(db: Conn, connect: Connections) -> None:
    job = add(db, "a")["id"]
    with connect().transaction() as _:
        other = connect()
        with other.transaction():
            other.execute("select from pgworker.job where id = %s for update", [job])
            db.execute("set lock_timeout = '2s'")
            call(db, "configure_task", "a", max_attempts=3, keep_failed="1 day", timeout="1 min", paused=True)


def test_a_job_added_while_limits_are_set_is_neither_let_past_them_nor_lost(db: Conn, connect: Connections) -> None:
    adder = connect()
    worker = register(db)
    with adder.transaction():
        late = [add(adder, "a")["id"] for _ in range(3)]
        call(db, "configure_task", "a", max_concurrency=1)
    assert claim_ids(db, worker, 10) == []
    call(db, "maintain")
    assert claim_ids(db, worker, 10) == late[:1]
    assert_consistent(db)
    with adder.transaction():
        later = add(adder, "a")["id"]
        call(db, "configure_task", "a", reset=["max_concurrency"])
    assert claim_ids(db, worker, 10) == late[1:]
    assert seen(db, later)["state"] == "ready"
    call(db, "maintain")
    assert claim_ids(db, worker, 10) == [later]
    assert_consistent(db)


def test_jobs_that_are_added_late_are_looked_for_again_and_again(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", max_concurrency=10)
    call(tx, "maintain")
    tx.execute(
        "insert into pgworker.job (run_at, created_at, task_identifier, payload) values (now(), now(), 'a', '{}')"
    )
    worker = register(tx)
    at(tx, 59)
    call(tx, "maintain")
    assert claim_ids(tx, worker, 5) == []
    at(tx, 61)
    call(tx, "maintain")
    assert len(claim_ids(tx, worker, 5)) == 1


def test_configuring_waits_for_a_claim_that_is_going_on_and_counts_it(db: Conn, connect: Connections) -> None:
    ids = many(db, 3)
    claimer, administrator = connect(), connect()
    worker = register(claimer)
    with claimer.transaction():
        assert claim_ids(claimer, worker) == ids[:1]
        configuring = Background(administrator, "select * from pgworker.configure_task('a', max_concurrency => 1)")
        configuring.wait_until_blocked(db)
    configuring.result()
    assert claim_ids(db, register(db), 10) == []
    assert_consistent(db)


def test_cleanup_forgets_gates_of_keys_that_nothing_uses(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency_per_key=2)
    worker = register(tx)
    idle, busy = add(tx, "a", limit_key="idle")["id"], add(tx, "a", limit_key="busy")["id"]
    assert claim_ids(tx, worker, 10) == [idle, busy]
    call(tx, "complete_job", worker, idle)
    call(tx, "cleanup", tasks=["gc_job_queues"])
    assert value(tx, "select array_agg(distinct lane_key) from pgworker.permit") == ["4:busy"]
    add(tx, "a", limit_key="idle")
    assert len(claim_ids(tx, worker, 10)) == 1
    assert_consistent(tx)


def test_two_who_configure_at_once_do_not_deadlock(db: Conn, connect: Connections) -> None:
    ids = many(db, 2)
    first, second = connect(), connect()
    with first.transaction():
        call(first, "configure_task", "a", max_concurrency=1)
        other = Background(second, "select * from pgworker.configure_task('a', max_concurrency => 2)")
        other.wait_until_blocked(db)
    other.result()
    assert claim_ids(db, register(db), 10) == ids
    assert row(db, "select max_concurrency from pgworker.tasks") == {"max_concurrency": 2}


def test_everything_can_be_claimed_after_a_wild_life(db: Conn) -> None:
    for settings in ({"max_concurrency": 2}, {"fair": True}, {"reset": ["all"]}, {"max_concurrency_per_key": 1}):
        call(db, "configure_task", "a", **settings)
        many(db, 3, limit_key="k")
        many(db, 2, queue_name="q")
    assert len(assert_all_claimable(db)) == 20
    move_clock(db, "")
