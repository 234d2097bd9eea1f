"""How fast workers drain a table: one and several processes, beside other jobs, and while an old snapshot is held.

A drain is timed from the moment when the workers, connected and with their first claim sent, are let at the table, to
the moment when every job has been handled and none is left in it. Starting a process, importing and connecting do not
count: a lock on the table holds the workers back until all of them stand before it. The same for every side.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg

from bench.processes import Child, wait_until
from bench.setting import Bench
from bench.sides import Side

_BEFORE_THE_GATE = """
    select count(distinct a.application_name) from pg_locks l join pg_stat_activity a using (pid)
    where l.relation = %s::regclass and not l.granted and a.application_name like 'drain %%'"""


def throughput(bench: Bench) -> None:
    """Drain a table that holds nothing else, with one process, then with several."""
    for processes, row in ((1, "throughput_1"), (bench.sizes.processes, "throughput_many")):
        for sides in bench.rounds("throughput"):
            for side in sides:
                with side.connect(bench.server) as conn:
                    bench.note(row, side, drain(bench, side, conn, processes))


def batches(bench: Bench) -> None:
    """Drain with one process that claims many jobs ahead, as it does by default, then fewer, by turns."""
    for run in range(bench.runs):
        for buffer in bench.sizes.buffers[:: 1 if run % 2 == 0 else -1]:
            side = replace(bench.ours, environment={**bench.ours.environment, "BENCH_BUFFER": str(buffer)})
            with side.connect(bench.server) as conn:
                bench.note(f"buffer_{buffer}", side, drain(bench, side, conn, 1))


def history(bench: Bench) -> None:
    """Drain with one process with history off, as it is, and with every job and every attempt kept, by turns."""
    kinds = {"history_off": ("off", "0"), "history": ("on", "0"), "history_kept": ("on", "1 day")}
    for run in range(bench.runs):
        for row, (recorded, kept) in list(kinds.items())[:: 1 if run % 2 == 0 else -1]:
            with bench.ours.connect(bench.server) as conn:
                conn.execute("truncate pgworker.finished, pgworker.attempt")
                conn.execute("select pgworker.configure('history', %s)", [recorded])
                conn.execute("select pgworker.configure('keep_completed', %s)", [kept])
                bench.note(row, bench.ours, drain(bench, bench.ours, conn, 1))
    with bench.ours.connect(bench.server) as conn:
        conn.execute("select pgworker.configure(name, null) from pgworker.settings")
        conn.execute("truncate pgworker.finished, pgworker.attempt")


def held(bench: Bench) -> None:
    """Drain round after round, one process each, in two databases: in one of them an old snapshot is held all the time.

    It keeps every row version of its own database, and none of another one's, so the two can take turns round by round.
    The first rounds only pass, under the snapshot for as long as it is to be old; then every run is a round of each.
    One side after the other, since workers that find nothing but dead rows would not leave the others in peace.
    """
    for side in bench.taking_part("held"):
        with (
            free_and_held(bench, side) as (free, kept),
            _workers(bench, free, 1) as one,
            _workers(bench, kept, 1) as other,
        ):
            for _ in range(bench.sizes.rounds):
                _round(bench, free, one)
            begun, passed = time.monotonic(), 0
            while passed < bench.sizes.rounds or time.monotonic() - begun < bench.sizes.held:
                _round(bench, kept, other)
                passed += 1
            bench.note("held_passed", side, passed * side.count(bench.sizes.jobs))
            turns = [("held_not", free, one), ("held", kept, other)]
            for run in range(bench.runs):
                for row, where, workers in turns[:: 1 if run % 2 == 0 else -1]:
                    bench.note(row, side, _round(bench, where, workers))


@contextlib.contextmanager
def free_and_held(bench: Bench, side: Side) -> Iterator[tuple[Side, Side]]:
    """Yield a side in two databases; in the second an old snapshot is held."""
    with (
        side.apart(bench.server, "free") as free,
        side.apart(bench.server, "held") as kept,
        kept.connect(bench.server) as old,
    ):
        old.execute("begin isolation level repeatable read")
        old.execute("select count(*) from pg_class")
        yield free, kept


def drain(
    bench: Bench,
    side: Side,
    conn: psycopg.Connection[Any],
    processes: int,
    *,
    fill: str = "",
    jobs: int = 0,
    size: int = 0,
    parents: int = 1,
    more: int = 0,
) -> float:
    """Return jobs per second.

    Args:
        bench: the measurements.
        side: whose jobs and workers.
        conn: a connection to its database.
        processes: workers.
        fill: SQL that adds ``%(count)s`` jobs, ``%(parents)s`` times; else the side's own, of noop.
        jobs: how many that are; else as many as the sizes say, or the side's share of them.
        size: bytes by which the payloads of the side's own jobs are larger.
        parents: how often so many.
        more: how many jobs it adds beyond those that count.

    """
    count = jobs or side.count(bench.sizes.jobs)
    conn.execute(side.clear.encode())
    if fill:
        conn.execute(fill.encode(), {"count": count, "parents": parents})
    else:
        side.fill(bench.server, conn, count, size=size)
    side.settle(conn)
    return release(bench, side, processes, count * parents, more)


def drain_twice(bench: Bench, side: Side, conn: psycopg.Connection[Any]) -> tuple[float, float]:
    """Drain with one process that has just started, and as many jobs again with the same; return both jobs per second.

    What else is in the table, which it cannot run, is left there.
    """
    jobs = side.count(bench.sizes.jobs)
    side.fill(bench.server, conn, jobs)
    side.settle(conn)
    with _before_the_gate(bench, side, 1) as (gate, workers):
        return _time(gate, side, workers, jobs), _round(bench, side, workers)


def release(
    bench: Bench,
    side: Side,
    processes: int,
    jobs: int,
    more: int = 0,
    look: Callable[[list[Child]], object] = lambda _workers: None,
) -> float:
    """Start workers, let them at the jobs in the table, and return jobs per second; ``look`` before and after."""
    with _before_the_gate(bench, side, processes) as (gate, workers):
        look(workers)
        rate = _time(gate, side, workers, jobs, more)
        look(workers)
        return rate


@contextlib.contextmanager
def _before_the_gate(bench: Bench, side: Side, processes: int) -> Iterator[tuple[psycopg.Connection[Any], list[Child]]]:
    """Start workers, and yield the transaction that holds them back with their first claims sent."""
    with side.connect(bench.server) as gate, side.connect(bench.server) as conn:
        gate.autocommit = False
        gate.execute(f"lock table {side.table} in access exclusive mode")
        with _workers(bench, side, processes) as workers:
            wait_until(lambda: _waiting(conn, side) == processes, workers, "the workers' first claims", 0.02)
            time.sleep(0.3)  # a worker whose housekeeping came first stands here with its claim too
            yield gate, workers


def _round(bench: Bench, side: Side, workers: list[Child]) -> float:
    """Add jobs, all seen at the same moment, and drain them with workers that are there; return jobs per second."""
    jobs = side.count(bench.sizes.jobs)
    with side.connect(bench.server) as gate:
        gate.autocommit = False
        side.fill(bench.server, gate, jobs)
        return _time(gate, side, workers, jobs)


def _time(gate: psycopg.Connection[Any], side: Side, workers: list[Child], jobs: int, more: int = 0) -> float:
    """Open the gate, which is a transaction, and return jobs per second until nothing is left, nor of the others."""
    last = 0 if side.left else _last(gate, side)
    before = sum(worker.handled for worker in workers)
    begun = time.perf_counter()
    gate.commit()
    wait_until(lambda: sum(worker.handled for worker in workers) - before >= jobs + more, workers, "all jobs handled")
    gate.autocommit = True
    if side.left:
        wait_until(lambda: not _is_true(gate, side.left), workers, "the end of all jobs")
        return jobs / (time.perf_counter() - begun)
    # Jobs end roughly in the order of their ids: looking at the last ones is quick however many dead rows lie before.
    wait_until(lambda: not _any_from(gate, side, last - jobs // 10, last), workers, "an empty table")
    rate = jobs / (time.perf_counter() - begun)
    wait_until(lambda: not _any_from(gate, side, last - jobs - more, last), workers, "an empty table")
    return rate


def _last(conn: psycopg.Connection[Any], side: Side) -> int:
    row = conn.execute(f"select coalesce(max({side.key}), 0) from {side.table}").fetchone()
    assert row is not None
    return int(row[0])


def _any_from(conn: psycopg.Connection[Any], side: Side, after: int, to: int) -> bool:
    return _is_true(conn, f"select exists (select from {side.table} where {side.key} > {after} and {side.key} <= {to})")


def _is_true(conn: psycopg.Connection[Any], query: str) -> bool:
    row = conn.execute(query.encode()).fetchone()
    return row is None or bool(row[0])


def _waiting(conn: psycopg.Connection[Any], side: Side) -> int:
    """Return how many workers stand before the gate."""
    row = conn.execute(_BEFORE_THE_GATE, [side.table]).fetchone()
    return 0 if row is None else int(row[0])


@contextlib.contextmanager
def _workers(bench: Bench, side: Side, processes: int) -> Iterator[list[Child]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(side.start(bench.server, "work", f"drain {number}")) for number in range(processes)]
