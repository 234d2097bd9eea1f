"""Trees for tests: nodes named after their tasks, and the ways in which a job of a tree can end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.calling import Conn, call, claim_ids, register, row, rows, seen, value, values

Node = dict[str, Any]


def node(identifier: str, *children: Node, **arguments: Any) -> Node:
    """Return a node that is called like its task."""
    return {"identifier": identifier, "name": identifier, **arguments, **({"children": children} if children else {})}


def deep(levels: int) -> str:
    """Return a tree of that many levels, one job on each; too deep for Python's JSON."""
    inner = '{"identifier": "inner", "children": ['
    return inner * (levels - 1) + '{"identifier": "leaf"}' + "]}" * (levels - 1)


def plant(conn: Conn, tree: Node) -> dict[str, int]:
    """Add the tree, and return the ids of its nodes by name; names must differ throughout the tree."""
    root = row(conn, "select * from pgworker.add_job_tree(%s)", json.dumps(tree))["id"]
    return named(conn, root)


def named(conn: Conn, job_id: int) -> dict[str, int]:
    """Return the ids of a tree's jobs by name."""
    found = rows(conn, "select id, name from pgworker.job_tree(%s)", job_id)
    return {job["name"]: job["id"] for job in found if job["name"]}


def grow(conn: Conn, worker: int, job_id: int, *children: Node) -> dict[str, int]:
    """Have a running job add children to itself, and return their ids, and those of what is below them, by name."""
    call(conn, "add_children", worker, job_id, json.dumps(children))
    return named(conn, job_id)


def start(conn: Conn, job_id: int, worker: int | None = None) -> int:
    """Have a worker claim that job; its task must be its alone among what is ready. Return the worker."""
    worker = worker or register(conn)
    assert claim_ids(conn, worker, tasks=[seen(conn, job_id)["task_identifier"]]) == [job_id]
    return worker


def complete(conn: Conn, job_id: int, result: Any = None) -> None:
    """Have a worker run that job with success."""
    value(conn, "select pgworker.complete_job(%s, %s, %s)", start(conn, job_id), job_id, json.dumps(result))


def fail(conn: Conn, job_id: int, error: str = "it broke") -> None:
    """Have a worker run that job, which fails for good."""
    call(conn, "fail_job", start(conn, job_id), job_id, error, permanent=True)


def states(conn: Conn, ids: dict[str, int]) -> dict[str, str | None]:
    """Return the states of these jobs by name; None for what is not known any more."""
    found = dict(
        conn.execute("select id, state from pgworker.jobs where id = any(%s)", [list(ids.values())]).fetchall()
    )
    return {name: found.get(job) for name, job in ids.items()}


def only(states: dict[str, str | None], *names: str) -> list[str | None]:
    """Return the states of those jobs, in that order."""
    return [states[name] for name in names]


def error_of(conn: Conn, job_id: int) -> str:
    """Return the last error of a job."""
    return str(seen(conn, job_id)["last_error"])


def leftovers(conn: Conn) -> int:
    """Have maintain do all that was put off, and return how much that was."""
    for done in range(1000):
        if not value(conn, "select exists (select from pgworker.unsettled)"):
            return done
        call(conn, "maintain")
    raise AssertionError("maintain does not get done")


def stored(conn: Conn) -> list[int]:
    """Return how many rows there are: live jobs, finished ones, counters, dependencies, what is left to be done."""
    tables = ("job", "finished", "counter", "dependency", "unsettled")
    return [value(conn, f"select count(*) from pgworker.{table}") for table in tables]


def _vanish(conn: Conn, job_id: int) -> None:
    conn.execute("update pgworker.job set max_attempts = attempts + 1 where id = %s", [job_id])
    worker = register(conn, lease="1 hour")
    start(conn, job_id, worker)
    conn.execute("update pgworker.worker set lease_until = now() - interval '1 second' where id = %s", [worker])
    call(conn, "maintain")
    assert values(conn, "select id from pgworker.worker where id = %s", worker) == []


def _use_up(conn: Conn, job_id: int) -> None:
    conn.execute("update pgworker.job set max_attempts = attempts + 1 where id = %s", [job_id])
    value(
        conn,
        "select outcome from pgworker.finish_jobs(%s, null, null, %s, array['it broke'])",
        start(conn, job_id),
        [job_id],
    )


def _remove(conn: Conn, job_id: int) -> None:
    conn.execute("update pgworker.job set key = 'to-be-removed' where id = %s", [job_id])
    assert call(conn, "remove_job", "to-be-removed")[0]["id"] == job_id


def _delete(conn: Conn, job_id: int) -> None:
    conn.execute("delete from pgworker.job where id = %s", [job_id])


def _stop(conn: Conn, job_id: int) -> None:
    worker = start(conn, job_id)
    call(conn, "cancel_jobs", [job_id], "no need")
    assert call(conn, "heartbeat", worker) == [{"job_id": job_id, "notice": "cancel"}]
    call(conn, "complete_job", worker, job_id)


def _give_up(conn: Conn, job_id: int) -> None:
    call(conn, "cancel_job", start(conn, job_id), job_id, "I gave up")


WELL: dict[str, Callable[[Conn, int], Any]] = {
    "completed": complete,
    "complete_jobs": lambda conn, job: call(conn, "complete_jobs", [job]),
}
"""Ways in which a job that is ready ends well."""

BADLY: dict[str, Callable[[Conn, int], Any]] = {
    "failed": fail,
    "attempts used up": _use_up,
    "vanished worker": _vanish,
    "permanently_fail_jobs": lambda conn, job: call(conn, "permanently_fail_jobs", [job]),
    "cancel_jobs": lambda conn, job: call(conn, "cancel_jobs", [job], "no need"),
    "stopped": _stop,
    "cancel_job": _give_up,
    "remove_job": _remove,
    "deleted": _delete,
}
"""Ways in which it does not, and what its parent is told, roughly."""

SAYS = {
    "failed": "failed: it broke",
    "attempts used up": "failed: it broke",
    "vanished worker": "vanished while it ran this job",
    "permanently_fail_jobs": "failed: Manually marked as failed",
    "cancel_jobs": "cancelled: no need",
    "stopped": "cancelled: no need",
    "cancel_job": "cancelled: I gave up",
    "remove_job": "was removed",
    "deleted": "was removed",
}

GONE = ("remove_job", "deleted")
"""Those after which nothing is kept of the job."""
