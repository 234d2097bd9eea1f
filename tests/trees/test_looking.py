"""children, values, job_tree, tree_progress, audit: what is told of trees, to whom."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.calling import FUTURE, Conn, add, call, register, row, rows, seen, value, values
from tests.connections import Connections
from tests.trees.planting import complete, fail, grow, node, plant, start


def test_children_are_rows_of_the_view_live_and_finished_in_order(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b", node("b1")), node("c", on_failure="ignore")))
    complete(tx, ids["a"])
    fail(tx, ids["c"])
    found = rows(tx, "select * from pgworker.children(%s)", ids["root"])
    assert found == [seen(tx, ids[name]) for name in ("a", "b", "c")]
    assert [child["state"] for child in found] == ["completed", "waiting", "failed"]
    assert rows(tx, "select * from pgworker.children(%s)", ids["a"]) == []


def test_values_are_those_of_the_completed_children_and_of_nobody_else(tx: Conn) -> None:
    """bullmq #4236 (#4235)."""
    names = ("good", "empty", "failed", "cancelled", "live")
    ids = plant(tx, node("root", *[node(name, node(f"{name}1"), on_failure="ignore") for name in names]))
    for name in names[:-1]:
        complete(tx, ids[f"{name}1"], "of a grandchild")
    complete(tx, ids["good"], {"rows": [1, None]})
    call(tx, "complete_job", start(tx, ids["empty"]), ids["empty"])
    fail(tx, ids["failed"])
    call(tx, "cancel_jobs", [ids["cancelled"]])
    root = ids["root"]
    assert value(tx, "select pgworker.get_children_values(%s)", root) == {
        str(ids["good"]): {"rows": [1, None]}, str(ids["empty"]): None,
    }  # fmt: skip
    assert value(tx, "select pgworker.get_failed_children_values(%s)", root) == {str(ids["failed"]): None}


@pytest.mark.parametrize("known", [True, False])
def test_a_job_without_children_has_no_values(tx: Conn, known: bool) -> None:
    job = add(tx)["id"] if known else None
    assert value(tx, "select pgworker.get_children_values(%s)", job) == {}
    assert value(tx, "select pgworker.get_failed_children_values(%s)", job) == {}
    assert rows(tx, "select * from pgworker.children(%s)", job) == []


def test_results_of_many_children_are_one_object(tx: Conn) -> None:
    ids = plant(tx, node("root", *[node(f"a{n}") for n in range(50)]))
    for n in range(50):
        complete(tx, ids[f"a{n}"], n)
    found = value(tx, "select pgworker.get_children_values(%s)", ids["root"])
    assert found == {str(ids[f"a{n}"]): n for n in range(50)}


def test_the_whole_tree_is_shown_in_order_whichever_job_is_named(tx: Conn) -> None:
    tree = {"identifier": "r", "children": [
        node("a", {"identifier": "x"}, node("a2")), {"identifier": "y"}, node("b", after=["a"]),
    ]}  # fmt: skip
    root = value(tx, "select (pgworker.add_job_tree(%s)).id", Jsonb(tree))
    shown = rows(tx, "select * from pgworker.job_tree(%s)", root)
    assert [(job["depth"], job["path"], job["state"]) for job in shown] == [
        (0, "r", "waiting"), (1, "r/a", "waiting"), (2, "r/a/x", "ready"), (2, "r/a/a2", "ready"), (1, "r/y", "ready"),
        (1, "r/b", "waiting"),
    ]  # fmt: skip
    for job in shown:
        assert rows(tx, "select * from pgworker.job_tree(%s)", job["id"]) == shown
        assert {name: job[name] for name in job if name not in ("depth", "path")} == seen(tx, job["id"])
    complete(tx, shown[2]["id"])
    assert [job["id"] for job in rows(tx, "select * from pgworker.job_tree(%s)", root)] == [job["id"] for job in shown]


def test_a_job_of_no_tree_is_shown_alone_and_an_unknown_one_not_at_all(tx: Conn) -> None:
    job = add(tx, "alone")["id"]
    (shown,) = rows(tx, "select * from pgworker.job_tree(%s)", job)
    assert (shown["depth"], shown["path"], shown["id"]) == (0, "alone", job)
    assert rows(tx, "select * from pgworker.tree_progress(%s)", job) == [{"state": "ready", "jobs": 1}]
    for unknown in (job + 1, None):
        assert rows(tx, "select * from pgworker.job_tree(%s)", unknown) == []
        assert rows(tx, "select * from pgworker.tree_progress(%s)", unknown) == []


