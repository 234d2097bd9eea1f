"""forbid_flag and allow_flag: no worker takes such jobs meanwhile, and none is lost."""

from __future__ import annotations

import pytest

from tests.calling import Conn, add, call, claim_ids, refused, register, rows, values
from tests.clock import move_clock
from tests.connections import Connections


def test_no_worker_takes_a_job_with_a_forbidden_flag_until_it_is_allowed_again(db: Conn, connect: Connections) -> None:
    other = connect()
    mine, theirs = register(db), register(other)
    flagged = [add(db, flags=["slow"], queue_name=queue)["id"] for queue in (None, "q")]
    both, free = add(db, flags=["slow", "big"])["id"], add(db, flags=["big"])["id"]
    call(db, "forbid_flag", "slow")
    assert claim_ids(db, mine, 10) == [free]
    assert claim_ids(other, theirs, 10) == []
    assert claim_ids(other, theirs, 10, forbidden_flags=["big"]) == []
    call(db, "allow_flag", "slow")
    assert sorted(claim_ids(other, theirs, 10, forbidden_flags=["big"])) == flagged
    assert claim_ids(db, mine, 10) == [both]


def test_a_job_that_runs_goes_on_and_is_not_taken_again_after_its_failure(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, flags=["slow"])["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "forbid_flag", "slow")
    call(tx, "fail_job", worker, job, "broke", retry_at="2020-01-01")
    assert claim_ids(tx, worker, 10) == []
    call(tx, "allow_flag", "slow")
    assert claim_ids(tx, worker, 10) == [job]


def test_allowing_moves_the_cursors_of_sessions_that_have_passed_by(db: Conn, connect: Connections) -> None:
    worker = register(db)
    other = connect()
    job = add(db, flags=["slow"])["id"]
    call(db, "forbid_flag", "slow")
    later = [add(db)["id"] for _ in range(3)]
    assert claim_ids(db, worker) == later[:1]
    before = values(db, "select last_value from pgworker.epoch")
    call(other, "allow_flag", "slow")
    assert values(db, "select last_value from pgworker.epoch") > before
    assert claim_ids(db, worker) == [job]


def test_allowing_wakes_the_workers_that_sleep(db: Conn, connect: Connections) -> None:
    sleeper = connect()
    worker = register(sleeper)
    add(db, flags=["slow"])
    call(db, "forbid_flag", "slow")
    assert claim_ids(sleeper, worker) == []
    sleeper.execute("listen pgworker")
    call(db, "allow_flag", "other")  # nothing to tell
    call(db, "allow_flag", "slow")
    (notified,) = list(sleeper.notifies(timeout=10, stop_after=1))
    assert notified.channel == "pgworker"


def test_the_view_says_which_flags_and_since_when(tx: Conn) -> None:
    for flag, hour in (("slow", 12), ("big", 13), ("slow", 14)):
        move_clock(tx, f"2030-01-01 {hour}:00:00+00")
        call(tx, "forbid_flag", flag)
    call(tx, "allow_flag", "big")
    (shown,) = rows(tx, "select * from pgworker.forbidden_flags")
    assert (shown["name"], str(shown["forbidden_at"])) == ("slow", "2030-01-01 12:00:00+00:00")


@pytest.mark.parametrize("function", ["forbid_flag", "allow_flag"])
@pytest.mark.parametrize(("flag", "sqlstate"), [(None, "22004"), ("", "22023"), ("é" * 513, "22023")])
def test_what_can_be_no_flag_is_refused(tx: Conn, function: str, flag: str | None, sqlstate: str) -> None:
    says = "name must not be null" if flag is None else f"name must be 1 to 512 characters long, got {len(flag)}"
    with refused(tx, sqlstate, says, hint="as jobs have it"):
        call(tx, function, flag)


def test_the_longest_flag_can_be_forbidden(tx: Conn) -> None:
    worker, flag = register(tx), "".join(chr(0x10000 + n) for n in range(512))
    job = add(tx, flags=[flag])["id"]
    call(tx, "forbid_flag", flag)
    assert claim_ids(tx, worker) == []
    call(tx, "allow_flag", flag)
    assert claim_ids(tx, worker) == [job]


def test_a_hundred_thousand_forbidden_jobs_are_walked_over_once_a_session_not_once_a_claim(db: Conn) -> None:
    db.execute(
        "insert into pgworker.job (run_at, created_at, task_identifier, payload, flags) "
        "select now() - interval '1 hour', now(), 't', '{}', '{slow}' from generate_series(1, 100000)"
    )
    call(db, "forbid_flag", "slow")
    worker = register(db)
    expected = [add(db)["id"] for _ in range(50)]
    assert claim_ids(db, worker) == expected[:1]
    assert claim_ids(db, worker) == expected[1:2]  # plans are made
    fetched = []
    for job in expected[2:22]:
        with db.transaction():
            assert claim_ids(db, worker) == [job]
            fetched += values(db, "select pg_stat_get_xact_tuples_fetched('pgworker.job'::regclass)")
    assert min(fetched) < 1000, fetched  # all but the sweeps, whose share of the time is bounded
