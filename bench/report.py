"""The rows of the table, in their order, and the table itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.setting import Sizes

Numbers = Mapping[str, Mapping[str, Sequence[float]]]
"""By row and side, one number a run."""


@dataclass(frozen=True)
class Row:
    """One line: what was measured, in which unit, and the row of ours that it is held against, if there is one."""

    key: str
    title: str
    unit: str
    baseline: str | None = None


def questions(sizes: Sizes) -> dict[str, list[Row]]:
    """Return the rows that a whole run has, by the measurement that they are from."""
    buffer, *smaller = sizes.buffers
    return {
        "throughput": [
            Row("throughput_1", f"{sizes.jobs:,} jobs, 1 process", "jobs/s"),
            Row("throughput_many", f"{sizes.jobs:,} jobs, {sizes.processes} processes", "jobs/s"),
        ],
        "batches": [
            Row(f"buffer_{buffer}", f"{sizes.jobs:,} jobs, up to {buffer:,} claimed ahead", "jobs/s"),
            *(Row(f"buffer_{count}", f"  up to {count:,}", "jobs/s", f"buffer_{buffer}") for count in smaller),
        ],
        "adding": [
            Row("add_single", "adding one by one, 1 session", "jobs/s"),
            *(Row(f"add_sessions_{count}", f"  {count} sessions", "jobs/s", "add_single") for count in sizes.sessions),
            Row("add_bulk", f"adding {sizes.jobs:,} with one call", "jobs/s"),
            *(
                Row(f"add_bulk_{count}", f"  {count} sessions, one call each", "jobs/s", "add_bulk")
                for count in sizes.sessions
            ),
        ],
        "latency": [
            Row("latency_p50", f"latency, {sizes.samples:,} samples: p50", "ms"),
            Row("latency_p95", "  p95", "ms"),
            Row("latency_p99", "  p99", "ms"),
            Row("latency_max", "  max", "ms"),
            Row("loaded_p50", "latency at half load: p50", "ms"),
            Row("loaded_p95", "  p95", "ms"),
            Row("loaded_p99", "  p99", "ms"),
            Row("loaded_max", "  max", "ms"),
            Row("loaded_rate", "  jobs added meanwhile", "jobs/s"),
        ],
        "payloads": [
            *(
                Row(f"payload_add_{kind.size}", f"adding one by one, payloads of {in_bytes(kind.size)}", "jobs/s")
                for kind in sizes.payloads
            ),
            *(
                Row(f"payload_drain_{kind.size}", f"{kind.drained:,} jobs, payloads of {in_bytes(kind.size)}", "jobs/s")
                for kind in sizes.payloads
            ),
        ],
        "resources": [
            Row("wal", f"WAL from adding to the end, {in_bytes(sizes.payload)} payload", "B/job"),
            Row("cpu_server", "processor time of the server", "µs/job"),
            Row("cpu_worker", "  of the worker", "µs/job"),
        ],
        "memory": [
            Row("memory_0", f"a worker's memory after {sizes.passed // 1000:,} jobs", "MB"),
            *(
                Row(f"memory_{quarter}", f"  after {sizes.passed * quarter // 4:,}", "MB", "memory_0")
                for quarter in (1, 2, 3, 4)
            ),
        ],
        "steps": [
            Row("step_trip", "a round trip of one session", "µs"),
            Row("step_insert", f"bare rows in bulk: insert {sizes.jobs:,}", "µs/row"),
            Row("step_add", "  jobs: add_jobs", "µs/job", "step_insert"),
            Row("step_update", "bare rows: update 500 at a time", "µs/row"),
            Row("step_claim", "  jobs: get_jobs", "µs/job", "step_update"),
            Row("step_delete", "bare rows: delete 500 at a time", "µs/row"),
            Row("step_finish", "  jobs: finish_jobs", "µs/job", "step_delete"),
        ],
        "held": [
            Row("held_not", f"1 process, {sizes.jobs:,} jobs again and again", "jobs/s"),
            Row("held", f"  after {sizes.held:g} s under an old snapshot", "jobs/s", "held_not"),
            Row("held_passed", "  jobs that have passed in that time", "jobs"),
        ],
        "backlog": [
            *(
                row
                for kind, others in (
                    ("future", f"beside {sizes.backlog:,} of the future"),
                    ("foreign", f"behind {sizes.backlog:,} foreign ones"),
                    ("queue", f"behind {sizes.backlog:,} of a busy queue"),
                )
                for row in (
                    Row(f"backlog_{kind}_not", f"{sizes.jobs:,} jobs, 1 process", "jobs/s"),
                    Row(f"backlog_{kind}", f"  {others}", "jobs/s", f"backlog_{kind}_not"),
                    Row(f"backlog_{kind}_first", "  the first ones of a new worker", "jobs/s", f"backlog_{kind}_not"),
                )
            ),
        ],
        "ready": [
            Row("ready_not", f"{sizes.jobs:,} jobs, 1 process", "jobs/s"),
            Row("ready", f"  {sizes.backlog:,} instead", "jobs/s", "ready_not"),
        ],
        "history": [
            Row("history_off", f"{sizes.jobs:,} jobs, 1 process, no history", "jobs/s"),
            Row("history", "  with a history of what fails, as it is", "jobs/s", "history_off"),
            Row("history_kept", "  every job and attempt kept", "jobs/s", "history_off"),
        ],
        "claims": [
            Row("claim_empty", "claim of 1 job, nothing else there", "ms"),
            Row("claim_behind", f"  {sizes.behind:,} behind one busy queue", "ms", "claim_empty"),
            Row("claim_busy_queues", f"  {10 * sizes.queues:,} in {sizes.queues:,} busy queues", "ms", "claim_empty"),
            Row(
                "claim_foreign_queues",
                f"  {10 * sizes.queues:,} foreign, {sizes.queues:,} queues",
                "ms",
                "claim_empty",
            ),
        ],
        "limits": [
            Row("limit_none", "claim of 1 job, nothing else there", "ms"),
            Row("limit_few", f"  {sizes.behind // 1000:,} wait for one limit", "ms", "limit_none"),
            Row("limit_one", f"  {sizes.behind:,} wait for one limit", "ms", "limit_none"),
            Row("limit_keys", f"  {10 * sizes.queues:,} for limits of {sizes.queues:,} keys", "ms", "limit_none"),
            Row("limit_own", "  itself limited, by task and by key", "ms", "limit_none"),
        ],
        "fairness": [
            Row("fair_not", f"10 jobs of a key behind {sizes.behind:,} of another", "claimed"),
            Row("fair", "  with fairness", "claimed", "fair_not"),
        ],
        "trees": [
            Row("tree_add_plain", f"adding {sizes.jobs:,} with one call", "jobs/s"),
            Row("tree_add", "  a tree of as many", "jobs/s", "tree_add_plain"),
            Row("tree_unrelated", f"{sizes.children:,} jobs with results, {sizes.processes} processes", "jobs/s"),
            Row("tree_children", "  children of one parent", "jobs/s", "tree_unrelated"),
            Row("tree_hundreds", f"{sizes.jobs:,} children, a hundred a parent", "jobs/s"),
            Row("tree_siblings", "  of one parent", "jobs/s", "tree_hundreds"),
            Row("tree_slots_one", "children one by one, commits of 5 ms, 1 counter", "jobs/s"),
            Row("tree_slots", "  as it is", "jobs/s", "tree_slots_one"),
            Row("tree_held_not", f"{sizes.jobs:,} children of one parent", "jobs/s"),
            Row("tree_held", "  the same under an old snapshot", "jobs/s", "tree_held_not"),
        ],
        "recovery": [
            Row("recovery_killed", "jobs of a killed worker claimed by another", "s"),
            Row("recovery_unregistered", "jobs of one that said goodbye run by another", "s"),
            Row("recovery_crashed", "jobs run after the server, crashed, is back", "s"),
        ],
    }


def rows(sizes: Sizes) -> list[Row]:
    """Return every row that a whole run has."""
    return [row for found in questions(sizes).values() for row in found]


def in_bytes(size: int) -> str:
    """Return a number of bytes as one reads it: 10 kB."""
    for unit, factor in (("MB", 1_000_000), ("kB", 1_000)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} B"


def table(numbers: Numbers, sides: Sequence[str], sizes: Sizes) -> str:
    """Return the measured rows: medians, in brackets least and most; ratios are medians of the ratios run by run.

    Args:
        numbers: what was measured.
        sides: ours, then the peers.
        sizes: what the titles say.

    """
    ours, *peers = sides
    lines = [["", "", ours, "of base", *(head for peer in peers for head in (peer, f"{ours}/{peer}"))]]
    first = {row.key: row for row in rows(sizes)}
    for row in first.values():
        if row.key not in numbers:
            continue
        measured = numbers[row.key]
        base = numbers.get(row.baseline or "", {}).get(ours)
        cells = [row.title, row.unit, _spread(measured.get(ours)), _ratio(measured.get(ours), base)]
        for peer in peers:
            cells += [_spread(measured.get(peer)), _ratio(measured.get(ours), measured.get(peer))]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = 2  # the first columns are words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios, run by run: neighbours in time had the same machine to share."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=False))


def _ratio(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> str:
    return f"{ratio(ours, theirs):.2f}" if ours and theirs else ""


def _spread(numbers: Sequence[float] | None) -> str:
    if not numbers:
        return ""
    middle = statistics.median(numbers)
    if len(numbers) == 1:
        return _number(middle)
    return f"{_number(middle)} ({_number(min(numbers))}–{_number(max(numbers))})"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"
