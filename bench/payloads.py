"""How fast jobs with small, large and very large payloads are added one by one, and drained."""

from __future__ import annotations

from bench.draining import drain
from bench.setting import Bench


def payloads(bench: Bench) -> None:
    """Add jobs of each size from one session, each in a transaction of its own; then drain with one process."""
    for kind in bench.sizes.payloads:
        for sides in bench.rounds("payloads"):
            for side in sides:
                with side.connect(bench.server) as conn:
                    conn.execute(side.clear.encode())
                    side.settle(conn)
                    with side.start(bench.server, "produce") as producer:
                        producer.wait_until_ready()
                        spent = producer.ask("single", kind.added, kind.size)
                    bench.note(f"payload_add_{kind.size}", side, kind.added / spent)
                    rate = drain(bench, side, conn, 1, jobs=side.count(kind.drained), size=kind.size)
                    bench.note(f"payload_drain_{kind.size}", side, rate)
                    conn.execute(side.clear.encode())
