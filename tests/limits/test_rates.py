"""So many starts within any interval of that length; and sleepers wake when the next may start."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.calling import FUTURE, Conn, add, call, claim, claim_ids, register, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.invariants import assert_consistent
from tests.limits.test_concurrency import many
from tests.parallel import in_parallel

START = datetime(2030, 1, 1, tzinfo=UTC)


def at(conn: Conn, seconds: float) -> datetime:
    now = START + timedelta(seconds=seconds)
    move_clock(conn, now.isoformat())
    return now


def test_no_more_start_until_the_first_is_an_interval_ago(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=3, rate_interval="10 seconds")
    worker = register(tx)
    ids = many(tx, 8)
    assert claim_ids(tx, worker, 2) == ids[:2]
    call(tx, "finish_jobs", worker, ids[:2], None, None, None)  # what has ended has started all the same
    at(tx, 4)
    assert claim_ids(tx, worker, 10) == ids[2:3]
    at(tx, 9.999)
    assert claim_ids(tx, worker, 10) == []
    at(tx, 10)
    assert claim_ids(tx, worker, 10) == ids[3:5]
    at(tx, 13.999)
    assert claim_ids(tx, worker, 10) == []
    at(tx, 14)
    assert claim_ids(tx, worker, 10) == ids[5:6]


def test_any_window_of_that_length_holds_no_more_than_the_limit(tx: Conn) -> None:
    at(tx, 0)
    call(
        tx, "configure_task", "a",
        rate_limit=5, rate_interval="60 seconds", rate_limit_per_key=2, rate_interval_per_key="45 seconds",
    )  # fmt: skip
    worker, chosen = register(tx), random.Random(4)
    for n in range(120):
        add(tx, "a", limit_key=f"k{n % 4}")
    key_of = dict(tx.execute("select id, limit_key from pgworker.jobs").fetchall())
    starts: list[tuple[float, str]] = []
    now = 0.0
    while len(starts) < 120:
        now += chosen.choice([0, 0.5, 3, 7, 20])
        at(tx, now)
        claimed = claim_ids(tx, worker, chosen.choice([1, 4, 10]))
        starts += [(now, key_of[job]) for job in claimed]
        if chosen.random() < 0.5:
            call(tx, "finish_jobs", worker, claimed, None, None, None)
    for since, key in starts:
        assert sum(since <= then < since + 60 for then, _ in starts) <= 5
        assert sum(since <= then < since + 45 and other == key for then, other in starts) <= 2
    assert now < 120 / 5 * 60 * 1.5  # and it is no slower than that for no reason


def test_two_hundred_sessions_start_no_more_than_the_limit(db: Conn, dsn: str) -> None:
    call(db, "configure_task", "a", rate_limit=17, rate_interval="1 hour")
    db.execute("select pgworker.add_job('a') from generate_series(1, 400)")
    claimed: list[int] = []

    def work(conn: Conn) -> None:
        worker = register(conn, lease="1 hour")
        for _ in range(2):
            claimed.extend(claim_ids(conn, worker, random.choice([1, 3])))

    in_parallel(dsn, [work] * 200, timeout=120)
    assert len(claimed) == len(set(claimed)) == 17
    assert_consistent(db)


def test_a_key_that_has_had_its_share_stops_no_other(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit_per_key=1, rate_interval_per_key="1 hour")
    worker = register(tx)
    ada, bob, none = (many(tx, 3, limit_key=key) for key in ("ada", "bob", None))
    assert claim_ids(tx, worker, 10) == [ada[0], bob[0], *none]
    at(tx, 3600)
    assert claim_ids(tx, worker, 10) == [ada[1], bob[1]]


def test_a_claim_that_was_given_back_does_not_count(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=2, rate_interval="1 hour", max_concurrency=2)
    worker = register(tx)
    ids = many(tx, 4)
    assert claim_ids(tx, worker, 10) == ids[:2]
    call(tx, "release_jobs", worker, ids[1:2], columns="1")
    assert claim_ids(tx, worker, 10) == ids[1:2]
    call(tx, "complete_job", worker, ids[0])
    call(tx, "unregister_worker", worker)  # gives the other one back
    worker = register(tx)
    assert claim_ids(tx, worker, 10) == ids[1:2]
    call(tx, "fail_job", worker, ids[1], "no", retry_at=START.isoformat())  # an attempt that failed did start
    assert claim_ids(tx, worker, 10) == []


def test_only_the_latest_start_of_a_job_is_given_back(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=2, rate_interval="1 hour")
    worker = register(tx)
    first, *_ = many(tx, 3)
    assert claim_ids(tx, worker) == [first]
    call(tx, "fail_job", worker, first, "no", retry_at=START.isoformat())
    at(tx, 1)
    assert claim_ids(tx, worker) == [first]
    call(tx, "release_jobs", worker, [first], columns="1")
    assert claim_ids(tx, worker, 10) == [first]
    assert claim_ids(tx, worker, 10) == []


def test_sleepers_are_told_when_the_next_may_start(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="10 seconds")
    worker = register(tx)
    many(tx, 3)
    at(tx, 3)
    assert len(claim_ids(tx, worker, 10)) == 1
    asked = "select pgworker.next_run_at(%s)"
    assert value(tx, asked, None) == START + timedelta(seconds=13)
    assert value(tx, asked, ["a"]) == START + timedelta(seconds=13)
    assert value(tx, asked, ["b"]) is None
    at(tx, 13)
    assert len(claim_ids(tx, worker, 10)) == 1
    assert value(tx, asked, None) == START + timedelta(seconds=23)
    add(tx, "a", run_at=(START + timedelta(seconds=20)).isoformat())
    assert value(tx, asked, None) == START + timedelta(seconds=20)
    call(tx, "pause_task", "a")
    assert value(tx, asked, None) is None


def test_sleepers_are_not_told_of_keys_for_which_nothing_waits(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit_per_key=1, rate_interval_per_key="10 seconds")
    worker = register(tx)
    add(tx, "a", limit_key="ada")
    assert len(claim_ids(tx, worker, 10)) == 1
    assert value(tx, "select pgworker.next_run_at()") is None
    at(tx, 5)
    many(tx, 2, limit_key="bob")
    assert len(claim_ids(tx, worker, 10)) == 1
    assert value(tx, "select pgworker.next_run_at()") == START + timedelta(seconds=15)


def test_delayed_jobs_of_limited_tasks_are_announced_too(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=1)
    add(tx, "a", run_at=FUTURE)
    assert value(tx, "select pgworker.next_run_at()") == datetime(2100, 1, 1, tzinfo=UTC)
    assert value(tx, "select pgworker.next_run_at('{b}')") is None


def test_rate_and_concurrency_hold_together(tx: Conn) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=3, rate_interval="10 seconds", max_concurrency=2)
    worker = register(tx)
    ids = many(tx, 6)
    assert claim_ids(tx, worker, 10) == ids[:2]
    call(tx, "finish_jobs", worker, ids[:2], None, None, None)
    assert claim_ids(tx, worker, 10) == ids[2:3]
    assert claim_ids(tx, worker, 10) == []
    at(tx, 10)
    assert claim_ids(tx, worker, 10) == ids[3:4]  # one still runs
    assert_consistent(tx)


def test_a_clock_that_goes_back_lets_no_more_through_and_stops_no_limit_of_concurrency(tx: Conn) -> None:
    at(tx, 100)
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="10 seconds")
    call(tx, "configure_task", "b", max_concurrency=1)
    worker = register(tx)
    a, b = many(tx, 2, "a", run_at="2020-01-01"), many(tx, 2, "b", run_at="2020-01-01")
    assert claim_ids(tx, worker, 10) == [a[0], b[0]]
    call(tx, "finish_jobs", worker, [a[0], b[0]], None, None, None)
    at(tx, 50)
    assert claim_ids(tx, worker, 10) == [b[1]]
    at(tx, 110)
    assert claim_ids(tx, worker, 10) == [a[1]]


@pytest.mark.parametrize("interval", ["1 month", "1 day", "500 milliseconds"])
def test_an_interval_may_be_of_any_unit(tx: Conn, interval: str) -> None:
    at(tx, 0)
    call(tx, "configure_task", "a", rate_limit=1, rate_interval=interval)
    worker = register(tx)
    ids = many(tx, 2)
    assert claim_ids(tx, worker, 10) == ids[:1]
    due: Any = value(tx, "select %s::timestamptz + %s::interval", START, interval)
    assert value(tx, "select pgworker.next_run_at()") == due
    move_clock(tx, due.isoformat())
    assert [job["id"] for job in claim(tx, worker, 10)] == ids[1:]


def test_a_rate_that_was_used_by_a_clock_that_was_ahead_can_be_set_anew(tx: Conn) -> None:
    at(tx, 1_000_000)
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="10 seconds")
    worker = register(tx)
    ids = many(tx, 2, run_at="2020-01-01")
    assert claim_ids(tx, worker, 10) == ids[:1]
    at(tx, 0)
    assert claim_ids(tx, worker, 10) == []
    call(tx, "configure_task", "a", reset=["rate_limit"])
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="10 seconds")
    assert claim_ids(tx, worker, 10) == ids[1:]


def test_a_day_is_as_long_where_clocks_are_put_forward(tx: Conn) -> None:
    tx.execute("set timezone = 'Europe/Berlin'")
    move_clock(tx, "2026-03-28 12:00:00+00")
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="1 day")
    worker = register(tx)
    ids = many(tx, 3)
    assert claim_ids(tx, worker, 10) == ids[:1]
    move_clock(tx, "2026-03-29 11:30:00+00")
    assert claim_ids(tx, worker, 10) == []
    call(tx, "configure_task", "a", rate_interval="2 days")
    move_clock(tx, "2026-03-30 11:30:00+00")
    assert claim_ids(tx, worker, 10) == []
    move_clock(tx, "2026-03-30 12:00:00+00")
    assert claim_ids(tx, worker, 10) == ids[1:2]


def test_a_worker_of_another_session_finds_what_a_rate_lets_through_again(db: Conn, connect: Connections) -> None:
    at(db, 0)
    call(db, "configure_task", "a", rate_limit=1, rate_interval="10 seconds")
    ids = many(db, 2)
    other = connect()
    at(other, 0)
    one, two = register(db), register(other)
    assert claim_ids(db, one, 5) == ids[:1]
    assert claim_ids(other, two, 5) == []
    at(other, 10)
    assert claim_ids(other, two, 5) == ids[1:]
