"""add_job_tree: everything is checked before anything is there, and whatever is there belongs to the caller."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from tests.calling import (
    FUTURE,
    PAST,
    Conn,
    add,
    call,
    claim_ids,
    refused,
    register,
    row,
    rows,
    seen,
    state,
    value,
    values,
)
from tests.clock import move_clock
from tests.connections import Connections
from tests.lifecycle import bring
from tests.sessions import Background
from tests.trees.planting import complete, deep, node, only, plant, states, stored


def put(conn: Conn, tree: Any) -> dict[str, Any]:
    text = tree if isinstance(tree, str) else json.dumps(tree)
    return row(conn, "select * from pgworker.add_job_tree(%s)", text)


def test_the_root_is_returned_as_the_view_shows_it(tx: Conn) -> None:
    root = put(tx, node("root", node("a")))
    assert root == seen(tx, root["id"])
    assert (root["state"], root["parent_id"], root["root_id"], root["name"]) == ("waiting", None, root["id"], "root")


@pytest.mark.parametrize("extra", [{}, {"children": []}, {"children": None}, {"children": [], "after": []}])
def test_a_job_without_children_is_ready_at_once(tx: Conn, extra: dict[str, Any]) -> None:
    """bullmq 48168f07 (#547): with an empty array of children the parent was never processed."""
    root = put(tx, {"identifier": "root"} | extra)
    assert (root["state"], root["root_id"]) == ("ready", root["id"])
    complete(tx, root["id"])


def test_every_node_has_add_jobs_attributes_and_its_defaults(tx: Conn) -> None:
    attributes = {
        "payload": {"n": [1, {"x": None}]}, "queue_name": "q", "run_at": FUTURE, "max_attempts": 3, "job_key": "k",
        "priority": -7, "flags": ["f", "g"],
    }  # fmt: skip
    single = add(tx, "a", **attributes | {"payload": json.dumps(attributes["payload"])})
    call(tx, "remove_job", "k")
    ids = plant(tx, node("root", node("a", **attributes), node("b")))
    told = ("task_identifier", "payload", "queue_name", "run_at", "max_attempts", "key", "priority", "flags", "state")
    assert [seen(tx, ids["a"])[name] for name in told] == [single[name] for name in told]
    plain, by_default = seen(tx, ids["b"]), add(tx, "b")
    differ = {"id", "parent_id", "root_id", "name"}
    assert {name: plain[name] for name in plain if name not in differ} == {
        name: by_default[name] for name in by_default if name not in differ
    }


def test_ids_ascend_as_the_tree_reads_and_ancestors_come_before_descendants(tx: Conn) -> None:
    tree = node("root", node("a", node("b"), node("c", node("d"))), node("e"), node("f", node("g")))
    ids = plant(tx, tree)
    assert sorted(ids, key=lambda name: ids[name]) == ["root", "a", "b", "c", "d", "e", "f", "g"]
    assert claim_ids(tx, register(tx), 10) == [ids[name] for name in ("b", "d", "e", "g")]


def test_a_released_parent_comes_before_what_was_added_after_its_tree(tx: Conn) -> None:
    """sidekiq #3619, #4735: the callback waits behind thousands of jobs in its own queue."""
    worker = register(tx)
    ids = plant(tx, node("root", node("a"), node("b")))
    later = [add(tx)["id"] for _ in range(3)]
    claimed = claim_ids(tx, worker, 3)
    assert claimed == [ids["a"], ids["b"], later[0]]
    call(tx, "finish_jobs", worker, claimed, None, None, None)
    assert claim_ids(tx, worker, 1) == [ids["root"]]


def test_priority_time_queue_flags_and_attempts_of_a_parent_hold_when_it_is_released(tx: Conn) -> None:
    """bullmq #1286, #1370, #1501, #2055."""
    worker = register(tx)
    tree = node("root", node("a"), priority=9, queue_name="q", flags=["f"], max_attempts=1)
    ids = plant(tx, tree)
    running = add(tx, queue_name="q")["id"]
    assert claim_ids(tx, worker, 10) == [ids["a"], running]
    call(tx, "complete_job", worker, ids["a"])
    assert claim_ids(tx, worker, 10) == []
    call(tx, "complete_job", worker, running)
    assert claim_ids(tx, worker, 10, forbidden_flags=["f"]) == []
    assert claim_ids(tx, worker, 10) == [ids["root"]]
    assert call(tx, "fail_job", worker, ids["root"], "it broke")[0]["state"] == "failed"


def test_a_parent_whose_time_has_not_come_is_scheduled_when_its_children_are_done(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), run_at=FUTURE))
    assert states(tx, ids) == {"root": "waiting", "a": "ready"}
    complete(tx, ids["a"])
    assert state(tx, ids["root"]) == "scheduled"


