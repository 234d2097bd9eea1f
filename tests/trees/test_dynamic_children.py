"""add_children and wait_for_children: a job that finds out what there is to do when it runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.calling import PAST, Conn, add, call, claim, claim_ids, refused, register, row, rows, seen, state, value
from tests.connections import Connections
from tests.trees.planting import BADLY, complete, error_of, fail, grow, leftovers, node, only, plant, start, states


def running(conn: Conn, **arguments: Any) -> tuple[int, int]:
    """Return a running job and the worker that runs it."""
    root = add(conn, "root", **arguments)["id"]
    return root, start(conn, root)


def waits(conn: Conn, worker: int, job: int, *attempt: int) -> bool:
    return bool(call(conn, "wait_for_children", worker, job, *attempt, columns="wait_for_children as w")[0]["w"])


def test_a_job_that_waits_is_claimed_again_with_its_progress_when_its_children_are_done(tx: Conn) -> None:
    root, worker = running(tx, max_attempts=1)
    call(tx, "set_progress", worker, root, '{"step": 2}')
    ids = grow(tx, worker, root, node("a"), node("b", node("b1")))
    assert waits(tx, worker, root)
    waiting = seen(tx, root)
    assert (waiting["state"], waiting["attempts"], waiting["locked_by"]) == ("waiting", 0, None)
    for name in ("a", "b1", "b"):
        assert claim_ids(tx, worker, tasks=["root"]) == []
        complete(tx, ids[name], {"from": name})
    (again,) = claim(tx, worker)
    assert (again["id"], again["attempts"], again["progress"]) == (root, 1, {"step": 2})
    values = call(tx, "get_children_values", root, columns="get_children_values as v")[0]["v"]
    assert values == {str(ids["a"]): {"from": "a"}, str(ids["b"]): {"from": "b"}}
    call(tx, "complete_job", worker, root)


def test_a_job_may_add_children_and_wait_again_and_again(tx: Conn) -> None:
    root, worker = running(tx)
    for turn in range(3):
        ids = grow(tx, worker, root, *[node(f"a{turn}-{n}") for n in range(40)])
        assert waits(tx, worker, root)
        children = claim_ids(tx, worker, 100)
        assert len(children) == 40
        call(tx, "finish_jobs", worker, children[1:], None, None, None)
        assert state(tx, root) == "waiting"
        call(tx, "finish_jobs", worker, children[:1], None, None, None)
        assert (claim_ids(tx, worker), seen(tx, root)["attempts"]) == ([root], 1)
    assert len(ids) == 120
    assert not waits(tx, worker, root)
    call(tx, "complete_job", worker, root)


def test_children_added_in_several_calls_are_all_waited_for(tx: Conn) -> None:
    root, worker = running(tx)
    for n in (1, 40, 2, 300, 1):
        call(tx, "add_children", worker, root, json.dumps([{"identifier": "x"}] * n), columns="id")
    assert waits(tx, worker, root)
    children = claim_ids(tx, worker, 1000)
    assert len(children) == 344
    for n in range(0, 344, 43):
        assert state(tx, root) == "waiting"
        call(tx, "finish_jobs", worker, children[n : n + 43], None, None, None)
    assert state(tx, root) == "ready"


def test_with_thousands_of_parts_in_use_further_children_are_counted_in_the_total(tx: Conn) -> None:
    root, worker = running(tx)
    grow(tx, worker, root, *[node(f"a{n}") for n in range(32)])
    tx.execute("update pgworker.counter set slot = 31999 where job_id = %s and slot = 4", [root])
    tx.execute("update pgworker.job set slot = 31999 where parent_id = %s and slot = 4", [root])
    grow(tx, worker, root, *[node(f"b{n}") for n in range(32)])
    assert waits(tx, worker, root)
    children = claim_ids(tx, worker, 100)
    assert len(children) == 64
    call(tx, "finish_jobs", worker, children[:-1], None, None, None)
    assert state(tx, root) == "waiting"
    call(tx, "finish_jobs", worker, children[-1:], None, None, None)
    assert state(tx, root) == "ready"


def test_there_is_nothing_to_wait_for_without_children_or_when_all_have_ended(tx: Conn) -> None:
    """bullmq #3235: told to wait though nothing is unprocessed."""
    root, worker = running(tx)
    assert not waits(tx, worker, root)
    assert call(tx, "add_children", worker, root, "[]") == []
    assert not waits(tx, worker, root)
    ids = grow(tx, worker, root, node("a"), node("b", on_failure="ignore"))
    complete(tx, ids["a"])
    fail(tx, ids["b"])
    assert not waits(tx, worker, root)
    assert state(tx, root) == "running"
    call(tx, "complete_job", worker, root)


