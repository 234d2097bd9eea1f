"""Steering, pruning and other sessions meet trees that are to be undone: exactly once, and never by halves."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest

from tests.calling import Conn, call, register, rows, state, value, values
from tests.connections import Connections
from tests.invariants import violations
from tests.sessions import Background
from tests.trees.planting import complete, fail, leftovers, named, node, only, plant, start, states
from tests.trees.undoing import chain, compensations, settle, undoable, undoes, work


def _undone(conn: Conn) -> tuple[dict[str, int], list[int]]:
    """Return a tree whose compensations have begun, by name, and their ids."""
    ids = plant(conn, chain("a", "b", "c"))
    complete(conn, ids["a"])
    complete(conn, ids["b"])
    fail(conn, ids["c"])
    return ids, [job["id"] for job in compensations(conn, ids["order"])]


@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("which", ["order", "c"])
def test_a_tree_that_is_being_undone_is_not_retried(tx: Conn, which: str, when: str) -> None:
    """Nobody would know what of it is done and what undone."""
    ids, undoing = _undone(tx)
    for job in undoing[: ["before", "while", "after"].index(when)]:
        complete(tx, job)
    said: list[str] = []
    tx.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    other = plant(tx, node("other"))["other"]
    call(tx, "permanently_fail_jobs", [other])
    assert [job["id"] for job in call(tx, "retry_jobs", [ids[which], other])] == [other]
    assert said == [f"passed over, for their trees are being undone: jobs {ids[which]}"]
    assert call(tx, "reschedule_jobs", [ids[which]], attempts=0) == []
    assert call(tx, "complete_jobs", [ids[which]]) == []
    assert only(states(tx, ids), "order", "a", "c") == ["failed", "completed", "failed"]
    complete(tx, other)
    work(tx)
    assert [job["state"] for job in compensations(tx, ids["order"])] == ["completed", "completed"]


def test_a_compensation_that_failed_can_be_retried_or_declared_done(tx: Conn) -> None:
    ids, (undo_b, undo_a) = _undone(tx)
    fail(tx, undo_b)
    assert [job["id"] for job in call(tx, "retry_jobs", [undo_b])] == [undo_b]
    assert state(tx, undo_a) == "ready"  # it did not have to wait any more
    assert work(tx, "undo-a") == ["undo-b", "undo-a"]
    assert [job["id"] for job in call(tx, "complete_jobs", [undo_a])] == [undo_a]
    assert undoes(tx, ids["order"]) == ["undo-b", "undo-a"]


def test_cancelling_a_tree_again_does_not_cancel_what_undoes_it(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b", "c"))
    complete(tx, ids["a"])
    complete(tx, ids["b"])
    call(tx, "cancel_jobs", [ids["order"]])
    assert call(tx, "cancel_jobs", [ids["order"], ids["c"]]) == []
    (undo_b, _) = (job["id"] for job in compensations(tx, ids["order"]))
    assert [job["id"] for job in call(tx, "cancel_jobs", [undo_b])] == [undo_b]
    assert work(tx) == ["undo-a"]


def test_a_compensation_that_is_cancelled_takes_along_what_it_added(tx: Conn) -> None:
    ids, (undo_b, _) = _undone(tx)
    worker = start(tx, undo_b)
    call(tx, "add_children", worker, undo_b, '[{"identifier": "sub"}]')
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, undo_b)
    assert len(call(tx, "cancel_jobs", [undo_b])) == 2
    assert work(tx) == ["undo-a"]
    assert state(tx, ids["order"]) == "failed"


def test_a_tree_that_is_retried_before_it_came_to_rest_is_not_undone(tx: Conn) -> None:
    ids = plant(tx, node("order", undoable("a"), undoable("b", max_attempts=2), node("c", max_attempts=1)))
    complete(tx, ids["a"])
    worker = start(tx, ids["b"])
    fail(tx, ids["c"])
    assert state(tx, ids["order"]) == "failed"
    call(tx, "retry_jobs", [ids["c"]])
    assert state(tx, ids["order"]) == "waiting"
    call(tx, "complete_job", worker, ids["b"])
    settle(tx)
    assert work(tx) == ["c", "order"]
    assert only(states(tx, ids), "order", "b") == ["completed", "completed"]
    assert undoes(tx, ids["order"]) == []


def test_what_was_done_by_a_job_that_was_to_stop_and_runs_again_is_undone_once(tx: Conn) -> None:
    tree = node("order", undoable("a"), node("c", max_attempts=1), node("slow"))
    ids = plant(tx, tree)
    worker, slow = start(tx, ids["a"]), start(tx, ids["slow"])
    fail(tx, ids["c"])
    call(tx, "complete_job", worker, ids["a"])
    assert state(tx, ids["a"]) == "cancelled"
    call(tx, "retry_jobs", [ids["order"]])
    assert state(tx, ids["a"]) == "ready"
    assert values(tx, "select node from pgworker.compensation") == [None]
    complete(tx, ids["a"], "again")
    fail(tx, ids["c"])
    call(tx, "complete_job", slow, ids["slow"])
    settle(tx)
    (undo,) = compensations(tx, ids["order"])
    assert undo["payload"]["node"]["result"] == "again"
    work(tx)


def test_what_completes_below_a_failed_root_after_a_retry_is_undone(tx: Conn) -> None:
    ids = plant(tx, node("order", undoable("a", on_failure="ignore"), node("b", max_attempts=1)))
    fail(tx, ids["a"])
    fail(tx, ids["b"])
    assert [job["id"] for job in call(tx, "retry_jobs", [ids["a"]])] == [ids["a"]]
    assert state(tx, ids["order"]) == "failed"
    settle(tx)
    complete(tx, ids["a"])
    settle(tx)
    assert work(tx) == ["undo-a"]


def test_a_failed_job_that_is_declared_completed_is_undone_in_a_failed_tree(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b"))
    fail(tx, ids["a"])
    call(tx, "complete_jobs", [ids["a"]])
    assert work(tx) == ["undo-a"]


def test_a_failed_root_that_is_declared_completed_in_time_is_not_undone(tx: Conn) -> None:
    ids = plant(tx, node("order", undoable("a"), undoable("b"), node("c", max_attempts=1)))
    complete(tx, ids["a"])
    worker = start(tx, ids["b"])
    fail(tx, ids["c"])
    assert [job["id"] for job in call(tx, "complete_jobs", [ids["order"]])] == [ids["order"]]
    call(tx, "complete_job", worker, ids["b"])
    settle(tx)
    assert values(tx, "select n from pgworker.unsettled") == []
    assert undoes(tx, ids["order"]) == []


def _age(conn: Conn) -> None:
    conn.execute("update pgworker.finished set keep_until = now() - interval '1 hour' where keep_until < 'infinity'")


@pytest.mark.parametrize("way", ["prune", "cleanup"])
def test_a_tree_is_kept_until_it_is_undone_and_forgotten_as_a_whole(tx: Conn, way: str) -> None:
    """good_job #1387, #1454: a batch was cleaned before its callbacks ran."""

    def forget() -> None:
        _age(tx)
        for _ in range(3):
            call(tx, "maintain") if way == "prune" else call(tx, "cleanup")

    ids, _ = _undone(tx)
    forget()
    assert only(states(tx, ids), "order", "a") == ["failed", "completed"]
    assert work(tx) == ["undo-b", "undo-a"]
    forget()
    assert set(states(tx, ids).values()) == {None}
    for table in ("finished", "compensation", "dependency", "counter", "unsettled"):
        assert values(tx, f"select count(*) from pgworker.{table}") == [0], table