def test_a_tree_whose_time_has_passed_is_not_missed_by_a_worker_that_looked_further_already(db: Conn) -> None:
    """bullmq #4332: a flow that nobody comes back to."""
    worker = register(db)
    first = add(db)["id"]
    assert claim_ids(db, worker, 10) == [first]
    move_clock(db, value(db, "select (now() + interval '10 seconds')::text"))
    assert claim_ids(db, worker, 10) == []
    ids = plant(db, node("root", node("a", run_at=PAST), node("b", run_at=PAST), run_at=PAST))
    for names in (["a", "b"], ["root"]):
        assert claim_ids(db, worker, 10) == [ids[name] for name in names]
        call(db, "finish_jobs", worker, [ids[name] for name in names], None, None, None)


def test_a_tree_rolls_back_with_its_caller(db: Conn) -> None:
    with db.transaction(force_rollback=True):
        plant(db, node("root", node("a", job_key="k"), node("b", after=["a"])))
    assert stored(db) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("commits", [True, False])
def test_a_trigger_may_add_a_tree(db: Conn, commits: bool) -> None:
    db.execute("create table public.report (id int)")
    db.execute(
        """create function public.plan() returns trigger language plpgsql as $$
        begin
          perform pgworker.add_job_tree(jsonb_build_object('identifier', 'report', 'payload', to_jsonb(new), 'children',
            (select jsonb_agg(jsonb_build_object('identifier', 'slice', 'payload', n)) from generate_series(1, 40) n)));
          return new;
        end $$"""
    )
    db.execute("create trigger plan after insert on public.report for each row execute function public.plan()")
    with db.transaction(force_rollback=not commits):
        db.execute("insert into public.report values (1), (2)")
    assert value(db, "select count(*) from pgworker.jobs where state = 'waiting'") == (2 if commits else 0)
    assert value(db, "select count(*) from pgworker.jobs where state = 'ready'") == (80 if commits else 0)


def test_a_tree_is_invisible_until_its_caller_commits(db: Conn, connect: Any) -> None:
    """celery #5850 (#4443), sidekiq-batch #69: children ran before all of the tree was there."""
    other = connect()
    worker = register(db)
    with other.transaction():
        ids = plant(other, node("root", node("a")))
        assert claim_ids(db, worker, 10) == []
    assert claim_ids(db, worker, 10) == [ids["a"]]
    call(db, "complete_job", worker, ids["a"])
    assert state(db, ids["root"]) == "ready"


