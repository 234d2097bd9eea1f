"""job_key_mode debounce: a burst of adds puts the job off, and debounce_max says how far."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, Row, add, call, claim_ids, register, seen
from tests.clock import move_clock
from tests.lifecycle import bring

WAYS = pytest.mark.parametrize("bulk", [False, True], ids=["add_job", "add_jobs"])


def put(conn: Conn, bulk: bool, at: str, due: str | None, most: str | None = "10 minutes", **more: Any) -> Row:
    move_clock(conn, f"2030-01-01 {at}+00")
    given: dict[str, Any] = {"job_key": "k", "job_key_mode": "debounce", "debounce_max": most, **more}
    if due:
        given["run_at"] = f"2030-01-01 {due}+00"
    (job,) = call(conn, "add_jobs", Jsonb([{"identifier": "t", **given}])) if bulk else [add(conn, "t", **given)]
    return job


def due(job: Row) -> str:
    return str(job["run_at"])[11:-6]


@WAYS
def test_a_pending_job_is_put_off_but_no_further_than_from_its_first_add(tx: Conn, bulk: bool) -> None:
    first = put(tx, bulk, "12:00:00", "12:02:00")
    for at, asked, got in (("12:01:00", "12:03:00", "12:03:00"), ("12:02:30", "12:09:59", "12:09:59"),
                           ("12:09:00", "12:11:00", "12:10:00"), ("12:09:30", "12:09:40", "12:09:40")):  # fmt: skip
        job = put(tx, bulk, at, asked)
        assert (job["id"], due(job)) == (first["id"], got)
    assert (job["revision"], str(job["created_at"])[11:-6]) == (4, "12:00:00")
    assert seen(tx, job["id"]) == job


@WAYS
def test_without_a_bound_it_is_put_off_as_long_as_adds_come(tx: Conn, bulk: bool) -> None:
    put(tx, bulk, "12:00:00", "12:02:00", most=None)
    assert due(put(tx, bulk, "23:00:00", "23:02:00", most=None)) == "23:02:00"


@WAYS
def test_the_first_add_is_bounded_too(tx: Conn, bulk: bool) -> None:
    assert due(put(tx, bulk, "12:00:00", "13:00:00")) == "12:10:00"
    assert due(put(tx, bulk, "12:05:00", None)) == "12:05:00"


@WAYS
def test_everything_else_is_as_in_replace(tx: Conn, bulk: bool) -> None:
    put(tx, bulk, "12:00:00", "12:02:00", payload=[1], priority=3, limit_key="ada") if bulk else put(
        tx, bulk, "12:00:00", "12:02:00", payload="[1]", priority=3, limit_key="ada")  # fmt: skip
    job = put(tx, bulk, "12:01:00", "12:03:00", payload=[2] if bulk else "[2]")
    assert (job["payload"], job["priority"], job["limit_key"]) == ([1, 2], 0, None)


@WAYS
def test_a_job_that_has_failed_starts_afresh_at_the_new_time(tx: Conn, bulk: bool) -> None:
    job = put(tx, bulk, "12:00:00", "12:00:00")
    bring(tx, job["id"], "retrying")
    again = put(tx, bulk, "12:30:00", "12:32:00")
    assert (again["id"], again["attempts"], due(again)) == (job["id"], 0, "12:32:00")


@WAYS
def test_a_running_job_goes_on_and_a_new_one_is_added(tx: Conn, bulk: bool) -> None:
    job = put(tx, bulk, "12:00:00", "12:00:00")
    bring(tx, job["id"], "running")
    new = put(tx, bulk, "12:30:00", "12:32:00")
    assert (new["id"] > job["id"], due(new), seen(tx, job["id"])["key"]) == (True, "12:32:00", None)


def test_a_burst_in_one_call_is_one_job(tx: Conn) -> None:
    move_clock(tx, "2030-01-01 12:00:00+00")
    spec = {"identifier": "t", "job_key": "k", "job_key_mode": "debounce", "debounce_max": "10 minutes"}
    jobs = call(tx, "add_jobs", Jsonb([spec | {"run_at": f"2030-01-01 12:{n:02}:00+00"} for n in (2, 5, 30)]))
    assert ({job["id"] for job in jobs}, [due(job) for job in jobs]) == (
        {jobs[0]["id"]}, ["12:02:00", "12:05:00", "12:10:00"],
    )  # fmt: skip


def test_the_bound_that_has_passed_makes_the_job_due(tx: Conn) -> None:
    worker = register(tx)
    job = put(tx, False, "12:00:00", "12:09:00")
    assert claim_ids(tx, worker) == []
    put(tx, False, "12:11:00", "12:20:00")  # nobody has come to take it
    assert claim_ids(tx, worker) == [job["id"]]
