from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import rows, table
from bench.setting import QUICK

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, "BENCH_PEERS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
def test_a_quick_run_prints_every_row_and_writes_every_number(tmp_path: Path) -> None:
    done = bench("--quick", "--json", str(tmp_path / "numbers.json"))

    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "numbers.json").read_text())
    for row in rows(QUICK):
        assert f"\n{row.title} " in done.stdout, row.title
        assert [number > 0 for number in written["numbers"][row.key]["pgworker"]] == [True], row.key
    for fact in ("machine", "PostgreSQL", "disk", "pgworker", "runs"):
        assert f"\n{fact}: " in done.stdout


@pytest.mark.parametrize(
    ("peer", "home", "said"),
    [
        ("graphile", "", "BENCH_GRAPHILE_HOME is not set"),
        ("graphile", "/nowhere", "npm install graphile-worker"),
        ("sidekiq", "", "no peer 'sidekiq'; known: graphile"),
    ],
)
def test_a_peer_that_is_not_there_is_said_before_anything_is_measured(peer: str, home: str, said: str) -> None:
    done = bench("--quick", BENCH_PEERS=peer, BENCH_GRAPHILE_HOME=home)

    assert done.returncode == 2
    assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_ratios_are_taken_run_by_run_and_only_of_what_was_measured() -> None:
    numbers = {
        "throughput_1": {"pgworker": [30_000.0, 10_000.0, 40_000.0], "graphile": [15_000.0, 10_000.0, 10_000.0]},
        "held_not": {"pgworker": [100.0]},
        "held": {"pgworker": [95.0]},
    }

    head, first, *rest = table(numbers, ["pgworker", "graphile"], QUICK).splitlines()

    assert head.split() == ["pgworker", "of", "base", "graphile", "pgworker/graphile"]
    assert first.endswith("jobs/s  30,000 (10,000–40,000)           10,000 (10,000–15,000)               2.00")
    assert [line.split("jobs/s")[1].split() for line in rest] == [["100"], ["95.00", "0.95"]]
