"""What a worker can be told, and what it refuses before it touches a database."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest

from pgworker_client import Worker
from pgworker_client.connection import connection_string


async def handler(_payload: Any, _ctx: Any) -> None: ...


def blocking(_payload: Any, _ctx: Any) -> None: ...


def test_a_task_is_named_like_its_function() -> None:
    worker = Worker()

    @worker.task
    async def send_email(_payload: Any, _ctx: Any) -> None: ...

    assert list(worker.tasks.by_name) == ["send_email"]
    assert send_email.__name__ == "send_email"  # the decorator returns the function itself


def test_a_task_can_be_given_a_name_and_a_timeout() -> None:
    worker = Worker()
    worker.task("make-pdf", timeout=timedelta(minutes=1))(blocking)
    task = worker.tasks.by_name["make-pdf"]
    assert (task.timeout, task.is_async, task.handler) == (60.0, False, blocking)


def test_a_timeout_alone_leaves_the_name_to_the_function() -> None:
    worker = Worker()
    worker.task(timeout=5)(handler)
    assert worker.tasks.by_name["handler"].timeout == 5.0


class _Callable:
    async def __call__(self, _payload: Any, _ctx: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "is_async"),
    [
        (handler, True),
        (blocking, False),
        (functools.partial(handler), True),
        (_Callable(), True),
        (lambda _payload, _ctx: None, False),
    ],
)
def test_async_handlers_are_told_from_sync_ones(function: Callable[..., Any], is_async: bool) -> None:
    assert Worker(tasks={"t": function}).tasks.by_name["t"].is_async is is_async


def test_two_handlers_of_one_name_are_refused() -> None:
    worker = Worker(tasks={"handler": blocking})
    with pytest.raises(ValueError, match=r"task 'handler' exists already \(.*blocking\); give one of the two"):
        worker.task(handler)


def test_a_handler_that_cannot_take_payload_and_ctx_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"task 'bad': the handler must take \(payload, ctx\)"):
        Worker(tasks={"bad": cast(Any, lambda _payload: None)})


def test_a_generator_is_refused_as_a_handler() -> None:
    def produce(_payload: Any, _ctx: Any) -> Any:
        yield 1

    with pytest.raises(TypeError, match="task 'produce': the handler has a yield in it"):
        Worker().task(produce)


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ValueError, match="has no name that could be the task's"):
        Worker().task(lambda _payload, _ctx: None)


def test_a_worker_without_tasks_does_not_start() -> None:
    with pytest.raises(ValueError, match=r"this worker has no tasks: add one with @worker\.task"):
        Worker("host=/nowhere").run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concurrency": 0}, "concurrency must be between 1 and 10000, not 0"),
        ({"concurrency": "4"}, "concurrency must be a whole number, not '4'"),
        ({"buffer": -1}, "buffer must be between 0 and 100000, not -1"),
        ({"poll_interval": 0}, "poll_interval must be at least 0.001 seconds, not 0"),
        ({"poll_interval": float("nan")}, "poll_interval must be at least 0.001 seconds, not nan"),
        ({"lease": 0.5}, "lease must be at least 1 seconds, not 0.5"),
        ({"lease": timedelta(0)}, "lease must be at least 1 seconds"),
        ({"grace": -1}, "grace must be at least 0 seconds, not -1"),
        ({"forbidden_flags": "spam"}, "forbidden_flags must be a list of flags, not the text 'spam'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Worker(**arguments)


def test_a_connection_string_that_libpq_cannot_read_is_refused_without_repeating_its_password() -> None:
    with pytest.raises(ValueError, match="dsn is not a connection string") as refused:
        connection_string("postgres:s3cret@@", name="w")
    assert "s3cret" not in str(refused.value)


def test_the_connection_string_comes_from_the_argument_then_from_database_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql:///shop")
    assert connection_string() == "postgresql:///shop"
    assert connection_string("dbname=other") == "dbname=other"
    assert "dbname=shop" in connection_string(name="w")
    monkeypatch.delenv("DATABASE_URL")
    assert connection_string() == ""  # PG* variables


def test_what_the_connection_string_sets_is_not_overridden() -> None:
    string = connection_string("dbname=x application_name=mine connect_timeout=3", name="w")
    assert "application_name=mine" in string
    assert "connect_timeout=3" in string