@pytest.mark.parametrize(
    ("tree", "sqlstate", "message", "hint"),
    [
        ("[]", "22023", "tree must be an object, got array", "argument names of add_job"),
        ("7", "22023", "tree must be an object, got number", "argument names"),
        ("null", "22023", "tree must be an object, got null", "argument names"),
        ("{}", "22004", "tree.identifier must not be null", "names the task"),
        ({"identifier": "r", "kids": []}, "22023", "tree has an unknown key 'kids'", "children"),
        ({"identifier": "r", "onFailure": "ignore"}, "22023", "unknown key 'onFailure'", "Did you mean 'on_failure'?"),
        ({"identifier": "r", "dependsOn": []}, "22023", "unknown key 'dependsOn'", "Did you mean 'after'?"),
        ({"identifier": "r", "children": [{"identifier": "a", "childern": []}]}, "22023",
         "tree.children[0] has an unknown key 'childern'", "Did you mean 'children'?"),
        ({"identifier": "r", "children": {"identifier": "a"}}, "22023", "tree.children must be an array", "array"),
        ({"identifier": "r", "children": [{"identifier": "a", "children": "b"}]}, "22023",
         "tree.children[0].children must be an array", "array"),
        ({"identifier": "r", "children": [{"identifier": "a"}, "b"]}, "22023",
         "tree.children[1] must be an object, got string", "argument names"),
        ({"identifier": "r", "children": [{"identifier": "a"}, None]}, "22023",
         "tree.children[1] must be an object, got null", "argument names"),
        ({"identifier": "r", "children": [{"identifier": "a", "after": "b"}]}, "22023",
         "tree.children[0].after must be an array", "array"),
        ({"identifier": "r", "children": [{"identifier": "a", "after": [7]}]}, "22023",
         "tree.children[0].after must be a list of strings, got [7]", "array of strings"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": 7}]}, "22023",
         "tree.children[0].name must be a string, got 7", "string"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": ""}]}, "22023",
         "tree.children[0].name must be 1 to 128 characters long, got 0", "siblings"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": "x" * 129}]}, "22023",
         "tree.children[0].name must be 1 to 128 characters long, got 129", "siblings"),
        ({"identifier": "r", "children": [{"identifier": "a", "children": [{"identifier": "b"}, {"priority": 1}]}]},
         "22004", "tree.children[0].children[1].identifier must not be null", "names the task"),
        ({"identifier": "r", "children": [{"identifier": "a", "priority": 40000}]}, "22023",
         "tree.children[0].priority must be a whole number", "Lower numbers"),
        ({"identifier": "r", "children": [{"identifier": "a", "run_at": "soon"}]}, "22023",
         "tree.children[0].run_at is not a time: 'soon'", "Write a time"),
        ({"identifier": "r", "children": [{"identifier": "a", "on_failure": "fail_parent"}]}, "PW003",
         "tree.children[0].on_failure must be one of fail-parent, ignore, remove, got 'fail_parent'", "fail-parent"),
        ({"identifier": "r", "children": [{"identifier": "a", "on_failure": True}]}, "22023",
         "tree.children[0].on_failure must be a string, got true", "string"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": "x"}, {"identifier": "b"},
                                          {"identifier": "c", "name": "x"}]},
         "PW003", "tree.children[2].name 'x' is taken by one of its siblings", "unique among siblings"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": "x"}, {"identifier": "b", "after": ["y"]}]},
         "PW003", "tree.children[1].after names 'y', which none of its siblings is called",
         "Its siblings' names: 'x'."),
        ({"identifier": "r", "children": [{"identifier": "a"}, {"identifier": "b", "after": ["a"]}]},
         "PW003", "tree.children[1].after names 'a'", "Give the sibling that it is to wait for a name."),
        ({"identifier": "r", "after": ["x"]}, "PW003", "tree.after names 'x'", "Give the sibling"),
        ({"identifier": "r", "name": "r", "children": [{"identifier": "a", "after": ["r"]}]}, "PW003",
         "tree.children[0].after names 'r'", "sibling"),
        ({"identifier": "r", "children": [{"identifier": "a", "children": [{"identifier": "b", "after": ["y"]}]},
                                          {"identifier": "c", "name": "y"}]},
         "PW003", "tree.children[0].children[0].after names 'y'", "sibling"),
        ({"identifier": "r", "children": [{"identifier": "a", "name": "x", "after": ["x"]}]}, "PW003",
         "tree.children[0] waits for itself: 'x' after 'x'", "Take one of these out"),
        ({"identifier": "r", "children": [{"identifier": "a", "job_key": "k"}, {"identifier": "b", "job_key": "k"}]},
         "PW003", "tree.children[0].job_key 'k' is used by another job of the tree", "unique among live jobs"),
        ({"identifier": "r", "job_key": "k", "children": [{"identifier": "b", "job_key": "k"}]},
         "PW003", "tree.job_key 'k' is used by another job of the tree", "unique among live jobs"),
    ],
)  # fmt: skip
def test_a_tree_that_cannot_be_is_refused_by_the_path_of_the_node_and_leaves_nothing(
    tx: Conn, tree: Any, sqlstate: str, message: str, hint: str
) -> None:
    with refused(tx, sqlstate, message, hint=hint):
        put(tx, tree)


