"""When a tree fails for good, what its completed jobs did is undone: one by one, the last to complete first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.calling import Conn, call, claim_ids, refused, register, row, rows, seen, state, value, values
from tests.invariants import assert_consistent
from tests.trees.planting import BADLY, complete, fail, grow, named, node, only, plant, start, states
from tests.trees.undoing import chain, compensations, settle, undoable, undoes, work


@pytest.mark.parametrize("how", BADLY)
def test_whatever_makes_a_tree_fail_it_is_undone_backwards(tx: Conn, how: str) -> None:
    ids = plant(tx, chain("reserve", "charge", "notify"))
    complete(tx, ids["reserve"])
    complete(tx, ids["charge"])
    BADLY[how](tx, ids["notify"])
    # Whoever was to stop and reports that it is done has done it.
    undone = [*(["undo-notify"] if how == "stopped" else []), "undo-charge", "undo-reserve"]
    assert work(tx) == undone
    assert state(tx, ids["order"]) == "failed"
    assert [(job["task_identifier"], job["state"]) for job in compensations(tx, ids["order"])] == [
        (task, "completed") for task in undone
    ]


def test_a_tree_that_completes_is_not_undone(tx: Conn) -> None:
    ids = plant(tx, chain("reserve", "charge"))
    assert work(tx) == ["reserve", "charge", "order"]
    assert state(tx, ids["order"]) == "completed"
    assert undoes(tx, ids["order"]) == []
    assert values(tx, "select state from pgworker.compensations") == [None, None]


def test_a_compensation_gets_payload_and_result_of_its_node_and_a_payload_of_its_own(tx: Conn) -> None:
    compensate = {"identifier": "refund", "payload": {"reason": "order failed"}}
    charge = node("charge", payload={"amount": 5}, compensate=compensate)
    ids = plant(tx, node("order", charge, node("notify", after=["charge"])))
    complete(tx, ids["charge"], {"charge_id": 77})
    fail(tx, ids["notify"])
    (job,) = compensations(tx, ids["order"])
    assert job["payload"] == {
        "reason": "order failed",
        "node": {
            "id": ids["charge"],
            "identifier": "charge",
            "name": "charge",
            "payload": {"amount": 5},
            "result": {"charge_id": 77},
        },
    }
    assert job["name"] == f"compensation of job {ids['charge']}"
    assert (job["parent_id"], job["root_id"], job["depth"]) == (ids["order"], ids["order"], 1)


def test_a_compensation_has_the_arguments_it_was_given(tx: Conn) -> None:
    compensate = {
        "identifier": "refund", "payload": None, "queue_name": "bank", "max_attempts": 3, "priority": -5, "flags": ["f"]
    }  # fmt: skip
    ids = plant(tx, node("order", node("charge", compensate=compensate), node("notify", after=["charge"])))
    complete(tx, ids["charge"])
    fail(tx, ids["notify"])
    (job,) = compensations(tx, ids["order"])
    assert {key: job[key] for key in ("queue_name", "max_attempts", "priority", "flags", "state")} == {
        "queue_name": "bank",
        "max_attempts": 3,
        "priority": -5,
        "flags": ["f"],
        "state": "ready",
    }


def test_only_one_compensation_of_a_tree_runs_at_a_time(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b", "c", "d"))
    assert work(tx, "d") == ["a", "b", "c", "d", "undo-c", "undo-b", "undo-a"]
    ids = plant(tx, chain("a", "b", "c", "d"))
    for name in "abc":
        complete(tx, ids[name])
    fail(tx, ids["d"])
    worker = register(tx)
    for name in ("undo-c", "undo-b", "undo-a"):
        (job,) = call(tx, "get_jobs", worker, 10)
        assert job["task_identifier"] == name
        call(tx, "complete_job", worker, job["id"])


@pytest.mark.parametrize("how", BADLY)
def test_a_compensation_that_fails_is_seen_and_stops_nothing_else(tx: Conn, how: str) -> None:
    ids = plant(tx, chain("a", "b", "c"))
    complete(tx, ids["a"])
    complete(tx, ids["b"])
    fail(tx, ids["c"])
    undo_b, undo_a = (job["id"] for job in compensations(tx, ids["order"]))
    assert [state(tx, undo_b), state(tx, undo_a)] == ["ready", "waiting"]
    BADLY[how](tx, undo_b)
    assert state(tx, undo_b) in ("failed", "cancelled", None)
    assert state(tx, undo_a) == "ready"
    complete(tx, undo_a)
    assert state(tx, ids["order"]) == "failed"
    shown = row(tx, "select state from pgworker.compensations where job_id = %s", undo_b)
    assert shown["state"] == state(tx, undo_b)


def test_a_compensation_is_retried_with_delays_like_any_job(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b"))
    complete(tx, ids["a"])
    fail(tx, ids["b"])
    (undo,) = compensations(tx, ids["order"])
    call(tx, "fail_job", start(tx, undo["id"]), undo["id"], "the bank is closed")
    again = seen(tx, undo["id"])
    assert (again["state"], again["attempts"], again["max_attempts"]) == ("scheduled", 1, 25)


@pytest.mark.parametrize(("report", "undone"), [
    ("complete_job", ["undo-b", "undo-a"]), ("finish_jobs", ["undo-b", "undo-a"]), ("cancel_job", ["undo-a"]),
    ("fail_job", ["undo-a"]), ("release_jobs", ["undo-a"]),
])  # fmt: skip
def test_no_tree_is_undone_before_everything_of_it_has_ended(tx: Conn, report: str, undone: list[str]) -> None:
    """What runs when the root fails ends as cancelled; but when it reports that it is done, it is done, and undone."""
    tree = node("order", undoable("a"), undoable("b"), undoable("c"), node("d", max_attempts=1))
    ids = plant(tx, tree)
    complete(tx, ids["a"])
    holder = start(tx, ids["b"])
    fail(tx, ids["d"])
    assert only(states(tx, ids), "order", "a", "b", "c") == ["failed", "completed", "running", "cancelled"]
    for _ in range(3):
        settle(tx)
        assert undoes(tx, ids["order"]) == []
    arguments = {"complete_job": [ids["b"], '{"b": 1}'], "finish_jobs": [[ids["b"]], ['{"b": 1}'], None, None]}
    arguments |= {"fail_job": [ids["b"], "it broke"], "release_jobs": [[ids["b"]]]}
    types = (
        "%s, %s, %s::jsonb[], %s, %s"
        if report == "finish_jobs"
        else ", ".join(["%s"] * (1 + len(arguments.get(report, [1]))))
    )
    tx.execute(f"select pgworker.{report}({types})".encode(), [holder, *arguments.get(report, [ids["b"]])])
    assert state(tx, ids["b"]) == "cancelled"
    for _ in range(2):
        settle(tx)
        assert undoes(tx, ids["order"]) == undone
    if "undo-b" in undone:
        assert compensations(tx, ids["order"])[0]["payload"]["node"]["result"] == {"b": 1}
    assert values(tx, "select n from pgworker.unsettled") == []


def test_what_a_child_did_that_nobody_waited_for_is_undone(tx: Conn) -> None:
    ids = plant(tx, node("order", node("a"), node("b", after=["a"])))
    worker = start(tx, ids["a"])
    ids |= grow(tx, worker, ids["a"], undoable("late"))
    late = start(tx, ids["late"])
    call(tx, "complete_job", worker, ids["a"])
    call(tx, "complete_job", late, ids["late"])
    fail(tx, ids["b"])
    assert undoes(tx, ids["order"]) == ["undo-late"]


def test_the_order_of_completion_counts_and_not_that_of_the_tree(tx: Conn) -> None:
    ids = plant(
        tx, node("order", undoable("a"), undoable("b", undoable("b1"), undoable("b2")), undoable("c"), node("d"))
    )
    tx.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    for minute, name in enumerate(["c", "b2", "b1", "a", "b"]):
        tx.execute(f"set local pgworker.fake_now = '2030-01-01 00:{minute:02}:00'")
        tx.execute("update pgworker.job set run_at = pgworker.clock() where id = %s", [ids[name]])
        complete(tx, ids[name])
    call(tx, "permanently_fail_jobs", [ids["d"]])
    assert undoes(tx, ids["order"]) == ["undo-b", "undo-a", "undo-b1", "undo-b2", "undo-c"]
    tx.execute("reset pgworker.fake_now")


def test_of_jobs_that_completed_at_the_same_time_the_later_id_is_undone_first(tx: Conn) -> None:
    ids = plant(tx, node("order", *[undoable(f"a{n}") for n in range(12)], node("z")))
    worker = register(tx)
    claimed = claim_ids(tx, worker, 12)
    call(tx, "finish_jobs", worker, claimed[::-1], None, None, None)
    fail(tx, ids["z"])
    assert undoes(tx, ids["order"]) == [f"undo-a{n}" for n in reversed(range(12))]


def test_a_cancelled_tree_is_undone(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b", "c"))
    complete(tx, ids["a"])
    complete(tx, ids["b"])
    call(tx, "cancel_jobs", [ids["order"]], "changed my mind")
    assert only(states(tx, ids), "order", "c") == ["cancelled", "cancelled"]
    assert work(tx) == ["undo-b", "undo-a"]


@pytest.mark.parametrize("how", ["remove_job", "deleted"])
def test_a_tree_whose_root_is_removed_is_kept_as_cancelled_and_undone(tx: Conn, how: str) -> None:
    ids = plant(tx, chain("a", "b", payload={"order": 1}, job_key="k", priority=7))
    before = seen(tx, ids["order"])
    complete(tx, ids["a"])
    if how == "deleted":
        tx.execute("delete from pgworker.job where id = %s", [ids["order"]])
    else:
        assert call(tx, "remove_job", "k")[0]["id"] == ids["order"]
    after = seen(tx, ids["order"])
    assert after["finished_at"]
    assert after["last_error"] == f"job {ids['order']} was removed"
    changed = {"state": "cancelled", "finished_at": after["finished_at"], "last_error": after["last_error"]}
    assert after == before | changed
    assert value(
        tx, "select keep_until > now() + interval '29 days' from pgworker.finished where id = %s", ids["order"]
    )
    assert state(tx, ids["b"]) == "cancelled"
    assert work(tx) == ["undo-a"]


def test_trees_without_compensations_vanish_with_their_roots(tx: Conn) -> None:
    ids = plant(tx, node("order", node("a"), node("b")))
    complete(tx, ids["a"])
    tx.execute("delete from pgworker.job where id = %s", [ids["order"]])
    assert set(states(tx, ids).values()) == {None}


def test_below_an_ignored_failure_nothing_is_undone_until_the_tree_fails(tx: Conn) -> None:
    part = node("part", undoable("a"), node("b", after=["a"]), on_failure="ignore")
    for end, undone in (("z", ["undo-a"]), (None, [])):
        ids = plant(tx, node("order", part, node("z", after=["part"])))
        complete(tx, ids["a"])
        fail(tx, ids["b"])
        assert only(states(tx, ids), "part", "order", "z") == ["failed", "waiting", "ready"]
        settle(tx)
        assert undoes(tx, ids["order"]) == []
        work(tx, *([end] if end else []))
        assert undoes(tx, ids["order"]) == undone


@pytest.mark.parametrize("removal", ["policy", "deleted"])
def test_what_was_done_below_a_removed_job_is_still_undone(tx: Conn, removal: str) -> None:
    """Its payload and result are remembered, though the job is forgotten."""
    part = node("part", undoable("a", payload={"n": 1}), node("b", after=["a"]), on_failure="remove")
    ids = plant(tx, node("order", undoable("first"), part, node("z", after=["part", "first"])))
    complete(tx, ids["first"])
    complete(tx, ids["a"], {"did": "it"})
    if removal == "policy":
        fail(tx, ids["b"])
    else:
        tx.execute("delete from pgworker.job where id = %s", [ids["part"]])
    assert only(states(tx, ids), "part", "a", "b", "z") == [None, None, None, "ready"]
    fail(tx, ids["z"])
    undo_a, _ = compensations(tx, ids["order"])
    assert undo_a["payload"]["node"] == {
        "id": ids["a"], "identifier": "a", "name": "a", "payload": {"n": 1}, "result": {"did": "it"}
    }  # fmt: skip
    assert work(tx) == ["undo-a", "undo-first"]


def test_children_that_a_running_job_adds_are_undone_too(tx: Conn) -> None:
    job = call(tx, "add_job", "plain")[0]["id"]
    worker = start(tx, job)
    ids = grow(tx, worker, job, undoable("a"), node("b", after=["a"]))
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, job)
    complete(tx, ids["a"])
    fail(tx, ids["b"])
    assert state(tx, job) == "failed"
    assert work(tx) == ["undo-a"]


def test_a_root_is_never_undone_itself(tx: Conn) -> None:
    """It has completed, and then the tree has not failed; or it has not, and then nothing was done."""
    for failing in ("lonely", ""):
        ids = plant(tx, undoable("lonely"))
        assert work(tx, failing) == ["lonely"]
        assert undoes(tx, ids["lonely"]) == []


def test_a_root_that_completes_although_it_was_to_stop_is_undone(tx: Conn) -> None:
    """What undoes it is then the only child that it ever has."""
    ids = plant(tx, undoable("lonely"))
    worker = start(tx, ids["lonely"])
    call(tx, "cancel_jobs", [ids["lonely"]])
    call(tx, "complete_job", worker, ids["lonely"])
    assert state(tx, ids["lonely"]) == "cancelled"
    assert_consistent(tx)
    assert work(tx) == ["undo-lonely"]


def test_a_parent_is_undone_before_its_children(tx: Conn) -> None:
    ids = plant(tx, node("order", undoable("a", undoable("a1")), node("z", after=["a"])))
    tx.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    for minute, name in enumerate(["a1", "a"]):
        tx.execute(f"set local pgworker.fake_now = '2040-01-01 00:{minute:02}:00'")
        complete(tx, ids[name])
    fail(tx, ids["z"])
    assert work(tx) == ["undo-a", "undo-a1"]
    tx.execute("reset pgworker.fake_now")


def test_a_compensation_may_have_children_of_its_own_but_none_that_is_to_be_undone(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b"))
    complete(tx, ids["a"])
    fail(tx, ids["b"])
    (undo,) = compensations(tx, ids["order"])
    worker = start(tx, undo["id"])
    with refused(tx, "PW003", "children[0].compensate is below a compensation"):
        call(tx, "add_children", worker, undo["id"], json.dumps([undoable("c")]))
    grow(tx, worker, undo["id"], node("c"))
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, undo["id"])
    assert work(tx, "c") == ["c"]
    assert state(tx, undo["id"]) == "failed"
    call(tx, "retry_jobs", [named(tx, undo["id"])["c"]])
    assert work(tx) == ["c", "undo-a"]


def test_a_failed_tree_without_anything_to_undo_can_be_retried(tx: Conn) -> None:
    ids = plant(tx, chain("a", "b"))
    fail(tx, ids["a"])
    assert only(states(tx, ids), "order", "b") == ["failed", "cancelled"]
    call(tx, "retry_jobs", [ids["order"]])
    assert work(tx, "b") == ["a", "b", "undo-a"]


def test_many_jobs_are_undone_one_after_the_other(tx: Conn) -> None:
    tree = node("order", *[undoable("a", name=f"a{n}") for n in range(300)], node("z"))
    ids = plant(tx, tree)
    worker = register(tx)
    call(tx, "finish_jobs", worker, claim_ids(tx, worker, 300), None, None, None)
    fail(tx, ids["z"])
    assert value(tx, "select count(*) from pgworker.compensations where state = 'waiting'") == 299
    done: list[int] = []
    while len(done) < 300:
        for n, job in enumerate(call(tx, "get_jobs", worker, 10)):
            assert n == 0
            done.append(job["payload"]["node"]["id"])
            call(tx, "complete_job", worker, job["id"])
    assert done == sorted((ids[f"a{n}"] for n in range(300)), reverse=True)
    assert rows(tx, "select * from pgworker.counter") == []


WRONG: dict[str, tuple[Any, str, str]] = {
    "no object": ("refund", "22023", "tree.children[1].compensate must be an object, got string"),
    "no identifier": ({}, "22004", "tree.children[1].compensate.identifier must not be null"),
    "long identifier": ({"identifier": "x" * 129}, "22023", "tree.children[1].compensate.identifier must be 1 to 128"),
    "unknown key": ({"identifier": "r", "job_key": "k"}, "22023", "compensate has an unknown key 'job_key'"),
    "bad attempts": ({"identifier": "r", "max_attempts": 0}, "22023", "compensate.max_attempts must be a whole number"),
    "bad priority": ({"identifier": "r", "priority": "1"}, "22023", "compensate.priority must be a number"),
    "bad flags": ({"identifier": "r", "flags": [1]}, "22023", "compensate.flags must be a list of strings"),
    "array": ({"identifier": "r", "payload": [1]}, "22023", "payload must be an object without a key 'node'"),
    "node": ({"identifier": "r", "payload": {"node": 1}}, "22023", "without a key 'node', got {\"node\": 1}"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_compensation_that_cannot_be_is_refused_with_its_place(tx: Conn, case: str) -> None:
    compensate, code, says = WRONG[case]
    tree = node("order", node("a"), node("b", compensate=compensate))
    with refused(tx, code, says):
        plant(tx, tree)


def test_a_compensation_of_null_is_none(tx: Conn) -> None:
    plant(tx, node("order", node("a", compensate=None)))
    assert rows(tx, "select * from pgworker.compensations") == []
