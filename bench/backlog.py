"""How fast one worker drains while very many other jobs lie in the table, against a table without them.

What lies there is added once, in a database of its own, and stays: jobs of the future, due ones of a task that the
worker does not know, and due ones behind a serial queue that is busy all the time.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg

from bench.draining import drain, drain_twice
from bench.setting import Bench
from bench.sides import Side

KINDS: dict[str, dict[str, Any]] = {
    "future": {"run_at": datetime(2100, 1, 1, tzinfo=UTC)},
    "foreign": {"task": "foreign"},
    "queue": {"queue": "busy"},
}


def backlog(bench: Bench) -> None:
    """Drain beside a backlog of each kind, by turns with a drain of nothing else."""
    for kind in KINDS:
        with contextlib.ExitStack() as stack:
            heaps = {}
            for side in bench.taking_part("backlog"):
                heap = replace(stack.enter_context(side.apart(bench.server, kind)), share=side.share_beside)
                heaps[side.name] = heap, stack.enter_context(heap.connect(bench.server))
                pile(bench, *heaps[side.name], kind)
            for sides in bench.rounds("backlog"):
                for side in sides:
                    with side.connect(bench.server) as conn:
                        conn.execute(side.clear.encode())
                        _, alone = drain_twice(bench, side, conn)
                    first, beside = drain_twice(bench, *heaps[side.name])
                    bench.note(f"backlog_{kind}_not", side, alone)
                    bench.note(f"backlog_{kind}", side, beside)
                    bench.note(f"backlog_{kind}_first", side, first)


def ready(bench: Bench) -> None:
    """Drain a backlog of one's own, by turns with as many jobs as elsewhere."""
    for sides in bench.rounds("ready"):
        for side in sides:
            with side.connect(bench.server) as conn:
                bench.note("ready_not", side, drain(bench, side, conn, 1))
                bench.note("ready", side, drain(bench, side, conn, 1, jobs=bench.sizes.backlog))


def pile(bench: Bench, side: Side, conn: psycopg.Connection[Any], kind: str) -> None:
    """Add a backlog; its queue is busy until the session ends."""
    side.fill(bench.server, conn, bench.sizes.backlog, **KINDS[kind])
    if kind == "queue" and conn.execute(side.occupy.encode()).rowcount != 1:
        raise RuntimeError(f"the queue of {side.name} is not busy")
