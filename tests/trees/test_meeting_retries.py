"""A retry and an end in two sessions at the same moment: whoever comes second sees what the first has done."""

from __future__ import annotations

import pytest

from tests.calling import Conn, call, state, values
from tests.connections import Connections
from tests.sessions import Background
from tests.trees.planting import complete, fail, leftovers, node, only, plant, start, states, stored

ENDS = pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
RETRY = "select id from pgworker.retry_jobs(array[%s::bigint])"


@ENDS
def test_a_predecessor_that_ends_while_its_follower_is_retried_is_not_waited_for_for_ever(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """oban #1235, bullmq #2554: waiting for what has completed already."""
    ender, other = connect(), connect()
    others = [node(f"o{n}") for n in range(40)]  # so that the two do not meet in the counter of their parent
    ids = plant(db, node("root", node("a"), node("b", node("x"), after=["a"], on_failure="ignore"), *others))
    call(db, "cancel_jobs", [ids["b"]])
    worker = start(db, ids["a"])
    ender.execute("begin")
    call(ender, "complete_job", worker, ids["a"])
    retrying = Background(other, RETRY, ids["b"])
    retrying.wait_until_blocked(db)
    ender.execute("commit" if commits else "rollback")
    assert [job["id"] for job in retrying.result()] == [ids["b"], ids["x"]]
    if not commits:
        assert state(db, ids["x"]) == "waiting"
        call(db, "complete_job", worker, ids["a"])
    call(db, "complete_jobs", [ids[other["name"]] for other in others])
    for name in ("x", "b", "root"):
        complete(db, ids[name])


@ENDS
def test_a_child_that_stops_while_its_parent_is_re_armed_is_counted_or_over(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """good_job #1239: the callback after a retry never came."""
    ender, other = connect(), connect()
    ids = plant(db, node("root", node("a"), node("runs")))
    worker = start(db, ids["runs"])
    fail(db, ids["a"])
    ender.execute("begin")
    call(ender, "complete_job", worker, ids["runs"])
    retrying = Background(other, RETRY, ids["a"])
    retrying.wait_until_blocked(db)
    ender.execute("commit" if commits else "rollback")
    retrying.result()
    assert only(states(db, ids), "root", "a", "runs") == ["waiting", "ready", "cancelled" if commits else "running"]
    if commits:
        assert call(db, "heartbeat", worker) == []
    else:
        call(db, "complete_job", worker, ids["runs"])
        assert state(db, ids["runs"]) == "completed"
    complete(db, ids["a"])
    complete(db, ids["root"])


@ENDS
def test_an_end_that_meets_a_retry_waits_for_it_and_counts_down_what_that_counted(
    db: Conn, connect: Connections, commits: bool
) -> None:
    retrier, other = connect(), connect()
    ids = plant(db, node("root", node("a"), node("runs")))
    worker = start(db, ids["runs"])
    fail(db, ids["a"])
    retrier.execute("begin")
    call(retrier, "retry_jobs", [ids["a"]])
    ending = Background(other, "select pgworker.complete_job(%s, %s)", worker, ids["runs"])
    ending.wait_until_blocked(db)
    retrier.execute("commit" if commits else "rollback")
    ending.result()
    if commits:
        assert only(states(db, ids), "root", "runs") == ["waiting", "completed"]
        complete(db, ids["a"])
        complete(db, ids["root"])
    else:
        assert states(db, ids) == {"root": "failed", "a": "failed", "runs": "cancelled"}


@ENDS
def test_a_parent_that_is_cancelled_while_its_child_is_retried_takes_it_along(
    db: Conn, connect: Connections, commits: bool
) -> None:
    retrier, other = connect(), connect()
    ids = plant(db, node("root", node("a", on_failure="ignore"), node("b")))
    fail(db, ids["a"])
    retrier.execute("begin")
    call(retrier, "retry_jobs", [ids["a"]])
    cancelling = Background(other, "select id from pgworker.cancel_jobs(array[%s::bigint])", ids["root"])
    cancelling.wait_until_blocked(db)
    retrier.execute("commit" if commits else "rollback")
    assert {job["id"] for job in cancelling.result()} == {ids["root"], ids["b"], *([ids["a"]] if commits else [])}
    assert states(db, ids) == {"root": "cancelled", "a": "cancelled" if commits else "failed", "b": "cancelled"}


@ENDS
def test_a_subtree_that_is_removed_while_something_deep_in_it_is_retried_does_not_deadlock(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """hatchet #2475, #3261, #3776, #4328; absurd 0.1.0: locks in another order."""
    retrier = connect()
    deep = node("mid", node("low", on_failure="ignore"), on_failure="ignore")
    ids = plant(db, node("root", node("a", deep, node("live"), on_failure="remove"), node("b")))
    for name in ("low", "mid"):
        fail(db, ids[name])
    db.execute("set lock_timeout = '2s'")
    with retrier.transaction(force_rollback=not commits):
        assert [job["id"] for job in call(retrier, "retry_jobs", [ids["low"]])] == [ids["low"]]
        call(db, "cancel_jobs", [ids["a"]])
    assert only(states(db, ids), "a", "mid", "live") == [None, None, None]
    if commits:
        complete(db, ids["low"])
    complete(db, ids["b"])
    complete(db, ids["root"])
    assert state(db, ids["low"]) == (None if commits else "failed")
    call(db, "retry_jobs", [ids["low"]])
    if not commits:
        complete(db, ids["low"])
    assert state(db, ids["low"]) is None


def test_two_retries_of_jobs_of_one_tree_bring_everything_back_once(db: Conn, connect: Connections) -> None:
    first, second = connect(), connect()
    ids = plant(db, node("root", node("a", node("x"), on_failure="ignore"), node("b"), node("c")))
    fail(db, ids["x"])
    fail(db, ids["b"])
    first.execute("begin")
    call(first, "retry_jobs", [ids["b"]])
    retrying = Background(second, RETRY, ids["root"])
    retrying.wait_until_blocked(db)
    first.execute("commit")
    retrying.result()
    for name in ("b", "c"):
        complete(db, ids[name])
    if state(db, ids["x"]) == "ready":
        complete(db, ids["x"])
        complete(db, ids["a"])
    complete(db, ids["root"])
    assert values(db, "select id from pgworker.job") == []
    assert leftovers(db) == 0
    assert stored(db)[2] == 0