def test_a_job_of_a_tree_that_was_released_may_add_children_too(tx: Conn) -> None:
    ids = plant(tx, node("root", node("mid", node("a")), node("late", node("l1"), after=["mid"])))
    complete(tx, ids["a"])
    worker = start(tx, ids["mid"])
    ids = grow(tx, worker, ids["mid"], node("b", node("c")))
    assert [seen(tx, ids[name])["root_id"] for name in ("b", "c")] == [ids["root"]] * 2
    assert waits(tx, worker, ids["mid"])
    for name in ("c", "b", "mid", "l1", "late", "root"):
        complete(tx, ids[name])


def test_children_that_nobody_waits_for_go_on_by_themselves(tx: Conn) -> None:
    root, worker = running(tx)
    ids = grow(tx, worker, root, node("a", node("a1")), node("b"), node("c", after=["b"]))
    value(tx, """select pgworker.complete_job(%s, %s, '"done"')""", worker, root)
    assert only(states(tx, ids), "a1", "a", "b", "c") == ["ready", "waiting", "ready", "waiting"]
    for name in ("a1", "a", "b", "c"):
        complete(tx, ids[name])
    assert state(tx, root) == "completed"


def test_who_comes_after_a_failed_one_is_cancelled_when_the_parent_has_gone_on(tx: Conn) -> None:
    """pg-boss docs: a failed predecessor leaves the dependant blocked."""
    root, worker = running(tx)
    children = (node("a"), node("b", node("x"), after=["a"]), node("c", after=["b"]), node("d"))
    ids = grow(tx, worker, root, *children)
    call(tx, "complete_job", worker, root)
    fail(tx, ids["a"])
    assert only(states(tx, ids), "b", "x", "c", "d") == ["cancelled", "cancelled", "cancelled", "ready"]
    assert error_of(tx, ids["x"]) == "it broke"
    complete(tx, ids["d"])
    assert state(tx, root) == "completed"


@pytest.mark.parametrize("how", list(BADLY))
def test_a_running_parent_whose_child_fails_is_asked_to_stop_and_ends_as_failed(tx: Conn, how: str) -> None:
    """bullmq #3098, #3112, #3160: failParentOnFailure missed a parent that was active; hatchet #4154."""
    root, worker = running(tx)
    ids = grow(tx, worker, root, node("a"), node("b"), node("c"))
    complete(tx, ids["c"])
    BADLY[how](tx, ids["a"])
    assert only(states(tx, ids), "b") == ["ready"]
    assert not waits(tx, worker, root)
    assert call(tx, "heartbeat", worker) == [{"job_id": root, "notice": "cancel"}]
    call(tx, "complete_job", worker, root)
    assert (state(tx, root), state(tx, ids["b"])) == ("failed", "cancelled")
    assert error_of(tx, root).startswith(f"child {ids['a']} (a) ")


@pytest.mark.parametrize("policy", ["ignore", "remove"])
def test_a_running_parent_goes_on_when_a_child_may_fail(tx: Conn, policy: str) -> None:
    root, worker = running(tx)
    ids = grow(tx, worker, root, node("a", on_failure=policy), node("b"))
    fail(tx, ids["a"])
    assert call(tx, "heartbeat", worker) == []
    assert waits(tx, worker, root)
    complete(tx, ids["b"])
    complete(tx, root)