@pytest.mark.parametrize("way", ["prune", "cleanup"])
def test_a_tree_whose_compensations_could_not_begin_yet_is_kept(db: Conn, connect: Connections, way: str) -> None:
    ids = plant(db, chain("a", "b"))
    complete(db, ids["a"])
    holder = connect()
    with holder.transaction():
        holder.execute("select from pgworker.compensation for update")
        fail(db, ids["b"])
        assert values(db, "select what from pgworker.unsettled") == ["compensate"]
        _age(db)
        db.execute("update pgworker.unsettled set due = now() + interval '1 hour'")
        call(db, "maintain") if way == "prune" else call(db, "cleanup")
        assert state(db, ids["order"]) == "failed"
    settle(db)
    assert work(db) == ["undo-a"]


def test_a_tree_that_is_forgotten_while_somebody_holds_a_compensation_leaves_nothing(
    db: Conn, connect: Connections
) -> None:
    ids, _ = _undone(db)
    work(db)
    holder = connect()
    with holder.transaction():
        holder.execute("select from pgworker.compensation where node_id = %s for update", [ids["a"]])
        call(db, "cleanup")
        assert states(db, ids)["order"] is None
        assert values(db, "select node_id from pgworker.compensation") == [ids["a"]]
        assert violations(db) == []
        settle(db)
    settle(db)
    assert values(db, "select node_id from pgworker.compensation") == []
    assert leftovers(db) == 0


