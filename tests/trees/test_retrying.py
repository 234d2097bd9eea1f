"""retry_jobs in trees: what followed from a failure is undone, what completed stays, nothing waits for ever."""

from __future__ import annotations

import pytest

from tests.calling import FUTURE, Conn, add, call, claim_ids, register, row, rows, seen, state, value
from tests.trees.planting import (
    complete,
    error_of,
    fail,
    grow,
    node,
    only,
    plant,
    start,
    states,
    stored,
)


def retry(conn: Conn, *job_ids: int) -> list[int]:
    """Return the ids of what is live again."""
    return sorted(job["id"] for job in call(conn, "retry_jobs", list(job_ids)))


def test_a_retried_child_is_waited_for_again_by_the_ancestors_that_had_failed(tx: Conn) -> None:
    """bullmq #3402 (#3320), good_job #822, #1239, #1450: fail, then retry to success, and the callback never came."""
    ids = plant(tx, node("root", node("mid", node("leaf"), node("done")), node("beside"), node("ended")))
    complete(tx, ids["done"], 1)
    complete(tx, ids["ended"])
    fail(tx, ids["leaf"])
    assert retry(tx, ids["leaf"]) == sorted(ids[name] for name in ("root", "mid", "leaf", "beside"))
    assert states(tx, ids) == {
        "root": "waiting", "mid": "waiting", "leaf": "ready", "beside": "ready",
        "done": "completed", "ended": "completed",
    }  # fmt: skip
    assert [
        (job["attempts"], job["last_error"])
        for job in rows(tx, "select * from pgworker.live where id <> %s", ids["leaf"])
    ] == [(0, None)] * 3
    for name in ("leaf", "mid", "beside", "root"):
        complete(tx, ids[name])
    assert set(states(tx, ids).values()) == {"completed"}
    assert stored(tx)[2:] == [0, 0, 0]


def test_retrying_a_failed_parent_runs_what_failed_or_was_cancelled_below_it(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("x"), node("y")), node("b"), node("c", on_failure="ignore")))
    complete(tx, ids["y"])
    fail(tx, ids["c"])
    fail(tx, ids["x"])
    assert retry(tx, ids["root"]) == sorted(ids[name] for name in ("root", "a", "x", "b", "c"))
    assert only(states(tx, ids), "root", "a", "x", "b", "c") == ["waiting", "waiting", "ready", "ready", "ready"]
    fail(tx, ids["c"])
    for name in ("x", "a", "b", "root"):
        complete(tx, ids[name])


def test_a_parent_that_two_children_failed_at_once_does_not_start_after_one_of_them_was_retried(tx: Conn) -> None:
    below = node("b", node("under"), node("spare", on_failure="ignore"))
    ids = plant(tx, node("root", node("mid", node("a"), below, node("c", on_failure="ignore"))))
    for name in ("c", "spare"):
        fail(tx, ids[name])
    call(tx, "permanently_fail_jobs", [ids["a"], ids["b"]])
    assert set(states(tx, ids).values()) == {"failed", "cancelled"}
    again = sorted(ids[name] for name in ("root", "mid", "a", "b", "under", "spare"))
    assert retry(tx, ids["a"]) == again
    assert only(states(tx, ids), "a", "b", "c", "mid") == ["ready", "waiting", "failed", "waiting"]
    for name in ("a", "spare", "under", "b", "mid", "root"):
        complete(tx, ids[name])
    assert stored(tx)[2:] == [0, 0, 0]


def test_a_retried_child_that_fails_once_more_fails_its_parent_once_more(tx: Conn) -> None:
    ids = plant(tx, node("root", node("mid", node("leaf")), node("beside")))
    for error in ("first", "second", "third"):
        fail(tx, ids["leaf"], error)
        assert only(states(tx, ids), "root", "mid", "beside") == ["failed", "failed", "cancelled"]
        assert error_of(tx, ids["root"]).endswith(error)
        retry(tx, ids["leaf"])


@pytest.mark.parametrize("policy", ["ignore", "fail-parent"])
def test_a_retried_child_of_a_parent_that_still_waits_is_waited_for(tx: Conn, policy: str) -> None:
    ids = plant(tx, node("root", node("mid", node("leaf", on_failure=policy), on_failure="ignore"), node("b")))
    fail(tx, ids["leaf"])
    if policy == "ignore":
        fail(tx, ids["mid"])
    assert state(tx, ids["root"]) == "waiting"
    retry(tx, ids["leaf"] if policy == "fail-parent" else ids["mid"])
    complete(tx, ids["b"])
    assert only(states(tx, ids), "root", "mid", "leaf") == ["waiting", "waiting", "ready"]
    for name in ("leaf", "mid", "root"):
        complete(tx, ids[name])


