"""``./run soak``: go round through all faults, at random, for as long as one likes; then print the table."""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time

from pgworker_client.installations import NoPostgresError, find_installation
from tests.faults.catalog import FAULTS, tried
from tests.faults.ground import Ground
from tests.faults.of_servers import CannotBeTried
from tests.faults.table import lines, together
from tests.faults.trial import Outcome

JOBS = 5_000


def main(arguments: list[str] | None = None) -> int:
    """Try faults until the time is over, each once at least; return 1 if any job was lost or ran twice unexplained."""
    parser = argparse.ArgumentParser(prog="./run soak", description="Do harm of every kind to workers and servers.")
    parser.add_argument(
        "--minutes", type=float, default=30, metavar="N", help="for how long (30); all faults, at least"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="what is done at random is done as it was with this seed")
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help=f"jobs of each trial ({JOBS})")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="faults whose names contain one of these")
    parser.add_argument("--pg", default="best", metavar="MAJOR", help="PostgreSQL: 14 … 18, newest, or best")
    given = parser.parse_args(arguments)
    names = [name for name in FAULTS if not given.only or any(text in name for text in given.only)]
    if not names:
        parser.error(f"no such fault; there are: {', '.join(FAULTS)}")
    try:
        installation = find_installation(given.pg)
    except (NoPostgresError, ValueError) as error:
        parser.error(f"--pg: {error}")
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    print(f"seed {seed}, PostgreSQL {installation.major}, {given.jobs:,} jobs a trial", flush=True)
    outcomes: list[Outcome] = []
    failed = 0
    deadline = time.monotonic() + 60 * given.minutes
    chance = random.Random(seed)
    with Ground(installation, jobs=given.jobs, patient=True) as ground:
        first = True
        while first or time.monotonic() < deadline:
            for name in chance.sample(names, len(names)):
                own = random.Random(chance.random())
                if not first and time.monotonic() > deadline:
                    break
                begun = time.monotonic()
                try:
                    outcome = tried(ground, name, own)
                except CannotBeTried as impossible:
                    said = f"not tried: {impossible}"
                except Exception as error:  # the others are to be tried all the same
                    failed += 1
                    said = f"FAILED: {type(error).__name__}: {error}"
                else:
                    outcomes.append(outcome)
                    failed += not outcome.survived
                    said = "survived" if outcome.survived else f"FAILED: {outcome}"
                print(f"{name}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
            first = False
    print("\n" + "\n".join(lines(together(outcomes))))
    print(f"\n{len(outcomes)} trials, {failed} failed, seed {seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
