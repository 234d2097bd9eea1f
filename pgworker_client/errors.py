"""The errors that a user of the client meets, and what an error of the database says about what to do next."""

from __future__ import annotations

import psycopg

#: SQLSTATEs of the protocol; the reference says when the database raises each of them.
NOT_HELD = "PW001"
UNKNOWN_WORKER = "PW002"
INCOMPATIBLE = "PW004"
#: Somebody else has locked a row, for longer than the statement waits.
LOCKED = "55P03"

#: The state of the server, not the statement, is the reason: the same statement may succeed later. Read-only
#: transaction (a standby), deadlock and serialization, resources, object in use, operator intervention, system error.
_PASSING = ("25006", "40", "53", "55", "57", "58", "08")

#: Of those, the ones that leave a connection which is as good as before.
_SAME_CONNECTION = ("40", LOCKED, "57014")


class PgworkerError(Exception):
    """What every error raised by this package on purpose derives from."""


class JobLost(PgworkerError):
    """The job is not held by this run any more: rescued, cancelled for good or finished by somebody else.

    Raised inside a handler by the methods of its context. Let it pass: the run ends and nothing of it is reported.
    """


class NotInstalled(PgworkerError):
    """The database has no usable pgworker schema, or one of a version that this client cannot work with."""


class WorkerFailed(PgworkerError):
    """A part of the worker died; everything was stopped in order. The cause is in ``__cause__`` and in the text."""


class LoadError(PgworkerError):
    """Tasks or a worker named on the command line cannot be loaded; the text names the file and the way out."""


class LinkDown(PgworkerError):
    """A statement failed for a reason that passes; whether it took effect is unknown if ``unknown`` is true."""

    def __init__(self, reason: str, *, unknown: bool) -> None:
        super().__init__(reason)
        self.unknown = unknown


def is_passing(exc: psycopg.Error) -> bool:
    """Whether the same statement may succeed later: the server or the way to it is the trouble, not what was said."""
    if exc.sqlstate is None:  # libpq's own: refused, reset, timed out, closed
        return isinstance(exc, (psycopg.OperationalError, psycopg.InterfaceError))
    return exc.sqlstate.startswith(_PASSING)


def keeps_connection(exc: psycopg.Error) -> bool:
    """Whether the connection that reported this passing error is worth keeping."""
    return exc.sqlstate is not None and exc.sqlstate.startswith(_SAME_CONNECTION)


def one_line(exc: BaseException) -> str:
    """The error as one line: its first line of text, or its type where there is none."""
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