def test_a_retried_child_does_not_hold_a_parent_back_that_runs_already(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", on_failure="ignore")))
    fail(tx, ids["a"])
    worker = start(tx, ids["root"])
    assert retry(tx, ids["a"]) == [ids["a"]]
    call(tx, "complete_job", worker, ids["root"])
    complete(tx, ids["a"])
    assert states(tx, ids) == {"root": "completed", "a": "completed"}


def test_a_running_parent_may_wait_for_a_child_that_was_retried_meanwhile(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", on_failure="ignore")))
    fail(tx, ids["a"])
    worker = start(tx, ids["root"])
    retry(tx, ids["a"])
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, ids["root"])
    complete(tx, ids["a"])
    complete(tx, ids["root"])


@pytest.mark.parametrize("policy", ["ignore", "fail-parent"])
def test_a_child_of_a_parent_that_has_completed_runs_again_by_itself(tx: Conn, policy: str) -> None:
    """bullmq #4058 (#3264): a parent that is missing."""
    ids = plant(tx, node("root", node("a", on_failure="ignore"), node("b", on_failure="ignore")))
    for name in ("a", "b"):
        fail(tx, ids[name])
    complete(tx, ids["root"])
    tx.execute("update pgworker.finished set on_failure = %s where id = %s", [policy, ids["a"]])
    assert retry(tx, ids["a"]) == [ids["a"]]
    fail(tx, ids["a"])
    assert retry(tx, ids["a"], ids["b"]) == [ids["a"], ids["b"]]
    complete(tx, ids["b"])
    call(tx, "cancel_jobs", [ids["a"]])
    assert states(tx, ids) == {"root": "completed", "a": "cancelled", "b": "completed"}


def test_siblings_that_were_asked_to_stop_need_not_after_a_retry(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("running"), node("deaf")))
    worker, deaf = start(tx, ids["running"]), start(tx, ids["deaf"])
    fail(tx, ids["a"])
    assert call(tx, "heartbeat", worker) == [{"job_id": ids["running"], "notice": "cancel"}]
    assert retry(tx, ids["a"]) == [ids["root"], ids["a"]]
    assert call(tx, "heartbeat", worker) == []
    call(tx, "complete_job", worker, ids["running"])
    assert states(tx, ids) == {"root": "waiting", "a": "ready", "running": "completed", "deaf": "running"}
    complete(tx, ids["a"])
    assert state(tx, ids["root"]) == "waiting"
    call(tx, "complete_job", deaf, ids["deaf"])
    complete(tx, ids["root"])


def test_a_sibling_that_was_asked_to_stop_by_somebody_stops_after_a_retry_too(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("running", on_failure="ignore")))
    worker = start(tx, ids["running"])
    call(tx, "cancel_jobs", [ids["running"]], "no need")
    fail(tx, ids["a"])
    retry(tx, ids["a"])
    assert call(tx, "heartbeat", worker) == [{"job_id": ids["running"], "notice": "cancel"}]
    call(tx, "complete_job", worker, ids["running"])
    assert (state(tx, ids["running"]), error_of(tx, ids["running"])) == ("cancelled", "no need")
    complete(tx, ids["a"])
    complete(tx, ids["root"])


def test_a_running_parent_that_was_to_stop_because_of_its_child_goes_on_when_that_is_retried(tx: Conn) -> None:
    root = add(tx, "root")["id"]
    worker = start(tx, root)
    ids = grow(tx, worker, root, node("a"), node("b"))
    fail(tx, ids["a"])
    assert call(tx, "heartbeat", worker) == [{"job_id": root, "notice": "cancel"}]
    retry(tx, ids["a"])
    assert call(tx, "heartbeat", worker) == []
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, root)
    complete(tx, ids["a"])
    assert state(tx, root) == "waiting"
    complete(tx, ids["b"])
    complete(tx, root)


def test_phases_are_closed_again_as_far_as_they_have_to_be(tx: Conn) -> None:
    """oban #1235: workflows that do not advance."""
    tree = node(
        "root",
        node("a"),
        node("b"),
        node("c", node("x", node("deep"), node("deeper", after=["deep"])), after=["a", "b"]),
        node("d", node("y"), after=["c"]),
    )
    ids = plant(tx, tree)
    complete(tx, ids["b"])
    fail(tx, ids["a"])
    assert set(only(states(tx, ids), "c", "x", "deep", "deeper", "d", "y")) == {"cancelled"}
    retry(tx, ids["a"])
    assert set(only(states(tx, ids), "c", "x", "deep", "deeper", "d", "y")) == {"waiting"}
    complete(tx, ids["a"])
    assert only(states(tx, ids), "c", "x", "deep", "deeper", "d", "y") == ["waiting"] * 2 + ["ready"] + ["waiting"] * 3
    for name in ("deep", "deeper", "x", "c", "y", "d", "root"):
        complete(tx, ids[name])


def test_a_phase_that_had_begun_goes_on_where_it_was(tx: Conn) -> None:
    tree = node("root", node("a"), node("b", node("x"), node("y"), after=["a"]), node("c", after=["b"]))
    ids = plant(tx, tree)
    complete(tx, ids["a"])
    complete(tx, ids["x"])
    fail(tx, ids["y"])
    retry(tx, ids["y"])
    assert only(states(tx, ids), "a", "x", "y", "b", "c", "root") == [
        "completed", "completed", "ready", "waiting", "waiting", "waiting",
    ]  # fmt: skip
    for name in ("y", "b", "c", "root"):
        complete(tx, ids[name])