def test_what_is_left_below_a_removed_node_is_shown_at_the_top(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("low"), node("b"), on_failure="remove"), node("c")))
    worker = start(tx, ids["low"])
    fail(tx, ids["b"])
    shown = rows(tx, "select path, depth, state from pgworker.job_tree(%s)", ids["root"])
    assert [(job["path"], job["depth"], job["state"]) for job in shown] == [
        ("root", 0, "waiting"), ("root/c", 1, "ready"), ("low", 0, "running"),
    ]  # fmt: skip
    call(tx, "complete_job", worker, ids["low"])
    assert values(tx, "select path from pgworker.job_tree(%s)", ids["root"]) == ["root", "root/c"]


def test_progress_counts_every_state_in_the_order_of_their_lives(tx: Conn) -> None:
    tree = node(
        "root", node("soon", run_at=FUTURE), node("r1"), node("r2"), node("runs"), node("ok"),
        node("bad", on_failure="ignore"), node("off", on_failure="ignore"), node("late", after=["ok", "r1"]),
    )  # fmt: skip
    ids = plant(tx, tree)
    start(tx, ids["runs"])
    complete(tx, ids["ok"])
    fail(tx, ids["bad"])
    call(tx, "cancel_jobs", [ids["off"]])
    expected = [
        ("waiting", 2), ("scheduled", 1), ("ready", 2), ("running", 1), ("completed", 1), ("failed", 1),
        ("cancelled", 1),
    ]  # fmt: skip
    for name in ("root", "late"):
        found = rows(tx, "select * from pgworker.tree_progress(%s)", ids[name])
        assert [(line["state"], line["jobs"]) for line in found] == expected


