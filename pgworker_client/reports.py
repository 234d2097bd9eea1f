"""Reports: what became of jobs, gathered by the runners and cut into statements that can be sent, resent and halved.

Each kind of report is one statement for any number of jobs. A report that PostgreSQL refuses is halved until the one
job is found whose data it refuses; that one is reported as failed, so no job can harm another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from pgworker_client.job import ATTEMPTS, ID, Row
from pgworker_client.outcome import Fail, Retry, storable
from pgworker_client.settings import quoted

#: Milliseconds that a report waits for rows which somebody else has locked; and one that has waited before.
PATIENCE, LITTLE_PATIENCE = "500", "20"
#: The first parameter is one of these, the second the worker. Set for the statement only, as a pooler demands.
_HOLDER = "(select case when set_config('lock_timeout', %s, true) <> '' then %s::bigint end) as holder(id)"

#: A statement may hold a gigabyte; results beyond this many characters go into the next one.
_RESULTS_LIMIT = 16_000_000


def _numbers(rows: list[Row], column: int) -> str:
    return ",".join([str(row[column]) for row in rows])


@dataclasses.dataclass(slots=True)
class Finish:
    """The ordinary ends: completed, with or without a result, and failed, to be retried as usual."""

    done: list[Row]
    results: list[str | None] | None
    failed: list[Row]
    errors: list[str]

    QUERY = (
        f"select job_id, outcome from {_HOLDER}, pgworker.finish_jobs(holder.id, %s::bigint[], %s::jsonb[], "
        "%s::bigint[], %s::text[], %s::int[]) where outcome <> 'completed'"
    )

    def params(self, worker_id: int) -> tuple[Any, ...]:
        results = None
        if self.results is not None:
            results = "{" + ",".join(["NULL" if text is None else quoted(text) for text in self.results]) + "}"
        attempts = _numbers(self.done, ATTEMPTS)
        if self.failed:
            attempts = (attempts + "," if attempts else "") + _numbers(self.failed, ATTEMPTS)
        return (
            worker_id,
            "{" + _numbers(self.done, ID) + "}",
            results,
            "{" + _numbers(self.failed, ID) + "}",
            "{" + ",".join([quoted(text) for text in self.errors]) + "}",
            "{" + attempts + "}",
        )

    def rows(self) -> list[Row]:
        return self.done + self.failed

    def errors_by_id(self) -> dict[int, str | None]:
        return {row[ID]: text for row, text in zip(self.failed, self.errors, strict=True)}

    def halves(self) -> tuple[Finish, Finish]:
        if self.done and self.failed:
            return Finish(self.done, self.results, [], []), Finish([], None, self.failed, self.errors)
        half = max(len(self.done), len(self.failed)) // 2
        first = None if self.results is None else self.results[:half]
        second = None if self.results is None else self.results[half:]
        return (
            Finish(self.done[:half], first, self.failed[:half], self.errors[:half]),
            Finish(self.done[half:], second, self.failed[half:], self.errors[half:]),
        )

    def instead(self, reason: str) -> Report | None:
        if self.done:
            return Finish([], None, self.done, [f"the result of this job was refused by the database: {reason}"])
        plain = self.errors[0].encode("ascii", "backslashreplace").decode("ascii")
        return None if plain == self.errors[0] else Finish([], None, self.failed, [plain])


class SpecialEntry(NamedTuple):
    """One failure: its error, in how many seconds or when to retry, whether for good, the payload left (JSON)."""

    row: Row
    error: str
    delay: float | None
    retry_at: datetime | None
    permanent: bool
    payload: str | None


@dataclasses.dataclass(slots=True)
class Special:
    """Failures that say more: when to retry, never to retry, or what is left of the payload."""

    entries: list[SpecialEntry]

    QUERY = (
        "select (f).id, (f).state from (select pgworker.fail_job(holder.id, s.id, s.error, coalesce(s.retry_at, "
        "clock_timestamp() + s.delay * interval '1 second'), s.permanent, s.payload, s.attempt) as f "
        f"from {_HOLDER}, unnest("
        "%s::bigint[], %s::text[], %s::float8[], %s::timestamptz[], %s::bool[], %s::jsonb[], %s::int[]) "
        "as s(id, error, delay, retry_at, permanent, payload, attempt) order by s.id) as reported"
    )

    def params(self, worker_id: int) -> tuple[Any, ...]:
        entries, rows = self.entries, self.rows()
        return (
            worker_id,
            [row[ID] for row in rows],
            [entry.error for entry in entries],
            [entry.delay for entry in entries],
            [entry.retry_at for entry in entries],
            [entry.permanent for entry in entries],
            [entry.payload for entry in entries],
            [row[ATTEMPTS] for row in rows],
        )

    def rows(self) -> list[Row]:
        return [entry.row for entry in self.entries]

    def errors_by_id(self) -> dict[int, str | None]:
        return {entry.row[ID]: entry.error for entry in self.entries}

    def halves(self) -> tuple[Special, Special]:
        half = len(self.entries) // 2
        return Special(self.entries[:half]), Special(self.entries[half:])

    def instead(self, reason: str) -> Report | None:
        row, error, delay, retry_at, permanent, payload = self.entries[0]
        if delay is None and retry_at is None and payload is None and error.isascii():
            return None
        text = f"{error}\n\nreported without time and payload, which the database refused: {reason}"
        plain = text.encode("ascii", "backslashreplace").decode("ascii")
        return Special([SpecialEntry(row, plain, None, None, permanent, None)])


@dataclasses.dataclass(slots=True)
class Cancelled:
    """Jobs that their handler cancelled."""

    entries: list[tuple[Row, str | None]]

    QUERY = (
        "select (c).id, (c).state from (select pgworker.cancel_job(holder.id, s.id, s.reason, s.attempt) as c "
        f"from {_HOLDER}, unnest(%s::bigint[], %s::text[], %s::int[]) as s(id, reason, attempt) order by s.id) "
        "as reported"
    )

    def params(self, worker_id: int) -> tuple[Any, ...]:
        rows = self.rows()
        reasons = [None if reason is None else storable(reason) for _, reason in self.entries]
        return worker_id, [row[ID] for row in rows], reasons, [row[ATTEMPTS] for row in rows]

    def rows(self) -> list[Row]:
        return [row for row, _ in self.entries]

    def errors_by_id(self) -> dict[int, str | None]:
        return {row[ID]: reason for row, reason in self.entries}

    def halves(self) -> tuple[Cancelled, Cancelled]:
        half = len(self.entries) // 2
        return Cancelled(self.entries[:half]), Cancelled(self.entries[half:])

    def instead(self, _reason: str) -> Report | None:
        row, reason = self.entries[0]
        return None if reason is None else Cancelled([(row, None)])


@dataclasses.dataclass(slots=True)
class Released:
    """Jobs that were not started, or were interrupted by a stop or as lost: back, with their attempt."""

    given_back: list[Row]

    QUERY = f"select null::bigint, null::text from {_HOLDER}, pgworker.release_jobs(holder.id, %s::bigint[], %s::int[])"

    def params(self, worker_id: int) -> tuple[Any, ...]:
        return worker_id, "{" + _numbers(self.given_back, ID) + "}", "{" + _numbers(self.given_back, ATTEMPTS) + "}"

    def rows(self) -> list[Row]:
        return self.given_back

    def halves(self) -> tuple[Released, Released]:
        half = len(self.given_back) // 2
        return Released(self.given_back[:half]), Released(self.given_back[half:])

    def instead(self, _reason: str) -> Report | None:
        return None


Report = Finish | Special | Cancelled | Released


class Outbox:
    """What runners have to report of the jobs claimed under one worker id."""

    def __init__(self, worker_id: int) -> None:
        self.worker_id = worker_id
        self._empty()

    def _empty(self) -> None:
        #: Written to directly by the runners: this is the hot path. One result per completed job, None for none.
        self.done: list[Row] = []
        self.results: list[str | None] = []
        self.any_result = False
        self._failed: list[Row] = []
        self._errors: list[str] = []
        self._special: list[SpecialEntry] = []
        self._cancelled: list[tuple[Row, str | None]] = []
        self._released: list[Row] = []

    def complete(self, row: Row, result: str | None) -> None:
        """The job succeeded; ``result`` is JSON."""
        self.done.append(row)
        self.results.append(result)
        if result is not None:
            self.any_result = True

    def fail(self, row: Row, exc: BaseException, text: str) -> None:
        """The attempt failed; `Retry` and `Fail` say what is to follow."""
        if isinstance(exc, Retry) and (exc.delay is not None or exc.at is not None):
            self._special.append(SpecialEntry(row, text, exc.delay, exc.at, False, None))
        elif isinstance(exc, Fail):
            self._special.append(SpecialEntry(row, text, None, None, True, None))
        else:
            self._failed.append(row)
            self._errors.append(text)

    def fail_partly(self, row: Row, text: str, left: str) -> None:
        """A part of an array payload failed: ``left``, as JSON, is the payload of the next attempt."""
        self._special.append(SpecialEntry(row, text, None, None, False, left))

    def cancel(self, row: Row, reason: str | None) -> None:
        """The handler cancelled its job."""
        self._cancelled.append((row, reason))

    def release(self, rows: list[Row]) -> None:
        """The jobs are to go back with their attempt."""
        self._released += rows

    def __len__(self) -> int:
        return len(self.done) + len(self._failed) + len(self._special) + len(self._cancelled) + len(self._released)

    def ids(self) -> Iterator[int]:
        """The jobs that it holds reports of."""
        for rows in (self.done, self._failed, self._released):
            yield from (row[ID] for row in rows)
        yield from (row[ID] for row, *_ in self._special)
        yield from (row[ID] for row, _ in self._cancelled)

    def take(self) -> Iterator[Report]:
        """Empty the box into reports."""
        done, results, any_result = self.done, self.results, self.any_result
        failed, errors, special = self._failed, self._errors, self._special
        cancelled, released = self._cancelled, self._released
        self._empty()
        if any_result:
            while len(done) > 1 and sum(map(len, filter(None, results))) > _RESULTS_LIMIT:
                fits, length = 0, 0
                while fits < len(results) and (not fits or length + len(results[fits] or "") <= _RESULTS_LIMIT):
                    length += len(results[fits] or "")
                    fits += 1
                yield Finish(done[:fits], results[:fits], [], [])
                done, results = done[fits:], results[fits:]
        if done or failed:
            yield Finish(done, results if any_result else None, failed, errors)
        if special:
            yield Special(special)
        if cancelled:
            yield Cancelled(cancelled)
        if released:
            yield Released(released)
