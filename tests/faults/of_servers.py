"""Faults of the server: it stops, crashes, ends sessions, is full, is busy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from pgworker_client.embedded import StopMode
from tests.faults.ground import Ground
from tests.faults.trial import Trial
from tests.waiting import until


class CannotBeTried(Exception):
    """What this fault needs is not to be had here; the text says what."""


def restart(mode: StopMode) -> Callable[[Ground, Trial], None]:
    """The server is stopped and started again."""

    def play(ground: Ground, trial: Trial) -> None:
        with trial.fleet(trial.dsn(), 2):
            for share in (0.05, 0.4) if ground.patient else (0.05,):
                trial.underway(share)
                with trial.fault():
                    trial.server.restart(mode)
            trial.finish()

    return play


def terminated_backends(ground: Ground, trial: Trial) -> None:
    """Sessions are ended, a few at a time, whoever's they are."""
    with trial.fleet(trial.dsn(), 2):
        trial.underway()
        for _ in range(20 if ground.patient else 4):
            with trial.fault():
                terminate(trial, trial.chance.randint(1, 4))
        trial.finish()


def terminate(trial: Trial, most: int) -> None:
    """End at most so many of the sessions of the trial's workers."""
    with trial.connect() as conn:
        found = conn.execute(
            "select pid from pg_stat_activity where datname = current_database() and usename = 'worker' order by pid"
        ).fetchall()
        victims = trial.chance.sample([pid for (pid,) in found], min(most, len(found)))
        conn.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) pid", [victims])


def storm(ground: Ground, trial: Trial) -> None:
    """Workers are killed, sessions ended, the server crashes, all of it at random, until most jobs have run."""
    crashes = [0.6, 0.3]
    with trial.fleet(trial.dsn(), 3) as fleet:
        trial.underway()
        rounds = 0
        while (done := trial.value("select count(distinct n) from public.run") / trial.jobs) < 0.8 or rounds < 8:
            rounds += 1
            with trial.fault(recovers=False):
                if crashes and done >= crashes[-1]:
                    crashes.pop()
                    trial.server.restart("immediate")
                elif trial.chance.random() < 0.4 or fleet.killed < 3 <= rounds:
                    fleet.kill_one(trial.chance)
                else:
                    terminate(trial, trial.chance.randint(1, 4))
            time.sleep(trial.chance.uniform(0.02, 0.2) * max(1, trial.jobs / 10_000))
        with trial.fault():
            fleet.kill_one(trial.chance)
        trial.finish()
        assert fleet.killed >= 3


def full_of_connections(_ground: Ground, trial: Trial) -> None:
    """Others take every connection that the server has, just as the workers lose theirs."""
    with trial.fleet(trial.dsn(), 2) as fleet, contextlib.ExitStack() as others:
        trial.underway()
        with trial.fault():
            until(lambda: _taken(trial, others), "nobody but others is connected", timeout=60)
            until(lambda: fleet.all_say("trying again"), "the workers notice", timeout=60)
            others.close()
        trial.finish()


def _taken(trial: Trial, others: contextlib.ExitStack) -> bool:
    """End the workers' sessions, take what is free, and return whether all is taken and none is theirs."""
    terminate(trial, 100)
    with contextlib.suppress(psycopg.OperationalError):
        while True:
            conn = psycopg.connect(trial.server.dsn(trial.dbname, "other"))
            others.enter_context(contextlib.closing(conn))
    return bool(trial.value("select not exists (select from pg_stat_activity where usename = 'worker')"))


def idle_in_transaction(_ground: Ground, trial: Trial) -> None:
    """Sessions hold a snapshot, and the rows of some jobs, also of running ones, while most of the others run."""
    with trial.connect() as holder, trial.connect() as other:
        holder.execute("begin isolation level repeatable read")
        holder.execute("select from pgworker.job where task_identifier = 'record' order by id limit 20 for update")
        with trial.fleet(trial.dsn(), 2):
            with trial.fault():
                other.execute("begin")
                for (worker,) in other.execute("select id from pgworker.presence where present").fetchall():
                    running = f"select from pgworker.job where locked_by = {worker} limit 2 for update skip locked"
                    until(lambda query=running: other.execute(query.encode()).rowcount > 0, "jobs that run")  # type: ignore[misc]
                live = "select count(*) from pgworker.job"
                until(lambda: trial.value(live) < trial.jobs * 0.3, "the end of most", timeout=120)
                other.execute("rollback")
                holder.execute("rollback")
            trial.finish()


def burst(ground: Ground, trial: Trial) -> None:
    """Many jobs are added at once, in four transactions, while the workers work."""
    more = 200_000 if ground.patient else 4_000
    with trial.fleet(trial.dsn(), 2):
        trial.underway()
        for _ in range(4):
            trial.add(more // 4)
        trial.finish()  # which no fault explains to be run twice


@contextlib.contextmanager
def small_disk(ground: Ground) -> Iterator[None]:
    """A file system of 64 MB for a block, with a tablespace ``small`` on it."""
    if os.geteuid() != 0:
        raise CannotBeTried("to mount a small file system takes root")
    libc = ctypes.CDLL(None, use_errno=True)
    place = Path(tempfile.mkdtemp(prefix="small-", dir="/tmp"))
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=64m"):
        place.rmdir()
        raise CannotBeTried(f"a small file system cannot be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        owner = os.stat(ground.server.host)
        data = place / "data"
        data.mkdir(mode=0o700)
        os.chown(data, owner.st_uid, owner.st_gid)
        place.chmod(0o755)
        with psycopg.connect(ground.server.dsn(), autocommit=True) as conn:
            conn.execute(f"create tablespace small location '{data}'".encode())
        try:
            yield
        finally:
            with psycopg.connect(ground.server.dsn(), autocommit=True) as conn:
                conn.execute("drop tablespace small")
    finally:
        libc.umount2(os.fsencode(place), 2)
        place.rmdir()


def full_disk(_ground: Ground, trial: Trial) -> None:
    """No page can be added to any table, until there is room again."""
    with trial.fleet(trial.dsn(), 2):
        trial.underway()
        with trial.fault():
            where = trial.value("select pg_tablespace_location(oid) from pg_tablespace where spcname = 'small'")
            filler = Path(where).parent / "filler"
            log = trial.server.log
            known = log.stat().st_size
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 65536)
            try:
                until(lambda: b"No space left on device" in log.read_bytes()[known:], "the disk is full")
            finally:
                filler.unlink()
        trial.finish()
