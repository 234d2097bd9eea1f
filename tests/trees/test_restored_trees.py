"""Trees that were half finished when the database was dumped are finished in the copy, as they would have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, call, claim, claim_ids, register, rows, value
from tests.invariants import assert_consistent
from tests.restore.dumping import FORMATS, restoring
from tests.trees.planting import complete, fail, plant
from tests.trees.undoing import chain, compensations, settle, work

COPY = "pgworker_restored_trees"

Restored = Callable[[str], Conn]


def _node(task: str, *children: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"identifier": task, "name": task, "children": list(children), **more}


TREE = _node(
    "report",
    _node("load", *[{"identifier": "slice", "priority": -n} for n in range(5)]),
    _node("wide", *[{"identifier": "leaf"} for _ in range(80)]),
    _node("flaky", on_failure="ignore", max_attempts=1),
    _node("render", _node("draw"), _node("print", after=["draw"]), after=["load", "flaky"]),
    _node("grow", max_attempts=2),
)


@pytest.fixture
def restored(server: EmbeddedServer, db: Conn, tmp_path: Path) -> Iterator[Restored]:
    """Dump the test's database in a format, restore it elsewhere, and connect to the copy."""
    with restoring(server, db.info.dbname, tmp_path, COPY) as take:
        yield take


def _half(db: Conn) -> int:
    """Add a tree and do half of it; return its root. What runs is held by a worker that the copy will not have."""
    root: int = value(db, "select id from pgworker.add_job_tree(%s)", Jsonb(TREE))
    worker = register(db)
    for job in claim(db, worker, 3, tasks=["slice"]):
        call(db, "complete_job", worker, job["id"], Jsonb({"slice": job["id"]}))
    for job in claim(db, worker, 30, tasks=["leaf"]):
        call(db, "complete_job", worker, job["id"])
    (flaky,) = claim_ids(db, worker, tasks=["flaky"])
    call(db, "set_progress", worker, flaky, Jsonb("half"))
    call(db, "fail_job", worker, flaky, "broken")
    (grow,) = claim_ids(db, worker, tasks=["grow"])
    call(db, "add_children", worker, grow, Jsonb([{"identifier": "late"}, {"identifier": "later", "name": "l"}]))
    assert value(db, "select pgworker.wait_for_children(%s, %s)", worker, grow)
    assert len(claim_ids(db, worker, 5, tasks=["slice", "late"])) == 3  # they run
    return root


def _finish(conn: Conn) -> list[str]:
    """Do what there is to do, a job at a time, and return the tasks in the order in which they were done."""
    worker = register(conn)
    done = []
    while claimed := claim(conn, worker):
        done.append(claimed[0]["task_identifier"])
        call(conn, "complete_job", worker, claimed[0]["id"])
        assert_consistent(conn)
    return done


@pytest.mark.parametrize("kind", FORMATS)
def test_a_half_finished_tree_is_finished_in_the_copy(db: Conn, restored: Restored, kind: str) -> None:
    root = _half(db)
    copy = restored(kind)
    assert_consistent(copy)
    shown = "select * from pgworker.job_tree(%s)"
    assert rows(copy, shown, root) == rows(db, shown, root)
    both = []
    for conn in (copy, db):
        conn.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
        both.append(_finish(conn))
    # Each of them once, and the copy in the order of the original.
    assert both[0] == both[1]
    counts = {task: both[0].count(task) for task in both[0]}
    once = ["load", "wide", "draw", "print", "render", "late", "later", "grow", "report"]
    assert counts == {"slice": 2, "leaf": 50, **dict.fromkeys(once, 1)}
    assert both[0].index("load") < both[0].index("draw") < both[0].index("print") < both[0].index("render")
    assert both[0][-1] == "report"
    for conn in (copy, db):
        assert rows(conn, "select * from pgworker.job") == []
        assert rows(conn, "select * from pgworker.counter") == []
        states = dict(conn.execute("select * from pgworker.tree_progress(%s)", [root]).fetchall())
        assert states == {"completed": 5 + 80 + 9, "failed": 1}
    load = value(copy, "select id from pgworker.jobs where name = 'load'")
    assert list(value(copy, "select pgworker.get_children_values(%s)", load).values()).count(None) == 2


def test_what_was_put_off_when_the_dump_was_taken_is_done_in_the_copy(
    db: Conn, connect: Callable[..., Conn], restored: Restored
) -> None:
    """Somebody's lock keeps a parent from being released; the dump does not have that lock."""
    root = value(db, "select id from pgworker.add_job_tree(%s)", Jsonb(_node("a", _node("b"), _node("c"))))
    keeper = connect(autocommit=False)
    keeper.execute("select from pgworker.job where id = %s for update", [root])
    worker = register(db)
    for job in claim_ids(db, worker, 5):
        call(db, "complete_job", worker, job)
    assert rows(db, "select what from pgworker.unsettled") == [{"what": "release"}]
    copy = restored("custom")
    keeper.rollback()
    for conn in (copy, db):
        assert claim_ids(conn, register(conn)) == []
        call(conn, "maintain")
        assert_consistent(conn)
        assert _finish(conn) == ["a"]


@pytest.mark.parametrize("when", ["running", "put off", "half undone"])
def test_a_tree_that_was_to_be_undone_is_undone_in_the_copy(db: Conn, restored: Restored, when: str) -> None:
    order = chain("a", "b", "c")
    if when == "put off":
        order["children"] = [*order["children"], {"identifier": "slow"}]
    ids = plant(db, order)
    complete(db, ids["a"])
    complete(db, ids["b"], {"b": 1})
    if when == "put off":
        claim_ids(db, register(db), tasks=["slow"])
    if when != "running":
        fail(db, ids["c"])
    if when == "half undone":
        complete(db, compensations(db, ids["order"])[0]["id"])
    copy = restored("custom")
    assert rows(copy, "select * from pgworker.compensations") == rows(db, "select * from pgworker.compensations")
    for conn in (copy, db):
        conn.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
        undone = work(conn, "c")
        settle(conn)
        undone += work(conn)
        assert [task for task in undone if task != "c"] == ["undo-b", "undo-a"][when == "half undone" :]
        assert compensations(conn, ids["order"])[0]["payload"]["node"]["result"] == {"b": 1}


def test_a_failed_tree_is_retried_in_the_copy(db: Conn, restored: Restored) -> None:
    root = _half(db)
    db.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
    leaf = value(db, "select min(id) from pgworker.job where task_identifier = 'leaf'")
    call(db, "permanently_fail_jobs", [leaf])
    assert value(db, "select state from pgworker.jobs where id = %s", root) == "failed"
    copy = restored("plain")
    call(copy, "retry_jobs", [leaf])
    assert_consistent(copy)
    assert _finish(copy).count("leaf") == 50
    assert value(copy, "select state from pgworker.jobs where id = %s", root) == "completed"
