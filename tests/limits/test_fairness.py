"""Turns among the limit keys of a task: nobody's hundred thousand jobs keep another's ten waiting."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.calling import Conn, add, call, claim_ids, register, value, values
from tests.connections import Connections
from tests.limits.test_concurrency import many
from tests.limits.test_rates import at


def keys(conn: Conn, ids: list[int]) -> list[str | None]:
    return [value(conn, "select limit_key from pgworker.jobs where id = %s", job) for job in ids]


def fill(conn: Conn, **counts: int) -> None:
    for key, count in counts.items():
        conn.execute(
            "select pgworker.add_job('a', limit_key => nullif(%s, 'none')) from generate_series(1, %s)", [key, count]
        )


@pytest.mark.parametrize("max_jobs", [1, 3, 10])
def test_keys_take_turns_whatever_their_number_of_jobs(tx: Conn, max_jobs: int) -> None:
    call(tx, "configure_task", "a", fair=True)
    fill(tx, big=500, small=10, none=10)
    worker = register(tx)
    ran: list[str | None] = []
    while len(ran) < 30:
        ran += keys(tx, claim_ids(tx, worker, max_jobs))
    assert Counter(ran[:30]) == {"big": 10, "small": 10, None: 10}


def test_without_turns_they_come_in_claim_order(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency_per_key=1000)
    fill(tx, big=50, small=10)
    ids = values(tx, "select id from pgworker.jobs order by id")
    assert claim_ids(tx, register(tx), 20) == ids[:20]


def test_a_key_that_comes_later_has_its_turn_at_once(tx: Conn) -> None:
    call(tx, "configure_task", "a", fair=True)
    fill(tx, big=100)
    worker = register(tx)
    assert keys(tx, claim_ids(tx, worker, 5)) == ["big"] * 5
    fill(tx, late=3)
    ran = [keys(tx, claim_ids(tx, worker))[0] for _ in range(6)]
    assert Counter(ran) == {"big": 3, "late": 3}


def test_within_a_key_the_order_stays(tx: Conn) -> None:
    call(tx, "configure_task", "a", fair=True)
    worker, chosen = register(tx), random.Random(2)
    for _ in range(40):
        add(tx, "a", priority=chosen.choice([0, 1]), limit_key=chosen.choice("xy"))
    ran: list[int] = []
    while jobs := claim_ids(tx, worker, chosen.choice([1, 4])):
        ran += sorted(jobs, key=lambda job: value(tx, "select (priority, id) from pgworker.jobs where id = %s", job))
    for key in "xy":
        expected = values(tx, "select id from pgworker.jobs where limit_key = %s order by priority, id", key)
        assert [job for job in ran if job in expected] == expected


def test_every_key_has_its_turn_within_as_many_claims_as_there_are_keys(tx: Conn) -> None:
    call(tx, "configure_task", "a", fair=True, max_concurrency_per_key=1000)
    fill(tx, **{f"k{n}": 5 for n in range(20)})
    worker = register(tx)
    ran = [keys(tx, claim_ids(tx, worker))[0] for _ in range(60)]
    for since in range(41):
        assert len(set(ran[since : since + 20])) == 20


def test_turns_and_limits_hold_together(tx: Conn) -> None:
    call(tx, "configure_task", "a", fair=True, max_concurrency=4, max_concurrency_per_key=3)
    fill(tx, big=50, small=2)
    worker = register(tx)
    first = claim_ids(tx, worker, 10)
    assert Counter(keys(tx, first)) == {"big": 2, "small": 2}
    small = [job for job, key in zip(first, keys(tx, first), strict=True) if key == "small"]
    call(tx, "finish_jobs", worker, small, None, None, None)
    assert keys(tx, claim_ids(tx, worker, 10)) == ["big"]  # three of one key, though a fourth may run


def test_turns_change_who_runs_and_not_how_much_of_the_task_runs(tx: Conn) -> None:
    call(tx, "configure_task", "a", fair=True)
    worker = register(tx)
    mine = [add(tx, "a" if n % 2 else "b", limit_key="old")["task_identifier"] for n in range(40)]
    fill(tx, new=20)
    ran = [
        value(tx, "select task_identifier from pgworker.jobs where id = %s", claim_ids(tx, worker)[0])
        for _ in range(40)
    ]
    assert abs(Counter(ran)["a"] - Counter(mine)["a"]) <= 1


def test_a_session_remembers_whose_turn_it_was_and_a_rollback_forgets_it(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", fair=True)
    fill(db, x=5, y=5)
    worker = register(db)
    with db.transaction(force_rollback=True):
        assert keys(db, claim_ids(db, worker)) == ["x"]
    assert keys(db, claim_ids(db, worker)) == ["x"]
    assert keys(db, claim_ids(db, worker)) == ["y"]
    other = connect()
    assert keys(other, claim_ids(other, register(other))) == ["x"]


@pytest.mark.parametrize("text", ["nonsense", "1#{}", "#", "0#[1", ""])
def test_a_garbled_memory_is_ignored(tx: Conn, text: str) -> None:
    call(tx, "configure_task", "a", fair=True)
    fill(tx, x=2, y=2)
    worker = register(tx)
    for _ in range(2):
        value(tx, "select set_config('pgworker.lanes', %s, false)", text)
        assert keys(tx, claim_ids(tx, worker)) == ["x"]


def test_more_lines_than_are_looked_at_at_once_all_have_their_turn(db: Conn) -> None:
    call(db, "configure_task", "a", max_concurrency_per_key=1)
    db.execute("select pgworker.add_job('a', limit_key => 'k' || n % 1500) from generate_series(1, 3000) n")
    worker = register(db)
    ran = 0
    while jobs := claim_ids(db, worker, 100):
        of = values(db, "select limit_key from pgworker.jobs where id = any (%s)", jobs)
        assert len(set(of)) == len(of)
        ran += len(jobs)
        call(db, "finish_jobs", worker, jobs, None, None, None)
    assert ran == 3000


def exhausted(conn: Conn, worker: int) -> list[int]:
    """Add two jobs to each of 3000 keys, and claim until no key lets anything through."""
    conn.execute("select pgworker.add_job('a', limit_key => 'k' || n % 3000) from generate_series(1, 6000) n")
    claimed: list[int] = []
    while jobs := claim_ids(conn, worker, 1000):
        claimed += jobs
    return claimed


def test_what_was_passed_over_as_a_whole_is_found_when_a_run_ends_or_a_key_is_new(
    db: Conn, connect: Connections
) -> None:
    call(db, "configure_task", "a", max_concurrency_per_key=1)
    holder = connect()
    held = register(holder)
    claimed = exhausted(holder, held)
    assert len(claimed) == 3000
    worker = register(db)
    assert claim_ids(db, worker, 10) == []
    assert "cost" in value(db, "select current_setting('pgworker.lanes')")
    call(holder, "complete_job", held, claimed[7])
    assert claim_ids(db, worker, 10) == [claimed[7] + 3000]
    new = many(db, 1, limit_key="new")
    assert claim_ids(db, worker, 10) == new
    assert claim_ids(db, worker, 10) == []
    call(db, "configure_task", "a", max_concurrency_per_key=2)
    assert len(claim_ids(db, worker, 10)) == 10


def test_what_was_passed_over_as_a_whole_is_found_when_a_rate_allows(db: Conn) -> None:
    at(db, 0)
    call(db, "configure_task", "a", rate_limit_per_key=1, rate_interval_per_key="1 hour")
    worker = register(db)
    first, second = add(db, "a", limit_key="k1")["id"], add(db, "a", limit_key="k1")["id"]
    assert claim_ids(db, worker, 10) == [first]
    at(db, 10)
    assert len(exhausted(db, worker)) == 2999
    assert claim_ids(db, worker, 10) == []
    assert "cost" in value(db, "select current_setting('pgworker.lanes')")
    at(db, 3600)
    assert claim_ids(db, worker, 10) == [second]
    at(db, 3609)
    assert claim_ids(db, worker, 10) == []
    at(db, 3610)
    assert len(claim_ids(db, worker, 10)) == 10