@pytest.mark.parametrize("when", ["before", "while"])
def test_children_that_are_added_to_a_tree_that_is_removed_leave_nothing(
    db: Conn, connect: Connections, when: str
) -> None:
    """Who removes the tree cannot see yet that there is something to be undone in it."""
    ids = plant(db, node("order", node("a")))
    worker = start(db, ids["a"])
    adding = connect(autocommit=False)
    if when == "before":
        db.execute("delete from pgworker.job where id = %s", [ids["order"]])
    call(adding, "add_children", worker, ids["a"], '[{"identifier": "b", "compensate": {"identifier": "undo-b"}}]')
    if when == "while":
        db.execute("delete from pgworker.job where id = %s", [ids["order"]])
    adding.commit()
    call(db, "cancel_job", worker, ids["a"])
    settle(db)
    work(db)
    assert values(db, "select id from pgworker.jobs") == []
    assert value(db, "select count(*) from pgworker.compensation") == 0
    assert violations(db) == []


@pytest.mark.parametrize("when", ["before", "while", "uncommitted"])
def test_children_that_are_added_to_a_tree_that_fails_are_undone(db: Conn, connect: Connections, when: str) -> None:
    """Who makes it fail cannot see yet that there is something to be undone in it."""
    ids = plant(db, node("order", node("a", on_failure="ignore"), node("c", max_attempts=1)))
    worker = start(db, ids["a"])
    failing = start(db, ids["c"])
    adding, other = connect(autocommit=False), connect(autocommit=False)
    fails = (failing, ids["c"], "broken")
    if when == "before":
        call(db, "fail_job", *fails)
    call(adding, "add_children", worker, ids["a"], json.dumps([undoable("b")]))
    if when != "before":
        call(other, "fail_job", *fails)
    if when == "while":
        other.commit()
    adding.commit()
    complete(db, named(db, ids["order"])["b"])
    settle(db)
    other.commit()
    assert state(db, ids["order"]) == "failed"
    call(db, "complete_job", worker, ids["a"])
    settle(db)
    assert violations(db) == []
    assert undoes(db, ids["order"]) == ["undo-b"]
    assert work(db) == ["undo-b"]


def test_a_removed_subtree_is_not_forgotten_before_what_it_did_is_remembered(db: Conn, connect: Connections) -> None:
    part = node("part", undoable("a"), node("b", after=["a"]), on_failure="remove")
    ids = plant(db, node("order", part, node("z", after=["part"])))
    complete(db, ids["a"])
    holder = connect()
    with holder.transaction():
        holder.execute("select from pgworker.compensation for update")
        fail(db, ids["b"])
        assert only(states(db, ids), "part", "a", "b") == [None, "completed", None]
    settle(db)
    assert state(db, ids["a"]) is None
    fail(db, ids["z"])
    assert work(db) == ["undo-a"]


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("how", ["completed", "failed"])
def test_the_last_two_jobs_that_end_at_once_do_not_lose_the_compensations(
    db: Conn, connect: Connections, how: str, commits: bool
) -> None:
    """Each of two sessions sees the other's job live: neither may be the one that undoes the tree."""
    ids = plant(db, node("order", undoable("a"), undoable("b"), node("c", max_attempts=1)))
    complete(db, ids["a"])
    worker = start(db, ids["b"])
    failing = start(db, ids["c"])
    other = connect()
    with other.transaction(force_rollback=not commits):
        if how == "completed":
            call(other, "complete_job", worker, ids["b"])  # and holds the counter of their parent
        else:
            call(other, "fail_job", worker, ids["b"], "it broke", permanent=True)  # and holds what is to stop
        second = Background(
            connect(), "select pgworker.fail_job(%s, %s, 'broken', permanent => true)", failing, ids["c"]
        )
        second.wait_until_blocked(db)
    second.result()
    assert state(db, ids["order"]) == "failed"
    if not commits:
        settle(db)
        assert undoes(db, ids["order"]) == []
        call(db, "cancel_job", worker, ids["b"])
    settle(db)
    completed = commits and how == "completed"
    assert undoes(db, ids["order"]) == [*(["undo-b"] if completed else []), "undo-a"]
    work(db)


_BEGIN: dict[str, Callable[[dict[str, int]], str]] = {
    "retry_jobs": lambda ids: f"select count(*) from pgworker.retry_jobs(array[{ids['c']}])",
    "complete_jobs": lambda ids: f"select count(*) from pgworker.complete_jobs(array[{ids['order']}])",
}


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("act", _BEGIN)
def test_whoever_retries_first_keeps_the_tree_from_being_undone(
    db: Conn, connect: Connections, act: str, commits: bool
) -> None:
    ids = plant(db, node("order", undoable("a"), undoable("b"), node("c", max_attempts=1)))
    complete(db, ids["a"])
    worker = start(db, ids["b"])
    fail(db, ids["c"])
    other = connect()
    with other.transaction(force_rollback=not commits):
        other.execute(_BEGIN[act](ids).encode())
        db.execute("set lock_timeout = '2s'")
        settle(db)
        assert undoes(db, ids["order"]) == []
    call(db, "complete_job", worker, ids["b"])
    settle(db)
    if commits:
        work(db)
        assert (state(db, ids["order"]), undoes(db, ids["order"])) == ("completed", [])
    else:
        assert undoes(db, ids["order"]) == ["undo-b", "undo-a"]
        work(db)


