"""after: phases, fan-outs within them, any graph among siblings, fan-ins of any width."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.calling import Conn, call, claim_ids, register, state, value
from tests.trees.planting import BADLY, GONE, WELL, complete, error_of, fail, node, only, plant, states, stored


def test_a_node_and_everything_below_it_starts_when_those_before_it_have_finished(tx: Conn) -> None:
    tree = node(
        "root",
        node("a", node("a1"), node("a2")),
        node("b", node("b1", node("b11")), node("b2"), after=["a"]),
        node("c", after=["a", "b"]),
    )
    ids = plant(tx, tree)
    worker = register(tx)

    def run(*names: str) -> None:
        assert claim_ids(tx, worker, 100) == [ids[name] for name in names]
        call(tx, "finish_jobs", worker, [ids[name] for name in names], None, None, None)

    run("a1", "a2")
    run("a")
    run("b11", "b2")
    run("b1")
    run("b")
    run("c")
    run("root")
    assert stored(tx)[2:4] == [0, 3]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_whatever_the_order_of_ends_a_follower_starts_after_the_last(tx: Conn, order: tuple[str, ...]) -> None:
    ids = plant(tx, node("root", node("d", after=["a", "c", "b", "a"]), node("a"), node("b"), node("c")))
    for name in order:
        assert state(tx, ids["d"]) == "waiting"
        complete(tx, ids[name])
    complete(tx, ids["d"])
    complete(tx, ids["root"])


@pytest.mark.parametrize(("width", "parts"), [(31, 0), (33, 4), (127, 15), (300, 16), (2049, 32)])
@pytest.mark.parametrize("at_once", [3, 7, 1000])
def test_a_fan_in_of_any_width_is_counted_exactly(tx: Conn, width: int, parts: int, at_once: int) -> None:
    """bullmq #2644, #800: 5 % of flows, or those with 10,000 children, never schedule the parent."""
    names = [f"a{n}" for n in range(width)]
    ids = plant(tx, node("root", node("late", node("below"), after=names), *[node(name) for name in names]))
    slots = value(tx, "select count(*) from pgworker.counter where job_id = %s and after", ids["late"])
    assert slots == 1 + parts
    worker = register(tx)
    jobs = [ids[name] for name in names]
    random.Random(width).shuffle(jobs)
    assert len(claim_ids(tx, worker, 3000)) == width
    for first in range(0, width, at_once):
        assert state(tx, ids["below"]) == "waiting"
        call(tx, "finish_jobs", worker, jobs[first : first + at_once], None, None, None)
    assert only(states(tx, ids), "below", "late", "root") == ["ready", "waiting", "waiting"]
    for name in ("below", "late", "root"):
        complete(tx, ids[name])
    assert value(tx, "select count(*) from pgworker.counter") == 0


def test_phases_within_phases_open_from_the_outside_in(tx: Conn) -> None:
    inner = [node("i1"), node("i2", node("i21", node("deep"), node("deeper", after=["deep"])), after=["i1"])]
    ids = plant(tx, node("root", node("o1"), node("o2", *inner, after=["o1"]), node("o3", after=["o2"])))
    order = ["o1", "i1", "deep", "deeper", "i21", "i2", "o2", "o3", "root"]
    worker = register(tx)
    for name in order:
        assert claim_ids(tx, worker, 100) == [ids[name]]
        call(tx, "complete_job", worker, ids[name])


def test_an_inner_phase_that_waits_for_nothing_any_more_opens_with_the_outer_one(tx: Conn) -> None:
    inner = [node("i1", on_failure="ignore"), node("i2", node("deep"), after=["i1"]), node("i3", after=["i2"])]
    ids = plant(tx, node("root", node("o1"), node("o2", *inner, after=["o1"])))
    call(tx, "cancel_jobs", [ids["i1"]])
    assert only(states(tx, ids), "i2", "deep", "i3") == ["waiting"] * 3
    complete(tx, ids["o1"])
    assert only(states(tx, ids), "i2", "deep", "i3") == ["waiting", "ready", "waiting"]
    for name in ("deep", "i2", "i3", "o2", "root"):
        complete(tx, ids[name])