@pytest.mark.parametrize("state_of_parent", ["scheduled", "ready"])
def test_a_parent_that_is_to_be_retried_fails_with_its_child(tx: Conn, state_of_parent: str) -> None:
    """bullmq #3098, #3112, #3160: a parent that was delayed or prioritized."""
    root, worker = running(tx)
    ids = grow(tx, worker, root, node("a"), node("b"))
    call(tx, "fail_job", worker, root, "it broke", retry_at=PAST if state_of_parent == "ready" else None)
    assert state(tx, root) == state_of_parent
    fail(tx, ids["a"])
    assert (state(tx, root), state(tx, ids["b"])) == ("failed", "cancelled")


def test_a_parent_that_is_retried_may_wait_for_the_children_of_the_attempt_before(tx: Conn) -> None:
    root, worker = running(tx)
    ids = grow(tx, worker, root, node("a"), node("b"))
    call(tx, "fail_job", worker, root, "it broke", retry_at=PAST)
    assert start(tx, root, worker) == worker
    complete(tx, ids["a"])
    assert waits(tx, worker, root)
    complete(tx, ids["b"])
    assert claim(tx, worker)[0]["attempts"] == 2


@pytest.mark.parametrize("how", ["permanent", "vanished", "cancelled", "unregistered"])
def test_a_parent_that_ends_badly_while_it_runs_takes_its_children_along(tx: Conn, how: str) -> None:
    root = add(tx, "root", max_attempts=1)["id"]
    worker = register(tx, lease="1 hour")
    start(tx, root, worker)
    ids = grow(tx, worker, root, node("a", node("a1")), node("b", after=["a"]))
    other = start(tx, ids["a1"])
    if how == "permanent":
        call(tx, "fail_job", worker, root, "it broke", permanent=True)
    elif how == "vanished":
        tx.execute("update pgworker.worker set lease_until = now() - interval '1 second' where id = %s", [worker])
        call(tx, "maintain")
    elif how == "cancelled":
        call(tx, "cancel_jobs", [root])
        call(tx, "complete_job", worker, root)
    else:
        call(tx, "cancel_jobs", [root])
        call(tx, "unregister_worker", worker)
    assert state(tx, root) == ("failed" if how in ("permanent", "vanished") else "cancelled")
    assert only(states(tx, ids), "a", "b", "a1") == ["cancelled", "cancelled", "running"]
    assert call(tx, "heartbeat", other) == [{"job_id": ids["a1"], "notice": "cancel"}]
    call(tx, "complete_job", other, ids["a1"])
    assert state(tx, ids["a1"]) == "cancelled"


def test_waiting_frees_the_queue_and_takes_it_again_when_it_is_claimed(tx: Conn) -> None:
    root, worker = running(tx, queue_name="q")
    following = add(tx, "following", queue_name="q")["id"]
    ids = grow(tx, worker, root, node("a", queue_name="q"))
    assert claim_ids(tx, worker, 10) == []
    assert waits(tx, worker, root)
    assert claim_ids(tx, worker, 10) == [following]
    call(tx, "complete_job", worker, following)
    complete(tx, ids["a"])
    assert claim_ids(tx, worker, 10) == [root]
    call(tx, "complete_job", worker, root)


def test_a_job_that_is_not_held_cannot_wait_or_add(tx: Conn) -> None:
    """bullmq #4332, oban #603: whoever lost a job went on with it."""
    root, worker = running(tx)
    other = register(tx)
    for thief, job in ((other, root), (worker, root + 1000), (None, root), (worker, None)):
        with refused(tx, "PW001", "is not held by worker"):
            call(tx, "wait_for_children", thief, job)
        with refused(tx, "PW001", "is not held by worker"):
            call(tx, "add_children", thief, job, '[{"identifier": "a"}]')
    with refused(tx, "PW001", "is not held by worker"):
        waits(tx, worker, root, 2)
    ids = grow(tx, worker, root, node("a"))
    assert waits(tx, worker, root, 1)
    with refused(tx, "PW001", "is not held by worker"):
        waits(tx, worker, root)
    with refused(tx, "PW001", "is not held by worker"):
        grow(tx, worker, root, node("b"))
    with refused(tx, "PW001", "is not held by worker"):
        call(tx, "complete_job", worker, root)
    assert only(states(tx, ids), "a") == ["ready"]