def test_a_retried_sibling_is_waited_for_by_those_that_still_wait_for_others(tx: Conn) -> None:
    """bullmq #1740: released before its children ended."""
    ids = plant(tx, node("root", node("a", on_failure="ignore"), node("b"), node("c", after=["a", "b"])))
    fail(tx, ids["a"])
    retry(tx, ids["a"])
    complete(tx, ids["a"])
    assert state(tx, ids["c"]) == "waiting"
    complete(tx, ids["b"])
    for name in ("c", "root"):
        complete(tx, ids[name])


def test_a_retried_sibling_does_not_stop_a_phase_that_has_begun(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", on_failure="ignore"), node("c", node("x"), after=["a"])))
    fail(tx, ids["a"])
    retry(tx, ids["a"])
    assert only(states(tx, ids), "c", "x") == ["waiting", "ready"]
    complete(tx, ids["x"])
    complete(tx, ids["a"])
    for name in ("c", "root"):
        complete(tx, ids[name])


def test_a_cancelled_subtree_runs_again(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", node("x"), node("y", after=["x"])), node("b")))
    call(tx, "cancel_jobs", [ids["root"]])
    assert set(states(tx, ids).values()) == {"cancelled"}
    assert retry(tx, ids["root"]) == sorted(ids.values())
    for name in ("x", "y", "a", "b", "root"):
        complete(tx, ids[name])


def test_a_job_that_was_cancelled_by_itself_and_is_retried_brings_nothing_else_along(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", on_failure="ignore"), node("b", on_failure="ignore"), node("c")))
    call(tx, "cancel_jobs", [ids["a"], ids["b"]])
    assert retry(tx, ids["a"]) == [ids["a"]]
    assert states(tx, ids) == {"root": "waiting", "a": "ready", "b": "cancelled", "c": "ready"}


def test_a_retry_of_what_completed_or_is_live_or_is_gone_changes_nothing(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b", on_failure="remove")))
    complete(tx, ids["a"])
    fail(tx, ids["b"])
    before = states(tx, ids)
    assert retry(tx, *ids.values()) == []
    assert states(tx, ids) == before


def test_a_reschedule_that_gives_a_failed_child_attempts_again_re_arms_its_parent(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", max_attempts=1), node("b")))
    fail(tx, ids["a"])
    changed = call(tx, "reschedule_jobs", [ids["a"]], max_attempts=2, run_at=FUTURE, priority=7)
    assert [(job["id"], job["state"], job["attempts"], job["priority"]) for job in changed] == [
        (ids["root"], "waiting", 0, 0), (ids["a"], "scheduled", 1, 7), (ids["b"], "ready", 0, 0),
    ]  # fmt: skip
    call(tx, "reschedule_jobs", [ids["a"]], run_at="2020-01-01 00:00:00+00")
    for name in ("a", "b", "root"):
        complete(tx, ids[name])


def test_a_key_that_was_taken_meanwhile_does_not_break_the_retry_of_a_tree(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a", job_key="ka"), node("b", job_key="kb"), job_key="kr"))
    fail(tx, ids["a"])
    taken = add(tx, "other", job_key="kr")["id"]
    retry(tx, ids["a"])
    assert [seen(tx, ids[name])["key"] for name in ("a", "b", "root")] == ["ka", "kb", None]
    assert seen(tx, taken)["key"] == "kr"
    for name in ("a", "b", "root"):
        complete(tx, ids[name])


def test_results_and_progress_survive_a_retry_of_the_parent(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b")))
    complete(tx, ids["a"], {"rows": 7})
    worker = start(tx, ids["b"])
    call(tx, "set_progress", worker, ids["b"], '{"page": 3}')
    call(tx, "fail_job", worker, ids["b"], "it broke", permanent=True)
    retry(tx, ids["b"])
    assert row(tx, "select progress from pgworker.get_job(%s)", register(tx))["progress"] == {"page": 3}
    assert value(tx, "select pgworker.get_children_values(%s)", ids["root"]) == {str(ids["a"]): {"rows": 7}}


def test_a_retry_in_a_wide_tree_is_counted_in_one_place(tx: Conn) -> None:
    ids = plant(tx, node("root", *[node(f"a{n}") for n in range(100)]))
    worker = register(tx)
    finished = claim_ids(tx, worker, 50)
    call(tx, "finish_jobs", worker, finished, None, None, None)
    call(tx, "permanently_fail_jobs", [ids["a99"]])
    assert len(retry(tx, ids["a99"])) == 51
    rest = claim_ids(tx, worker, 100)
    assert len(rest) == 50
    call(tx, "finish_jobs", worker, rest[1:], None, None, None)
    assert state(tx, ids["root"]) == "waiting"
    call(tx, "finish_jobs", worker, rest[:1], None, None, None)
    assert state(tx, ids["root"]) == "ready"