def test_children_of_a_closed_phase_that_end_before_it_opens_are_not_waited_for(tx: Conn) -> None:
    """pgflow #606, #609."""
    tree = node(
        "root", node("a"), node("b", node("x", on_failure="ignore"), node("y", on_failure="remove"), after=["a"])
    )
    ids = plant(tx, tree)
    call(tx, "cancel_jobs", [ids["x"], ids["y"]])
    assert only(states(tx, ids), "b", "x", "y") == ["waiting", "cancelled", None]
    complete(tx, ids["a"])
    complete(tx, ids["b"])
    complete(tx, ids["root"])


@pytest.mark.parametrize("policy", ["ignore", "remove"])
@pytest.mark.parametrize("how", [*WELL, *BADLY])
def test_a_predecessor_that_may_fail_does_not_block_who_comes_after(tx: Conn, how: str, policy: str) -> None:
    """pg-boss docs: a failed predecessor leaves the dependant blocked."""
    ids = plant(tx, node("root", node("a", on_failure=policy), node("b", node("x"), after=["a"])))
    (WELL | BADLY)[how](tx, ids["a"])
    for name in ("x", "b", "root"):
        complete(tx, ids[name])


@pytest.mark.parametrize("how", list(BADLY))
def test_who_comes_after_a_failed_one_is_cancelled_with_the_reason(tx: Conn, how: str) -> None:
    ids = plant(tx, node("root", node("a"), node("b", node("x"), after=["a"]), node("c", after=["b"])))
    BADLY[how](tx, ids["a"])
    assert only(states(tx, ids), "root", "b", "x", "c") == ["failed", "cancelled", "cancelled", "cancelled"]
    assert error_of(tx, ids["x"]) == error_of(tx, ids["root"])
    assert stored(tx)[2:] == [0, 0 if how in GONE else 2, 0] or how in GONE


@pytest.mark.parametrize("how", ["cancel_jobs", "remove_job", "deleted", "permanently_fail_jobs", "complete_jobs"])
def test_a_follower_that_ends_while_it_waits_lets_those_after_it_go_on(tx: Conn, how: str) -> None:
    """bullmq #1060, #990: removed jobs whose links stayed."""
    tree = node("root", node("a"), node("b", node("x"), after=["a"], on_failure="ignore"), node("c", after=["b"]))
    ids = plant(tx, tree)
    (WELL | BADLY)[how](tx, ids["b"])
    assert only(states(tx, ids), "a", "c") == ["ready", "ready"]
    assert state(tx, ids["x"]) == (None if how in GONE else "cancelled")
    for name in ("c", "a", "root"):
        complete(tx, ids[name])


def test_a_random_graph_runs_in_an_order_that_it_allows(tx: Conn) -> None:
    chance = random.Random(20)
    names = [f"n{n}" for n in range(60)]
    before = {name: chance.sample(names[:n], chance.randint(0, min(n, 4))) for n, name in enumerate(names)}
    ids = plant(tx, node("root", *[node(name, after=before[name]) for name in chance.sample(names, len(names))]))
    by_id = {job: name for name, job in ids.items()}
    worker = register(tx)
    done: list[str] = []
    while claimed := claim_ids(tx, worker, chance.randint(1, 5)):
        for job in claimed:
            assert set(before.get(by_id[job], names)) <= set(done)
        call(tx, "finish_jobs", worker, claimed, None, None, None)
        done += [by_id[job] for job in claimed]
    assert sorted(done) == sorted([*names, "root"])


def test_a_phase_with_thousands_of_leaves_opens_at_once(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b", *[node(f"x{n}") for n in range(3000)], after=["a"])))
    complete(tx, ids["a"])
    assert value(tx, "select count(*) from pgworker.jobs where state = 'ready'") == 3000
    assert state(tx, ids["b"]) == "waiting"


def test_thousands_of_phases_that_wait_for_one_job_open_at_once(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), *[node(f"x{n}", after=["a"]) for n in range(3000)]))
    complete(tx, ids["a"])
    assert value(tx, "select count(*) from pgworker.jobs where state = 'ready'") == 3000
    assert value(tx, "select count(*) from pgworker.counter where after") == 0


def test_a_job_that_failed_and_was_retried_lets_the_next_phase_go_on(tx: Conn) -> None:
    ids = plant(tx, node("root", node("a"), node("b", after=["a"])))
    fail(tx, ids["a"])
    call(tx, "retry_jobs", [ids["a"]])
    for name in ("a", "b", "root"):
        complete(tx, ids[name])
