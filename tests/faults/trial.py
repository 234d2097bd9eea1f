"""One fault's trial: jobs are added, workers work, harm is done, all is awaited, and the count is taken."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from pgworker_client.embedded import EmbeddedServer
from tests.faults import load
from tests.faults.fleet import Fleet
from tests.invariants import violations
from tests.waiting import until

Conn = psycopg.Connection[Any]

#: Claims are committed asynchronously: a crash of the server may undo one. Its worker runs the job all the same when
#: the turn comes in its buffer, and so does the worker that claims it then. Seconds that a job may wait in a buffer.
CLAIMED_AHEAD = 2

_AGAIN = """
select r.job_id, extract(epoch from case when r.inherited then r.registered else r.claimed end)::float8,
       extract(epoch from r.before)::float8, extract(epoch from r.at)::float8
from (select job_id, at, inherited, lag(registered) over w as registered, lag(claimed) over w as claimed,
             lag(at) over w as before, lag(raised) over w as raised
      from public.run window w as (partition by job_id order by at)) r
where r.before is not null and not r.raised
"""
_MISSING = """
select count(*) from generate_series(1, %s) n
where not exists (select from public.run r where r.n = n.n and not r.raised)
"""
_HELD = "select id, locked_by, attempts from pgworker.job where locked_by is not null"


@dataclass(frozen=True)
class Outcome:
    """What is said of a fault: jobs that were lost, jobs that ran again, and how many of these nothing explains.

    ``recovery``: seconds from the end of the fault, the longest if there were several, until a job was begun and
    nothing was held any more as it was when the fault began. None where there is nothing to recover from.
    """

    fault: str
    jobs: int
    lost: int
    doubled: int
    unexplained: int
    recovery: float | None
    problems: tuple[str, ...] = ()

    @property
    def survived(self) -> bool:
        """Whether all is as it must be."""
        return not (self.lost or self.unexplained or self.problems)


class Trial:
    """What a fault is given: a server with a database full of jobs, and what it takes to do harm.

    Attributes:
        server: where the database is now; faults that fail over change it.
        dbname: its name there.
        jobs: how many there are.
        chance: whatever is done at random comes from it.
        outcome: what came of it, once it is finished.
    """

    def __init__(self, name: str, server: EmbeddedServer, dbname: str, jobs: int, chance: random.Random) -> None:
        self.name = name
        self.server = server
        self.dbname = dbname
        self.chance = chance
        self.outcome: Outcome | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="tasks-"))
        load.write_tasks(self._directory)
        self._fleets: list[Fleet] = []
        self._faults: list[tuple[float, float]] = []
        self._recovery: list[float] = []
        self._effects = 0
        self.jobs = 0
        with self.connect() as conn:
            conn.execute(load.TABLES)
            conn.execute("select pgworker.grant_worker('worker')")
        self.add(jobs)

    def close(self) -> None:
        """Remove the tasks and the logs."""
        shutil.rmtree(self._directory)

    def add(self, jobs: int) -> None:
        """Add so many jobs."""
        with self.connect() as conn:
            effects = load.add(conn, self.jobs + 1, self.jobs + jobs)
        self.jobs += jobs
        self._effects += effects

    def connect(self) -> Conn:
        """Return an autocommit connection of a superuser."""
        return psycopg.connect(self.server.dsn(self.dbname), autocommit=True)

    def dsn(self) -> str:
        """Return the connection string of workers that connect without detours."""
        return self.server.dsn(self.dbname, "worker")

    def value(self, query: str, *parameters: Any) -> Any:
        """Return the one value that a query returns."""
        with self.connect() as conn:
            (found,) = conn.execute(query, parameters).fetchone() or (None,)
            return found

    @contextlib.contextmanager
    def fleet(self, dsn: str, size: int, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Fleet]:
        """Run so many worker processes, which work when the block begins."""
        with Fleet(dsn, self._directory, size, "-j", "8", *arguments, environment=environment) as fleet:
            self._fleets.append(fleet)
            try:
                until(fleet.started, "the workers start", timeout=60)
                yield fleet
            except AssertionError as error:
                raise AssertionError(f"{error}\nthe workers said:\n{fleet.said()}") from error

    def underway(self, share: float = 0.05) -> None:
        """Wait until that share of the jobs has run. Undisturbed, nothing has run twice by then."""
        query = "select count(*) from public.run"
        until(lambda: self.value(query) > self.jobs * share, f"{share:.0%} of the jobs", timeout=120)
        assert self._faults or self._again() == []

    @contextlib.contextmanager
    def fault(self, *, recovers: bool = True) -> Iterator[None]:
        """The harm is done inside the block and over at its end; then wait for the recovery."""
        for fleet in self._fleets:
            fleet.forget()
        with self.connect() as conn:
            held = conn.execute(_HELD).fetchall()
        begun = time.time()
        yield
        over = time.time()
        self._faults.append((begun, over))
        if recovers:
            until(lambda: self._recovered(held, over), "the recovery", timeout=120)
            self._recovery.append(time.time() - over)

    def finish(self) -> None:
        """Wait until nothing is live, without the pauses before retries; stop the workers in good order; count."""

        def over() -> bool:
            for fleet in self._fleets:
                fleet.check()
            with self.connect() as conn:
                conn.execute(
                    "select count(*) from pgworker.reschedule_jobs(array("
                    "select id from pgworker.jobs where state = 'scheduled'), now())"
                )
                return conn.execute("select from pgworker.job limit 1").fetchone() is None

        try:
            until(over, "the end of all jobs", timeout=max(60, self.jobs / 200))
        except AssertionError as error:
            left = self._live()
            raise AssertionError(f"{error}; live: {left}") from error
        for fleet in self._fleets:
            fleet.stop()
        self.outcome = self.counted()

    def counted(self) -> Outcome:
        """Count what has become of the jobs so far."""
        again = self._again()
        unexplained = [run for run in again if not self._explained(*run[1:])]
        with self.connect() as conn:
            problems = violations(conn)
            bad = "select state, last_error from pgworker.jobs where state <> 'completed' limit 5"
            problems += [f"a job is {state}: {error}" for state, error in conn.execute(bad)]
        if held := self.value("select count(*) from pgworker.queue where job_id is not null"):
            problems.append(f"{held} queues are still taken")
        if several := self.value("select count(*) - count(distinct n) from public.effect"):
            problems.append(f"{several} effects of transactions are there twice")
        lost = self.value(_MISSING, self.jobs)
        if missing := self._effects - self.value("select count(distinct n) from public.effect"):
            problems.append(f"{missing} effects of transactions are not there")
        if unexplained:
            problems.append(f"ran again without a fault between: {unexplained[:5]}")
        recovery = max(self._recovery) if self._recovery else None
        return Outcome(self.name, self.jobs, lost, len(again), len(unexplained), recovery, tuple(problems))

    def _recovered(self, held: list[tuple[Any, ...]], over: float) -> bool:
        try:
            with self.connect() as conn:
                if set(held) & set(conn.execute(_HELD).fetchall()):
                    return False
                row = conn.execute(
                    "select exists (select from public.run where at > to_timestamp(%s))"
                    " or not exists (select from pgworker.job)",
                    [over],
                ).fetchone()
                return row == (True,)
        except psycopg.OperationalError:
            return False

    def _again(self) -> list[tuple[int, float | None, float, float]]:
        """For each run that is neither its job's first nor follows one that failed: the job, the run before, itself.

        Of the run before also when it was claimed, or when its worker registered, if that has vanished since; None if
        the job had been taken from it by the time it ran.
        """
        with self.connect() as conn:
            return conn.execute(_AGAIN).fetchall()

    def _explained(self, since: float | None, before: float, after: float) -> bool:
        return any(
            begun <= after and (since is None or min(since, before - CLAIMED_AHEAD) <= over)
            for begun, over in self._faults
        )

    def _live(self) -> Any:
        with self.connect() as conn:
            return conn.execute("select state, locked_by, count(*) from pgworker.jobs group by 1, 2").fetchall()
