"""Workers are killed, backends terminated, the server crashes while thousands of jobs run.

Every job ends, and whatever ran twice did so because of one of these faults.

PGWORKER_FAULT_JOBS sets how many jobs (default 15,000).
"""

from __future__ import annotations

import bisect
import os
import random
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.faults.fleet import Fleet
from tests.invariants import assert_consistent
from tests.waiting import until

JOBS = int(os.environ.get("PGWORKER_FAULT_JOBS", "15000"))
PROCESSES = 3
# Claims are committed asynchronously: a crash of the server may undo one. Its worker runs the job all the same when the
# turn comes in its buffer, and so does the worker that claims it then. Seconds that a job may wait in a buffer.
CLAIMED_AHEAD = 2

_TASK = '''
import random, time

def handle(payload, ctx):
    """Record the run; some jobs take a while, so that kills meet them at work."""
    with ctx.connection() as conn:
        conn.execute(
            "insert into public.run (job_id, attempt) values (%s, %s)", (ctx.job.id, ctx.job.attempts)
        )
    if payload % 100 == 0:
        time.sleep(0.05)
'''

_ADD = """
select count(*) from pgworker.add_jobs((
  select jsonb_agg(jsonb_build_object(
    'identifier', 'record', 'payload', n, 'priority', mod(n, 3),
    'queue_name', case when mod(n, 25) = 0 then 'q' || mod(n / 25, 15) end))
  from generate_series(%s::int, %s::int) n))
"""


@pytest.mark.timeout(max(180, JOBS // 100))
def test_every_job_ends_and_runs_again_only_after_a_fault(own_server: EmbeddedServer, tmp_path: Path) -> None:
    dsn = own_server.dsn()
    (tmp_path / "record.py").write_text(_TASK)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("insert into pgworker.setting values ('rescue_grace', '2 seconds')")
        conn.execute(
            "create table public.run (job_id bigint, attempt int, at timestamptz not null default clock_timestamp())"
        )
        for first in range(1, JOBS + 1, 10_000):
            conn.execute(_ADD, [first, min(first + 9_999, JOBS)])

    faults: list[float] = []
    with Fleet(dsn, tmp_path, PROCESSES, "-j", "8", "--poll-interval", "0.2") as fleet:
        until(lambda: _recorded(dsn) > JOBS // 20, "the first runs", timeout=60)
        # Undisturbed, nothing runs twice.
        assert _again(dsn) == []
        _disturb(own_server, fleet, faults)
        _let_them_finish(dsn, fleet)
        fleet.stop()
        assert fleet.killed >= 3

    with psycopg.connect(dsn, autocommit=True) as conn:
        assert conn.execute("select state, count(*) from pgworker.jobs group by state").fetchall() == []
        assert conn.execute("select count(distinct job_id) from public.run").fetchone() == (JOBS,)
        assert_consistent(conn)
        assert conn.execute("select count(*) from pgworker.queue where job_id is not null").fetchone() == (0,)
    again = _again(dsn)
    unexplained = [
        (job, before, after)
        for job, before, after in again
        if bisect.bisect(faults, before - CLAIMED_AHEAD) == bisect.bisect(faults, after)
    ]
    assert not unexplained, f"ran again without a fault between: {unexplained[:10]}"
    assert len(again) < JOBS / 4


def _recorded(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute("select count(distinct job_id) from public.run").fetchone()
        assert row is not None
        return int(row[0])


def _again(dsn: str) -> list[tuple[int, float, float]]:
    """Return, for each run that is not its job's first: the job, when the run before it began, when it began."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(
            "select job_id, extract(epoch from before)::float8, extract(epoch from at)::float8"
            " from (select job_id, at, lag(at) over (partition by job_id order by at) as before from public.run) r"
            " where before is not null"
        ).fetchall()


def _disturb(server: EmbeddedServer, fleet: Fleet, faults: list[float]) -> None:
    """Do harm, at random, until most of the jobs have run; crash the server twice on the way."""
    chance = random.Random(7)
    crashes = [0.6, 0.3]  # of the jobs
    rounds = 0
    while (done := _recorded(server.dsn()) / JOBS) < 0.8 or rounds < 8:
        rounds += 1
        faults.append(time.time())
        if crashes and done >= crashes[-1]:
            crashes.pop()
            server.restart("immediate")
        elif chance.random() < 0.4 or fleet.killed < 3 <= rounds:
            fleet.kill_one(chance)
        else:
            with psycopg.connect(server.dsn(), autocommit=True) as conn:
                conn.execute(
                    "select pg_terminate_backend(pid) from (select pid from pg_stat_activity"
                    " where backend_type = 'client backend' and pid <> pg_backend_pid()"
                    " order by random() limit %s) victims",
                    [chance.randint(1, 4)],
                )
        faults.append(time.time())
        time.sleep(chance.uniform(0.05, 0.4) * max(1, JOBS / 50_000))


def _let_them_finish(dsn: str, fleet: Fleet) -> None:
    """Wait until nothing is live, without the pauses before retries."""

    def over() -> bool:
        fleet.check()
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "select count(*) from pgworker.reschedule_jobs(array("
                "select id from pgworker.jobs where state = 'scheduled'), now())"
            )
            return conn.execute("select from pgworker.job limit 1").fetchone() is None

    def left() -> Any:
        with psycopg.connect(dsn, autocommit=True) as conn:
            return conn.execute("select state, locked_by, count(*) from pgworker.jobs group by 1, 2").fetchall()

    try:
        until(over, "the end of all jobs", timeout=max(60, JOBS / 200))
    except AssertionError as error:
        raise AssertionError(f"{error}; live: {left()}; the workers said:\n{fleet.said()}") from error