def test_no_tree_at_all_is_refused(tx: Conn) -> None:
    with refused(tx, "22004", "tree must not be null", hint="Give a JSON object"):
        tx.execute("select pgworker.add_job_tree(null)")


def test_a_cycle_is_refused_by_naming_it_and_nothing_that_leads_there(tx: Conn) -> None:
    tree = node(
        "root",
        node("start"),
        node("a", after=["start", "c"]),
        node("b", after=["a"]),
        node("c", after=["b"]),
        node("end", after=["c"]),
    )
    with refused(tx, "PW003", " waits for itself: ", hint="Take one of these out of an after.") as _:
        put(tx, {"identifier": "top", "children": [tree]})
    with pytest.raises(Exception, match=r"tree\.children\[0\]\.children\[\d\]") as caught, tx.transaction():
        put(tx, {"identifier": "top", "children": [tree]})
    around = str(caught.value).partition(": ")[2].splitlines()[0].replace("'", "").split(" after ")
    assert set(around) == {"a", "b", "c"}
    assert around[0] == around[-1]
    assert len(around) == 4


@pytest.mark.parametrize("count", [19, 20, 21, 22, 3000])
def test_what_is_said_of_thousands_of_siblings_can_be_read(tx: Conn, count: int) -> None:
    ring = [node(f"n{n}", after=[f"n{(n + 1) % count}"]) for n in range(count)]
    with pytest.raises(psycopg.Error, match="waits for itself") as caught, tx.transaction():
        put(tx, node("root", *ring))
    around = str(caught.value.diag.message_primary).partition(": ")[2].split(" after ")
    assert around[0] == around[-1]
    more = [int(part.removesuffix(" more")) for part in around if part.endswith(" more")]
    assert len(around) - len(more) + sum(more) == count + 1
    assert len(around) <= 22

    row = [node(f"n{n}") for n in range(count)]
    with pytest.raises(psycopg.Error, match="names 'nobody'") as caught, tx.transaction():
        put(tx, node("root", *row, node("last", after=["nobody"])))
    hint = str(caught.value.diag.message_hint)
    assert hint.count("'n") == min(count, 20)
    assert hint.endswith(f" and {count - 20} more." if count > 20 else f"'n{count - 1}'.")


def test_later_siblings_may_be_waited_for_as_long_as_there_is_no_cycle(tx: Conn) -> None:
    ids = plant(tx, node("root", node("c", after=["b"]), node("b", after=["a"]), node("a")))
    for name in ("a", "b", "c", "root"):
        complete(tx, ids[name])


def test_a_key_of_a_live_job_is_refused_and_that_job_is_left_alone(tx: Conn) -> None:
    """bullmq #2554 (#2627), #3817, #3637: children that are there already; deduplication inside of a tree."""
    taken = add(tx, job_key="k")["id"]
    tree = node("root", node("a"), node("b", job_key="k"), job_key="free")
    with refused(tx, "PW003", f"tree.children[1].job_key 'k' is taken by job {taken}", hint="remove_job()"):
        put(tx, tree)
    bring(tx, taken, "running")
    with refused(tx, "PW003", f"job_key 'k' is taken by job {taken}"):
        put(tx, tree)
    with refused(tx, "PW003", "tree.job_key 'k' is taken"):
        put(tx, node("root", job_key="k"))


