"""The count that ends each trial sees what it is there to see."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.faults.fleet import ROOT
from tests.faults.ground import Ground
from tests.faults.table import lines, together
from tests.faults.trial import Outcome, Trial

_RUN = "insert into public.run (n, job_id, attempt, at) select n, n, 1, to_timestamp(%s) from generate_series(1, %s) n"


@pytest.fixture
def trial(server: EmbeddedServer) -> Iterator[Trial]:
    with (
        Ground(server.installation, jobs=20, patient=False) as ground,
        ground.trial("nothing", random.Random(1)) as trial,
    ):
        yield trial


def test_jobs_that_are_lost_or_run_twice_without_a_fault_between_are_counted(trial: Trial) -> None:
    outcome = trial.counted()
    assert (outcome.jobs, outcome.lost, outcome.doubled, outcome.survived) == (20, 20, 0, False)
    assert "2 effects of transactions are not there" in outcome.problems
    assert any("a job is ready" in problem for problem in outcome.problems)

    with trial.connect() as conn:
        conn.execute("select from pgworker.complete_jobs(array(select id from pgworker.job))")
        conn.execute("insert into public.effect values (10), (20)")
        conn.execute(_RUN, [100, 20])
    assert trial.counted() == Outcome("nothing", 20, 0, 0, 0, None)
    assert trial.counted().survived

    with trial.connect() as conn:
        conn.execute(_RUN, [200, 3])
        conn.execute("insert into public.effect values (20)")
    outcome = trial.counted()
    assert (outcome.lost, outcome.doubled, outcome.unexplained, outcome.survived) == (0, 3, 3, False)
    assert "1 effects of transactions are there twice" in outcome.problems

    begun = time.time()
    with trial.fault(recovers=False):
        pass
    with trial.connect() as conn:
        conn.execute("delete from public.run where at = to_timestamp(200)")
        conn.execute(_RUN, [begun + 60, 3])
    outcome = trial.counted()
    assert (outcome.doubled, outcome.unexplained) == (3, 0)


def test_the_table_has_a_line_for_each_fault() -> None:
    outcomes = [Outcome("a", 1_000, 0, 1, 0, 0.52), Outcome("bb", 5, 1, 0, 0, None), Outcome("a", 500, 0, 2, 0, 1.0)]
    head, *rest = lines(together(outcomes))
    assert head.split("  ")[0] == "fault"
    assert [line.split() for line in rest] == [["a", "1,500", "0", "3", "0", "1.0"], ["bb", "5", "1", "0", "0"]]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--only", "clocks", "--seed", "7"], 0, "1 trials, 0 failed, seed 7"),
        (["--only", "meteorite"], 2, "no such fault; there are: server restarted (fast), "),
    ],
)
def test_soak_says_what_it_did(arguments: list[str], status: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--minutes", "0", "--jobs", "200", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert said in done.stdout
