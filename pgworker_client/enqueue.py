"""Producing jobs, and withdrawing them by key, in the caller's transaction.

The meaning of every argument is that of the SQL function of the same name; None leaves it to its default there.
Limits are checked by the database, which names the argument in its error (SQLSTATE 22023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Required, TypedDict, Unpack, cast

from pgworker_client.job import JOB_COLUMNS, JobRow, to_json
from pgworker_client.on_connection import Request, on_connection

KeyMode = Literal["replace", "preserve_run_at", "unsafe_dedupe", "debounce"]


class JobOptions(TypedDict, total=False):
    """The optional arguments of `add_job`; see there."""

    queue_name: str | None
    run_at: datetime | None
    max_attempts: int | None
    job_key: str | None
    priority: int | None
    flags: Sequence[str] | None
    job_key_mode: KeyMode | None
    limit_key: str | None
    unique_for: timedelta | None
    debounce_max: timedelta | None


class JobSpec(JobOptions, total=False):
    """One job for `add_jobs`: `add_job`'s arguments as a dict."""

    identifier: Required[str]
    payload: Any


def one_job(rows: list[tuple[Any, ...]]) -> JobRow:
    """The one job that the statement returned."""
    return JobRow(*rows[0])


def all_jobs(rows: list[tuple[Any, ...]]) -> list[JobRow]:
    """The jobs that the statement returned, in its order."""
    return [JobRow(*row) for row in rows]


def _job_if_any(rows: list[tuple[Any, ...]]) -> JobRow | None:
    return JobRow(*rows[0]) if rows and rows[0][0] is not None else None


def aware(what: str, value: datetime | None) -> datetime | None:
    """``value`` if it has a time zone, or None; TypeError or ValueError, naming ``what``, otherwise."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise TypeError(f"{what} must be a datetime, not {value!r}")
    if value.utcoffset() is None:
        raise ValueError(f"{what} must be an aware datetime, not {value!r}: give it a time zone")
    return value


def span(what: str, value: timedelta | None) -> timedelta | None:
    """``value`` if it is a timedelta, or None; TypeError, naming ``what``, otherwise."""
    if value is not None and not isinstance(value, timedelta):
        raise TypeError(f"{what} must be a timedelta, not {value!r}")
    return value


def refuse_unknown(call: str, options: Mapping[str, Any], *others: str, known: type = JobOptions) -> None:
    """TypeError, naming it and what there is, for an option that ``known``, a TypedDict, does not know."""
    unknown = sorted(options.keys() - known.__annotations__.keys())
    if unknown:
        there_are = ", ".join((*others, *known.__annotations__))
        raise TypeError(f"{call} has no argument {unknown[0]!r}; it takes {there_are}")


def flag_list(flags: Sequence[str] | None) -> list[str] | None:
    """The flags as the database takes them; TypeError for a text, which is a sequence too."""
    if isinstance(flags, str):
        raise TypeError(f"flags must be a list of flags, not the text {flags!r}")
    return None if flags is None else list(flags)


def plain_spec(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of a spec, with what JSON has no type for written as the database reads it; ``where`` is for errors."""
    plain = {**spec}
    if plain.get("run_at") is not None:
        plain["run_at"] = cast("datetime", aware(f"{where}run_at", plain["run_at"])).isoformat()
    for key in ("unique_for", "debounce_max"):
        if (length := span(where + key, plain.get(key))) is not None:
            plain[key] = f"{length.days} days {length.seconds} seconds {length.microseconds} microseconds"
    if plain.get("flags") is not None and not isinstance(plain["flags"], str):
        plain["flags"] = list(plain["flags"])
    return plain


@on_connection
def add_job(identifier: str, payload: Any = None, **options: Unpack[JobOptions]) -> Request[JobRow]:
    """Add a job in the transaction of ``conn`` and return it as the view ``pgworker.jobs`` shows it.

    Args:
        identifier: the task that is to handle it, 1 to 128 characters.
        payload: anything that JSON can hold; None stands for ``{}``.
        **options: ``queue_name`` (a serial queue), ``run_at`` (an aware datetime), ``max_attempts``, ``job_key`` with
            ``job_key_mode`` (``replace``, ``preserve_run_at``, ``unsafe_dedupe``, ``debounce``), ``priority`` (lower
            runs sooner), ``flags``, ``limit_key`` (whom the limits of its task are counted for), ``unique_for`` (a
            timedelta: so long the first job with that key is returned instead, finished or not), ``debounce_max`` (a
            timedelta: the job is put off no longer than that after its first add).

    ``conn`` is any psycopg connection or cursor; with an async one the call returns an awaitable. Nothing is committed.
    """
    return job_request(identifier, payload, options)


def job_request(identifier: str, payload: Any, options: JobOptions) -> Request[JobRow]:
    """What `add_job` asks of the database."""
    refuse_unknown("add_job", options)
    return Request(
        f"select {JOB_COLUMNS} from pgworker.add_job("
        "%s::text, %s::jsonb, %s::text, %s::timestamptz, %s::int, %s::text, %s::int, %s::text[], %s::text, "
        "%s::text, %s::interval, %s::interval)",
        (
            identifier,
            None if payload is None else to_json(f"payload of job {identifier!r}", payload),
            options.get("queue_name"),
            aware("run_at", options.get("run_at")),
            options.get("max_attempts"),
            options.get("job_key"),
            options.get("priority"),
            flag_list(options.get("flags")),
            options.get("job_key_mode"),
            options.get("limit_key"),
            span("unique_for", options.get("unique_for")),
            span("debounce_max", options.get("debounce_max")),
        ),
        one_job,
    )


@on_connection
def add_jobs(specs: Iterable[JobSpec | Mapping[str, Any]]) -> Request[list[JobRow]]:
    """Add many jobs with one statement and return them in the order given; their ids ascend in that order.

    Each spec is a dict of `add_job`'s arguments; an unknown key is named and the whole call refused.
    """
    text = to_json("specs", [plain_spec(spec, f"specs[{index}].") for index, spec in enumerate(specs)])
    return Request(f"select {JOB_COLUMNS} from pgworker.add_jobs(%s::jsonb)", (text,), all_jobs)


@on_connection
def remove_job(job_key: str) -> Request[JobRow | None]:
    """Remove the pending job with that key and return it; None if there is none.

    A running one goes on, without its key and its retries, and is returned.
    """
    return Request(f"select {JOB_COLUMNS} from pgworker.remove_job(%s::text)", (job_key,), _job_if_any)
