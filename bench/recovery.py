"""How soon jobs go on after a worker was killed or has said goodbye, or the server has crashed; all at its defaults."""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg

from bench.claims import register
from bench.processes import wait_until
from bench.setting import Bench

_JOBS = 10
_LIVE = "select count(*) from pgworker.job"
_WORKERS = "select count(*) from pgworker.worker"


def recovery(bench: Bench) -> None:
    """Have jobs held by a worker that is killed, by one that is unregistered; have the server crash under a third."""
    for _ in range(bench.runs):
        for row, measure in (
            ("recovery_killed", _killed),
            ("recovery_unregistered", _unregistered),
            ("recovery_crashed", _crashed),
        ):
            with bench.ours.connect(bench.server) as conn:
                conn.execute(bench.ours.clear)
            bench.note(row, bench.ours, measure(bench))


def _killed(bench: Bench) -> float:
    """Seconds from the SIGKILL until another worker has claimed what was held: the median job's."""
    with bench.ours.connect(bench.server) as conn, bench.ours.start(bench.server, "work") as victim:
        _add(bench, conn, "stuck")  # ends at the second attempt only
        held = _LIVE + " where locked_by is not null"
        wait_until(lambda: _count(conn, held) == _JOBS, [victim], "the claims of the one to be killed")
        with bench.ours.start(bench.server, "work") as other:
            wait_until(lambda: _count(conn, _WORKERS) == 2, [victim, other], "the other one")
            victim.kill()
            begun = time.monotonic()
            took: list[float] = []

            def claimed() -> bool:
                again = _JOBS - _count(conn, _LIVE + " where attempts = 1 or locked_by is null and attempts < 2")
                took.extend([time.monotonic() - begun] * (again - len(took)))
                return len(took) == _JOBS

            wait_until(claimed, [other], "the claims of the other one")
            wait_until(lambda: not _count(conn, _LIVE), [other], "the end of the jobs")
    return statistics.median(took)


def _unregistered(bench: Bench) -> float:
    """Seconds from a worker's goodbye until another one has run all that it held."""
    with bench.ours.connect(bench.server) as conn:
        worker = register(conn)
        _add(bench, conn, "noop")
        conn.execute("select from pgworker.get_jobs(%s, %s)", [worker, _JOBS])
        with bench.ours.start(bench.server, "work") as other:
            wait_until(lambda: _count(conn, _WORKERS) == 2, [other], "the other one")
            begun = time.monotonic()
            conn.execute("select pgworker.unregister_worker(%s)", [worker])
            wait_until(lambda: not _count(conn, _LIVE), [other], "the end of the jobs")
            return time.monotonic() - begun


def _crashed(bench: Bench) -> float:
    """Seconds from when the server answers again after a crash until a worker has run jobs."""
    with bench.ours.start(bench.server, "work") as worker:
        with bench.ours.connect(bench.server) as conn:
            _add(bench, conn, "noop")
            wait_until(lambda: not _count(conn, _LIVE), [worker], "the worker works")
        bench.server.restart("immediate")
        begun = time.monotonic()
        with bench.ours.connect(bench.server) as conn:
            _add(bench, conn, "noop")
            wait_until(lambda: not _count(conn, _LIVE), [worker], "the end of the jobs")
            return time.monotonic() - begun


def _add(bench: Bench, conn: psycopg.Connection[Any], task: str) -> None:
    bench.ours.fill(bench.server, conn, _JOBS, task=task)


def _count(conn: psycopg.Connection[Any], query: str) -> int:
    (found,) = conn.execute(query.encode()).fetchone() or (0,)
    return int(found)
