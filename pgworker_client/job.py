"""The two faces of a job: as a worker claims it, and as the view ``pgworker.jobs`` shows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

#: One claimed job as it comes from the database, in the order of CLAIM_COLUMNS. It stays a tuple until somebody asks
#: for more than its payload: objects and dates for each of 50,000 jobs a second would cost more than the claim.
Row = tuple[Any, ...]

ID, TASK, PAYLOAD, ATTEMPTS, MAX_ATTEMPTS, QUEUE, PARENT, PROGRESS, TIMEOUT = 0, 1, 2, 3, 4, 5, 10, 12, 14
_RUN_AT, _CREATED_AT = 7, 13
CLAIM_COLUMNS = (
    "id, task_identifier, payload::text, attempts, max_attempts, queue_name, priority, run_at, key, flags, "
    "parent_id, root_id, progress::text, created_at, extract(epoch from timeout)::float8"
)

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_scan = json.JSONDecoder().raw_decode


def _decode(text: str) -> Any:
    return _scan(text)[0]


def _fast_decoder() -> Callable[[str], Any]:
    """As `_decode`, by msgspec where it is installed; what that refuses, huge numbers, is read without it."""
    try:
        import msgspec
    except ImportError:
        return _decode
    quick = msgspec.json.Decoder().decode

    def fast(text: str) -> Any:
        try:
            return quick(text)
        except (msgspec.MsgspecError, RecursionError):
            return _decode(text)

    return fast


#: The value of a JSON text written by PostgreSQL, which never begins with white space.
decode: Callable[[str], Any] = _fast_decoder()


def end_of_value(text: str, start: int) -> int:
    """Where the JSON value that begins at ``start`` ends."""
    return _scan(text, start)[1]


def moment(raw: bytes) -> datetime:
    """A binary timestamptz; infinite ones, and years that Python cannot hold, become the nearest one it can."""
    microseconds = int.from_bytes(raw, "big", signed=True)
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return (datetime.max if microseconds > 0 else datetime.min).replace(tzinfo=UTC)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A claimed job: the columns of ``pgworker.claimed_job``. Times are aware, in UTC; ``attempts`` counts this run."""

    id: int
    task_identifier: str
    payload: Any
    attempts: int
    max_attempts: int
    queue_name: str | None
    priority: int
    run_at: datetime
    key: str | None
    flags: list[str] | None
    parent_id: int | None
    root_id: int | None
    progress: Any
    created_at: datetime
    timeout: timedelta | None

    @classmethod
    def from_row(cls, row: Row) -> Job:
        """The job that the claim returned as ``row``. ValueError when Python cannot read its payload."""
        values: list[Any] = list(row)
        values[PAYLOAD] = decode(row[PAYLOAD])
        values[PROGRESS] = None if row[PROGRESS] is None else decode(row[PROGRESS])
        values[_RUN_AT] = moment(row[_RUN_AT])
        values[_CREATED_AT] = moment(row[_CREATED_AT])
        values[TIMEOUT] = None if row[TIMEOUT] is None else timedelta(seconds=row[TIMEOUT])
        return cls(*values)


@dataclasses.dataclass(slots=True)  # not frozen: that makes an object cost ten times as much
class JobRow:
    """A row of the view ``pgworker.jobs``: what the database knows of a job now, live or finished."""

    id: int
    task_identifier: str
    queue_name: str | None
    state: str
    payload: Any
    priority: int
    run_at: datetime
    attempts: int
    max_attempts: int
    last_error: str | None
    key: str | None
    revision: int
    flags: list[str] | None
    parent_id: int | None
    root_id: int | None
    name: str | None
    on_failure: str | None
    progress: Any
    result: Any
    locked_at: datetime | None
    locked_by: int | None
    created_at: datetime
    finished_at: datetime | None
    started_at: datetime | None
    limit_key: str | None
    unique_until: datetime | None


#: Named one by one: a newer schema may append columns.
JOB_COLUMNS = ", ".join(field.name for field in dataclasses.fields(JobRow))

#: The value as compact JSON. NaN and infinity are refused here: Python would write words that are not JSON.
encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def to_json(what: str, value: Any) -> str:
    """``value`` as JSON text. TypeError or ValueError, naming ``what``, when it cannot be written so."""
    try:
        return encode(value)
    except TypeError as exc:
        raise TypeError(f"{what} cannot be written as JSON: {exc}; use dicts, lists, text, numbers, None") from None
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{what} cannot be written as JSON: {exc}; NaN, infinity and cycles are not JSON") from None


def items_of(text: str) -> list[str]:
    """The JSON texts of the items of an array, exactly as PostgreSQL wrote them (Python would round its numbers)."""
    items: list[str] = []
    start = 1
    while text[start] != "]":
        end = end_of_value(text, start)
        items.append(text[start:end])
        start = end + 2 if text[end] == "," else end
    return items
