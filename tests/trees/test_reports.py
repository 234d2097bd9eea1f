"""finish_jobs with jobs of trees: whatever else is in the report, and in which order."""

from __future__ import annotations

import itertools

import pytest

from tests.calling import Conn, add, call, claim_ids, refused, register, seen, state
from tests.trees.planting import node, plant


@pytest.mark.parametrize("order", list(itertools.permutations(["plain", "child", "asked", "lost"])))
@pytest.mark.parametrize("results", [False, True])
def test_each_job_of_a_mixed_report_ends_as_it_would_alone(tx: Conn, order: tuple[str, ...], results: bool) -> None:
    ids = plant(tx, node("root", node("child"), node("asked", on_failure="ignore")))
    ids["plain"] = add(tx, "plain")["id"]
    worker = register(tx)
    assert len(claim_ids(tx, worker, 3)) == 3
    ids["lost"] = add(tx, "lost")["id"]
    call(tx, "cancel_jobs", [ids["asked"]], "no need")
    report = [ids[name] for name in order]
    told = call(tx, "finish_jobs", worker, report, ["1"] * 4 if results else None, None, None)
    outcomes = {"plain": "completed", "child": "completed", "asked": "cancelled", "lost": "lost"}
    assert [(one["job_id"], one["outcome"]) for one in told] == [(ids[name], outcomes[name]) for name in order]
    assert [state(tx, ids[name]) for name in ("child", "asked", "lost", "root")] == [
        "completed", "cancelled", "ready", "ready",
    ]  # fmt: skip
    assert seen(tx, ids["asked"])["last_error"] == "no need"
    assert state(tx, ids["plain"]) == ("completed" if results else None)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("attempts", [None, "right", "wrong"])
def test_children_reported_at_once_release_or_fail_their_parent_once(
    tx: Conn, failed: bool, attempts: str | None
) -> None:
    ids = plant(tx, node("root", node("mid", node("a"), node("b")), node("c", max_attempts=1)))
    worker = register(tx)
    assert claim_ids(tx, worker, 9) == [ids[name] for name in ("a", "b", "c")]
    done = [ids["a"], ids["b"]] + ([] if failed else [ids["c"]])
    fence = None if attempts is None else [1 if attempts == "right" else 2] * 3
    told = call(tx, "finish_jobs", worker, done, None, [ids["c"]] if failed else None, ["broke"] * failed, fence)
    if attempts == "wrong":
        assert {one["outcome"] for one in told} == {"lost"}
        assert [state(tx, ids[name]) for name in ("a", "b", "c", "mid")] == ["running"] * 3 + ["waiting"]
    elif failed:
        assert [one["outcome"] for one in told] == ["completed", "completed", "failed"]
        assert [state(tx, ids[name]) for name in ("mid", "root")] == ["cancelled", "failed"]
    else:
        assert {one["outcome"] for one in told} == {"completed"}
        assert [state(tx, ids[name]) for name in ("mid", "root")] == ["ready", "waiting"]


def test_a_child_that_is_reported_twice_is_counted_once(tx: Conn) -> None:
    """celery #7692, sidekiq #6852: the same end, told again."""
    ids = plant(tx, node("root", node("a"), node("b")))
    worker = register(tx)
    assert claim_ids(tx, worker, 2) == [ids["a"], ids["b"]]
    for outcome in ("completed", "lost", "lost"):
        told = call(tx, "finish_jobs", worker, [ids["a"], ids["a"]], None, None, None)
        assert {one["outcome"] for one in told} == {outcome}
        assert state(tx, ids["root"]) == "waiting"
    with refused(tx, "PW001", f"job {ids['a']} is not held by worker {worker}"):
        call(tx, "complete_job", worker, ids["a"])
    call(tx, "finish_jobs", worker, [ids["a"], ids["b"]], None, [ids["b"]], ["and failed"])
    assert [state(tx, ids[name]) for name in ("root", "b")] == ["ready", "completed"]