@pytest.mark.parametrize("act", _BEGIN)
def test_whoever_retries_while_the_tree_begins_to_be_undone_waits_and_is_too_late(
    db: Conn, connect: Connections, act: str
) -> None:
    ids = plant(db, chain("a", "c"))
    complete(db, ids["a"])
    failing = start(db, ids["c"])
    with db.transaction():
        call(db, "fail_job", failing, ids["c"], "broken", permanent=True)
        assert undoes(db, ids["order"]) == ["undo-a"]
    with db.transaction():
        # Somebody who looks at that moment has found the tree failed, and now waits.
        db.execute("select from pgworker.compensation for update")
        second = Background(connect(), _BEGIN[act](ids))
        second.wait_until_blocked(db)
        db.execute("update pgworker.compensation set job_id = job_id")
    assert second.result() == [{"count": 0}]
    assert work(db) == ["undo-a"]


def test_a_transaction_with_an_old_snapshot_does_not_undo_what_was_retried_since(
    db: Conn, connect: Connections
) -> None:
    ids = plant(db, node("order", undoable("a"), undoable("b"), undoable("i", on_failure="ignore", max_attempts=1),
                         node("c", max_attempts=1)))  # fmt: skip
    complete(db, ids["a"])
    fail(db, ids["i"])
    worker = start(db, ids["b"])
    fail(db, ids["c"])
    call(db, "complete_job", worker, ids["b"])
    old = connect()
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with old.transaction(force_rollback=True):
        old.execute("select from pgworker.job")
        call(db, "retry_jobs", [ids["i"]])
        with pytest.raises(psycopg.errors.SerializationFailure):
            settle(old)
    assert undoes(db, ids["order"]) == []
    complete(db, ids["i"])
    settle(db)
    assert work(db) == ["undo-i", "undo-b", "undo-a"]


def test_two_who_begin_at_once_undo_a_tree_once(db: Conn, connect: Connections) -> None:
    ids = plant(db, node("order", undoable("a"), undoable("b"), node("c", max_attempts=1)))
    complete(db, ids["a"])
    worker = start(db, ids["b"])
    fail(db, ids["c"])
    call(db, "complete_job", worker, ids["b"])
    first, second = connect(), connect()
    with first.transaction():
        settle(first)
        assert undoes(first, ids["order"]) == ["undo-b", "undo-a"]
        second.execute("set lock_timeout = '2s'")
        second.execute("select pgworker.compensate(array[%s]::bigint[])", [ids["order"]])
    settle(db)
    assert undoes(db, ids["order"]) == ["undo-b", "undo-a"]
    assert rows(db, "select * from pgworker.unsettled") == []
    work(db)


def test_many_trees_that_fail_at_once_are_all_undone(tx: Conn) -> None:
    roots = [plant(tx, chain("a", "b"))["order"] for _ in range(30)]
    worker = register(tx)
    while claimed := call(tx, "get_jobs", worker, 100, tasks=["a"]):
        call(tx, "finish_jobs", worker, [job["id"] for job in claimed], None, None, None)
    call(tx, "cancel_jobs", roots)
    assert [undoes(tx, root) for root in roots] == [["undo-a"]] * 30
    assert work(tx) == ["undo-a"] * 30


def test_what_is_wrong_with_compensations_is_reported(tx: Conn) -> None:
    ids, _ = _undone(tx)
    with tx.transaction(force_rollback=True):
        tx.execute("insert into pgworker.compensation (node_id, root_id, spec) values (-1, -1, '{}')")
        tx.execute("update pgworker.compensation set job_id = null where root_id = %s", [ids["order"]])
        tx.execute(
            "insert into pgworker.job (id, run_at, created_at, root_id, parent_id, depth, task_identifier, payload)"
            " values (-2, now(), now(), %s, %s, 1, 'x', '{}')",
            [ids["order"]] * 2,
        )
        assert violations(tx) == [
            "job -1 is to be compensated when its tree fails, but that (of root -1) is not known",
            f"job {ids['a']} has completed in a tree that has failed, and is not going to be compensated",
            f"job {ids['b']} has completed in a tree that has failed, and is not going to be compensated",
        ]
        tx.execute("update pgworker.compensation set job_id = 999999999 where node_id = %s", [ids["a"]])
        assert "job -2 is live, though its tree is being undone" in violations(tx)
