"""How fast one and several sessions add jobs, and how soon a job that was added runs.

These take short moments, so within a run the sides alternate too, block by block: whatever else the machine does
meanwhile hits them alike.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

from bench.draining import drain
from bench.processes import Child, wait_until
from bench.programs.orders import WARMING_UP
from bench.setting import Bench
from bench.sides import Side

BLOCKS = 20
#: Milliseconds between two calls that add the jobs of a load, few at a time.
PAUSE = 5
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
    """Time jobs from before the call that adds them, in one process, to the first line of the handler in another.

    First the workers have nothing else to do; then each is given half of what it has just been seen to drain.
    """
    for sides in bench.rounds("latency"):
        _take_samples(bench, sides)
        halves = {}
        for side in sides:
            with side.connect(bench.server) as conn:
                halves[side.name] = max(int(drain(bench, side, conn, 1) / 2), 1)
        _take_samples(bench, sides, halves)


def _take_samples(bench: Bench, sides: list[Side], rates: Mapping[str, int] | None = None) -> None:
    """Add jobs whose latency is taken; where there are rates, another producer adds others at the side's meanwhile."""
    samples = bench.sizes.samples // BLOCKS
    with contextlib.ExitStack() as stack:
        producers = stack.enter_context(_producers(bench, sides))
        loads = stack.enter_context(_producers(bench, sides)) if rates else {}
        workers = {side.name: stack.enter_context(side.start(bench.server, "work")) for side in sides}
        for worker in workers.values():
            _wait_until_handled(worker, WARMING_UP)  # the producers'
        added, spent = dict.fromkeys(loads, 0), dict.fromkeys(loads, 0.0)
        for block in range(BLOCKS + 1):
            for name, worker in workers.items():
                if rates:
                    before = worker.handled
                    loads[name].tell("steady", rates[name], PAUSE)
                    _wait_until_handled(worker, before + 1)
                producers[name].ask("timed", samples, bench.sizes.gap)
                _wait_for_delays(worker, samples * max(block, 1))
                if rates:
                    took = loads[name].ask("stop")
                    _wait_until_handled(worker, before + samples + loads[name].added)
                    added[name] += loads[name].added
                    spent[name] += took
                if not block:
                    worker.delays.clear()  # the first block is for warming up
    for side in sides:
        row = "loaded" if rates else "latency"
        delays = workers[side.name].delays
        percentiles = statistics.quantiles(delays, n=100, method="inclusive")
        for which, milliseconds in (
            ("p50", percentiles[49]),
            ("p95", percentiles[94]),
            ("p99", percentiles[98]),
            ("max", max(delays)),
        ):
            bench.note(f"{row}_{which}", side, milliseconds)
        if rates:
            bench.note("loaded_rate", side, added[side.name] / spent[side.name])


def _wait_until_handled(worker: Child, jobs: int) -> None:
    wait_until(lambda: worker.handled >= jobs, [worker], "the jobs that are not timed", 0.001)


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
