"""Plans that are made while there is nothing, and kept, do not compare each of many with each of many.

A session keeps its plans. What is cheap for the few rows that the planner saw (a look through a whole index; rows
compared with an array, element by element; two lists compared row by row) takes minutes for a hundred thousand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from tests.calling import Conn, add, call, claim_ids, register, value
from tests.plans.explained import Explained, Plan
from tests.trees.planting import complete, fail, node, plant, start

TABLES = {
    "attempt", "compensation", "counter", "dependency", "finished", "job", "notice", "permit", "queue", "unsettled",
}  # fmt: skip

MAY_READ_ALL = {
    "adopt_jobs(": "from task to task",
    "apply_limits(": "of a task whose limits change",
    "check_nodes(": "compares with three names",
    "configure_task(": "compares the names of settings",
    "why(": "of one job",
}
"""Functions of which some statement has to, and why."""


def _smells(plan: Plan, limited: bool = False) -> Iterator[str]:
    kind, table = plan["Node Type"], plan.get("Relation Name")
    limited = limited or kind == "Limit" or plan.get("Subplan Name", "").startswith("InitPlan")
    whole = kind == "Seq Scan" or (kind in {"Index Scan", "Index Only Scan"} and "Index Cond" not in plan)
    if table in TABLES and whole and not limited:
        yield f"reads all of {table}: {kind} {plan.get('Index Name', '')}"
    if kind == "Bitmap Index Scan" and "Index Cond" not in plan:
        yield f"reads all of index {plan['Index Name']}"
    if re.search(r"id = ANY \(\$|id <> ALL \(\$", plan.get("Filter", "")):
        yield f"compares with each element of an array: {plan['Filter']}"
    if kind == "Nested Loop" and "Join Filter" in plan:
        yield f"compares each with each: {plan['Join Filter']}"
    for below in plan.get("Plans", []):
        yield from _smells(below, limited and kind != "Nested Loop")


def _trees(conn: Conn) -> None:
    steps = [node(f"s{n}", node(f"leaf{n}"), after=[f"s{n - 1}"] if n else None) for n in range(3)]
    undone = node("undone", compensate={"identifier": "undo"})
    ids = plant(conn, node("root", *steps, undone, node("fails"), node("ignored", on_failure="ignore"), node("more")))
    complete(conn, ids["undone"])
    complete(conn, ids["leaf0"])
    complete(conn, ids["s0"])
    fail(conn, ids["ignored"])
    worker = start(conn, ids["more"])
    call(conn, "add_children", worker, ids["more"], json.dumps([node("child"), node("other", after=["child"])]))
    call(conn, "wait_for_children", worker, ids["more"])
    for function in ["children", "job_tree", "tree_progress", "why"]:
        call(conn, function, ids["root"])
    fail(conn, ids["fails"])
    for function in ["get_children_values", "get_failed_children_values"]:
        call(conn, function, ids["root"])
    call(conn, "retry_jobs", [ids["fails"]])
    call(conn, "cancel_jobs", [ids["root"]])
    call(conn, "retry_jobs", [ids["root"], ids["s1"]])
    call(conn, "reschedule_jobs", [ids["fails"], ids["leaf1"]], priority=1)
    call(conn, "complete_jobs", [ids["leaf1"], ids["fails"]])
    call(conn, "permanently_fail_jobs", [ids["leaf2"]])
    conn.execute("delete from pgworker.job where id = %s", [ids["leaf1"]])
    call(conn, "maintain")


def _plain(conn: Conn) -> None:
    call(conn, "configure_task", "limited", max_concurrency=2, rate_limit=5, rate_interval="1 minute")
    worker = register(conn)
    for task in ["plain", "queued", "limited", "keyed"]:
        arguments = {"queued": {"queue_name": "q"}, "keyed": {"job_key": "k"}}.get(task, {})
        for _ in range(2 if task == "keyed" else 6):
            add(conn, task, **arguments)
    call(conn, "pause_queue", "q")
    call(conn, "resume_queue", "q")
    call(conn, "remove_job", "k")
    for end in ["complete", "fail", "release", "unlock"]:
        ids = claim_ids(conn, worker, 3)
        assert ids
        call(conn, "set_progress", worker, ids[0], "1")
        call(conn, "heartbeat", worker)
        call(conn, "why", ids[0])
        match end:
            case "complete":
                call(conn, "finish_jobs", worker, ids, [json.dumps(1)] * len(ids), None, None)
            case "fail":
                call(conn, "finish_jobs", worker, ids[1:], None, ids[:1], ["broken"])
            case "release":
                call(conn, "release_jobs", worker, ids)
            case _:
                call(conn, "force_unlock_workers", [worker])
    call(conn, "add_jobs", json.dumps([{"identifier": "keyed", "job_key": f"k{n}"} for n in range(5)]))
    value(conn, "select count(*) from pgworker.cancel_jobs(array(select id from pgworker.jobs))")
    value(conn, "select count(*) from pgworker.retry_jobs(array(select id from pgworker.jobs))")
    call(conn, "maintain")


@pytest.mark.parametrize("work", [_trees, _plain])
@pytest.mark.parametrize("statistics", ["none", "of empty tables", (1, 1), (1000, 0)], ids=str)
def test_what_is_kept_is_fit_for_many(
    db: Conn, work: Callable[[Conn], None], statistics: str | tuple[int, int]
) -> None:
    """Statistics: what a vacuum has left, or pages and rows."""
    if isinstance(statistics, tuple):
        db.execute(
            "update pg_class set relpages = %s, reltuples = %s"
            " where relkind = 'r' and relnamespace = 'pgworker'::regnamespace",
            statistics,
        )
    elif statistics == "of empty tables":
        db.execute("vacuum analyze")
    db.execute("set plan_cache_mode = force_generic_plan")
    explained = Explained(db)
    work(db)
    found = {}
    for (query, plan), context in zip(explained.plans, explained.contexts, strict=True):
        smells = list(_smells(plan))
        inside = re.search(r"^PL/pgSQL function pgworker\.(.*)$", context, re.M)
        if smells and inside and not inside[1].startswith(tuple(MAY_READ_ALL)):
            found[" ".join(query.split())[:300]] = (smells, inside[1])
    assert not found, json.dumps(found, indent=2)
