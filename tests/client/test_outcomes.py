"""Errors, Retry, Fail, Cancel, and arrays of which a part failed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgworker_client import Cancel, Context, Fail, Retry, Worker, add_job
from pgworker_client.outcome import ERROR_LIMIT
from tests.calling import retry_in_an_hour

Db = psycopg.Connection[Any]


def run(dsn: str, handler: Any) -> None:
    """Run what is due of task ``t`` with that handler."""
    Worker(dsn, tasks={"t": handler}).run_once()


def raising(error: Any) -> Any:
    """A handler that raises it."""

    async def handler(_payload: Any, _ctx: Context) -> None:
        raise error

    return handler


def job(db: Db, columns: str = "state, attempts, last_error") -> tuple[Any, ...]:
    """The only job that the database knows."""
    (row,) = db.execute(f"select {columns} from pgworker.jobs").fetchall()
    return tuple(row)


def test_an_error_is_retried_and_keeps_type_message_and_traceback(dsn: str, db: Db) -> None:
    add_job(db, "t")
    retry_in_an_hour(db, "t")
    run(dsn, raising(KeyError("colour")))
    state, attempts, error = job(db)
    assert (state, attempts) == ("scheduled", 1)
    assert error.startswith("KeyError: 'colour'\n\nTraceback (most recent call last):\n")
    assert "test_outcomes.py" in error
    assert "pgworker_client" not in error  # frames of the handler, not ours


def test_the_last_attempt_fails_for_good(dsn: str, db: Db) -> None:
    add_job(db, "t", max_attempts=1)
    run(dsn, raising(ValueError("no")))
    assert job(db, "state") == ("failed",)


class _Huge(Exception):
    def __str__(self) -> str:
        return "y" * 50_000


def test_a_huge_error_is_cut_and_keeps_both_ends(dsn: str, db: Db) -> None:
    async def deep(payload: Any, ctx: Context) -> None:
        if payload["depth"] == 0:
            raise _Huge
        await deep({"depth": payload["depth"] - 1}, ctx)

    add_job(db, "t", {"depth": 5})
    run(dsn, deep)
    _, _, error = job(db)
    assert len(error) <= ERROR_LIMIT
    assert "_Huge: yyyy" in error[:200]
    assert error.endswith("yyyy")


@pytest.mark.parametrize("text", ["nul \x00 inside", "lone \ud800 surrogate", 'quote " back \\ slash {},', "ä€😀"])
def test_an_error_text_that_postgresql_could_not_keep_is_made_keepable(dsn: str, db: Db, text: str) -> None:
    add_job(db, "t")
    run(dsn, raising(ValueError(text)))
    _, _, error = job(db)
    expected = text.replace("\x00", "").replace("\ud800", "\\ud800")
    assert error.splitlines()[0] == f"ValueError: {expected}"


def test_sys_exit_in_a_handler_fails_the_job_and_not_the_worker(dsn: str, db: Db) -> None:
    add_job(db, "t")
    run(dsn, raising(SystemExit(3)))
    assert job(db)[2].startswith("SystemExit: 3")


def _stop_iteration(_payload: Any, _ctx: Any) -> None:
    raise StopIteration


def test_stop_iteration_in_a_thread_fails_the_job(dsn: str, db: Db) -> None:
    add_job(db, "t")
    run(dsn, _stop_iteration)
    assert job(db)[2].startswith("RuntimeError: the handler raised StopIteration")


@pytest.mark.parametrize("delay", [7200, timedelta(hours=2)])
def test_retry_in_a_while(dsn: str, db: Db, delay: Any) -> None:
    add_job(db, "t")
    run(dsn, raising(Retry(in_=delay, reason="try later")))
    assert job(db) == ("scheduled", 1, "try later")
    (wait,) = job(db, "extract(epoch from run_at - now())::float8")
    assert 7200 - 60 < wait <= 7200


def test_retry_at_a_moment(dsn: str, db: Db) -> None:
    add_job(db, "t")
    run(dsn, raising(Retry(at=datetime(2100, 1, 2, tzinfo=UTC))))
    assert job(db, "run_at, last_error") == (datetime(2100, 1, 2, tzinfo=UTC), "the handler asked for a retry")


def test_a_bare_retry_backs_off_as_usual(dsn: str, db: Db) -> None:
    add_job(db, "t")
    run(dsn, raising(Retry))
    (wait,) = job(db, "extract(epoch from run_at - created_at)::float8")
    assert 2.7 < wait < 60


def test_retry_does_not_help_when_the_attempts_are_used_up(dsn: str, db: Db) -> None:
    add_job(db, "t", max_attempts=1)
    run(dsn, raising(Retry(in_=1)))
    assert job(db, "state") == ("failed",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_": 1, "at": datetime(2100, 1, 1, tzinfo=UTC)}, "in_ or at, not both"),
        ({"in_": -1}, "must be at least 0 seconds, not -1"),
        ({"in_": "soon"}, "number of seconds or a timedelta, not 'soon'"),
        ({"at": datetime(2100, 1, 1)}, "aware datetime"),  # noqa: DTZ001
    ],
)
def test_a_retry_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Retry(**arguments)


def test_a_retry_at_a_time_that_the_database_refuses_is_a_failure_like_any_other(dsn: str, db: Db) -> None:
    add_job(db, "t")
    retry_in_an_hour(db, "t")
    run(dsn, raising(Retry(in_=1e300, reason="in ages")))
    state, _, error = job(db)
    assert state == "scheduled"
    assert error.startswith("in ages\n\nreported without time and payload, which the database refused: ")


def test_fail_ends_the_job_for_good(dsn: str, db: Db) -> None:
    add_job(db, "t")
    run(dsn, raising(Fail("no such customer")))
    assert job(db) == ("failed", 1, "no such customer")


@pytest.mark.parametrize(("error", "reason"), [(Cancel("obsolete"), "obsolete"), (Cancel, "cancelled by its handler")])
def test_cancel_ends_the_job_as_cancelled(dsn: str, db: Db, error: Any, reason: str) -> None:
    add_job(db, "t")
    run(dsn, raising(error))
    assert job(db) == ("cancelled", 1, reason)


def test_of_an_array_only_the_part_that_failed_is_retried(dsn: str, db: Db) -> None:
    async def handler(payload: Any, _ctx: Context) -> list[Any]:
        payload.reverse()  # what is kept is the payload as it was, not as the handler left it
        return [None, ValueError("bad item"), 5, KeyError("x")]

    db.execute("""select pgworker.add_job('t', '[1, {"n": 1.10000000000000000001}, "a, ]b", [2, {"k": []}]]')""")
    retry_in_an_hour(db, "t")
    run(dsn, handler)
    state, attempts, error = job(db)
    assert (state, attempts) == ("scheduled", 1)
    assert error == "2 of 4 items failed\n[1] ValueError: bad item\n[3] KeyError: 'x'"
    # Exactly as it was stored: Python would have rounded the number.
    assert job(db, "payload::text") == ('[{"n": 1.10000000000000000001}, [2, {"k": []}]]',)


def test_the_attempts_of_the_failed_part_count(dsn: str, db: Db) -> None:
    async def handler(payload: Any, _ctx: Context) -> list[Any]:
        return [ValueError(item) for item in payload]

    add_job(db, "t", [1, 2], max_attempts=1)
    run(dsn, handler)
    assert job(db, "state, payload") == ("failed", [1, 2])


@pytest.mark.parametrize(
    ("payload", "returned", "kept"),
    [
        ([1, 2], ["a", None], ["a", None]),
        ([1, 2], ["a"], ["a"]),
        ({"a": 1}, [1], [1]),
        ([], [], None),
        ([1, 2], [None, None], None),
    ],
)
def test_a_list_without_errors_is_the_result(dsn: str, db: Db, payload: Any, returned: Any, kept: Any) -> None:
    async def handler(_payload: Any, _ctx: Context) -> Any:
        return returned

    added = add_job(db, "t", payload)
    run(dsn, handler)
    row = db.execute("select state, result from pgworker.jobs where id = %s", [added.id]).fetchone()
    assert row == (None if kept is None else ("completed", kept))  # without a result nothing is kept


def test_a_payload_that_python_cannot_read_fails_its_own_job_only(dsn: str, db: Db) -> None:
    async def handler(_payload: Any, _ctx: Context) -> int:
        return 1

    db.execute("select pgworker.add_job('t', ('{\"n\": ' || repeat('9', 5000) || '}')::jsonb)")
    add_job(db, "t")
    retry_in_an_hour(db, "t")
    run(dsn, handler)
    rows = db.execute("select state, last_error from pgworker.jobs order by id").fetchall()
    assert [row[0] for row in rows] == ["scheduled", "completed"]
    assert "ValueError: Exceeds the limit" in rows[0][1]
