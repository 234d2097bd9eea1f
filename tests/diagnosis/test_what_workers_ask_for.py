"""What workers ask for is on record, and claims pay for that only when it changes."""

from __future__ import annotations

from tests.calling import Conn, add, call, claim_ids, register, rows
from tests.connections import Connections
from tests.waiting import until_gone

_INTEREST = "select worker_id, pid, tasks, forbidden_flags, xmin::text from pgworker.interest order by worker_id, pid"


def asked(conn: Conn) -> list[tuple[object, ...]]:
    """Return what is on record, without what tells whether it was written anew."""
    return [tuple(row.values())[:4] for row in rows(conn, _INTEREST)]


def test_a_session_that_goes_on_asking_for_the_same_writes_nothing(db: Conn) -> None:
    worker, pid = register(db), db.info.backend_pid
    claim_ids(db, worker, tasks=["a"], forbidden_flags=["x"])
    assert asked(db) == [(worker, pid, ["a"], ["x"])]
    before = rows(db, _INTEREST)
    for _ in range(3):
        add(db)
        assert claim_ids(db, worker, 5, tasks=["a"], forbidden_flags=["x"])
    assert rows(db, _INTEREST) == before
    claim_ids(db, worker)
    assert asked(db) == [(worker, pid, None, None)]


def test_workers_that_share_a_session_do_not_write_in_turns(db: Conn) -> None:
    one, two = register(db, lease="1 hour"), register(db, lease="1 hour")
    for worker, task in ((one, "a"), (two, "b")):
        claim_ids(db, worker, tasks=[task])
    before = rows(db, _INTEREST)
    assert len(before) == 2
    for worker, task in ((one, "a"), (two, "b")) * 2:
        claim_ids(db, worker, tasks=[task])
    assert rows(db, _INTEREST) == before


def test_sessions_of_one_worker_do_not_wait_for_each_other(db: Conn, connect: Connections) -> None:
    worker = register(db, lease="1 hour")
    first, second = connect(autocommit=False), connect(options="-c lock_timeout=1s")
    jobs = [add(db)["id"] for _ in range(2)]
    assert claim_ids(first, worker) == jobs[:1]
    assert claim_ids(second, worker) == jobs[1:]
    first.commit()
    assert len(asked(db)) == 2


def test_a_claim_that_is_rolled_back_leaves_the_record_to_the_next(db: Conn) -> None:
    worker = register(db)
    with db.transaction(force_rollback=True):
        claim_ids(db, worker, tasks=["a"])
    assert asked(db) == []
    claim_ids(db, worker, tasks=["a"])
    assert asked(db) == [(worker, db.info.backend_pid, ["a"], None)]


def test_what_ended_sessions_and_forgotten_workers_asked_for_goes(db: Conn, connect: Connections) -> None:
    worker = register(db)
    before = connect()
    pid = before.info.backend_pid
    claim_ids(before, worker, tasks=["a"])
    before.close()
    until_gone(db, pid)
    claim_ids(db, worker, tasks=["b"])
    assert asked(db) == [(worker, db.info.backend_pid, ["b"], None)]
    call(db, "unregister_worker", worker)
    assert asked(db) == []