def test_the_result_of_the_root_is_readable_after_it_finished(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a")))
    complete(tx, ids["a"], 1)
    complete(tx, ids["root"], {"pdf": "report.pdf"})
    assert seen(tx, ids["root"])["result"] == {"pdf": "report.pdf"}
    assert seen(tx, ids["a"])["result"] == 1


@pytest.mark.parametrize(
    ("damage", "who", "says"),
    [
        ("update pgworker.counter set pending = pending + 1 where job_id = %(root)s and slot = 0", "root", "says 4"),
        ("update pgworker.counter set pending = 0 where job_id = %(root)s and slot = 0", "root",
         "waits, but for nothing"),
        ("delete from pgworker.counter where job_id = %(root)s", "root", "says nothing, should say 3"),
        ("update pgworker.counter set pending = 2 where job_id = %(c)s and after", "c", "of siblings says 2"),
        ("delete from pgworker.counter where job_id = %(c)s and after", "c", "which waits for no sibling"),
        ("insert into pgworker.counter values (0, false, 0, 1)", None, "has a counter, but is not live"),
        ("update pgworker.job set waiting = false where id = %(c)s", "c", "could be claimed, but has to wait"),
        ("update pgworker.job set waiting = true where id = %(a)s", "a", "waits, but for nothing"),
        ("update pgworker.job set locked_by = 0, locked_at = now(), attempts = 1 where id = %(c)s", "c",
         "runs and waits at once"),
        ("update pgworker.job set ends_as = 'cancelled', cancel_reason = 'x' where id = %(a)s", "a",
         "is to end, but does not run"),
        ("update pgworker.job set cancel_reason = 'x' where id = %(a)s", "a", "has a reason to end and no way"),
        ("update pgworker.job set settled = true where id = %(a)s", "a", "is marked as settled, but live"),
        ("update pgworker.finished set root_id = 0 where id = %(b)s", "b",
         "is in the tree of job 0, which is not known"),
        ("update pgworker.job set depth = null where id = %(a)s", "a", "has no place in its tree"),
        ("update pgworker.job set depth = 5 where id = %(a)s", "a", "is no level below its parent"),
        ("update pgworker.job set has_followers = false where id = %(a)s", "c", "which is no sibling of it"),
        ("insert into pgworker.dependency values (%(c)s, %(x)s, 0)", "x", "which is no sibling of it"),
        ("insert into pgworker.finished select (jsonb_populate_record(f, jsonb_build_object('id', %(a)s))).* "
         "from pgworker.finished f", "a", "is live and finished at once"),
    ],
)  # fmt: skip
def test_audit_sees_whatever_is_not_as_it_must_be(db: Conn, damage: str, who: str | None, says: str) -> None:
    """OpenCue #2219, sidekiq #5659: a sweep for what should not be, or a clamped counter, instead of the truth."""
    ids = plant(db, node("root", node("a"), node("b"), node("c", node("x"), after=["a"]), node("d")))
    complete(db, ids["b"])
    assert rows(db, "select * from pgworker.audit()") == []
    with db.transaction(force_rollback=True):
        db.execute(damage, ids)
        found = rows(db, "select * from pgworker.audit()")
        assert [line for line in found if says in line["problem"] and line["job_id"] == (ids[who] if who else 0)], found


def test_audit_sees_a_part_of_a_wide_counter(db: Conn) -> None:
    ids = plant(db, node("root", *[node(f"a{n}") for n in range(40)]))
    with db.transaction(force_rollback=True):
        db.execute("update pgworker.counter set pending = 0 where job_id = %s and slot = 3", [ids["root"]])
        problems = values(db, "select problem from pgworker.audit()")
        assert problems == [
            "slot 0 of its counter of children says 5, should say 4",
            "slot 3 of its counter of children says 0, should say 8",
        ]  # fmt: skip


def test_a_counter_never_goes_below_nothing(db: Conn) -> None:
    """sidekiq #5524, #5659: pending == -1, then clamped."""
    ids = plant(db, node("root", node("a"), node("b")))
    worker = start(db, ids["a"])
    with db.transaction(force_rollback=True):
        db.execute("update pgworker.counter set pending = 0 where job_id = %s", [ids["root"]])
        with pytest.raises(psycopg.errors.CheckViolation), db.transaction():
            call(db, "complete_job", worker, ids["a"])


def test_an_observer_sees_trees_and_changes_nothing(db: Conn, connect: Connections, role: Callable[..., str]) -> None:
    name = role("onlooker")
    call(db, "grant_observer", name)
    ids = plant(db, node("root", node("a"), node("b")))
    complete(db, ids["a"], 7)
    theirs = connect(user=name)
    assert value(theirs, "select count(*) from pgworker.job_tree(%s)", ids["root"]) == 3
    assert value(theirs, "select pgworker.get_children_values(%s)", ids["root"]) == {str(ids["a"]): 7}
    assert value(theirs, "select pgworker.get_failed_children_values(%s)", ids["root"]) == {}
    assert value(theirs, "select count(*) from pgworker.children(%s)", ids["root"]) == 2
    assert value(theirs, "select sum(jobs) from pgworker.tree_progress(%s)", ids["root"]) == 3
    assert rows(theirs, "select * from pgworker.audit()") == []
    for denied in ('add_job_tree(\'{"identifier": "a"}\')', "retry_jobs('{1}')", "cancel_jobs('{1}')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            theirs.execute(f"select pgworker.{denied}")


def test_a_worker_without_any_table_runs_a_tree_to_its_end(
    db: Conn, connect: Connections, role: Callable[..., str]
) -> None:
    name = role("hand")
    call(db, "grant_worker", name)
    theirs = connect(user=name)
    theirs.execute("create temp table jobs (id int)")
    tree = '{"identifier": "root", "children": [{"identifier": "a"}, {"identifier": "b", "on_failure": "ignore"}]}'
    root = row(theirs, "select * from pgworker.add_job_tree(%s)", tree)["id"]
    worker = register(theirs)
    first, second = values(theirs, "select id from pgworker.get_jobs(%s, 10)", worker)
    call(theirs, "complete_job", worker, first)
    call(theirs, "fail_job", worker, second, "it broke", permanent=True)
    assert values(theirs, "select id from pgworker.get_jobs(%s, 10)", worker) == [root]
    assert value(theirs, "select pgworker.get_failed_children_values(%s)", root) == {str(second): None}
    call(theirs, "add_children", worker, root, '[{"identifier": "c"}]')
    assert value(theirs, "select pgworker.wait_for_children(%s, %s)", worker, root)
    assert len(values(theirs, "select id from pgworker.children(%s)", root)) == 3
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        theirs.execute("select * from pgworker.job_tree(%s)", [root])


def test_a_role_that_may_delete_jobs_need_not_know_of_trees(
    db: Conn, connect: Connections, role: Callable[..., str]
) -> None:
    name = role("sweeper")
    db.execute(f"grant usage on schema pgworker to {name}")
    db.execute(f"grant select, delete on pgworker.job to {name}")
    ids = plant(db, node("root", node("a"), node("b", on_failure="ignore")))
    theirs = connect(user=name)
    theirs.execute("delete from pgworker.job where id = %s", [ids["b"]])
    theirs.execute("delete from pgworker.job where id = %s", [ids["a"]])
    assert seen(db, ids["root"])["state"] == "failed"


def test_growing_a_tree_keeps_one_root(tx: Conn) -> None:
    root = add(tx, "root")["id"]
    worker = start(tx, root)
    assert seen(tx, root)["root_id"] is None
    ids = grow(tx, worker, root, node("a", node("b")))
    assert {seen(tx, job)["root_id"] for job in (root, *ids.values())} == {root}
