"""Trees that can be undone: nodes whose compensation is named after them, and what has become of it."""

from __future__ import annotations

from typing import Any

from tests.calling import Conn, Row, call, claim, register, rows, value, values
from tests.trees.planting import Node, node

_READY = "select exists (select from pgworker.jobs where state = 'ready')"


def undoable(identifier: str, *children: Node, **arguments: Any) -> Node:
    """Return a node whose compensation is called like its task, with ``undo-`` before it."""
    return node(identifier, *children, **{"compensate": {"identifier": f"undo-{identifier}"}, **arguments})


def chain(*names: str, **arguments: Any) -> Node:
    """Return an order: its children come one after the other, each can be undone, and fail at their first attempt."""
    after: list[list[str]] = [[], *[[name] for name in names]]
    children = [undoable(name, after=after[n], max_attempts=1) for n, name in enumerate(names)]
    return node("order", *children, **arguments)


def compensations(conn: Conn, root: int) -> list[Row]:
    """Return the jobs that undo that tree, in the order in which they were added."""
    return rows(
        conn,
        "select j.* from pgworker.job_tree(%s) j join pgworker.compensations c on c.job_id = j.id order by j.id",
        root,
    )


def undoes(conn: Conn, root: int) -> list[str]:
    """Return the tasks of the jobs that undo that tree, in the order in which they were added."""
    return [job["task_identifier"] for job in compensations(conn, root)]


def work(conn: Conn, *failing: str) -> list[str]:
    """Do what there is to do, a job at a time; return the tasks in that order. Those named fail for good."""
    worker = register(conn)
    done = []
    # On a slow machine a claim may overlook what has just been released, and finds it a little later.
    while (claimed := claim(conn, worker)) or value(conn, _READY):
        if not claimed:
            continue
        task = claimed[0]["task_identifier"]
        done.append(task)
        if task in failing:
            call(conn, "fail_job", worker, claimed[0]["id"], "it broke", permanent=True)
        else:
            call(conn, "complete_job", worker, claimed[0]["id"])
        assert values(conn, "select problem from pgworker.audit()") == []
    value(conn, "select pgworker.unregister_worker(%s)", worker)
    return done


def settle(conn: Conn) -> None:
    """Have maintain look at once at everything that was put off."""
    conn.execute(
        "update pgworker.unsettled set due = pgworker.clock()"
        " where n in (select n from pgworker.unsettled for update skip locked)"
    )
    for _ in range(value(conn, "select count(*) from pgworker.unsettled")):
        call(conn, "maintain")
