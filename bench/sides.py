"""One side of a comparison, and ours; the others, measured alternately with it on the same server, are in `peers`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from bench.processes import Child
from bench.programs.orders import padding
from bench.programs.work import CONCURRENCY
from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer

ROOT = Path(__file__).parents[1]
#: Added with one statement: all of its jobs are in memory, and one JSON array holds 256 MB.
CHUNK = 100_000


@dataclass(frozen=True)
class Side:
    """How one queue is installed, filled, emptied and run.

    Attributes:
        name: also its database's.
        about: version and configuration, for the report.
        programs: commands of its worker, its producer and, where it is a program, its installer.
        environment: what these need besides libpq's variables.
        table: the live jobs.
        clear: SQL that removes every job.
        add: SQL that adds ``%(count)s`` jobs of task ``%(task)s`` with payloads like ``{"id": 1}`` and the members of
            ``%(more)s``, to the serial queue ``%(queue)s``, due at ``%(run_at)s``, both if they are not null. Where
            there is none, the producer adds them.
        occupy: SQL that makes the only serial queue busy, by changing or returning one row, while its session lasts.
        key: a column of the table that ascends.
        left: SQL that says whether a job is left to do, where the table has no such column or keeps what is done.
        share: it drains, and adds in bulk, this many times fewer jobs, so that a slow one takes no longer than others.
        share_beside: the same beside a backlog, where that slows it.
        cannot: measurements that it takes no part in.

    """

    name: str
    about: str
    programs: Mapping[str, list[str]]
    environment: Mapping[str, str]
    table: str
    clear: str
    add: str = ""
    occupy: str = ""
    key: str = "id"
    left: str = ""
    share: int = 1
    share_beside: int = 1
    cannot: frozenset[str] = field(default_factory=frozenset)

    def connect(self, server: EmbeddedServer) -> psycopg.Connection[Any]:
        """Open a connection to its database, in autocommit."""
        return psycopg.connect(server.dsn(self.name), autocommit=True)

    def install(self, server: EmbeddedServer) -> None:
        """Make its database."""
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(f"create database {self.name}")
        if "install" in self.programs:
            with self.start(server, "install"):
                pass
        else:
            with self.connect(server) as conn:
                schema.install(conn)

    @contextlib.contextmanager
    def apart(self, server: EmbeddedServer, name: str) -> Iterator[Side]:
        """Install it once more, in a database of another name, which is dropped in the end with all that is in it."""
        other = replace(self, name=f"{self.name}_{name}")
        other.install(server)
        yield other
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(f"drop database {other.name} with (force)")

    def start(self, server: EmbeddedServer, program: str, name: str = "") -> Child:
        """Start one of its programs; ``name`` becomes the application name of its connections."""
        where = {
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": server.user,
            "PGDATABASE": self.name,
            "PGAPPNAME": name or program,
        }
        return Child(self.programs[program], {**self.environment, **where})

    def count(self, jobs: int) -> int:
        """Return its share of so many jobs, at least ten of them."""
        return max(jobs // self.share, 10) if self.share > 1 else jobs

    def fill(
        self,
        server: EmbeddedServer,
        conn: psycopg.Connection[Any],
        count: int,
        *,
        task: str = "noop",
        size: int = 0,
        queue: str | None = None,
        run_at: datetime | None = None,
    ) -> None:
        """Add jobs; where its producer has to, the table is emptied before.

        Args:
            server: where its database is.
            conn: a connection to that.
            count: jobs.
            task: theirs; another than noop needs SQL that adds, as do a queue and a time.
            size: bytes by which their payloads are larger than ``{"id": 1}``.
            queue: the serial queue that they are in.
            run_at: when they are due, if that is not now.

        """
        if self.add:
            given = {"task": task, "more": Jsonb(padding(size)), "queue": queue, "run_at": run_at}
            for done in range(0, count, CHUNK):
                conn.execute(self.add.encode(), {**given, "count": min(count - done, CHUNK)})
            return
        with self.start(server, "produce") as producer:
            producer.wait_until_ready()
            conn.execute(self.clear.encode())  # it has added some to be ready
            producer.ask("bulk", count, size)

    def settle(self, conn: psycopg.Connection[Any]) -> None:
        """Bring the table into the state in which every measurement begins: vacuumed, analysed, written to disk."""
        conn.execute(f"vacuum (analyze) {self.table}")
        conn.execute("checkpoint")


def _msgspec() -> str:
    """Say so where the worker reads payloads by msgspec (the extra ``fast``)."""
    try:
        return f", msgspec {importlib.metadata.version('msgspec')}"
    except importlib.metadata.PackageNotFoundError:
        return ", no msgspec"


def pgworker() -> Side:
    """Return our side."""
    return Side(
        name="pgworker",
        about=f"pgworker {schema.version()}: Worker(concurrency={CONCURRENCY}), all else default; "
        f"Python {sys.version.split()[0]}, psycopg {psycopg.__version__} ({psycopg.pq.__impl__}){_msgspec()}",
        programs={mode: [sys.executable, "-m", f"bench.programs.{mode}"] for mode in ("work", "produce")},
        environment={"PYTHONPATH": str(ROOT)},
        table="pgworker.job",
        clear="truncate pgworker.job, pgworker.finished, pgworker.queue, pgworker.counter, pgworker.dependency, "
        "pgworker.permit, pgworker.task",
        add="""select from pgworker.add_jobs((
            select jsonb_agg(jsonb_build_object(
                'identifier', %(task)s::text, 'payload', jsonb_build_object('id', n) || %(more)s)
                || jsonb_strip_nulls(jsonb_build_object(
                    'queue_name', %(queue)s::text, 'run_at', %(run_at)s::timestamptz)))
            from generate_series(1, %(count)s) as n))""",
        occupy="select from pgworker.get_jobs(pgworker.register_worker('bench'), 1)",
    )
