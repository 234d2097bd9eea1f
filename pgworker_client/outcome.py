"""How a handler says that its job did not simply succeed, and the text that is kept of an error."""

from __future__ import annotations

import asyncio
import traceback
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from pgworker_client.settings import seconds

#: `last_error` is shown in lists and copied to parents: a page of text tells as much as a megabyte.
ERROR_LIMIT = 10_000
_HEAD_LIMIT = 4_000

_HERE = str(Path(__file__).parent)
_ASYNCIO = str(Path(asyncio.__file__).parent)


class Retry(Exception):
    """Raise it in a handler: the attempt failed, run the job again at the given time.

    ``in_`` is a delay (seconds or a timedelta, counted by the database's clock from the report), ``at`` a moment (an
    aware datetime); with neither, the usual backoff applies. ``reason`` becomes the job's `last_error`. The attempt
    counts: once `max_attempts` is reached the job is failed for good, as after any error.
    """

    def __init__(
        self, *, in_: float | timedelta | None = None, at: datetime | None = None, reason: str | None = None
    ) -> None:
        if in_ is not None and at is not None:
            raise ValueError("Retry takes in_ or at, not both")
        if at is not None and at.utcoffset() is None:
            raise ValueError(f"Retry(at=…) must be an aware datetime, not {at!r}: give it a time zone")
        self.delay = None if in_ is None else seconds("Retry(in_=…)", in_)
        self.at = at
        self.reason = reason
        super().__init__(reason or "the handler asked for a retry")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as calls with their positional arguments, of which there are none here.
        return _retry, (self.delay, self.at, self.reason)


def _retry(delay: float | None, at: datetime | None, reason: str | None) -> Retry:
    return Retry(in_=delay, at=at, reason=reason)


class Fail(Exception):
    """Raise it in a handler: the job is failed for good, whatever attempts are left. The text is its `last_error`."""

    def __init__(self, reason: str = "the handler failed the job for good") -> None:
        super().__init__(reason)


class Cancel(Exception):
    """Raise it in a handler: the job ends as cancelled. The text, if any, is kept as the reason."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(*([] if reason is None else [reason]))


class WaitsForChildren(BaseException):
    """Raised by ``ctx.wait_for_children()`` to end the run: the job waits now and will be started again. Let it pass.

    Not an Exception, so that a handler's ``except Exception`` does let it pass.
    """


class TimedOut(Exception):
    """The handler took longer than its task's timeout; kept as the job's `last_error`."""


class ProcessDied(Exception):
    """The process of a handler with ``executor="process"`` ended under it; kept as the job's `last_error`."""


class RemoteTraceback(Exception):
    """The cause of what a handler in another process raised: its error text, made there."""


def storable(text: str) -> str:
    """``text`` as PostgreSQL can keep it: no NUL, no lone surrogate."""
    return text.replace("\x00", "").encode("utf-8", "backslashreplace").decode("utf-8")


def error_text(exc: BaseException, frames: TracebackType | None = None) -> str:
    """What is kept of an error: type and message, then the traceback from ``frames`` on, only its end if it is long."""
    head = "".join(traceback.format_exception_only(exc)).strip()
    if len(head) > _HEAD_LIMIT:
        head = head[:_HEAD_LIMIT] + " …"
    trace = "".join(traceback.format_exception(type(exc), exc, frames)) if frames is not None else ""
    room = ERROR_LIMIT - len(head) - 4
    if len(trace) > room:
        trace = "…\n" + trace[-room:]
    return storable(f"{head}\n\n{trace}".strip())


def handlers_frames(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame on that is not this package's or asyncio's: the handler's own."""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith(_HERE) and not file.startswith(_ASYNCIO):
            return frames
        frames = frames.tb_next
    return None


def reason_text(exc: Retry | Fail) -> str:
    """What is kept of a `Retry` or a `Fail`: the handler's own words, without a traceback."""
    return storable(str(exc)[:ERROR_LIMIT]) or type(exc).__name__


def parts_error(failed: list[tuple[int, BaseException]], total: int) -> str:
    """The error of a batch of which a part failed: how many, then each entry's index, type and message."""
    lines = [f"{len(failed)} of {total} items failed"]
    length = len(lines[0])
    for index, exc in failed:
        line = f"[{index}] " + "".join(traceback.format_exception_only(exc)).strip()[:_HEAD_LIMIT]
        length += len(line) + 1
        if length > ERROR_LIMIT - 2:
            lines.append("…")
            break
        lines.append(line)
    return storable("\n".join(lines))
