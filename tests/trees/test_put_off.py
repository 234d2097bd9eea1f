"""Somebody holds the row of a job that others in its tree would change: it is done later, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, add, call, claim_ids, register, rows, state, value
from tests.connections import Connections
from tests.invariants import assert_consistent


@pytest.fixture
def keeper(connect: Connections) -> Iterator[Conn]:
    """A session in an open transaction."""
    conn = connect(autocommit=False)
    yield conn
    conn.rollback()


def _tree(db: Conn, *children: dict[str, Any], **more: Any) -> dict[str, int]:
    """Add a tree; return the ids by task."""
    root = value(
        db,
        "select id from pgworker.add_job_tree(%s)",
        Jsonb({"identifier": "root", "children": list(children), **more}),
    )
    found = rows(db, "select task_identifier as task, id from pgworker.jobs where root_id = %s", root)
    return {row["task"]: row["id"] for row in found}


def _keep(keeper: Conn, job: int) -> None:
    keeper.execute("select from pgworker.job where id = %s for update", [job])


def _put_off(db: Conn) -> list[str]:
    assert_consistent(db)
    return [row["what"] for row in rows(db, "select what from pgworker.unsettled order by n")]


def _settle(db: Conn) -> None:
    for _ in range(len(_put_off(db)) + 1):
        call(db, "maintain")
    assert _put_off(db) == []


def test_a_parent_that_is_held_is_released_later(db: Conn, keeper: Conn) -> None:
    ids = _tree(db, {"identifier": "a"})
    worker = register(db)
    claim_ids(db, worker)
    _keep(keeper, ids["root"])
    call(db, "complete_job", worker, ids["a"])
    assert _put_off(db) == ["release"]
    keeper.rollback()
    _settle(db)
    assert claim_ids(db, worker, 5) == [ids["root"]]


def test_a_parent_that_is_held_fails_later_and_does_not_run_before(db: Conn, keeper: Conn) -> None:
    ids = _tree(db, {"identifier": "a"}, {"identifier": "b"})
    worker = register(db)
    claim_ids(db, worker, 2)
    _keep(keeper, ids["root"])
    call(db, "fail_job", worker, ids["a"], "broken", permanent=True)
    keeper.rollback()
    call(db, "complete_job", worker, ids["b"])
    assert state(db, ids["root"]) == "waiting"
    _settle(db)
    assert state(db, ids["root"]) == "failed"


def test_a_phase_that_is_held_opens_later(db: Conn, keeper: Conn) -> None:
    after = {"identifier": "b", "after": ["a"], "children": [{"identifier": "leaf"}]}
    ids = _tree(db, {"identifier": "a", "name": "a"}, after)
    worker = register(db)
    claim_ids(db, worker)
    _keep(keeper, ids["leaf"])
    call(db, "complete_job", worker, ids["a"])
    assert _put_off(db) == ["open"]
    keeper.rollback()
    _settle(db)
    assert claim_ids(db, worker, 5) == [ids["leaf"]]


def test_what_is_held_below_a_failed_parent_is_cancelled_later(db: Conn, keeper: Conn) -> None:
    deep = {"identifier": "b", "children": [{"identifier": "c"}]}
    ids = _tree(db, {"identifier": "a", "priority": -1}, deep)
    worker = register(db)
    claim_ids(db, worker)
    _keep(keeper, ids["c"])
    call(db, "fail_job", worker, ids["a"], "broken", permanent=True)
    assert set(_put_off(db)) == {"stop"}
    assert state(db, ids["c"]) == "ready"
    keeper.rollback()
    _settle(db)
    assert rows(db, "select * from pgworker.job") == []
    assert value(db, "select count(*) from pgworker.finished where cause_id = %s", ids["a"]) == 3


def test_what_is_held_behind_a_failed_sibling_is_cancelled_later_when_no_parent_is_there(
    db: Conn, keeper: Conn
) -> None:
    parent = add(db, "parent")["id"]
    worker = register(db)
    assert claim_ids(db, worker) == [parent]
    children = [{"identifier": "a", "name": "a"}, {"identifier": "b", "after": ["a"]}]
    first, second = (job["id"] for job in call(db, "add_children", worker, parent, Jsonb(children)))
    call(db, "complete_job", worker, parent)
    assert claim_ids(db, worker, 5) == [first]
    _keep(keeper, second)
    call(db, "fail_job", worker, first, "broken", permanent=True)
    assert _put_off(db) == ["cancel"]
    keeper.rollback()
    _settle(db)
    assert state(db, second) == "cancelled"


def test_one_that_stays_held_holds_up_no_other(db: Conn, keeper: Conn, connect: Connections) -> None:
    first, second = _tree(db, {"identifier": "a"}), _tree(db, {"identifier": "a"})
    worker = register(db)
    claim_ids(db, worker, 5)
    other = connect(autocommit=False)
    _keep(keeper, first["root"])
    _keep(other, second["root"])
    call(db, "finish_jobs", worker, [first["a"], second["a"]], None, [], [])
    assert _put_off(db) == ["release"] * 2
    other.rollback()
    for _ in range(2):
        call(db, "maintain")
    assert [state(db, ids["root"]) for ids in (first, second)] == ["waiting", "ready"]


@pytest.mark.parametrize("ends", ["fail", "cancel"])
def test_what_was_put_off_is_forgotten_when_a_retry_undoes_it(db: Conn, keeper: Conn, ends: str) -> None:
    ids = _tree(db, {"identifier": "a", "priority": -1}, {"identifier": "b", "children": [{"identifier": "c"}]})
    worker = register(db)
    claim_ids(db, worker)
    _keep(keeper, ids["root"] if ends == "fail" else ids["c"])
    call(db, "fail_job", worker, ids["a"], "broken", permanent=True)
    assert set(_put_off(db)) == {"fail" if ends == "fail" else "stop"}
    keeper.rollback()
    call(db, "retry_jobs", [ids["a"]])
    assert _put_off(db) == []
    for job in ("a", "c", "b", "root"):
        assert claim_ids(db, worker) == [ids[job]]
        call(db, "complete_job", worker, ids[job])
        assert_consistent(db)
    assert state(db, ids["root"]) == "completed"
