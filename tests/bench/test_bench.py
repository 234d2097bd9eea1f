from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bench.__main__ import MEASUREMENTS
from bench.backlog import KINDS, pile
from bench.peers import GRAPHILE_PACKAGES, PEERS, PGBOSS_PACKAGES, PYTHON_PACKAGES, PeerMissingError, peers
from bench.processes import Child, wait_until
from bench.report import questions, rows, table
from bench.resources import _own_time
from bench.setting import QUICK, Bench
from bench.sides import pgworker
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.settings import Settings

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


def test_how_old_the_snapshot_is_can_be_said(tmp_path: Path) -> None:
    done = bench("--quick", "--only", "held", "--held", "0", "--json", str(tmp_path / "numbers.json"))

    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["sizes"]["held"] == 0
    assert written["numbers"]["held_passed"] == {"pgworker": [QUICK.rounds * QUICK.jobs]}


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_backlog_there_is_all_and_none_can_be_claimed(
    kind: str, server: EmbeddedServer, db: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.sides.CHUNK", 3)
    ours = pgworker()

    pile(Bench(server, ours, [], replace(QUICK, backlog=7), 1), ours, db, kind)

    assert db.execute("select count(*) from pgworker.job").fetchone() == (7,)
    assert not db.execute("select from pgworker.get_jobs(pgworker.register_worker(), 10, '{noop}')").fetchall()


#: In parts, which may run at the same time.
PARTS = [list(MEASUREMENTS)[begin : begin + 4] for begin in range(0, len(MEASUREMENTS), 4)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("asked", PARTS, ids="+".join)
def test_a_quick_run_prints_every_row_and_writes_every_number(asked: list[str], tmp_path: Path) -> None:
    done = bench("--quick", "--only", *asked, "--json", str(tmp_path / "numbers.json"))

    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "numbers.json").read_text())
    measured = [row for question in asked for row in questions(QUICK)[question]]
    assert written["numbers"].keys() == {row.key for row in measured}
    for row in measured:
        assert f"\n{row.title} " in done.stdout, row.title
        assert [number > 0 for number in written["numbers"][row.key]["pgworker"]] == [True], row.key
    for fact in ("machine", "PostgreSQL", "disk", "pgworker", "runs"):
        assert f"\n{fact}: " in done.stdout


def test_a_measured_worker_has_the_buffer_that_it_is_told_else_the_default() -> None:
    program = "from bench.programs.work import worker; print(worker.settings.buffer)"
    told = [
        subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **more}, text=True)
        for more in ({"BENCH_BUFFER": "10"}, {})
    ]

    assert told == ["10\n", f"{Settings().buffer}\n"]


PRODUCER = """
import asyncio
from bench.programs.orders import obey

added = []
async def add(payload): pass
async def add_many(payloads):
    added.extend(payloads)
    print("@ handled", len(added), flush=True)
asyncio.run(obey(add, add_many))
"""


def test_a_producer_adds_steadily_until_it_is_told_otherwise_and_never_more_than_it_should() -> None:
    with Child([sys.executable, "-c", PRODUCER], {"PYTHONPATH": str(ROOT)}) as producer:
        producer.wait_until_ready()
        for rate in (1000, 100):
            before = producer.handled
            producer.tell("steady", rate, 1)
            wait_until(lambda before=before: producer.handled >= before + 5, [producer], "what is added steadily")  # type: ignore[misc]
            took = producer.ask("stop")
            assert producer.handled - before == producer.added <= rate * took
        before = producer.handled
        producer.ask("bulk", 3, 0)
        assert producer.handled == before + 3


