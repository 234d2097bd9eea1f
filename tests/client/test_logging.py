"""Log records: who, which task, which job; and the lines that the command line makes of them."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Context, Worker, add_job
from pgworker_client.logs import LineFormatter

Db = psycopg.Connection[Any]


def test_each_record_about_a_job_says_worker_task_and_job(dsn: str, db: Db, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pgworker")
    worker = Worker(dsn, name="w1")

    @worker.task
    async def chatty(_payload: Any, ctx: Context) -> None:
        ctx.logger.info("hello %d", 1, extra={"mine": 2})
        raise ValueError("no")

    @worker.task
    def threaded(_payload: Any, ctx: BlockingContext) -> None:
        ctx.logger.info("from a thread")

    first = add_job(db, "chatty", max_attempts=1)
    second = add_job(db, "threaded")
    worker.run_once()
    about = {
        record.getMessage(): (record.worker, record.task, record.job_id)  # type: ignore[attr-defined]
        for record in caplog.records
        if hasattr(record, "job_id")
    }
    assert about == {
        "hello 1": ("w1", "chatty", first.id),
        "attempt 1 of 1 failed: ValueError: no": ("w1", "chatty", first.id),
        f"job {first.id} failed for good after attempt 1 of 1": ("w1", "chatty", first.id),
        "from a thread": ("w1", "threaded", second.id),
    }
    others = [record for record in caplog.records if not hasattr(record, "job_id")]
    assert [record.getMessage() for record in others] == ["worker started, concurrency 10", "worker stopped"]
    assert {record.name for record in caplog.records} == {"pgworker"}
    assert {record.worker for record in others} == {"w1"}  # type: ignore[attr-defined]
    assert [record.mine for record in caplog.records if hasattr(record, "mine")] == [2]


def test_an_error_is_logged_with_the_handlers_frames_only(dsn: str, db: Db, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(dsn)

    @worker.task
    async def bad(_payload: Any, _ctx: Context) -> None:
        raise ValueError("no")

    add_job(db, "bad")
    worker.run_once()
    (record,) = [record for record in caplog.records if record.exc_info]
    text = logging.Formatter().formatException(record.exc_info)  # type: ignore[arg-type]
    assert "in bad" in text
    assert "running.py" not in text


def test_a_logger_of_ones_own(dsn: str, db: Db) -> None:
    records: list[logging.LogRecord] = []
    logger = logging.Logger("mine", logging.INFO)

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(keep)
    Worker(dsn, tasks={"t": print}, logger=logger).run_once()
    assert [record.getMessage() for record in records] == ["worker started, concurrency 10", "worker stopped"]


def test_the_lines_of_the_command_line_show_the_job() -> None:
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "done"})
    assert LineFormatter().format(record).endswith("INFO    done")
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": "x", "task": "send", "job_id": 7})
    assert LineFormatter().format(record).endswith("WARNING x [send #7]")
