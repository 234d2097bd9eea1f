"""Job keys: every mode against every state of the job that has the key, with what is given and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import FUTURE, Conn, Row, add, call, claim_ids, job_row, register, row, rows, seen
from tests.clock import move_clock
from tests.lifecycle import FINISHED, STATES, bring

MODES = ("replace", "preserve_run_at", "unsafe_dedupe")

# What becomes of the job that has the key.
INSERT = "another job is inserted, this one is left as it is"
UPDATE = "every attribute becomes the new one"
UPDATE_EXCEPT_RUN_AT = "every attribute becomes the new one, run_at stays"
COUNT = "revision + 1, nothing else"
DETACH = "it runs on without key and retries, another job is inserted"

TABLE = {
    "absent": (INSERT, INSERT, INSERT),
    "ready": (UPDATE, UPDATE_EXCEPT_RUN_AT, COUNT),
    "scheduled": (UPDATE, UPDATE_EXCEPT_RUN_AT, COUNT),
    "retrying": (UPDATE, UPDATE, COUNT),
    "running": (DETACH, DETACH, COUNT),
    "stopping": (DETACH, DETACH, COUNT),
    "completed": (INSERT, INSERT, INSERT),
    "failed": (INSERT, INSERT, INSERT),
    "cancelled": (INSERT, INSERT, INSERT),
}

OLD: dict[str, Any] = {
    "payload": '{"old": true}', "queue_name": "old-queue", "run_at": "2020-05-05 00:00:00+00", "max_attempts": 7,
    "priority": 3, "flags": ["old"],
}  # fmt: skip

GIVEN: dict[str, Any] = {
    "payload": '{"new": true}', "queue_name": "new-queue", "run_at": "2021-06-06 00:00:00+00", "max_attempts": 9,
    "priority": -4, "flags": ["new"],
}  # fmt: skip

STORED = {"payload": {"new": True}, "queue_name": "new-queue", "max_attempts": 9, "priority": -4, "flags": ["new"]}
DEFAULTS: dict[str, Any] = {"payload": {}, "queue_name": None, "max_attempts": 25, "priority": 0, "flags": None}


def test_the_table_names_every_state_and_mode() -> None:
    assert set(TABLE) == {"absent", *STATES}
    assert {len(outcomes) for outcomes in TABLE.values()} == {len(MODES)}


def _add(conn: Conn, how: str, **arguments: Any) -> Row:
    if how == "add_job":
        return add(conn, **arguments)
    spec = arguments | {"payload": {"new": True}} if "payload" in arguments else arguments
    (job,) = call(conn, "add_jobs", Jsonb([spec]))
    return job


@pytest.mark.parametrize("how", ["add_job", "add_jobs"])
@pytest.mark.parametrize("given", [GIVEN, {}], ids=["all-given", "all-omitted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", list(TABLE))
def test_a_key_meets_a_job(tx: Conn, state: str, mode: str, given: dict[str, Any], how: str) -> None:
    outcome = TABLE[state][MODES.index(mode)]
    old: Row | None = None
    if state != "absent":
        move_clock(tx, "2022-01-01")
        old_id = add(tx, "old", job_key="k", **OLD)["id"]
        bring(tx, old_id, state)
        move_clock(tx, "")
        old = seen(tx, old_id)

    job = _add(tx, how, identifier="new", job_key="k", job_key_mode=mode, **given)

    assert job == seen(tx, job["id"])  # never an all-NULL row
    assert job["key"] == "k"
    new = {"task_identifier": "new"} | (STORED if given else DEFAULTS)
    run_at = row(tx, "select coalesce(%s::timestamptz, now()) as run_at", given.get("run_at"))["run_at"]
    if outcome in (UPDATE, UPDATE_EXCEPT_RUN_AT):
        assert old is not None
        new["run_at"] = old["run_at"] if outcome == UPDATE_EXCEPT_RUN_AT else run_at
        new["state"] = "scheduled" if state == "scheduled" and outcome == UPDATE_EXCEPT_RUN_AT else "ready"
        assert job == old | new | {"attempts": 0, "last_error": None, "progress": None, "revision": old["revision"] + 1}
    elif outcome == COUNT:
        assert old is not None
        assert job == old | {"revision": old["revision"] + 1}
    else:
        assert job["id"] > (old or {"id": 0})["id"]
        assert {name: job[name] for name in new} == new
        assert (job["attempts"], job["last_error"], job["revision"], job["run_at"]) == (0, None, 0, run_at)
        assert job["state"] == "ready"
        if old is not None:
            detached = {"key": None, "max_attempts": old["attempts"]} if outcome == DETACH else {}
            assert seen(tx, old["id"]) == old | detached
    assert len(rows(tx, "select from pgworker.jobs")) == (2 if old is not None and job["id"] != old["id"] else 1)


@pytest.mark.parametrize("mode", ["replace", "preserve_run_at"])
def test_a_run_that_lost_its_key_is_not_repeated_when_it_fails(tx: Conn, mode: str) -> None:
    worker = register(tx)
    old = add(tx, job_key="k")["id"]
    assert claim_ids(tx, worker) == [old]
    new = add(tx, job_key="k", job_key_mode=mode)["id"]
    call(tx, "fail_job", worker, old, "it broke")
    assert seen(tx, old)["state"] == "failed"
    assert claim_ids(tx, worker, 10) == [new]


def test_a_deduplicated_run_keeps_its_retries(tx: Conn) -> None:
    worker = register(tx)
    old = add(tx, job_key="k")["id"]
    assert claim_ids(tx, worker) == [old]
    add(tx, job_key="k", job_key_mode="unsafe_dedupe")
    call(tx, "fail_job", worker, old, "it broke")
    assert (seen(tx, old)["state"], seen(tx, old)["key"]) == ("scheduled", "k")


@pytest.mark.parametrize("state", FINISHED)
def test_a_finished_job_does_not_hold_its_key(tx: Conn, state: str) -> None:
    old = add(tx, job_key="k")["id"]
    bring(tx, old, state)
    new = add(tx, job_key="k")["id"]
    again = add(tx, job_key="k")
    assert (again["id"], again["revision"]) == (new, 1)
    assert seen(tx, old)["state"] == state


def test_a_key_is_unique_across_tasks_and_queues(tx: Conn) -> None:
    first = add(tx, "a", job_key="k", queue_name="q")
    second = add(tx, "b", job_key="k", queue_name="r")
    assert (second["id"], second["task_identifier"], second["queue_name"]) == (first["id"], "b", "r")


def test_jobs_without_key_never_meet(tx: Conn) -> None:
    assert add(tx)["id"] != add(tx)["id"]


@pytest.mark.parametrize("mode", ["replace", "preserve_run_at"])
@pytest.mark.parametrize(
    ("old", "new", "stored"),
    [
        ("[1]", "[2]", [1, 2]),
        ("[1, [2]]", "[[3]]", [1, [2], [3]]),
        ("[]", "[2]", [2]),
        ("[1]", "[]", [1]),
        ("[1]", '{"n": 2}', {"n": 2}),
        ('{"n": 1}', "[2]", [2]),
        ("[1]", "2", 2),
        ("[1]", None, {}),
        ('{"n": 1}', '{"m": 2}', {"m": 2}),
    ],
)
@pytest.mark.parametrize("state", ["ready", "retrying"])
def test_only_arrays_are_put_together(tx: Conn, state: str, old: str, new: str | None, stored: Any, mode: str) -> None:
    bring(tx, add(tx, job_key="k", payload=old)["id"], state)
    assert add(tx, job_key="k", payload=new, job_key_mode=mode)["payload"] == stored


def test_arrays_are_not_put_together_when_the_job_is_only_counted(tx: Conn) -> None:
    add(tx, job_key="k", payload="[1]")
    assert add(tx, job_key="k", payload="[2]", job_key_mode="unsafe_dedupe")["payload"] == [1]


def test_what_a_run_has_begun_with_is_not_done_a_second_time(tx: Conn) -> None:
    worker = register(tx)
    add(tx, job_key="k", payload="[1]")
    (running,) = call(tx, "get_jobs", worker)
    new = add(tx, job_key="k", payload="[2]")
    assert new["payload"] == [2]
    assert seen(tx, running["id"])["payload"] == [1]


def test_a_replaced_job_moves_to_its_new_queue_and_place(tx: Conn) -> None:
    worker = register(tx)
    busy = add(tx, queue_name="busy")["id"]
    assert claim_ids(tx, worker) == [busy]
    behind = add(tx, queue_name="busy", job_key="k", priority=5)["id"]
    other = add(tx)["id"]
    assert claim_ids(tx, worker) == [other]
    add(tx, queue_name="free", job_key="k", priority=-5)
    assert claim_ids(tx, worker, 10) == [behind]


def test_a_retrying_job_that_is_replaced_starts_afresh(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, job_key="k", max_attempts=2)["id"]
    bring(tx, job, "retrying", worker)
    add(tx, job_key="k", max_attempts=2)
    for _ in range(2):  # two attempts again, not one
        assert claim_ids(tx, worker) == [job]
        call(tx, "fail_job", worker, job, "it broke", retry_at="2020-01-01")
    assert seen(tx, job)["state"] == "failed"


def test_a_job_moved_into_the_future_is_not_claimed_before(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, job_key="k")["id"]
    add(tx, job_key="k", run_at=FUTURE)
    assert claim_ids(tx, worker, 10) == []
    add(tx, job_key="k", run_at="2020-01-01")
    assert claim_ids(tx, worker, 10) == [job]
    assert job_row(tx, job)
