"""unique_for: within the window the first job is returned, finished or not, whoever adds at the same moment."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, Row, add, call, claim_ids, contents, job_row, register, row, seen, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.lifecycle import LIVE, bring, job_in
from tests.parallel import in_parallel
from tests.sessions import Background

NOON = "2030-01-01 12:00:00+00"
ONE = "select * from pgworker.add_job('second', '[2]', job_key := 'k', unique_for := '1 hour')"
SPEC = '{"identifier": "second", "payload": [2], "job_key": "k", "unique_for": "1 hour"}'
MANY = f"select * from pgworker.add_jobs('[{SPEC}]')"
WAYS = pytest.mark.parametrize("query", [ONE, MANY], ids=["add_job", "add_jobs"])


def again(conn: Conn, query: str = ONE) -> Row:
    return row(conn, query)


def first(conn: Conn, **arguments: Any) -> Row:
    return add(conn, "first", **{"payload": "[1]", "job_key": "k", "unique_for": "1 hour"} | arguments)


@WAYS
@pytest.mark.parametrize("state", [*LIVE[:4], "failed"])
def test_the_first_job_is_returned_as_it_is(tx: Conn, query: str, state: str) -> None:
    job = job_in(tx, state, identifier="alone", payload="[1]", job_key="k", unique_for="1 hour")
    before = seen(tx, job)
    assert again(tx, query) == before
    assert seen(tx, job) == before


@WAYS
def test_a_completed_job_that_nothing_else_would_keep_is_returned_until_its_window_ends(tx: Conn, query: str) -> None:
    move_clock(tx, NOON)
    job, worker = first(tx), register(tx)
    assert str(job["unique_until"]) == "2030-01-01 13:00:00+00:00"
    assert claim_ids(tx, worker) == [job["id"]]
    move_clock(tx, "2030-01-01 12:30:00+00")
    call(tx, "finish_jobs", worker, [job["id"]], None, None, None)
    kept = again(tx, query)
    assert (kept["id"], kept["state"], kept["payload"], kept["revision"]) == (job["id"], "completed", [1], 0)
    move_clock(tx, "2030-01-01 12:59:59.999999+00")
    call(tx, "maintain")
    assert again(tx, query)["id"] == job["id"]
    move_clock(tx, "2030-01-01 13:00:00+00")
    new = again(tx, query)
    assert (new["id"] > job["id"], new["state"], new["payload"]) == (True, "ready", [2])
    move_clock(tx, "2030-01-01 13:00:01+00")
    call(tx, "maintain")
    assert job_row(tx, job["id"]) is None


@WAYS
@pytest.mark.parametrize("how", ["cancelled", "stopping", "removed"])
def test_a_job_that_is_not_wanted_any_more_does_not_keep_the_next_from_running(tx: Conn, query: str, how: str) -> None:
    job = job_in(tx, "ready" if how == "removed" else how, job_key="k", unique_for="1 hour")
    if how == "removed":
        call(tx, "remove_job", "k")
    new = again(tx, query)
    assert (new["id"] > job, new["state"], new["key"]) == (True, "ready", "k")
    assert again(tx, query)["id"] == new["id"]


@WAYS
@pytest.mark.parametrize("state", LIVE)
def test_after_the_window_the_live_job_with_that_key_is_met_as_ever(tx: Conn, query: str, state: str) -> None:
    move_clock(tx, NOON)
    job = job_in(tx, state, payload="[1]", job_key="k", unique_for="1 minute")
    move_clock(tx, "2030-01-01 12:01:00+00")
    met = again(tx, query)
    if state in ("running", "stopping"):
        assert (met["id"] > job, met["payload"], seen(tx, job)["key"]) == (True, [2], None)
        assert (seen(tx, job)["unique_until"], str(met["unique_until"])) == (None, "2030-01-01 13:01:00+00:00")
    else:  # the job is the old one, its window a new one
        assert (met["id"], met["payload"], met["revision"]) == (job, [1, 2], 1)
        assert str(met["created_at"]) == "2030-01-01 12:00:00+00:00"
        assert str(met["unique_until"]) == "2030-01-01 13:01:00+00:00"


@WAYS
@pytest.mark.parametrize("window", ["1 hour", None])
def test_a_window_is_not_over_before_it_begins(tx: Conn, query: str, window: str | None) -> None:
    """A job may wait for longer than the window: who then asks for one still gets it, and not two runs within it."""
    move_clock(tx, NOON)
    job = first(tx, unique_for=window, run_at="2030-01-01 12:00:00+00")
    move_clock(tx, "2030-01-01 14:00:00+00")
    assert again(tx, query)["id"] == job["id"]
    worker = register(tx)
    assert claim_ids(tx, worker) == [job["id"]]
    call(tx, "complete_job", worker, job["id"])
    move_clock(tx, "2030-01-01 14:59:00+00")
    assert again(tx, query)["id"] == job["id"]
    move_clock(tx, "2030-01-01 15:00:00+00")
    assert again(tx, query)["id"] > job["id"]


@pytest.mark.parametrize("state", ["ready", "running", "completed", "failed"])
def test_who_does_not_ask_for_uniqueness_adds_as_ever(tx: Conn, state: str) -> None:
    job = job_in(tx, state, payload="[1]", job_key="k", unique_for="1 hour")
    new = add(tx, payload="[2]", job_key="k")
    assert (new["id"] == job, new["unique_until"]) == (state == "ready", None)
    if state == "ready":  # every attribute becomes the new one, the window too
        assert again(tx)["revision"] == 2


def test_a_key_without_a_window_keeps_nobody_out_once_it_is_finished(tx: Conn) -> None:
    job = job_in(tx, "failed", job_key="k")
    assert again(tx)["id"] > job


def test_windows_are_each_keys_own(tx: Conn) -> None:
    job = first(tx)
    assert first(tx, job_key="l")["id"] > job["id"]


@pytest.mark.parametrize("state", ["completed", "failed"])
def test_one_call_folds_specs_with_windows_as_single_calls_would(db: Conn, state: str) -> None:
    def specs(*given: dict[str, Any]) -> list[Row]:
        asked = [{"identifier": f"t{n}", "payload": [n], **one} for n, one in enumerate(given)]
        return call(db, "add_jobs", Jsonb(asked))

    unique, plain = {"job_key": "k", "unique_for": "1 hour"}, {"job_key": "k"}
    one, two, other = specs(unique, unique, {"job_key": "o", "unique_for": "1 hour"})
    assert (one["id"], one["payload"], other["id"] > one["id"]) == (two["id"], [0], True)
    worker = register(db)
    bring(db, one["id"], state, worker)
    held, new, folded, held_too, fresh = specs(unique, plain, plain, unique, {})
    assert (held["id"], held["state"], held_too["id"]) == (one["id"], state, one["id"])
    assert (new["id"] > one["id"], new["payload"], folded["id"], folded["payload"]) == (True, [1], new["id"], [1, 2])
    assert seen(db, new["id"])["payload"] == [1, 2]
    assert fresh["payload"] == [4]


def test_a_retried_job_takes_its_window_with_it(tx: Conn) -> None:
    job = job_in(tx, "failed", job_key="k", unique_for="1 hour")
    call(tx, "retry_jobs", [job])
    assert (again(tx)["id"], again(tx)["state"]) == (job, "ready")


def test_a_job_that_comes_back_without_its_key_leaves_the_window_too(tx: Conn) -> None:
    job = job_in(tx, "failed", job_key="k", unique_for="1 hour")
    other = add(tx, job_key="k", unique_for=None)["id"]
    call(tx, "retry_jobs", [job])
    assert (seen(tx, job)["key"], seen(tx, job)["unique_until"]) == (None, None)
    assert again(tx)["id"] == other


def test_failed_jobs_are_cleaned_up_when_their_window_is_over(tx: Conn) -> None:
    move_clock(tx, NOON)
    job = job_in(tx, "failed", job_key="k", unique_for="1 hour")
    call(tx, "cleanup", ["delete_failed_jobs"])
    assert again(tx)["id"] == job
    move_clock(tx, "2030-01-01 13:00:00+00")
    call(tx, "cleanup", ["delete_failed_jobs"])
    assert job_row(tx, job) is None


def test_a_rolled_back_first_job_leaves_no_window(db: Conn) -> None:
    with db.transaction(force_rollback=True):
        first(db)
    before = contents(db)
    assert again(db)["payload"] == [2]
    assert before["job"] == []


@WAYS
def test_a_job_that_was_added_run_and_ended_while_another_waited_to_add_it_is_found(
    db: Conn, connect: Connections, query: str
) -> None:
    one, two = connect(), connect()
    one.execute("begin")
    job = first(one)["id"]
    adding = Background(two, query)
    adding.wait_until_blocked(db)
    worker = register(one)
    assert claim_ids(one, worker) == [job]
    value(one, "select pgworker.complete_job(%s, %s)", worker, job)
    one.execute("commit")
    (met,) = adding.result()
    assert (met["id"], met["state"], met["payload"]) == (job, "completed", [1])
    assert value(db, "select count(*) from pgworker.jobs") == 1


@WAYS
def test_the_second_of_two_who_add_at_the_same_moment_gets_the_firsts_job(
    db: Conn, connect: Connections, query: str
) -> None:
    one, two = connect(), connect()
    one.execute("begin")
    job = first(one)
    adding = Background(two, query)
    adding.wait_until_blocked(db)
    one.execute("commit")
    assert adding.result() == [job]
    one.execute("begin")
    call(one, "remove_job", "k")
    adding = Background(two, MANY)  # a bulk call locks the live jobs with its keys
    adding.wait_until_blocked(db)
    one.execute("commit")
    assert adding.result()[0]["id"] > job["id"]


def test_who_is_turned_away_waits_for_no_claim_and_no_finish(db: Conn, connect: Connections) -> None:
    other = connect()
    other.execute("set statement_timeout = '5s'")
    worker = register(db)
    job = first(db)["id"]
    with db.transaction():
        assert claim_ids(db, worker) == [job]
        assert again(other)["id"] == job
    with db.transaction():
        value(db, "select pgworker.complete_job(%s, %s)", worker, job)
        assert (again(other)["id"], again(other)["state"]) == (job, "running")
    assert again(other)["state"] == "completed"


@pytest.mark.timeout(120)
def test_eight_sessions_that_add_while_others_finish_make_one_job_a_window(db: Conn) -> None:
    keys = [f"k{n}" for n in range(40)]
    made: list[tuple[str, int]] = []

    def adder(bulk: bool) -> Callable[[Conn], None]:
        def part(conn: Conn) -> None:
            for key in keys:
                spec = {"identifier": "t", "job_key": key, "unique_for": "1 hour"}
                (job,) = call(conn, "add_jobs", Jsonb([spec])) if bulk else [add(conn, **spec)]
                made.append((key, job["id"]))

        return part

    def runner(conn: Conn) -> None:
        worker = register(conn)
        while len(made) < 8 * len(keys):
            call(conn, "finish_jobs", worker, claim_ids(conn, worker, 5), None, None, None)

    in_parallel(db.info.dsn, [*(adder(n % 2 == 0) for n in range(8)), runner, runner])
    assert len(made) == 8 * len(keys)
    assert len(set(made)) == len(keys)
    assert value(db, "select count(*) from pgworker.jobs") == len(keys)


def test_the_window_is_as_long_as_it_was_asked_for(tx: Conn) -> None:
    job = first(tx, unique_for="2 days 3 hours")
    assert job["unique_until"] - job["created_at"] == timedelta(days=2, hours=3)
