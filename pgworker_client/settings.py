"""What a worker can be told: every setting, its unit, its default and its limits."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from datetime import timedelta


def seconds(name: str, value: float | timedelta, *, least: float = 0.0) -> float:
    """``value`` (seconds, or a timedelta) as seconds; ValueError, naming the argument, when less than ``least``."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or a timedelta, not {value!r}")
    if not least <= number < float("inf"):
        raise ValueError(f"{name} must be at least {least:g} seconds, not {value!r}")
    return float(number)


def _whole(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, not {value}")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works. Frozen: ``dataclasses.replace`` makes a changed copy and checks it again."""

    #: libpq connection string or URL; None: DATABASE_URL, else libpq's own PG* variables.
    dsn: str | None = None
    #: How many handlers run at the same time.
    concurrency: int = 10
    #: The name that `register_worker` gets; None: host name and process id.
    name: str | None = None
    #: Seconds between two looks at the database when nothing says that there is work.
    poll_interval: float = 1.0
    #: At most so many claimed jobs wait here for a free runner; how many really do follows the measured pace.
    buffer: int = 1000
    #: Seconds; None: presence is the database session. A lease is for transaction poolers: no LISTEN, no session state.
    lease: float | None = None
    #: Jobs that carry any of these flags are passed over.
    forbidden_flags: Sequence[str] | None = None
    #: Seconds that running jobs get after the first stop; then they are cancelled. Less than Kubernetes' 30.
    grace: float = 25.0

    def __post_init__(self) -> None:
        _whole("concurrency", self.concurrency, 1, 10_000)
        _whole("buffer", self.buffer, 0, 100_000)
        object.__setattr__(self, "poll_interval", seconds("poll_interval", self.poll_interval, least=0.001))
        object.__setattr__(self, "grace", seconds("grace", self.grace))
        if self.lease is not None:
            object.__setattr__(self, "lease", seconds("lease", self.lease, least=1.0))
        if isinstance(self.forbidden_flags, str):
            raise TypeError(f"forbidden_flags must be a list of flags, not the text {self.forbidden_flags!r}")
        if self.forbidden_flags is not None:
            object.__setattr__(self, "forbidden_flags", tuple(self.forbidden_flags))

    @property
    def pooled(self) -> bool:
        """Whether a transaction pooler may stand between: nothing may depend on the database session."""
        return self.lease is not None

    def worker_name(self) -> str:
        """The given name, or one that tells where the process is."""
        return self.name or f"{socket.gethostname()}:{os.getpid()}"


def text_array(values: Sequence[str]) -> str:
    """``values`` as the literal of a PostgreSQL text[]; far cheaper to send, time after time, than a list."""
    return "{" + ",".join([quoted(value) for value in values]) + "}"


def quoted(value: str) -> str:
    """One element of an array literal."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
