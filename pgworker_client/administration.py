"""Steering jobs by id, in the caller's transaction. Each function returns the jobs that it changed, and no others.

``conn``, the first argument, is any psycopg connection or cursor; with an async one the call returns an awaitable.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pgworker_client.enqueue import all_jobs, aware
from pgworker_client.job import JOB_COLUMNS, JobRow
from pgworker_client.on_connection import Request, on_connection


def _on_jobs(call: str, job_ids: Iterable[int], *params: Any) -> Request[list[JobRow]]:
    return Request(f"select {JOB_COLUMNS} from pgworker.{call}", (list(job_ids), *params), all_jobs)


@on_connection
def complete_jobs(job_ids: Iterable[int]) -> Request[list[JobRow]]:
    """Finish jobs that are not running as completed, failed ones too."""
    return _on_jobs("complete_jobs(%s::bigint[])", job_ids)


@on_connection
def permanently_fail_jobs(job_ids: Iterable[int], error_message: str | None = None) -> Request[list[JobRow]]:
    """Finish jobs that are not running as failed, with that message as their `last_error`."""
    return _on_jobs("permanently_fail_jobs(%s::bigint[], %s::text)", job_ids, error_message)


@on_connection
def reschedule_jobs(
    job_ids: Iterable[int],
    run_at: datetime | None = None,
    priority: int | None = None,
    attempts: int | None = None,
    max_attempts: int | None = None,
) -> Request[list[JobRow]]:
    """Change when jobs run, and how often; None leaves a value as it is. Running jobs are left alone."""
    return _on_jobs(
        "reschedule_jobs(%s::bigint[], %s::timestamptz, %s::int, %s::int, %s::int)",
        job_ids,
        aware("run_at", run_at),
        priority,
        attempts,
        max_attempts,
    )


@on_connection
def retry_jobs(job_ids: Iterable[int]) -> Request[list[JobRow]]:
    """Run failed or cancelled jobs again, with fresh attempts."""
    return _on_jobs("retry_jobs(%s::bigint[])", job_ids)


@on_connection
def cancel_jobs(job_ids: Iterable[int], reason: str | None = None) -> Request[list[JobRow]]:
    """Cancel jobs: at once those that do not run, the running ones are asked to stop."""
    return _on_jobs("cancel_jobs(%s::bigint[], %s::text)", job_ids, reason)


def _nothing(rows: list[tuple[Any, ...]]) -> None:
    """What functions that return void have to say."""


@on_connection
def forbid_flag(name: str) -> Request[None]:
    """Let no worker claim jobs with that flag until `allow_flag`; those that run go on."""
    return Request("select pgworker.forbid_flag(%s::text)", (name,), _nothing)


@on_connection
def allow_flag(name: str) -> Request[None]:
    """Let workers claim jobs with that flag again."""
    return Request("select pgworker.allow_flag(%s::text)", (name,), _nothing)


@on_connection
def configure(name: str, value: str | None) -> Request[None]:
    """Change a setting of the installation, one of the view ``pgworker.settings``; None goes back to its default."""
    return Request("select pgworker.configure(%s::text, %s::text)", (name, value), _nothing)