@pytest.mark.parametrize("commits", [True, False])
def test_two_who_add_trees_with_the_same_keys_do_not_deadlock_and_one_is_refused(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """pgflow #477: concurrent compile race. The keys stand in the opposite order in the other tree."""
    here, there = connect(), connect()
    keys = [node("x", job_key="x"), node("y", job_key="y")]
    text = json.dumps(node("root", *reversed(keys)))
    with here.transaction(force_rollback=not commits):
        put(here, node("root", *keys))
        other = Background(there, "select id from pgworker.add_job_tree(%s)", text)
        other.wait_until_blocked(db)
    if commits:
        with pytest.raises(psycopg.Error, match=r"job_key '[xy]' is taken by job"):
            other.result()
    else:
        assert len(other.result()) == 1
    assert stored(db)[0] == 3


def test_a_key_of_a_finished_job_is_free(tx: Conn) -> None:
    """bullmq #2554: adding a flow again whose children have completed, and its parent never starts."""
    for _ in range(2):
        ids = plant(tx, node("root", node("a", job_key="a"), node("b", job_key="b"), job_key="r"))
        for name in ("a", "b", "root"):
            complete(tx, ids[name], 1)


def test_a_waiting_job_that_is_replaced_by_its_key_keeps_its_place_in_the_tree(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("c", node("x"), after=["a"], job_key="c"), job_key="r"))
    for key, name in (("r", "root"), ("c", "c")):
        replaced = add(tx, name, payload='{"new": 1}', job_key=key, priority=3)
        assert (replaced["id"], replaced["state"], replaced["revision"]) == (ids[name], "waiting", 1)
    for name in ("a", "x", "c", "root"):
        complete(tx, ids[name])


def test_a_thousand_levels_are_added_and_run_from_the_deepest_up(tx: Conn) -> None:
    root = put(tx, deep(1000))["id"]
    assert value(tx, "select max(depth) from pgworker.job_tree(%s)", root) == 999
    leaf = value(tx, "select max(id) from pgworker.jobs")
    worker = register(tx)
    for job in (leaf, leaf - 1, leaf - 2):
        assert claim_ids(tx, worker, 10) == [job]
        call(tx, "complete_job", worker, job)
    call(tx, "permanently_fail_jobs", [leaf - 3], "enough")
    assert value(tx, "select count(*) from pgworker.jobs where state = 'failed'") == 997
    assert str(seen(tx, root)["last_error"]) == f"child {root + 1} (inner) failed because of job {leaf - 3}: enough"


def test_2000_levels_are_too_many_by_one_only_when_there_are_2001(tx: Conn) -> None:
    with refused(tx, "PW003", "tree has more than 2000 levels", hint="add_children()"):
        put(tx, deep(2001))
    put(tx, deep(2000))
    call(tx, "cancel_jobs", [value(tx, "select min(id) from pgworker.jobs")])
    assert values(tx, "select distinct state from pgworker.jobs") == ["cancelled"]


def test_a_hundred_thousand_nodes_are_added_in_one_call_and_counted(db: Conn) -> None:
    """sidekiq #2458, #6967; bullmq #800."""
    root = row(
        db,
        """select * from pgworker.add_job_tree(jsonb_build_object('identifier', 'root', 'children',
             (select jsonb_agg(jsonb_build_object('identifier', 'mid', 'children',
                (select jsonb_agg('{"identifier": "leaf"}'::jsonb) from generate_series(1, 999))))
              from generate_series(1, 100))))""",
    )["id"]
    assert rows(db, "select * from pgworker.tree_progress(%s)", root) == [
        {"state": "waiting", "jobs": 101}, {"state": "ready", "jobs": 99900},
    ]  # fmt: skip
    assert len(call(db, "cancel_jobs", [root], columns="id")) == 100001
    assert rows(db, "select * from pgworker.tree_progress(%s)", root) == [{"state": "cancelled", "jobs": 100001}]


def test_nothing_is_added_twice_by_a_null_or_absent_mark(tx: Conn) -> None:
    tree = {
        "identifier": "root", "name": None, "on_failure": None, "after": None,
        "children": [{"identifier": "a", "name": None, "after": []}, {"identifier": "b", "on_failure": None}],
    }  # fmt: skip
    root = put(tx, tree)["id"]
    a, b = values(tx, "select id from pgworker.children(%s)", root)
    assert only(states(tx, {"a": a, "b": b, "root": root}), "a", "b", "root") == ["ready", "ready", "waiting"]