def test_children_are_returned_in_order_without_what_is_below_them(tx: Conn) -> None:
    root, worker = running(tx, priority=3)
    children = [node("a", node("a1"), node("a2")), node("b", run_at="2100-01-01", priority=7), node("c", after=["b"])]
    added = call(tx, "add_children", worker, root, json.dumps(children))
    assert [(job["name"], job["state"], job["parent_id"], job["root_id"]) for job in added] == [
        ("a", "waiting", root, root), ("b", "scheduled", root, root), ("c", "waiting", root, root),
    ]  # fmt: skip
    assert added == rows(tx, "select * from pgworker.children(%s)", root)
    assert [job["priority"] for job in added] == [0, 7, 0]


@pytest.mark.parametrize(
    ("children", "sqlstate", "message"),
    [
        (None, "22004", "children must be an array of objects, got null"),
        ("{}", "22023", "children must be an array of objects, got object"),
        ("null", "22023", "children must be an array of objects, got null"),
        ("[7]", "22023", "children[0] must be an object, got number"),
        ('[{"identifier": "a"}, {"identifier": "b", "children": [{"identifier": ""}]}]', "22023",
         "children[1].children[0].identifier must be 1 to 128 characters long, got 0"),
        ('[{"identifier": "a", "name": "old"}]', "PW003", "children[0].name 'old' is taken by one of its siblings"),
        ('[{"identifier": "a", "name": "finished"}]', "PW003", "children[0].name 'finished' is taken"),
        ('[{"identifier": "a", "name": "x"}, {"identifier": "a", "name": "x"}]', "PW003",
         "children[1].name 'x' is taken"),
        ('[{"identifier": "a", "after": ["nobody"]}]', "PW003", "children[0].after names 'nobody'"),
        ('[{"identifier": "a", "after": ["old"]}]', "PW003",
         "children[0].after names 'old', which was added by an earlier call"),
        ('[{"identifier": "a", "children": [{"identifier": "b", "after": ["old"]}]}]', "PW003",
         "children[0].children[0].after names 'old', which none of its siblings is called"),
        ('[{"identifier": "a", "job_key": "k"}]', "PW003", "children[0].job_key 'k' is taken by job "),
        ('[{"identifier": "a", "name": "x", "after": ["x"]}]', "PW003", "children[0] waits for itself"),
    ],
)  # fmt: skip
def test_children_that_cannot_be_are_refused_and_leave_nothing(
    tx: Conn, children: str | None, sqlstate: str, message: str
) -> None:
    root, worker = running(tx, job_key="k")
    ids = grow(tx, worker, root, node("old"), node("finished"))
    complete(tx, ids["finished"])
    with refused(tx, sqlstate, message):
        tx.execute("select pgworker.add_children(%s, %s, %s)", [worker, root, children])


def test_a_tree_may_grow_below_any_depth(tx: Conn) -> None:
    root, worker = running(tx)
    job = root
    for _ in range(30):
        job = call(tx, "add_children", worker, job, '[{"identifier": "deeper"}]')[0]["id"]
        assert claim_ids(tx, worker) == [job]
    assert row(tx, "select max(depth) as deepest from pgworker.job_tree(%s)", root)["deepest"] == 30
    call(tx, "fail_job", worker, job, "too deep", permanent=True)
    assert len(call(tx, "heartbeat", worker)) == 1


@pytest.mark.parametrize("commits", [True, False])
def test_the_last_child_that_ends_while_its_parent_begins_to_wait_is_not_missed(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """absurd #61: a lost wake-up between await_event and emit_event."""
    other = connect()
    root, worker = running(db)
    ids = grow(db, worker, root, node("a"))
    ends = start(other, ids["a"])
    with other.transaction(force_rollback=not commits):
        assert waits(other, worker, root)
        assert state(db, root) == "running"
    if commits:
        call(other, "complete_job", ends, ids["a"])
        complete(db, root)
    else:
        call(other, "complete_job", ends, ids["a"])
        assert not waits(db, worker, root)
        call(db, "complete_job", worker, root)
    assert leftovers(db) == 0
