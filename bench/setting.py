"""What every measurement is given: the server, the sides, how much to do, and where the numbers go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.sides import Side
from pgworker_client.embedded import EmbeddedServer


@dataclass(frozen=True)
class Payloads:
    """Jobs with payloads of a certain size: how many are added one by one, and how many drained."""

    size: int
    added: int
    drained: int


@dataclass(frozen=True)
class Sizes:
    """How much is done, in jobs where nothing else is said.

    Attributes:
        buffers: of a worker: at most so many jobs are claimed ahead.
        processes: that drain together, where it is more than one.
        jobs: drained in each run.
        singles: added one by one, by however many sessions.
        sessions: how many add at once, where it is more than one.
        samples: of latency.
        gap: milliseconds between two samples.
        payloads: how large, and how many of each.
        payload: bytes of the payloads whose WAL is weighed.
        passed: jobs that a worker has run at the end, when its memory is looked at.
        rounds: how often at least `jobs` pass before the drains beside and under a held snapshot that count.
        held: seconds for which jobs pass under it before those.
        backlog: jobs that lie in the table besides.
        behind: jobs behind one busy queue.
        queues: serial queues, with ten jobs each.
        claims: claims of one job that are timed.
        children: of one parent.
        one_by_one: of one parent, ended one by one.

    """

    buffers: tuple[int, ...] = (1_000, 100, 10)
    processes: int = 4
    jobs: int = 100_000
    singles: int = 2_000
    sessions: tuple[int, ...] = (4, 8, 16)
    samples: int = 1_000
    gap: int = 10
    payloads: tuple[Payloads, ...] = (
        Payloads(100, 1_000, 20_000), Payloads(10_000, 500, 2_000), Payloads(1_000_000, 50, 50),
    )  # fmt: skip
    payload: int = 100
    passed: int = 1_000_000
    rounds: int = 3
    held: float = 300.0
    backlog: int = 1_000_000
    behind: int = 100_000
    queues: int = 10_000
    claims: int = 2_000
    children: int = 10_000
    one_by_one: int = 1_500


QUICK = Sizes(
    processes=2, jobs=2_000, singles=100, sessions=(2,), samples=100, passed=4_000,
    payloads=(Payloads(100, 20, 200), Payloads(10_000, 20, 100), Payloads(1_000_000, 10, 10)),
    gap=2, rounds=1, held=1.0, backlog=2_000, behind=2_000, queues=100,
    claims=50, children=500, one_by_one=64,
)  # fmt: skip


@dataclass
class Bench:
    """One run of the measurements.

    Attributes:
        ours: pgworker.
        peers: what it is compared with.
        runs: how often everything is measured.
        numbers: what was measured: by row (see `bench.report`) and side, one number a run.

    """

    server: EmbeddedServer
    ours: Side
    peers: list[Side]
    sizes: Sizes
    runs: int
    numbers: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def taking_part(self, measurement: str) -> list[Side]:
        """Return ours and those peers that can be measured so."""
        return [side for side in (self.ours, *self.peers) if measurement not in side.cannot]

    def rounds(self, measurement: str) -> Iterator[list[Side]]:
        """Yield those that take part once a run, in the order of their turns, which alternates: A B, B A, A B …"""
        sides = self.taking_part(measurement)
        for run in range(self.runs):
            yield sides[:: 1 if run % 2 == 0 else -1]

    def note(self, row: str, side: Side, number: float) -> None:
        """Keep a number, and show that something happens."""
        self.numbers.setdefault(row, {}).setdefault(side.name, []).append(number)
        print(f"  {row:24} {side.name:14} {number:12,.3f}", flush=True)