@pytest.mark.parametrize(
    ("peer", "variable", "home", "said"),
    [
        ("graphile", "BENCH_GRAPHILE_HOME", "", "BENCH_GRAPHILE_HOME is not set"),
        ("graphile", "BENCH_GRAPHILE_HOME", "/nowhere", "npm install graphile-worker@"),
        ("pgboss", "BENCH_PGBOSS_HOME", "", "BENCH_PGBOSS_HOME is not set"),
        ("pgboss_notify", "BENCH_PGBOSS_HOME", "/nowhere", "npm install pg-boss@"),
        ("pgmq", "BENCH_PYTHON_PEERS", "", "BENCH_PYTHON_PEERS is not set"),
        ("pgqueuer", "BENCH_PYTHON_PEERS", "/nowhere", "no /nowhere/bin/python"),
        ("procrastinate", "BENCH_PYTHON_PEERS", sys.prefix, "pip install procrastinate=="),
        ("pgworker,sidekiq", "BENCH_PYTHON_PEERS", "", "no peer 'pgworker'; known: graphile"),
    ],
)
def test_a_peer_that_is_not_there_is_said_before_anything_is_measured(
    peer: str, variable: str, home: str, said: str
) -> None:
    done = bench("--quick", BENCH_PEERS=peer, **{variable: home})

    assert done.returncode == 2
    assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_how_peers_are_installed_is_said_as_it_is_checked() -> None:
    readme = (ROOT / "bench/README.md").read_text(encoding="utf-8").replace("'", "")

    for package in (*PYTHON_PACKAGES, *GRAPHILE_PACKAGES, *PGBOSS_PACKAGES):
        assert f" {package}" in readme, package
    for name in PEERS:
        assert f"`{name}`" in readme, name


def installed() -> list[str]:
    found = []
    for name in PEERS:
        with contextlib.suppress(PeerMissingError):
            peers(name)
            found.append(name)
    return found


@pytest.mark.timeout(600)
def test_installed_peers_are_measured_side_by_side(tmp_path: Path) -> None:
    names = installed()
    if not names:
        pytest.skip("no other queue is installed: bench/README.md says how")
    compared = ("throughput", "adding", "latency", "payloads", "resources", "memory", "held", "backlog", "ready")

    done = bench("--quick", "--only", *compared, "--json", str(tmp_path / "numbers.json"), BENCH_PEERS=",".join(names))

    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "numbers.json").read_text())
    for side in peers(",".join(names)):
        for question in compared:
            for row in questions(QUICK)[question]:
                measured = written["numbers"][row.key]
                assert (side.name in measured) == (question not in side.cannot), (side.name, row.key)
                assert all(number > 0 for number in measured.get(side.name, []))
        assert f"\n{side.name}: {side.about}" in done.stdout


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


def test_what_is_saved_says_how_it_was_made(tmp_path: Path) -> None:
    asked = ("--quick", "--only", "claims", "--save", str(tmp_path / "new/first"))

    done = bench(*asked)

    assert done.returncode == 0, done.stdout
    text = (tmp_path / "new/first.md").read_text()
    written = json.loads((tmp_path / "new/first.json").read_text())
    assert written["command"] == shlex.join(("./run", "bench", *asked))
    assert f"\n{written['command']}\n" in text
    for row in questions(QUICK)["claims"]:
        assert f"\n{row.title} " in text
        assert len(written["numbers"][row.key]["pgworker"]) == 1
    if find_spec("matplotlib"):
        assert "<svg" in (tmp_path / "new/first-claims.svg").read_text()
    else:
        assert "no plots: they need matplotlib" in done.stdout


def test_every_measurement_has_rows_and_every_row_one_measurement() -> None:
    assert set(questions(QUICK)) == set(MEASUREMENTS)
    keys = [row.key for row in rows(QUICK)]
    assert len(set(keys)) == len(keys)
    assert {row.baseline for row in rows(QUICK)} <= {None, *keys}


def test_processor_time_of_a_process_is_told_finer_than_in_ticks() -> None:
    own = os.getpid()
    before, kernels_before = _own_time(own), time.process_time()
    while time.process_time() - kernels_before < 0.02:
        pass
    spent, kernels = _own_time(own) - before, time.process_time() - kernels_before

    assert abs(spent - kernels) < 0.005
    assert _own_time(2**22 + 1) == 0  # there is no such process
