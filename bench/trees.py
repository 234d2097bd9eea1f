"""What trees cost beyond jobs that are in none: adding them, and ending children of one parent.

Children return a result, and so do the jobs that they are compared with, since the nodes of a tree are kept.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

import psycopg

from bench.draining import drain, free_and_held
from bench.setting import Bench
from bench.sides import Side

#: Of `tree_slots`.
SESSIONS = 16
COMMIT = 0.005

_CHILD = "jsonb_build_object('identifier', 'kept', 'payload', jsonb_build_object('id', n))"
_PLAIN = f"select from pgworker.add_jobs((select jsonb_agg({_CHILD}) from generate_series(1, %(count)s) as n))"
_PARENT = f"""
    pgworker.add_job_tree((select jsonb_build_object('identifier', 'noop', 'children', jsonb_agg({_CHILD}))
                           from generate_series(1, %(count)s) as n))"""
_TREE = f"select from {_PARENT}"
# A function that does not depend on the other side of a join is called once only.
_TREES = f"""select count(t.id) from generate_series(1, %(parents)s) as g(p)
             cross join lateral {_PARENT.replace("%(count)s", "%(count)s + 0 * g.p")} as t"""
#: As if there were one counter row for all children.
_ONE_SLOT = (
    "update pgworker.job j set slot = 0 where j.parent_id is not null",
    "delete from pgworker.counter c where c.slot > 0",
    "update pgworker.counter c set pending = (select count(*) from pgworker.job j where j.parent_id = c.job_id)",
)


def trees(bench: Bench) -> None:
    """Measure everything about trees."""
    adding(bench)
    for number in range(bench.runs):
        children(bench, number)
        siblings(bench)
        one_by_one(bench)
    held(bench)


def adding(bench: Bench) -> None:
    """Add as many nodes with one call as jobs."""
    count = bench.sizes.jobs
    with bench.ours.connect(bench.server) as conn:
        for number in range(bench.runs):
            for row, add in (("tree_add_plain", _PLAIN), ("tree_add", _TREE))[:: 1 if number % 2 == 0 else -1]:
                conn.execute(bench.ours.clear)
                bench.ours.settle(conn)
                begun = time.perf_counter()
                conn.execute(add, {"count": count})
                bench.note(row, bench.ours, count / (time.perf_counter() - begun))
        conn.execute(bench.ours.clear)


def children(bench: Bench, number: int) -> None:
    """Drain unrelated jobs, and children of one parent, with several processes, by turns."""
    count, many = bench.sizes.children, bench.sizes.processes
    kinds = (("tree_unrelated", _PLAIN, 0), ("tree_children", _TREE, 1))
    with bench.ours.connect(bench.server) as conn:
        for row, fill, more in kinds[:: 1 if number % 2 == 0 else -1]:
            bench.note(row, bench.ours, drain(bench, bench.ours, conn, many, fill=fill, jobs=count, more=more))


def siblings(bench: Bench) -> None:
    """Drain as many children of parents with a hundred each, then of one parent."""
    count, many = bench.sizes.jobs, bench.sizes.processes
    with bench.ours.connect(bench.server) as conn:
        rate = drain(bench, bench.ours, conn, many, fill=_TREES, jobs=100, parents=count // 100, more=count // 100)
        bench.note("tree_hundreds", bench.ours, rate)
        rate = drain(bench, bench.ours, conn, many, fill=_TREE, jobs=count, more=1)
        bench.note("tree_siblings", bench.ours, rate)


def held(bench: Bench) -> None:
    """Drain children of one parent in two databases that take turns; in one an old snapshot is held all the time."""
    with free_and_held(bench, bench.ours) as (free, kept):
        count = bench.sizes.jobs  # fewer end within a second, which is no measure
        for number in range(bench.runs):
            for row, side in (("tree_held_not", free), ("tree_held", kept))[:: 1 if number % 2 == 0 else -1]:
                with side.connect(bench.server) as conn:
                    rate = drain(bench, side, conn, bench.sizes.processes, fill=_TREE, jobs=count, more=1)
                    bench.note(row, bench.ours, rate)


def one_by_one(bench: Bench) -> None:
    """End children of one parent one by one from many sessions, each of which takes a while to commit."""
    for row, one_slot in (("tree_slots_one", True), ("tree_slots", False)):
        with bench.ours.connect(bench.server) as conn:
            conn.execute(bench.ours.clear)
            conn.execute(_TREE, {"count": bench.sizes.one_by_one})
            for statement in _ONE_SLOT if one_slot else ():
                conn.execute(statement)
            bench.ours.settle(conn)
            bench.note(row, bench.ours, _end_all(bench.ours, bench, conn, bench.sizes.one_by_one))


def _end_all(side: Side, bench: Bench, conn: psycopg.Connection[Any], count: int) -> float:
    (worker,) = conn.execute("select pgworker.register_worker()").fetchone() or (0,)
    claimed: queue.SimpleQueue[int] = queue.SimpleQueue()
    for (job_id,) in conn.execute("select id from pgworker.get_jobs(%s, %s, '{kept}')", [worker, count]):
        claimed.put(job_id)
    assert claimed.qsize() == count

    def end(session: psycopg.Connection[Any]) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                # One round trip, so that it is the database that is measured.
                session.execute(
                    f"begin; select pgworker.complete_job({worker}, {claimed.get_nowait()}, '1');"
                    f"select pg_sleep({COMMIT}); commit"
                )

    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(side.connect(bench.server)) for _ in range(SESSIONS)]
        threads = [threading.Thread(target=end, args=[session]) for session in sessions]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - begun
    state = conn.execute("select state from pgworker.jobs where task_identifier = 'noop'").fetchone()
    assert state == ("ready",), state
    return count / taken
