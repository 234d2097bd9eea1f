"""What jobs cost besides time: write-ahead log, processor time of the server and of the worker, memory of the worker.

Processor time and memory are what Linux says of a process; elsewhere these rows are missing.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from bench.draining import release
from bench.processes import Child, wait_until
from bench.setting import Bench
from bench.sides import Side
from pgworker_client.embedded import EmbeddedServer

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
#: Added at once, less where a side drains fewer.
_CHUNK = 50_000


def resources(bench: Bench) -> None:
    """Add jobs with one call and drain them with one process; weigh what that took, whole and per job."""
    for sides in bench.rounds("resources"):
        for side in sides:
            with side.connect(bench.server) as conn:
                _weigh(bench, side, conn)


def _weigh(bench: Bench, side: Side, conn: psycopg.Connection[Any]) -> None:
    jobs = side.count(bench.sizes.jobs)
    meter = _Meter(bench.server, conn)
    with side.start(bench.server, "produce") as producer:
        producer.wait_until_ready()
        conn.execute(side.clear.encode())
        # No checkpoint between adding and the end: pages that were written since the last one cost their changes only.
        side.settle(conn)
        meter.look()
        producer.ask("bulk", jobs, bench.sizes.payload)
        meter.look()
    conn.execute(f"analyze {side.table}".encode())
    release(bench, side, 1, jobs, look=meter.look)
    conn.execute(side.clear.encode())
    bench.note("wal", side, meter.wal / jobs)
    if _PROC.is_dir():
        bench.note("cpu_server", side, meter.server * 1e6 / jobs)
        bench.note("cpu_worker", side, meter.workers * 1e6 / jobs)


class _Meter:
    """Adds up what is spent between an odd look and the next, even one.

    Attributes:
        wal: bytes of write-ahead log.
        server: seconds of processor time, of all the server's processes.
        workers: seconds of processor time, of the workers that were there at both looks.

    """

    def __init__(self, server: EmbeddedServer, conn: psycopg.Connection[Any]) -> None:
        self.wal = self.server = self.workers = 0.0
        self._where, self._conn = server, conn
        self._sign = -1

    def look(self, workers: list[Child] | None = None) -> None:
        """Read all meters."""
        row = self._conn.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
        assert row is not None
        self.wal += self._sign * float(row[0])
        self.server += self._sign * _server_time(self._where)
        self.workers += self._sign * sum(_own_time(worker.pid) for worker in workers or [])
        self._sign = -self._sign


def _server_time(server: EmbeddedServer) -> float:
    """Return the seconds of processor time of the server's processes, those that have ended included."""
    if not _PROC.is_dir():
        return 0.0
    postmaster = int((server.directory / "data/postmaster.pid").read_text(encoding="utf-8").split()[0])
    ended = sum(map(int, _stat(postmaster)[13:15])) / _TICKS  # of children that were waited for, user and system
    children = [int(place.name) for place in _PROC.glob("[0-9]*") if _parent(int(place.name)) == postmaster]
    return ended + sum(map(_own_time, [postmaster, *children]))


def _own_time(pid: int) -> float:
    """Return the seconds of processor time of a process with all its threads; 0 if it has ended."""
    if not _PROC.is_dir():
        return 0.0
    try:
        return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3), which Python lacks; /proc counts in 10 ms
    except OSError:
        return 0.0


def _parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _stat(pid: int) -> list[str]:
    """Return what the kernel says of a process after its name; nothing if it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def memory(bench: Bench) -> None:
    """Have one worker of each side run very many jobs, once, and look at its memory on the way."""
    if not _PROC.is_dir():
        return
    for side in (bench.ours, *bench.peers):
        with side.connect(bench.server) as conn:
            conn.execute(side.clear.encode())
            side.settle(conn)
            with side.start(bench.server, "work") as worker, side.start(bench.server, "produce") as producer:
                producer.wait_until_ready()
                for row, jobs in (("memory_0", 1000), *((f"memory_{quarter}", 4) for quarter in (1, 2, 3, 4))):
                    _pass(worker, producer, side, side.count(bench.sizes.passed // jobs))
                    bench.note(row, side, _memory(worker.pid))
            conn.execute(side.clear.encode())


def _pass(worker: Child, producer: Child, side: Side, jobs: int) -> None:
    """Have so many jobs added and run."""
    while jobs > 0:
        now = min(jobs, side.count(_CHUNK))
        until = worker.handled + now
        producer.ask("bulk", now, 0)
        wait_until(partial(_has_handled, worker, until), [worker], "the jobs of which memory is looked at", 0.01)
        jobs -= now


def _has_handled(worker: Child, jobs: int) -> bool:
    return worker.handled >= jobs


def _memory(pid: int) -> float:
    """Return the MB of memory that a process takes up."""
    lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return kilobytes * 1024 / 1e6
