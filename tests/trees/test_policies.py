"""on_failure: whatever ends a child, its parent is released or fails, at once, and never waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import Conn, call, claim_ids, register, seen, state, value
from tests.trees.planting import (
    BADLY,
    GONE,
    SAYS,
    WELL,
    complete,
    error_of,
    fail,
    node,
    only,
    plant,
    start,
    states,
    stored,
)

POLICIES = ("fail-parent", "ignore", "remove")
WIDTHS = {"only child": (), "last of several": ("b", "c"), "last of forty": tuple(f"b{n}" for n in range(39))}


@pytest.mark.parametrize("width", list(WIDTHS))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", [*WELL, *BADLY])
def test_no_way_to_end_the_last_child_leaves_its_parent_waiting_for_ever(
    tx: Conn, how: str, policy: str, width: str
) -> None:
    """bullmq #3362, #3122, #2526, #2540, #2708, #2702, #3164, #990; celery #5630; sidekiq #4774; pg-boss docs."""
    ids = plant(tx, node("p", *[node(name) for name in WIDTHS[width]], node("a", on_failure=policy)))
    for name in WIDTHS[width]:
        complete(tx, ids[name])
        assert state(tx, ids["p"]) == "waiting"
    (WELL | BADLY)[how](tx, ids["a"])
    if how in WELL:
        assert only(states(tx, ids), "p", "a") == ["ready", "completed"]
    elif policy == "fail-parent":
        assert state(tx, ids["p"]) == "failed"
        assert error_of(tx, ids["p"]).startswith(f"child {ids['a']} (a) ")
        assert SAYS[how] in error_of(tx, ids["p"])
    else:
        assert state(tx, ids["p"]) == "ready"
        assert (state(tx, ids["a"]) is None) == (policy == "remove" or how in GONE)
    if state(tx, ids["p"]) == "ready":
        complete(tx, ids["p"])
        assert stored(tx)[0] == 0
    assert stored(tx)[2:] == [0, 0, 0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", [*WELL, *BADLY])
def test_a_child_that_ends_before_the_others_does_not_start_their_parent_early(tx: Conn, how: str, policy: str) -> None:
    """bullmq #1740, #1227; sidekiq #5524; pgflow #606."""
    ids = plant(tx, node("p", node("a", on_failure=policy), node("b"), node("c")))
    (WELL | BADLY)[how](tx, ids["a"])
    if how in BADLY and policy == "fail-parent":
        assert only(states(tx, ids), "p", "b", "c") == ["failed", "cancelled", "cancelled"]
        assert error_of(tx, ids["b"]) == error_of(tx, ids["p"])
        return
    for name in ("b", "c"):
        assert state(tx, ids["p"]) == "waiting"
        complete(tx, ids[name])
    complete(tx, ids["p"])
    assert state(tx, ids["p"]) == "completed"


@pytest.mark.parametrize("width", [1, 2, 40])
@pytest.mark.parametrize("policy", POLICIES)
def test_children_that_end_in_one_statement_release_their_parent_once(tx: Conn, policy: str, width: int) -> None:
    """good_job #832, sidekiq #5740: several ends at once, several callbacks."""
    ids = plant(tx, node("p", *[node(f"a{n}", on_failure=policy) for n in range(width)]))
    children = [ids[f"a{n}"] for n in range(width)]
    call(tx, "permanently_fail_jobs", children, "all at once")
    if policy == "fail-parent":
        assert state(tx, ids["p"]) == "failed"
        assert error_of(tx, ids["p"]) == f"child {children[0]} (a0) failed: all at once"
    else:
        assert state(tx, ids["p"]) == "ready"
        complete(tx, ids["p"])
    assert value(tx, "select count(*) from pgworker.jobs where id = %s", ids["p"]) == 1


def test_one_bad_end_among_good_ones_in_one_statement_fails_the_parent(tx: Conn) -> None:
    """bullmq #3348: the last to end decided."""
    worker = register(tx)
    ids = plant(tx, node("p", *[node(f"a{n}", max_attempts=1) for n in range(40)]))
    claimed = claim_ids(tx, worker, 100)
    call(tx, "finish_jobs", worker, claimed[:20] + claimed[21:], None, [claimed[20]], ["it broke"])
    assert state(tx, ids["p"]) == "failed"
    assert error_of(tx, ids["p"]) == f"child {claimed[20]} (a20) failed: it broke"


@pytest.mark.parametrize("how", BADLY)
def test_a_failure_goes_up_through_all_levels_and_says_where_it_began(tx: Conn, how: str) -> None:
    """bullmq #3098, #3112, #3160, #2712; sidekiq #4774."""
    ids = plant(tx, node("root", node("high", node("low", node("leaf")), node("beside"))))
    BADLY[how](tx, ids["leaf"])
    assert only(states(tx, ids), "root", "high", "low", "beside") == ["failed", "failed", "failed", "cancelled"]
    assert error_of(tx, ids["low"]).startswith(f"child {ids['leaf']} (leaf) ")
    assert f"child {ids['low']} (low) failed because of job {ids['leaf']}" in error_of(tx, ids["high"])
    assert f"child {ids['high']} (high) failed because of job {ids['leaf']}" in error_of(tx, ids["root"])
    if how not in GONE:
        assert SAYS[how].rpartition(": ")[2] in error_of(tx, ids["root"])


@pytest.mark.parametrize("how", BADLY)
@pytest.mark.parametrize("low", POLICIES)
@pytest.mark.parametrize("high", POLICIES)
def test_every_mixture_of_policies_on_two_levels_does_what_each_says(tx: Conn, high: str, low: str, how: str) -> None:
    """bullmq #3235, #2712, #3228, #2947: a mid-level failure that is ignored."""
    ids = plant(tx, node("root", node("mid", node("leaf", on_failure=low), on_failure=high), node("other")))
    BADLY[how](tx, ids["leaf"])
    if low != "fail-parent":
        assert only(states(tx, ids), "root", "mid") == ["waiting", "ready"]
        fail(tx, ids["mid"])
    now = states(tx, ids)
    if high == "fail-parent":
        assert only(now, "root", "mid", "other") == ["failed", "failed", "cancelled"]
        return
    assert only(now, "root", "mid", "other") == ["waiting", "failed" if high == "ignore" else None, "ready"]
    if high == "remove":
        assert now["leaf"] is None
    complete(tx, ids["other"])
    complete(tx, ids["root"])


def test_a_removed_child_takes_its_subtree_and_what_it_stored_along(tx: Conn) -> None:
    """bullmq #4169: links removed on one side only."""
    tree = node(
        "root",
        node("gone", node("done"), node("late", node("deep"), after=["done"]), on_failure="remove"),
        node("after", after=["gone"]),
    )
    ids = plant(tx, tree)
    complete(tx, ids["done"], {"rows": 7})
    fail(tx, ids["deep"])
    assert {name for name, known in states(tx, ids).items() if known} == {"root", "after"}
    assert state(tx, ids["after"]) == "ready"
    assert value(tx, "select pgworker.get_children_values(%s)", ids["root"]) == {}
    assert value(tx, "select pgworker.get_failed_children_values(%s)", ids["root"]) == {}
    complete(tx, ids["after"])
    complete(tx, ids["root"])
    assert stored(tx) == [0, 2, 0, 0, 0]


def test_an_ignored_child_stays_visible_with_its_last_progress(tx: Conn) -> None:
    """bullmq #4236 (#4235)."""
    ids = plant(tx, node("root", node("a", on_failure="ignore"), node("b", on_failure="ignore")))
    for name, progress in (("a", '{"page": 3}'), ("b", None)):
        worker = start(tx, ids[name])
        if progress:
            call(tx, "set_progress", worker, ids[name], progress)
        call(tx, "fail_job", worker, ids[name], "it broke", permanent=True)
    assert states(tx, ids) == {"root": "ready", "a": "failed", "b": "failed"}
    failed = value(tx, "select pgworker.get_failed_children_values(%s)", ids["root"])
    assert failed == {str(ids["a"]): {"page": 3}, str(ids["b"]): None}
    assert value(tx, "select pgworker.get_children_values(%s)", ids["root"]) == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_attempt_that_is_retried_says_nothing_to_the_parent(tx: Conn, policy: str) -> None:
    """sidekiq #5068: success before re-enqueued jobs have ended."""
    ids = plant(tx, node("root", node("a", on_failure=policy)))
    call(tx, "fail_job", start(tx, ids["a"]), ids["a"], "it broke", retry_at="2020-01-01 00:00:00+00")
    assert states(tx, ids) == {"root": "waiting", "a": "ready"}
    complete(tx, ids["a"])
    assert state(tx, ids["root"]) == "ready"


@pytest.mark.parametrize("how", ["release_jobs", "unregister_worker", "force_unlock_workers"])
def test_a_run_that_is_given_back_says_nothing_to_the_parent(tx: Conn, how: str) -> None:
    """sidekiq #6889: an interrupted job was taken for a finished one."""
    ids = plant(tx, node("root", node("a"), node("b")))
    complete(tx, ids["b"])
    worker = start(tx, ids["a"])
    arguments: dict[str, list[Any]] = {
        "release_jobs": [worker, [ids["a"]]],
        "unregister_worker": [worker],
        "force_unlock_workers": [[worker]],
    }
    call(tx, how, *arguments[how])
    assert only(states(tx, ids), "root", "a") == ["waiting", "ready"]
    complete(tx, ids["a"])
    assert state(tx, ids["root"]) == "ready"


@pytest.mark.parametrize("how", ["failed", "cancel_jobs"])
def test_what_runs_when_its_parent_fails_is_asked_to_stop_and_ends_as_cancelled(tx: Conn, how: str) -> None:
    """hatchet #2865: cancel not propagated cleanly, success sent after it; pgflow #609."""
    ids = plant(tx, node("root", node("a"), node("running", node("below")), node("b")))
    complete(tx, ids["below"])
    worker = start(tx, ids["running"])
    BADLY[how](tx, ids["a"])
    assert only(states(tx, ids), "root", "running", "b") == ["failed", "running", "cancelled"]
    assert call(tx, "heartbeat", worker) == [{"job_id": ids["running"], "notice": "cancel"}]
    value(tx, """select pgworker.complete_job(%s, %s, '{"too": "late"}')""", worker, ids["running"])
    assert seen(tx, ids["running"])["state"] == "cancelled"
    assert error_of(tx, ids["running"]) == error_of(tx, ids["root"])
    assert call(tx, "heartbeat", worker) == []


@pytest.mark.parametrize("how", ["permanently_fail_jobs", "cancel_jobs", "remove_job", "deleted", "complete_jobs"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_waiting_job_that_ends_takes_what_is_below_it_along(tx: Conn, how: str, policy: str) -> None:
    """bullmq #1060 (#1056), #992, #1048, #765, #3587: remove, drain and clean ignored the links."""
    tree = node("root", node("mid", node("a", node("deep")), node("b"), on_failure=policy), node("other"))
    ids = plant(tx, tree)
    worker = start(tx, ids["b"])
    (WELL | BADLY)[how](tx, ids["mid"])
    now = states(tx, ids)
    removed = how in GONE or (policy == "remove" and how != "complete_jobs")
    assert only(now, "mid", "a", "deep") == (
        [None] * 3
        if removed
        else [{"cancel_jobs": "cancelled", "complete_jobs": "completed"}.get(how, "failed"), "cancelled", "cancelled"]
    )
    assert now["b"] == "running"
    fails = policy == "fail-parent" and how != "complete_jobs"
    assert only(now, "root", "other") == (["failed", "cancelled"] if fails else ["waiting", "ready"])
    assert call(tx, "heartbeat", worker) == [{"job_id": ids["b"], "notice": "cancel"}]
    call(tx, "complete_job", worker, ids["b"])
    assert state(tx, ids["b"]) == (None if removed else "cancelled")
    if not fails:
        complete(tx, ids["other"])
        complete(tx, ids["root"])
    assert stored(tx)[2:] == [0, 0, 0]


def test_deleting_a_whole_tree_leaves_nothing_of_it(tx: Conn) -> None:
    """bullmq #4169, #765."""
    tree = node("root", node("a", *[node(f"x{n}") for n in range(40)]), node("b", node("y"), after=["a"]))
    ids = plant(tx, tree)
    complete(tx, ids["x7"])
    tx.execute("delete from pgworker.job where root_id = %s", [ids["root"]])
    assert stored(tx) == [0, 0, 0, 0, 0]


def test_a_sibling_that_is_deleted_while_it_runs_leaves_its_queue_to_the_others(tx: Conn) -> None:
    ids = plant(tx, node("root", *[node(name, queue_name="q", on_failure="ignore") for name in ("a", "b")]))
    start(tx, ids["a"])
    tx.execute("delete from pgworker.job where id = %s", [ids["a"]])
    complete(tx, ids["b"])
    assert state(tx, ids["root"]) == "ready"


def test_deleting_parts_on_several_levels_at_once_fails_what_is_left_of_the_ancestors(tx: Conn) -> None:
    ids = plant(tx, node("root", node("mid", node("low", node("leaf")), node("x")), node("other")))
    tx.execute("delete from pgworker.job where id = any(%s)", [[ids["leaf"], ids["mid"]]])
    assert states(tx, ids) == dict.fromkeys(ids) | {"root": "failed", "other": "cancelled"}
    assert error_of(tx, ids["root"]) == f"child {ids['mid']} (mid) was removed"


def test_what_an_administrators_trigger_deletes_while_a_sibling_completes_has_not_completed(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b"), node("c", on_failure="ignore")))
    tx.execute(
        f"""
        create function pg_temp.also() returns trigger language plpgsql as $$
        begin
          delete from pgworker.job where id = {ids["b"]};
          return null;
        end $$;
        create trigger a_before_all_others after delete on pgworker.job
        for each statement when (pg_trigger_depth() < 1) execute function pg_temp.also()"""
    )
    complete(tx, ids["a"])
    assert states(tx, ids) == {"root": "failed", "a": "completed", "b": None, "c": "cancelled"}
    assert error_of(tx, ids["root"]) == f"child {ids['b']} (b) was removed"


def test_a_child_deleted_after_another_completed_in_the_same_transaction_has_not_completed(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b")))
    complete(tx, ids["a"])
    tx.execute("delete from pgworker.job where id = %s", [ids["b"]])
    assert states(tx, ids) == {"root": "failed", "a": "completed", "b": None}
