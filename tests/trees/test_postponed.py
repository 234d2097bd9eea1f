"""Somebody holds a row of a tree while others end jobs in it: nobody waits, and afterwards all is as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, register, state, value, values
from tests.connections import Connections
from tests.invariants import violations
from tests.trees.planting import (
    BADLY,
    complete,
    error_of,
    fail,
    grow,
    leftovers,
    node,
    only,
    plant,
    start,
    states,
    stored,
)

ENDS = pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])


@contextmanager
def held(db: Conn, holder: Conn, *job_ids: int, commits: bool = True) -> Iterator[None]:
    """Have another session hold these jobs' rows, and let nothing wait for them meanwhile."""
    db.execute("set lock_timeout = '2s'")
    with holder.transaction(force_rollback=not commits):
        holder.execute("select pgworker.reschedule_jobs(%s, priority => 1)", [list(job_ids)])
        yield
        call(db, "maintain")  # cannot do anything about it either
        assert violations(db) == []
    db.execute("reset lock_timeout")


def due(db: Conn) -> None:
    """Let maintain look at once at what it found held."""
    db.execute("update pgworker.unsettled set due = now()")


@ENDS
def test_a_producer_that_holds_a_parent_by_its_key_does_not_lose_its_release(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """absurd #61: a lost wake-up."""
    producer = connect()
    ids = plant(db, node("root", node("a"), node("b"), job_key="k"))
    complete(db, ids["a"])
    db.execute("set lock_timeout = '2s'")
    with producer.transaction(force_rollback=not commits):
        assert add(producer, "root", payload='{"new": 1}', job_key="k", run_at=PAST)["id"] == ids["root"]
        complete(db, ids["b"])
        assert state(db, ids["root"]) == "waiting"
        assert values(db, "select what from pgworker.unsettled") == ["release"]
    due(db)
    assert leftovers(db) == 1
    assert state(db, ids["root"]) == "ready"
    payload = value(db, "select payload from pgworker.jobs where id = %s", ids["root"])
    assert payload == ({"new": 1} if commits else {})
    complete(db, ids["root"])


@ENDS
def test_a_parent_that_is_held_fails_afterwards_and_never_starts(db: Conn, connect: Connections, commits: bool) -> None:
    """bullmq #3348, #3346: a parent left active."""
    ids = plant(db, node("top", node("root", node("a"), node("b"), node("c")), node("d")))
    with held(db, connect(), ids["root"], commits=commits):
        fail(db, ids["a"])
        complete(db, ids["b"])
        complete(db, ids["c"])
        assert only(states(db, ids), "top", "root") == ["waiting", "waiting"]
        assert values(db, "select what from pgworker.unsettled order by 1") == ["fail", "release"]
    due(db)
    leftovers(db)
    assert only(states(db, ids), "top", "root", "d") == ["failed", "failed", "cancelled"]
    assert error_of(db, ids["root"]) == f"child {ids['a']} (a) failed: it broke"
    assert stored(db)[2:] == [0, 0, 0]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_running_parent_that_is_held_is_asked_to_stop_afterwards(
    db: Conn, connect: Connections, ends_well: bool
) -> None:
    holder = connect()
    root = add(db, "root")["id"]
    worker = start(db, root)
    ids = grow(db, worker, root, node("a"))
    with holder.transaction():
        call(holder, "set_progress", worker, root, "{}")
        fail(db, ids["a"])
    if ends_well:
        call(db, "complete_job", worker, root)
        assert leftovers(db) == 1
        assert state(db, root) == "completed"
    else:
        leftovers(db)
        assert call(db, "heartbeat", worker) == [{"job_id": root, "notice": "cancel"}]
        call(db, "complete_job", worker, root)
        assert (state(db, root), error_of(db, root)) == ("failed", f"child {ids['a']} (a) failed: it broke")


@ENDS
@pytest.mark.parametrize("who", ["c", "x"])
def test_a_phase_of_which_a_row_is_held_opens_afterwards(
    db: Conn, connect: Connections, who: str, commits: bool
) -> None:
    tree = node("root", node("a"), node("c", node("x"), node("y", node("deep")), after=["a"]), node("d", after=["c"]))
    ids = plant(db, tree)
    with held(db, connect(), ids[who], commits=commits):
        complete(db, ids["a"])
        assert only(states(db, ids), who) == ["waiting"]
        assert values(db, "select what from pgworker.unsettled") == ["open"]
    due(db)
    leftovers(db)
    assert only(states(db, ids), "c", "x", "y", "deep", "d") == ["waiting", "ready", "waiting", "ready", "waiting"]
    for name in ("x", "deep", "y", "c", "d", "root"):
        complete(db, ids[name])


@pytest.mark.parametrize("how", ["failed", "cancel_jobs", "deleted"])
@ENDS
def test_a_descendant_that_is_held_is_cancelled_afterwards(
    db: Conn, connect: Connections, how: str, commits: bool
) -> None:
    ids = plant(db, node("root", node("mid", node("low"), node("other")), node("a")))
    with held(db, connect(), ids["low"], commits=commits):
        BADLY[how](db, ids["a"])
        assert only(states(db, ids), "root", "mid", "other") == ["failed", "cancelled", "cancelled"]
        assert state(db, ids["low"]) == "ready"
    due(db)
    leftovers(db)
    assert state(db, ids["low"]) == "cancelled"
    assert error_of(db, ids["low"]) == error_of(db, ids["mid"])
    assert stored(db)[2:] == [0, 0, 0]


@ENDS
def test_a_cancelled_tree_of_which_a_row_is_held_ends_afterwards(db: Conn, connect: Connections, commits: bool) -> None:
    ids = plant(db, node("root", *[node(f"a{n}", node(f"b{n}")) for n in range(40)]))
    with held(db, connect(), ids["a7"], ids["b9"], commits=commits):
        changed = call(db, "cancel_jobs", [ids["root"]], "no need")
        # b7 stays with its parent: whoever holds that may be ending it.
        assert {job["id"] for job in changed} == set(ids.values()) - {ids["a7"], ids["b7"], ids["b9"]}
    due(db)
    leftovers(db)
    assert set(states(db, ids).values()) == {"cancelled"}
    assert error_of(db, ids["b9"]) == "no need"


def test_a_follower_that_is_held_and_has_no_parent_any_more_is_cancelled_afterwards(
    db: Conn, connect: Connections
) -> None:
    """pg-boss docs: a failed predecessor leaves the dependant blocked."""
    root = add(db, "root")["id"]
    worker = start(db, root)
    ids = grow(db, worker, root, node("a"), node("c", node("x"), after=["a"]), node("d", after=["c"]))
    call(db, "complete_job", worker, root)
    with held(db, connect(), ids["c"]):
        fail(db, ids["a"])
        assert only(states(db, ids), "a", "c", "x", "d") == ["failed", "waiting", "waiting", "cancelled"]
    due(db)
    leftovers(db)
    assert only(states(db, ids), "a", "c", "x", "d") == ["failed", "cancelled", "cancelled", "cancelled"]


def test_one_row_that_is_held_for_long_does_not_keep_maintain_from_the_others(db: Conn, connect: Connections) -> None:
    """procrastinate #1408, bullmq #3228: what heals is held up itself."""
    first, second = plant(db, node("p", node("a"))), plant(db, node("q", node("b")))
    long, short = connect(), connect()
    with long.transaction():
        call(long, "reschedule_jobs", [first["p"]], priority=1)
        with short.transaction():
            call(short, "reschedule_jobs", [second["q"]], priority=1)
            complete(db, first["a"])
            complete(db, second["b"])
        for _ in range(3):
            call(db, "maintain")
        assert (state(db, first["p"]), state(db, second["q"])) == ("waiting", "ready")
    due(db)
    leftovers(db)
    assert state(db, first["p"]) == "ready"


@pytest.mark.parametrize("what", ["release", "fail"])
def test_what_was_put_off_is_dropped_when_a_retry_comes_first(db: Conn, connect: Connections, what: str) -> None:
    """good_job #822: fail, then retry to success, and the batch is still discarded."""
    ids = plant(db, node("root", node("a", on_failure="ignore" if what == "release" else "fail-parent")))
    with held(db, connect(), ids["root"]):
        fail(db, ids["a"])
    assert values(db, "select what from pgworker.unsettled") == [what]
    call(db, "retry_jobs", [ids["a"]])
    due(db)
    leftovers(db)
    assert states(db, ids) == {"root": "waiting", "a": "ready"}
    complete(db, ids["a"])
    complete(db, ids["root"])


def test_what_was_to_be_stopped_goes_on_when_a_retry_comes_first(db: Conn, connect: Connections) -> None:
    ids = plant(db, node("root", node("mid", node("low")), node("a")))
    with held(db, connect(), ids["low"]):
        fail(db, ids["a"])
    call(db, "retry_jobs", [ids["a"]])
    due(db)
    leftovers(db)
    assert states(db, ids) == {"root": "waiting", "mid": "waiting", "low": "ready", "a": "ready"}
    for name in ("low", "mid", "a", "root"):
        complete(db, ids[name])


def test_a_phase_that_was_to_open_stays_closed_when_what_it_waited_for_runs_again(
    db: Conn, connect: Connections
) -> None:
    ids = plant(db, node("root", node("a", on_failure="ignore"), node("c", node("x"), after=["a"])))
    with held(db, connect(), ids["c"]):
        fail(db, ids["a"])
    call(db, "retry_jobs", [ids["a"]])
    due(db)
    leftovers(db)
    assert states(db, ids) == {"root": "waiting", "a": "ready", "c": "waiting", "x": "waiting"}
    for name in ("a", "x", "c", "root"):
        complete(db, ids[name])


def test_a_parent_that_ends_while_a_child_counts_down_leaves_no_counter(db: Conn, connect: Connections) -> None:
    """sidekiq #2889, good_job #1387: who waits ends before what it waits for."""
    ids = plant(db, node("root", node("a"), node("b")))
    other = connect()
    worker = start(other, ids["a"])
    db.execute("set lock_timeout = '2s'")
    with other.transaction():
        call(other, "complete_job", worker, ids["a"])
        call(db, "cancel_jobs", [ids["root"]], "no need")
        assert states(db, ids) == {"root": "cancelled", "a": "running", "b": "cancelled"}
        assert set(values(db, "select what from pgworker.unsettled")) == {"forget", "stop"}
    leftovers(db)
    assert states(db, ids) == {"root": "cancelled", "a": "completed", "b": "cancelled"}
    assert stored(db)[2:] == [0, 0, 0]


def test_a_parent_retried_before_its_old_counter_was_forgotten_is_counted_anew(db: Conn, connect: Connections) -> None:
    """django-celery-results #397: the counter's row is there twice, or not at all."""
    ids = plant(db, node("root", node("a"), node("b"), node("c")))
    other = connect()
    worker = start(other, ids["a"])
    with other.transaction():
        call(other, "complete_job", worker, ids["a"])
        call(db, "cancel_jobs", [ids["root"]], "no need")
    call(db, "retry_jobs", [ids["root"]])
    due(db)
    leftovers(db)
    assert states(db, ids) == {"root": "waiting", "a": "completed", "b": "ready", "c": "ready"}
    for name in ("b", "c", "root"):
        complete(db, ids[name])


@ENDS
def test_children_added_in_an_open_transaction_do_not_make_others_wait(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """breamware/sidekiq-batch #69: children finish while the adder still adds; celery #5850."""
    other = connect()
    root = add(db, "root")["id"]
    worker = register(other)
    start(other, root, worker)
    ids = grow(db, worker, root, node("a"))
    db.execute("set lock_timeout = '2s'")
    with other.transaction(force_rollback=not commits):
        grow(other, worker, root, *[node(f"b{n}") for n in range(40)])
        assert state(db, ids["a"]) == "ready"
        running = start(db, ids["a"])
    call(db, "complete_job", running, ids["a"])
    assert value(db, "select pgworker.wait_for_children(%s, %s)", worker, root) == commits
    if commits:
        call(db, "cancel_jobs", [root])
        assert value(db, "select count(*) from pgworker.jobs where state = 'cancelled'") == 41
    else:
        call(db, "complete_job", worker, root)


def test_what_is_put_off_is_done_whatever_the_time_of_the_job(db: Conn, connect: Connections) -> None:
    """bullmq #1286, #1370, #1501, #2055: a released parent lost its priority or delay."""
    ids = plant(db, node("root", node("a"), run_at=FUTURE, priority=7))
    with held(db, connect(), ids["root"], commits=False):
        complete(db, ids["a"])
    due(db)
    leftovers(db)
    assert state(db, ids["root"]) == "scheduled"
    assert value(db, "select priority from pgworker.jobs where id = %s", ids["root"]) == 7
