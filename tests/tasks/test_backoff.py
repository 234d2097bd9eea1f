"""How long a failed attempt waits: what the task says, and never a failure that is not recorded."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, add, call, claim_ids, refused, register, row, value, values
from tests.clock import move_clock
from tests.connections import Connections

NOW = "2030-01-01 00:00:00+00"


def delays(conn: Conn, attempts: int, task: str = "a") -> list[float]:
    """Fail a job again and again, and return how many seconds it is put off each time."""
    move_clock(conn, NOW)
    worker = register(conn)
    job = add(conn, task, max_attempts=attempts + 1)["id"]
    found = []
    for _ in range(attempts):
        assert claim_ids(conn, worker) == [job]
        conn.execute("select pgworker.finish_jobs(%s, null, null, %s, '{no}')", [worker, [job]])
        found.append(put_off(conn, job))
        call(conn, "reschedule_jobs", [job], run_at=NOW)
    call(
        conn,
        "permanently_fail_jobs",
        [job],
        error_message=value(conn, "select last_error from pgworker.jobs where id = %s", job),
    )
    return found


def put_off(conn: Conn, job: int) -> float:
    """Return how many seconds from now a job is due, by a clock that stands still."""
    seconds: float = value(
        conn, "select extract(epoch from run_at - %s::timestamptz)::float8 from pgworker.jobs where id = %s", NOW, job
    )
    return seconds


EXPECTED: list[tuple[Any, list[float]]] = [
    ({"kind": "exponential"}, [1, 2, 4, 8]),
    ({"kind": "exponential", "base": "10 seconds", "factor": 3, "maximum": "1 minute"}, [10, 30, 60, 60]),
    ({"kind": "linear", "base": 5}, [5, 10, 15, 20]),
    ({"kind": "linear", "base": "1 hour", "maximum": "2 hours"}, [3600, 7200, 7200]),
    ({"kind": "constant", "base": "1 month"}, [30 * 86400] * 2),
    ({"kind": "constant", "base": 0}, [0, 0]),
    ({"kind": "list", "delays": ["1 second", "1 minute", 7]}, [1, 60, 7, 7]),
    (["1 second", 2.5], [1, 2.5, 2.5]),
]


@pytest.mark.parametrize(("backoff", "expected"), EXPECTED)
def test_each_kind_puts_off_as_it_says(tx: Conn, backoff: Any, expected: list[float]) -> None:
    call(tx, "configure_task", "a", backoff=Jsonb(backoff))
    assert delays(tx, len(expected)) == pytest.approx(expected)


def test_without_a_backoff_and_for_other_tasks_it_stays_the_exponential_one(tx: Conn) -> None:
    usual = pytest.approx([2.718281828, 7.389056099, 20.08553692])
    assert delays(tx, 3) == usual
    call(tx, "configure_task", "b", backoff=Jsonb([100]))
    assert delays(tx, 3) == usual
    call(tx, "configure_task", "a", backoff=Jsonb([100]))
    call(tx, "configure_task", "a", reset=["backoff"])
    assert delays(tx, 3) == usual


def test_jitter_spreads_within_its_share_and_never_beyond_the_maximum(tx: Conn) -> None:
    call(tx, "configure_task", "a", backoff=Jsonb({"kind": "constant", "base": 1000, "jitter": 0.1}))
    call(tx, "configure_task", "m", backoff=Jsonb({"kind": "linear", "base": 1000, "maximum": 1000, "jitter": 0.1}))
    spread = delays(tx, 40)
    assert all(900 <= delay <= 1100 for delay in spread)
    assert max(spread) - min(spread) > 20
    assert max(delays(tx, 40, "m")) <= 1000


def test_ten_thousand_attempts_are_no_number_too_large(tx: Conn) -> None:
    call(tx, "configure_task", "a", backoff=Jsonb({"kind": "exponential", "factor": 1000, "maximum": "1 hour"}))
    assert value(tx, "select (pgworker.retry_delay((select backoff from pgworker.tasks), 32767)).delay") is not None
    worker = register(tx)
    job = add(tx, "a", max_attempts=32767)["id"]
    tx.execute("update pgworker.job set attempts = 32000")
    assert claim_ids(tx, worker) == [job]
    after = row(tx, "select state from pgworker.fail_job(%s, %s, 'no')", worker, job)
    assert after == {"state": "scheduled"}


def test_a_time_that_the_worker_names_goes_before_the_backoff(tx: Conn) -> None:
    call(tx, "configure_task", "a", backoff=Jsonb([1000]))
    worker = register(tx)
    job = add(tx, "a")["id"]
    claim_ids(tx, worker)
    at = value(tx, "select now() + interval '5 seconds'")
    assert row(tx, "select run_at from pgworker.fail_job(%s, %s, 'no', retry_at => %s)", worker, job, at) == {
        "run_at": at
    }


def test_jobs_of_several_tasks_that_fail_together_each_wait_as_their_task_says(tx: Conn) -> None:
    call(tx, "configure_task", "a", backoff=Jsonb([100]))
    call(tx, "configure_task", "b", backoff=Jsonb([1000]))
    move_clock(tx, NOW)
    worker = register(tx)
    jobs = [add(tx, task)["id"] for task in "abc"]
    claim_ids(tx, worker, 3)
    tx.execute("select pgworker.finish_jobs(%s, null, null, %s, '{x,y,z}')", [worker, jobs])
    assert [put_off(tx, job) for job in jobs] == pytest.approx([100, 1000, 2.718281828])
    assert values(tx, "select last_error from pgworker.jobs order by id") == ["x", "y", "z"]


def function(conn: Conn, body: str, name: str = "my_backoff") -> str:
    conn.execute(
        f"create or replace function public.{name}(attempt int) returns interval language plpgsql as $$ {body} $$"
    )
    return f"public.{name}"


def test_a_function_of_the_attempt_says_how_long(tx: Conn) -> None:
    name = function(tx, "begin return attempt * attempt * interval '1 minute'; end")
    call(tx, "configure_task", "a", backoff=Jsonb({"kind": "function", "function": name}))
    assert value(tx, "select backoff ->> 'function' from pgworker.tasks") == "public.my_backoff(integer)"
    assert delays(tx, 3) == pytest.approx([60, 240, 540])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("begin raise exception 'out of order'; end", "out of order"),
        ("begin return null; end", "it returned null"),
        ("begin return interval '-1 second'; end", "it returned -00:00:01"),
        ("begin return interval '11 years'; end", "it returned 11 years"),
        ("begin return 1 / (attempt - attempt) * interval '1 s'; end", "division by zero"),
    ],
)
def test_a_function_that_fails_neither_loses_the_failure_nor_keeps_it_to_itself(tx: Conn, body: str, says: str) -> None:
    name = function(tx, body)
    call(tx, "configure_task", "a", backoff=Jsonb({"kind": "function", "function": name}))
    assert delays(tx, 2) == pytest.approx([2.718281828, 7.389056099])
    error = value(tx, "select last_error from pgworker.jobs order by id desc limit 1")
    assert error.startswith("no; backoff function public.my_backoff(integer): ")
    assert says in error
    assert error.endswith("the default backoff was used")


def test_a_function_that_is_gone_or_somebody_elses_by_now_is_not_called(tx: Conn) -> None:
    name = function(tx, "begin return interval '1 hour'; end")
    call(tx, "configure_task", "a", backoff=Jsonb({"kind": "function", "function": name}))
    tx.execute("create role mallory")
    tx.execute(f"alter function {name}(int) owner to mallory")
    assert delays(tx, 1) == pytest.approx([2.718281828])
    assert "belongs to another role" in value(tx, "select last_error from pgworker.jobs order by id desc limit 1")
    tx.execute(f"drop function {name}(int)")
    assert delays(tx, 1) == pytest.approx([2.718281828])


def test_no_other_role_can_slip_a_function_in(db: Conn, connect: Connections, role: Any) -> None:
    role("mallory")
    db.execute("create schema lair authorization mallory")
    connect(user="mallory").execute(
        "create function lair.b(attempt int) returns interval language sql as $$ select interval '1 s' $$"
    )
    with refused(db, "22023", "backoff.function", "lair.b", hint="OWNER TO"):
        call(db, "configure_task", "a", backoff=Jsonb({"kind": "function", "function": "lair.b"}))


BAD: list[tuple[Any, list[str]]] = [
    ({}, ["backoff.kind", "{}"]),
    (None, ["backoff.kind", "null"]),
    ({"kind": "random"}, ["backoff.kind", "random"]),
    ({"kind": None}, ["backoff.kind", "null"]),
    ({"kind": "linear", "factor": 2}, ["factor", "linear"]),
    ({"kind": "exponential", "base": "soon"}, ["backoff.base", "soon"]),
    ({"kind": "exponential", "base": 0}, ["backoff.base", "0"]),
    ({"kind": "exponential", "base": True}, ["backoff.base", "true"]),
    ({"kind": "exponential", "maximum": "11 years"}, ["backoff.maximum", "11 years"]),
    ({"kind": "exponential", "factor": 0.5}, ["backoff.factor", "0.5"]),
    ({"kind": "exponential", "factor": "2"}, ["backoff.factor", '"2"']),
    ({"kind": "constant", "base": 1, "jitter": 1.5}, ["backoff.jitter", "1.5"]),
    ({"kind": "constant", "base": -1}, ["backoff.base", "-1"]),
    ({"kind": "list", "delays": []}, ["backoff.delays", "[]"]),
    ({"kind": "list"}, ["backoff.delays", "null"]),
    (["1 second", "later"], ["backoff.delays[1]", "later"]),
    ({"kind": "function", "function": "public.nowhere"}, ["backoff.function", "public.nowhere"]),
    ({"kind": "function", "function": "pg_catalog.abs"}, ["backoff.function", "abs"]),
    ({"kind": "function"}, ["backoff.function", "null"]),
]


@pytest.mark.parametrize(("backoff", "says"), BAD)
def test_a_backoff_that_could_not_work_is_refused(tx: Conn, backoff: Any, says: list[str]) -> None:
    with refused(tx, "22023", *says):
        call(tx, "configure_task", "a", backoff=Jsonb(backoff))


def test_a_function_name_that_is_no_name_is_refused_and_runs_nothing(tx: Conn) -> None:
    for name in ("public.x(int); drop table pgworker.job", "x(", ")", "'", ""):
        with pytest.raises(psycopg.Error) as caught, tx.transaction():
            call(tx, "configure_task", "a", backoff=Jsonb({"kind": "function", "function": name}))
        assert caught.value.sqlstate == "22023", name
