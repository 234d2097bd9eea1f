"""Where trials take place: one server for all of them, a database of its own for each."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import psycopg

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import Installation
from tests.faults.trial import Trial

SETTINGS = {
    "max_connections": "80", "shared_buffers": "64MB", "timezone": "UTC", "jit": "off", "max_wal_senders": "4",
    "log_checkpoints": "off",
}  # fmt: skip
_TEMPLATE = "template_of_trials"


class Ground:
    """A server that may be harmed, from the start of a ``with`` block to its end.

    Args:
        installation: whose PostgreSQL.
        jobs: how many each trial has.
        patient: True: the defaults, and harm that takes its time. False: short graces, little harm.
    """

    def __init__(self, installation: Installation, *, jobs: int, patient: bool) -> None:
        self.jobs = jobs
        self.patient = patient
        self.server = EmbeddedServer(installation, settings=SETTINGS)
        self._trials = 0

    def __enter__(self) -> Self:
        self.server.__enter__()
        with psycopg.connect(self.server.dsn(), autocommit=True) as conn:
            conn.execute("create role worker login")
            conn.execute("create role other login")
            conn.execute(f"create database {_TEMPLATE}")
        with psycopg.connect(self.server.dsn(_TEMPLATE), autocommit=True) as conn:
            schema.install(conn)
            if not self.patient:
                conn.execute("insert into pgworker.setting values ('rescue_grace', '1 second')")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.close()

    @contextlib.contextmanager
    def database(self, options: str = "") -> Iterator[str]:
        """Make a database with pgworker in it for a block, which gets its name."""
        self._trials += 1
        name = f"trial_{self._trials}"
        with psycopg.connect(self.server.dsn(), autocommit=True) as conn:
            conn.execute(f"create database {name} template {_TEMPLATE} {options}".encode())
        try:
            yield name
        finally:
            with psycopg.connect(self.server.dsn(), autocommit=True) as conn:
                conn.execute(f"drop database {name} with (force)".encode())

    @contextlib.contextmanager
    def trial(
        self, fault: str, chance: random.Random, *, jobs: int | None = None, options: str = ""
    ) -> Iterator[Trial]:
        """Prepare a trial for a block."""
        with self.database(options) as dbname:
            trial = Trial(fault, self.server, dbname, jobs or self.jobs, chance)
            try:
                yield trial
            finally:
                trial.close()
                if not self.server.running:
                    self.server.start()
