"""Every administrative function against every state: what it changes, what it returns, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import Conn, Row, call, contents, register, rows, seen
from tests.lifecycle import STATES, job_in

IGNORED: dict[str, Any] = {}

# Function: what becomes of a job in each state. Nothing means that it is neither changed nor returned.
TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "complete_jobs": {
        "ready": {"state": "completed"},
        "scheduled": {"state": "completed"},
        "retrying": {"state": "completed"},
        "running": IGNORED,
        "stopping": IGNORED,
        "completed": IGNORED,
        "failed": {"state": "completed"},
        "cancelled": IGNORED,
    },
    "permanently_fail_jobs": {
        "ready": {"state": "failed", "last_error": "Manually marked as failed"},
        "scheduled": {"state": "failed", "last_error": "Manually marked as failed"},
        "retrying": {"state": "failed", "last_error": "Manually marked as failed"},
        "running": IGNORED,
        "stopping": IGNORED,
        "completed": IGNORED,
        "failed": IGNORED,
        "cancelled": IGNORED,
    },
    "retry_jobs": {
        "ready": IGNORED,
        "scheduled": IGNORED,
        "retrying": IGNORED,
        "running": IGNORED,
        "stopping": IGNORED,
        "completed": IGNORED,
        "failed": {"state": "ready", "attempts": 0},
        "cancelled": {"state": "ready", "attempts": 0},
    },
    "cancel_jobs": {
        "ready": {"state": "cancelled", "last_error": "cancelled"},
        "scheduled": {"state": "cancelled", "last_error": "cancelled"},
        "retrying": {"state": "cancelled", "last_error": "cancelled"},
        "running": {"state": "running"},
        "stopping": IGNORED,  # has been asked before
        "completed": IGNORED,
        "failed": IGNORED,
        "cancelled": IGNORED,
    },
    "reschedule_jobs": {
        "ready": {"priority": 9},
        "scheduled": {"priority": 9},
        "retrying": {"priority": 9},
        "running": IGNORED,
        "stopping": IGNORED,
        "completed": IGNORED,
        "failed": {"state": "ready", "priority": 9},
        "cancelled": IGNORED,
    },
}

ARGUMENTS: dict[str, dict[str, Any]] = {"reschedule_jobs": {"priority": 9}}

SAME = (
    "id", "task_identifier", "queue_name", "payload", "max_attempts", "key", "flags", "parent_id", "root_id", "name",
    "on_failure", "progress", "created_at",
)  # fmt: skip


def test_the_table_names_every_state() -> None:
    assert all(set(effects) == set(STATES) for effects in TABLE.values())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("function", list(TABLE))
def test_a_function_changes_a_job_as_the_table_says(tx: Conn, function: str, state: str) -> None:
    # A key that may be there twice would meet itself; queue and flags must survive whatever happens.
    bystander = seen(tx, job_in(tx, state, queue_name="other"))
    job = job_in(tx, state, queue_name="q", payload='{"n": 1}', job_key="k", flags=["x"], max_attempts=5)
    before, everything = seen(tx, job), contents(tx)

    changed = call(tx, function, [job], **ARGUMENTS.get(function, {}))

    effect = TABLE[function][state]
    assert seen(tx, bystander["id"]) == bystander
    if effect is IGNORED:
        assert changed == []
        assert contents(tx) == everything
        return
    after = seen(tx, job)
    assert changed == [after]
    assert {name: after[name] for name in effect} == effect
    assert {name: after[name] for name in SAME} == {name: before[name] for name in SAME}
    assert (after["finished_at"] is not None) == (after["state"] in ("completed", "failed", "cancelled"))


@pytest.mark.parametrize("function", list(TABLE))
def test_many_at_once_are_each_treated_as_their_state_asks(tx: Conn, function: str) -> None:
    ids = {state: job_in(tx, state, queue_name=state) for state in STATES}
    changed = call(tx, function, [*ids.values(), None, 2**40], **ARGUMENTS.get(function, {}))
    expected = {ids[state] for state, effect in TABLE[function].items() if effect is not IGNORED}
    assert {job["id"] for job in changed} == expected
    assert len(changed) == len(expected)
    assert changed == [seen(tx, job["id"]) for job in changed]


@pytest.mark.parametrize("ids", [[], None, [None], [2**40, -1]])
@pytest.mark.parametrize("function", [*TABLE, "force_unlock_workers"])
def test_nothing_and_unknown_ids_change_nothing(tx: Conn, function: str, ids: list[Any] | None) -> None:
    for state in STATES:
        job_in(tx, state)
    before = contents(tx)
    assert call(tx, function, ids, **ARGUMENTS.get(function, {})) == []
    assert contents(tx) == before


@pytest.mark.parametrize("function", list(TABLE))
def test_an_id_named_twice_is_changed_once(tx: Conn, function: str) -> None:
    changes = (state for state, effect in TABLE[function].items() if effect is not IGNORED)
    job = job_in(tx, next(changes))
    changed = call(tx, function, [job, job], **ARGUMENTS.get(function, {}))
    assert changed == [seen(tx, job)]


@pytest.mark.parametrize("function", list(TABLE))
def test_a_running_job_goes_on_and_can_be_finished(tx: Conn, function: str) -> None:
    worker = register(tx)
    job = job_in(tx, "running", worker)
    call(tx, function, [job], **ARGUMENTS.get(function, {}))
    (told,) = call(tx, "finish_jobs", worker, [job], None, None, None)
    assert told["outcome"] == ("cancelled" if function == "cancel_jobs" else "completed")


@pytest.mark.parametrize("state", ["ready", "scheduled", "retrying"])
def test_a_job_completed_by_hand_is_kept_as_completed(tx: Conn, state: str) -> None:
    job = job_in(tx, state)
    (done,) = call(tx, "complete_jobs", [job])
    assert (done["state"], done["result"]) == ("completed", None)
    assert seen(tx, job) == done  # or it could not be returned


def test_a_reason_can_be_given_for_failing(tx: Conn) -> None:
    jobs: list[Row] = []
    for error, shown in (("by order", "by order"), (None, "Manually marked as failed")):
        jobs += call(tx, "permanently_fail_jobs", [job_in(tx, "ready")], error)
        assert jobs[-1]["last_error"] == shown
    assert rows(tx, "select state, count(*) as n from pgworker.jobs group by 1") == [{"state": "failed", "n": 2}]
