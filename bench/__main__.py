"""``python -m bench``: measure, and print one table. ``bench/README.md`` says what and how."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from bench import machine, results
from bench.adding import adding, latency
from bench.backlog import backlog, ready
from bench.claims import claims
from bench.draining import batches, held, history, throughput
from bench.limits import fairness, limits
from bench.payloads import payloads
from bench.peers import PeerMissingError, peers
from bench.recovery import recovery
from bench.report import ratio, table
from bench.resources import memory, resources
from bench.setting import QUICK, Bench, Sizes
from bench.sides import pgworker
from bench.steps import steps
from bench.trees import trees
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import NoPostgresError

MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "throughput": throughput,
    "batches": batches,
    "adding": adding,
    "latency": latency,
    "payloads": payloads,
    "resources": resources,
    "memory": memory,
    "steps": steps,
    "held": held,
    "backlog": backlog,
    "ready": ready,
    "history": history,
    "claims": claims,
    "limits": limits,
    "fairness": fairness,
    "trees": trees,
    "recovery": recovery,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, and return the process's status."""
    parser = argparse.ArgumentParser(prog="./run bench", description="Measure pgworker on a throwaway server.")
    parser.add_argument("--runs", type=_positive, metavar="N", help="how often to measure everything (5; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small numbers, no disk: does it work, not how fast is it")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--held", type=float, metavar="SECONDS", help="age of the snapshot in held (300; quick: 1)")
    parser.add_argument("--backlog", type=_positive, metavar="JOBS", help="in backlog and ready (1000000; quick: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there too")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json, NAME.md and plots")
    given = parser.parse_args(arguments)
    command = results.command(sys.argv[1:] if arguments is None else arguments)
    asked = {name: value for name in ("held", "backlog") if (value := getattr(given, name)) is not None}
    sizes = replace(QUICK if given.quick else Sizes(), **asked)
    try:
        ours, others = pgworker(), peers(os.environ.get("BENCH_PEERS", ""))
        server = EmbeddedServer(settings=machine.settings(), durable=not given.quick)
    except (PeerMissingError, NoPostgresError) as missing:
        print(f"bench: {missing}", file=sys.stderr)
        return 2
    with server:
        bench = Bench(server, ours, others, sizes, given.runs or (1 if given.quick else 5))
        about = {side.name: side.about for side in (ours, *others)}
        facts = machine.facts(server) | about
        for side in (ours, *others):
            side.install(server)
        for name in given.only or MEASUREMENTS:
            print(f"{name} …", flush=True)
            MEASUREMENTS[name](bench)
    facts["runs"] = f"{bench.runs}, load at the end {machine.load()}"
    printed = "\n".join(
        [
            table(bench.numbers, list(about), sizes),
            "",
            "Medians (least–most). Ratios are medians of the ratios run by run; of base: against the line that",
            "indented ones stand under.",
            *(f"{name}: {fact}" for name, fact in facts.items()),
        ]
    )
    print(f"\n{printed}")
    ratios = {
        row: {peer.name: ratio(sides[ours.name], sides[peer.name]) for peer in others if peer.name in sides}
        for row, sides in bench.numbers.items()
    }
    document = json.dumps(
        {"command": command, "facts": facts, "sizes": asdict(sizes), "numbers": bench.numbers, "ratios": ratios},
        indent=2,
    )
    if given.json:
        given.json.write_text(document + "\n", encoding="utf-8")
    if given.save:
        results.save(given.save, command, document, printed)
        results.plot(given.save, bench.numbers, list(about), sizes)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
