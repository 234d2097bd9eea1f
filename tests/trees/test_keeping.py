"""How long trees are kept: as a whole, as long as their roots, and never gone while something in them is live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.calling import Conn, add, call, state, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.trees.planting import complete, fail, grow, node, only, plant, start, states, stored

DAY = "24 hours"


def later(conn: Conn, by: str) -> None:
    """Move the clock, and let maintain prune all that it wants to."""
    move_clock(conn, value(conn, "select (pgworker.clock() + %s::interval)::text", by))
    for _ in range(200):
        if value(conn, "select extract(epoch from pgworker.maintain())") >= 1:
            return
    raise AssertionError("maintain does not get done")


@pytest.fixture(autouse=True)
def _real_time(db: Conn) -> Iterator[None]:
    yield
    move_clock(db, "")


def test_results_are_there_for_the_parent_however_long_it_waits(db: Conn) -> None:
    """bullmq #1788 (#1778), #1753, #2432: results that the parent needed were removed."""
    ids = plant(db, node("root", node("a"), node("b", on_failure="ignore"), node("c")))
    complete(db, ids["a"], 7)
    fail(db, ids["b"])
    later(db, "400 days")
    assert value(db, "select pgworker.get_children_values(%s)", ids["root"]) == {str(ids["a"]): 7}
    assert value(db, "select pgworker.get_failed_children_values(%s)", ids["root"]) == {str(ids["b"]): None}
    complete(db, ids["c"])
    complete(db, ids["root"])


def test_a_completed_tree_is_kept_a_day_and_goes_as_a_whole(db: Conn) -> None:
    """oban #722: the pruner deleted upstream jobs of a live workflow; sidekiq #2889, good_job #1387, #1454."""
    ids = plant(db, node("root", node("a"), node("b", node("x"), after=["a"]), node("c", on_failure="ignore")))
    fail(db, ids["c"])
    for name in ("a", "x", "b"):
        complete(db, ids[name])
    later(db, "100 days")
    complete(db, ids["root"])
    later(db, "23 hours")
    assert None not in states(db, ids).values()
    later(db, "2 hours")
    assert stored(db) == [0, 0, 0, 0, 0]


def test_a_node_that_is_being_retried_is_not_waited_for_when_its_tree_has_had_its_time(
    db: Conn, connect: Connections
) -> None:
    ids = plant(db, node("root", node("a", on_failure="ignore"), node("b")))
    fail(db, ids["a"])
    complete(db, ids["b"])
    complete(db, ids["root"])
    retrying = connect(autocommit=False)
    call(retrying, "retry_jobs", [ids["a"]])
    db.execute("set lock_timeout = '1 s'")
    later(db, "2 days")
    assert states(db, ids)["a"] == "failed"
    retrying.rollback()
    later(db, "1 s")
    assert stored(db) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_tree_that_ended_badly_is_kept_thirty_days(db: Conn, how: str) -> None:
    """bullmq #2947 (#2229)."""
    ids = plant(db, node("root", node("a"), node("b", after=["a"])))
    if how == "failed":
        fail(db, ids["a"])
    else:
        call(db, "cancel_jobs", [ids["root"]])
    later(db, "29 days 23 hours")
    assert states(db, ids) == {"root": how, "a": how, "b": "cancelled"}
    later(db, "2 hours")
    assert stored(db) == [0, 0, 0, 0, 0]


def test_a_tree_stays_while_something_of_it_is_live(db: Conn) -> None:
    """oban #722."""
    root = add(db, "root")["id"]
    worker = start(db, root)
    ids = grow(db, worker, root, node("a"), node("b"))
    complete(db, ids["b"])
    call(db, "complete_job", worker, root)
    later(db, "40 days")
    assert (state(db, root), *only(states(db, ids), "a", "b")) == ("completed", "ready", "completed")
    complete(db, ids["a"])
    later(db, "2 hours")
    assert stored(db) == [0, 0, 0, 0, 0]


def test_a_tree_of_thousands_goes_in_several_steps_and_its_root_last(db: Conn) -> None:
    ids = plant(db, node("root", *[node(f"a{n}") for n in range(2500)]))
    call(db, "cancel_jobs", [ids["root"]])
    move_clock(db, value(db, "select (now() + interval '31 days')::text"))
    left = []
    for _ in range(4):
        call(db, "maintain")
        left.append(stored(db)[1])
    assert (left[:2], left[-1]) == ([1501, 501], 0)


def test_a_tree_that_completed_by_hand_is_kept_a_day_from_then(db: Conn) -> None:
    ids = plant(db, node("root", node("a")))
    fail(db, ids["a"])
    later(db, "20 days")
    call(db, "complete_jobs", [ids["root"], ids["a"]])
    later(db, "23 hours")
    assert states(db, ids) == {"root": "completed", "a": "completed"}
    later(db, "2 hours")
    assert stored(db) == [0, 0, 0, 0, 0]


def test_what_is_retried_after_a_long_time_is_still_a_tree(db: Conn) -> None:
    ids = plant(db, node("root", node("a"), node("b", after=["a"])))
    fail(db, ids["a"])
    later(db, "29 days")
    call(db, "retry_jobs", [ids["root"]])
    later(db, "10 days")
    for name in ("a", "b", "root"):
        complete(db, ids[name])
    later(db, "2 days")
    assert stored(db) == [0, 0, 0, 0, 0]


def test_cleaning_up_forgets_trees_that_failed_as_a_whole_and_no_part_of_others(db: Conn) -> None:
    """bullmq #3587, #990, #992: clean ignored the links."""
    failed = plant(db, node("r1", node("a1"), node("b1", node("c1"), after=["a1"])))
    fail(db, failed["a1"])
    live = plant(db, node("r2", node("a2", on_failure="ignore"), node("b2")))
    fail(db, live["a2"])
    completed = plant(db, node("r3", node("a3", on_failure="ignore")))
    fail(db, completed["a3"])
    complete(db, completed["r3"])
    stopping = plant(db, node("r4", node("a4"), node("b4")))
    worker = start(db, stopping["b4"])
    fail(db, stopping["a4"])
    cancelled = plant(db, node("r5", node("a5")))
    call(db, "cancel_jobs", [cancelled["r5"]])

    call(db, "cleanup", ["delete_failed_jobs"])

    assert set(states(db, failed).values()) == {None}
    assert states(db, live) == {"r2": "waiting", "a2": "failed", "b2": "ready"}
    assert states(db, completed) == {"r3": "completed", "a3": "failed"}
    assert states(db, stopping) == {"r4": "failed", "a4": "failed", "b4": "running"}
    assert states(db, cancelled) == {"r5": "cancelled", "a5": "cancelled"}
    call(db, "complete_job", worker, stopping["b4"])
    call(db, "cleanup", ["delete_failed_jobs"])
    assert set(states(db, stopping).values()) == {None}
    assert value(db, "select count(*) from pgworker.dependency") == 0
    complete(db, live["b2"])
    complete(db, live["r2"])


def test_queues_of_waiting_jobs_survive_a_cleanup(db: Conn) -> None:
    ids = plant(db, node("root", node("a", queue_name="q1"), queue_name="q2"))
    complete(db, ids["a"])
    complete(db, ids["root"])
    ids = plant(db, node("root", node("a", queue_name="q1"), queue_name="q2"))
    call(db, "cleanup")
    for name in ("a", "root"):
        complete(db, ids[name])
