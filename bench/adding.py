"""How fast one and several sessions add jobs, and how soon a job that was added runs.

These take short moments, so within a run the sides alternate too, block by block: whatever else the machine does
meanwhile hits them alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

from bench.processes import Child, wait_until
from bench.setting import Bench
from bench.sides import Side

BLOCKS = 20
#: Of several sessions, which begin and end together: fewer and longer.
CROWDED_BLOCKS = 5


def adding(bench: Bench) -> None:
    """Add jobs one by one, each in a transaction of its own, then many with one call; nobody works meanwhile.

    Then both from several sessions.
    """
    sizes = bench.sizes
    singles = sizes.singles // BLOCKS
    for sides in bench.rounds("adding"):
        with _producers(bench, sides) as producers:
            spent = dict.fromkeys(producers, 0.0)
            for _ in range(BLOCKS):
                for name, producer in producers.items():
                    spent[name] += producer.ask("single", singles, 0)
            for side in sides:
                bench.note("add_single", side, BLOCKS * singles / spent[side.name])
            for side in sides:
                count = side.count(sizes.jobs)
                bench.note("add_bulk", side, count / producers[side.name].ask("bulk", count, 0))
        _sessions(bench, sides)
        for side in sides:
            with side.connect(bench.server) as conn:
                conn.execute(side.clear.encode())


def _sessions(bench: Bench, sides: list[Side]) -> None:
    """Add jobs one by one, then in bulk, from several sessions at once; those with nothing to do are there too."""
    sizes = bench.sizes
    with contextlib.ExitStack() as stack:
        crowds = {
            side.name: [stack.enter_context(side.start(bench.server, "produce")) for _ in range(max(sizes.sessions))]
            for side in sides
        }
        for crowd in crowds.values():
            for producer in crowd:
                producer.wait_until_ready()
        for sessions in sizes.sessions:
            singles = max(sizes.singles // CROWDED_BLOCKS // sessions, 1)
            spent = dict.fromkeys(crowds, 0.0)
            for _ in range(CROWDED_BLOCKS):
                for name, crowd in crowds.items():
                    spent[name] += _together(crowd[:sessions], "single", singles)
            for side in sides:
                bench.note(f"add_sessions_{sessions}", side, CROWDED_BLOCKS * sessions * singles / spent[side.name])
            for side in sides:
                each = max(side.count(sizes.jobs) // sessions, 1)
                took = _together(crowds[side.name][:sessions], "bulk", each)
                bench.note(f"add_bulk_{sessions}", side, sessions * each / took)


def _together(producers: Sequence[Child], how: str, each: int) -> float:
    """Have several sessions add so many jobs each; returns the seconds until the last one has."""
    begun = time.perf_counter()
    for producer in producers:
        producer.tell(how, each, 0)
    for producer in producers:
        producer.done()
    return time.perf_counter() - begun


def latency(bench: Bench) -> None:
    """Time jobs from before the call that adds them, in one process, to the first line of the handler in another."""
    sizes = bench.sizes
    samples = sizes.samples // BLOCKS
    for sides in bench.rounds("latency"):
        with _producers(bench, sides) as producers, contextlib.ExitStack() as stack:
            workers = {side.name: stack.enter_context(side.start(bench.server, "work")) for side in sides}
            for block in range(BLOCKS + 1):
                for name, worker in workers.items():
                    producers[name].ask("timed", samples, sizes.gap)
                    _wait_for_delays(worker, samples * max(block, 1))
                    if not block:
                        worker.delays.clear()  # the first block is for warming up
        for side in sides:
            delays = workers[side.name].delays
            percentiles = statistics.quantiles(delays, n=100, method="inclusive")
            for row, milliseconds in (
                ("latency_p50", percentiles[49]),
                ("latency_p95", percentiles[94]),
                ("latency_p99", percentiles[98]),
                ("latency_max", max(delays)),
            ):
                bench.note(row, side, milliseconds)


def _wait_for_delays(worker: Child, count: int) -> None:
    wait_until(lambda: len(worker.delays) >= count, [worker], "the jobs whose latency is taken", 0.02)


@contextlib.contextmanager
def _producers(bench: Bench, sides: list[Side]) -> Iterator[dict[str, Child]]:
    """Start a producer of each side on an empty table, by the side's name."""
    for side in sides:
        with side.connect(bench.server) as conn:
            conn.execute(side.clear)
            side.settle(conn)
    with contextlib.ExitStack() as stack:
        producers = {side.name: stack.enter_context(side.start(bench.server, "produce")) for side in sides}
        for producer in producers.values():
            producer.wait_until_ready()
        yield producers
