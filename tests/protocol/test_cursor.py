"""The session's cursor is a hint: whatever it says, every job is claimed, once and by whom it may."""

from __future__ import annotations

import pytest

from tests.calling import Conn, add, call, claim, claim_ids, register, value
from tests.connections import Connections
from tests.cursors import numbers
from tests.waiting import until

GARBLED = [
    "", " ", "x", "1", "1 2 3 4 5", "1 2 3 4 5 6 7 8 9 10", "-", "- -", "1--2", "0 - 0 0 0", "1  2", "     ",
    "99999999999999999999999999 1 2 3 4", "1,2,3,4,5", "{1,2,3,4,5}", "NULL", "1.5 0 0 0 0", "0x10 0 0 0 0", "\t\n",
    "é", "1 " * 5000,
]  # fmt: skip

BIGINTS = [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -32769, 32768]


def all_of(conn: Conn, worker: int, expected: set[int]) -> None:
    """Claim until all these jobs have come, each once."""
    got: list[int] = []

    def complete() -> bool:
        got.extend(claim_ids(conn, worker, 2))
        return len(got) >= len(expected)

    until(complete, "all jobs")
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("garbled", GARBLED, ids=lambda text: repr(text[:20]))
def test_a_garbled_cursor_is_ignored(tx: Conn, garbled: str) -> None:
    worker = register(tx)
    ids = {add(tx)["id"], add(tx, queue_name="q")["id"], add(tx, priority=5)["id"]}
    tx.execute("select set_config('pgworker.cursor', %s, false)", [garbled])
    all_of(tx, worker, ids)


@pytest.mark.parametrize("position", range(10))
def test_a_cursor_with_a_senseless_number_hides_no_job_for_long(tx: Conn, position: int) -> None:
    worker = register(tx)
    add(tx)
    assert len(claim_ids(tx, worker)) == 1
    good = numbers(tx)
    assert len(good) == 10
    for senseless in [*BIGINTS, ""]:
        ids = {add(tx)["id"], add(tx, queue_name=f"q{senseless}")["id"]}
        garbled = " ".join([*good[:position], str(senseless), *good[position + 1 :]])
        tx.execute("select set_config('pgworker.cursor', %s, false)", [garbled])
        all_of(tx, worker, ids)


@pytest.mark.parametrize("entries", [1, 2, 3, 5, 8, 10])
def test_a_cursor_that_was_cut_off_is_ignored(tx: Conn, entries: int) -> None:
    worker = register(tx)
    add(tx)
    assert len(claim_ids(tx, worker)) == 1
    good = numbers(tx)
    ids = {add(tx)["id"], add(tx, queue_name="q")["id"]}
    tx.execute("select set_config('pgworker.cursor', %s, false)", [" ".join((good + good)[:entries])])
    all_of(tx, worker, ids)


@pytest.mark.parametrize("queued", [False, True])
def test_a_claim_that_is_rolled_back_leaves_everything_claimable_at_once(db: Conn, queued: bool) -> None:
    worker = register(db)
    ids = [add(db, queue_name=f"q{n}" if queued else None)["id"] for n in range(6)]
    assert claim_ids(db, worker) == ids[:1]
    with db.transaction(force_rollback=True):
        assert claim_ids(db, worker, 3) == ids[1:4]
    with db.transaction():
        with db.transaction(force_rollback=True):
            assert claim_ids(db, worker, 10) == ids[1:]
        again = claim(db, worker, 2)
    assert [(job["id"], job["attempts"]) for job in again] == [(ids[1], 1), (ids[2], 1)]
    assert claim_ids(db, worker, 10) == ids[3:]


def test_a_session_shared_by_workers_with_other_tasks_hides_nothing_from_any(db: Conn) -> None:
    one, two = register(db, lease="1 hour"), register(db, lease="1 hour")
    ids = {name: [add(db, name)["id"] for _ in range(3)] for name in "abc"}
    for n in range(3):
        assert claim_ids(db, one, tasks=["c"]) == [ids["c"][n]]
        assert claim_ids(db, two, tasks=["b"]) == [ids["b"][n]]
        assert claim_ids(db, two, forbidden_flags=["x"], tasks=["a"]) == [ids["a"][n]]


def test_the_cursor_of_another_worker_handed_over_by_a_pooler_is_not_used(db: Conn, connect: Connections) -> None:
    first, second = connect(), connect()
    one, two = register(first, lease="1 hour"), register(second, lease="1 hour")
    passed_over = add(db, "b")["id"]
    last = add(db, "a")["id"]
    assert claim_ids(first, one, tasks=["a"]) == [last]
    cursor = value(first, "select current_setting('pgworker.cursor')")
    second.execute("select set_config('pgworker.cursor', %s, false)", [cursor])
    assert claim_ids(second, two, tasks=["b"]) == [passed_over]


@pytest.mark.parametrize("command", ["discard all", "reset all", "reset pgworker.cursor"])
def test_a_session_that_was_reset_goes_on(db: Conn, command: str) -> None:
    worker = register(db, lease="1 hour")
    ids = [add(db)["id"] for _ in range(4)]
    assert claim_ids(db, worker, 2) == ids[:2]
    db.execute(command)
    assert claim_ids(db, worker, 10) == ids[2:]
    assert claim_ids(db, worker, 10) == []


def test_claiming_leaves_the_sessions_other_settings_alone(db: Conn) -> None:
    settings = "select name, setting from pg_settings where name not like '%.%' order by name"
    before = db.execute(settings).fetchall()
    worker = register(db)
    for _ in range(2):
        add(db, queue_name="q")
        claim(db, worker)
    call(db, "next_run_at")
    call(db, "maintain")
    assert db.execute(settings).fetchall() == before


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_stricter_isolation_level_gets_each_job_once_too(db: Conn, connect: Connections, level: str) -> None:
    other = connect()
    one, two = register(db), register(other)
    ids = [add(db)["id"] for _ in range(4)]
    other.execute("set default_transaction_isolation = " + level.join("''"))
    with db.transaction():
        assert claim_ids(db, one, 2) == ids[:2]
        assert claim_ids(other, two, 10) == ids[2:]
    assert claim_ids(other, two, 10) == []
