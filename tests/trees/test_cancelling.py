"""cancel_jobs in trees: the whole subtree, at once, whatever state it is in."""

from __future__ import annotations

import pytest

from tests.calling import FUTURE, Conn, add, call, claim_ids, register, seen, state, values
from tests.trees.planting import complete, error_of, fail, grow, node, only, plant, start, states, stored


def cancel(conn: Conn, *job_ids: int | None, reason: str | None = None) -> list[int]:
    """Return the ids of what was changed."""
    return sorted(job["id"] for job in call(conn, "cancel_jobs", list(job_ids), reason))


@pytest.mark.parametrize(("reason", "shown"), [("no need", "no need"), (None, "cancelled")])
def test_the_whole_subtree_is_cancelled_with_the_reason_and_returned(tx: Conn, reason: str | None, shown: str) -> None:
    """hatchet #2865; bullmq #1060 (#1056), #3587."""
    tree = node(
        "root", node("a", node("a1", run_at=FUTURE), node("a2", node("deep"), after=["a1"]), on_failure="ignore"),
        node("b"),
    )  # fmt: skip
    ids = plant(tx, tree)
    below = ("a", "a1", "a2", "deep")
    assert cancel(tx, ids["a"], reason=reason) == sorted(ids[name] for name in below)
    assert only(states(tx, ids), *below) == ["cancelled"] * 4
    assert {error_of(tx, ids[name]) for name in below} == {shown}
    assert only(states(tx, ids), "root", "b") == ["waiting", "ready"]
    complete(tx, ids["b"])
    complete(tx, ids["root"])


def test_what_runs_below_is_asked_to_stop_once_and_returned(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("a1")), node("b"), node("c")))
    complete(tx, ids["a1"])
    workers = {name: start(tx, ids[name]) for name in ("a", "b")}
    assert cancel(tx, ids["root"], reason="no need") == sorted(ids[name] for name in ("root", "a", "b", "c"))
    assert only(states(tx, ids), "root", "a", "a1", "b", "c") == [
        "cancelled", "running", "completed", "running", "cancelled",
    ]  # fmt: skip
    assert cancel(tx, ids["root"]) == []
    for name, worker in workers.items():
        assert call(tx, "heartbeat", worker) == [{"job_id": ids[name], "notice": "cancel"}]
    call(tx, "fail_job", workers["a"], ids["a"], "it broke")
    call(tx, "unregister_worker", workers["b"])
    assert only(states(tx, ids), "a", "b") == ["cancelled", "cancelled"]
    assert error_of(tx, ids["a"]) == error_of(tx, ids["b"]) == "no need"


def test_a_running_job_is_asked_to_stop_and_what_is_below_it_is_cancelled_at_once(tx: Conn) -> None:
    root = add(tx, "root")["id"]
    worker = start(tx, root)
    ids = grow(tx, worker, root, node("a", node("a1")), node("b"))
    assert cancel(tx, root, reason="no need") == sorted([root, *ids.values()])
    assert set(states(tx, ids).values()) == {"cancelled"}
    assert call(tx, "heartbeat", worker) == [{"job_id": root, "notice": "cancel"}]
    call(tx, "complete_job", worker, root)
    assert (state(tx, root), error_of(tx, root)) == ("cancelled", "no need")


def test_cancelling_a_finished_job_cancels_what_goes_on_below_it(tx: Conn) -> None:
    root = add(tx, "root")["id"]
    worker = start(tx, root)
    ids = grow(tx, worker, root, node("a", node("a1")), node("b"))
    call(tx, "complete_job", worker, root)
    assert cancel(tx, root) == sorted(ids.values())
    assert state(tx, root) == "completed"
    assert set(states(tx, ids).values()) == {"cancelled"}


@pytest.mark.parametrize("policy", ["fail-parent", "ignore", "remove"])
def test_the_policy_of_a_cancelled_node_speaks_to_its_parent(tx: Conn, policy: str) -> None:
    ids = plant(tx, node("root", node("a", node("a1"), on_failure=policy)))
    cancel(tx, ids["a"], reason="no need")
    if policy == "fail-parent":
        assert (state(tx, ids["root"]), state(tx, ids["a"])) == ("failed", "cancelled")
        assert error_of(tx, ids["root"]) == f"child {ids['a']} (a) cancelled: no need"
    else:
        assert only(states(tx, ids), "root", "a", "a1") == [
            "ready", *(["cancelled"] * 2 if policy == "ignore" else [None] * 2),
        ]  # fmt: skip


def test_parents_and_children_named_in_one_call_end_once_each(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("a1"), node("a2")), node("b")))
    assert cancel(tx, None, ids["a1"], ids["root"], ids["a"], ids["a1"], ids["b"] + 1000) == sorted(ids.values())
    assert {error_of(tx, job) for job in ids.values()} == {"cancelled"}
    assert stored(tx)[0] == 0


def test_a_null_among_the_ids_hides_nothing_that_was_cancelled(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b")))
    assert cancel(tx, ids["root"], None) == sorted(ids.values())


def test_cancelling_nothing_changes_nothing(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a")))
    assert cancel(tx) == cancel(tx, None) == []
    assert call(tx, "cancel_jobs", None) == []
    assert states(tx, ids) == {"root": "waiting", "a": "ready"}


def test_a_branch_that_was_cancelled_lets_the_next_phase_go_on_if_it_may(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("a1"), on_failure="ignore"), node("b", node("b1"), after=["a"])))
    cancel(tx, ids["a"])
    for name in ("b1", "b", "root"):
        complete(tx, ids[name])


def test_a_wide_tree_of_which_half_runs_and_some_has_ended_is_cancelled_whole(tx: Conn) -> None:
    ids = plant(tx, node("root", *[node(f"a{n}", node(f"b{n}")) for n in range(200)]))
    worker = register(tx)
    claimed = claim_ids(tx, worker, 100)
    call(tx, "finish_jobs", worker, claimed[:50], None, None, None)
    assert len(cancel(tx, ids["root"])) == 401 - 50
    assert len(call(tx, "heartbeat", worker)) == 50
    outcomes = call(tx, "finish_jobs", worker, claimed[50:], None, None, None)
    assert {line["outcome"] for line in outcomes} == {"cancelled"}
    assert sorted(values(tx, "select distinct state from pgworker.jobs")) == ["cancelled", "completed"]
    assert stored(tx)[2:] == [0, 0, 0]


def test_a_job_that_failed_is_not_cancelled_afterwards(tx: Conn) -> None:
    """pgflow #609: late callbacks change a step that is over."""
    ids = plant(tx, node("root", node("a"), node("b", on_failure="ignore")))
    fail(tx, ids["b"])
    before = seen(tx, ids["b"])
    assert cancel(tx, ids["b"]) == []
    cancel(tx, ids["root"])
    assert seen(tx, ids["b"]) == before
