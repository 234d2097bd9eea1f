"""Bringing a job into each state that it can be in, by the calls that lead there."""

from __future__ import annotations

from typing import Any

from tests.calling import FUTURE, Conn, add, call, claim_ids, register, seen, value

STATES = ("ready", "scheduled", "retrying", "running", "stopping", "completed", "failed", "cancelled")
"""``retrying`` is a scheduled job that has failed once; ``stopping`` a running one that was asked to stop."""

LIVE = STATES[:5]
FINISHED = STATES[5:]
RUNNING = ("running", "stopping")


def shown(state: str) -> str:
    """Return what the view calls that state."""
    return {"retrying": "scheduled", "stopping": "running"}.get(state, state)


def bring(conn: Conn, job_id: int, state: str, worker: int | None = None) -> int:
    """Bring a job that is ready into ``state``, and return the worker that runs it or ran it last (0: none did).

    The job's task must be its alone, or it must be the first to be claimed of its task.
    """
    if state == "ready":
        return 0
    if state == "scheduled":
        call(conn, "reschedule_jobs", [job_id], run_at=FUTURE)
        return 0
    if state == "cancelled":
        call(conn, "cancel_jobs", [job_id], reason="no need")
        return 0
    worker = worker or register(conn)
    task = seen(conn, job_id)["task_identifier"]
    assert claim_ids(conn, worker, tasks=[task]) == [job_id]
    if state == "retrying":
        call(conn, "fail_job", worker, job_id, "it broke", retry_at=FUTURE)
    elif state == "stopping":
        call(conn, "cancel_jobs", [job_id], reason="no need")
    elif state == "completed":
        value(conn, """select pgworker.complete_job(%s, %s, '{"done": true}')""", worker, job_id)  # kept: has a result
    elif state == "failed":
        call(conn, "fail_job", worker, job_id, "it broke", permanent=True)
    return worker


def job_in(conn: Conn, state: str, worker: int | None = None, identifier: str | None = None, **arguments: Any) -> int:
    """Return the id of a new job in that state; its task is its alone unless one is given."""
    job = add(conn, identifier or "task-of-its-own", **arguments)["id"]
    if identifier is None:
        conn.execute("update pgworker.job set task_identifier = 'task-' || id where id = %s", [job])
    bring(conn, job, state, worker)
    assert seen(conn, job)["state"] == shown(state)
    return int(job)
