"""``pgworker run --processes N``: nobody is missing for long, nobody lives on alone, and nothing is lost on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import add_job, add_jobs
from tests.client.command import Process, Spawn, ended
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]

JOBS = """
import os, time
from pathlib import Path
from pgworker_client import Worker
worker = Worker()

@worker.task
def who(payload, ctx):
    return os.getpid()

@worker.task
def meet(payload, ctx):  # ends when two run at the same time, each in a process of its own if the concurrency is 1
    Path(f"met-{payload}").touch()
    while not Path(f"met-{1 - payload}").exists():
        time.sleep(0.01)
    return os.getpid()

@worker.task
def wait(payload, ctx):
    ctx.progress("waiting")
    while not Path("go").exists() and not ctx.cancelled.is_set():
        time.sleep(0.01)
    return os.getpid()

@worker.task
def crash(payload, ctx):
    if ctx.job.attempts == 1:
        os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Path:
    file = tmp_path / "shop_jobs.py"
    file.write_text(JOBS)
    return file


def pids(db: Db, others: int = 2) -> list[int]:
    """The processes of the workers, once there are so many; their names end with it."""
    until_row(db, "select 1 where (select count(*) from pgworker.worker) = %s", others)
    return [int(name.rpartition(":")[2]) for (name,) in db.execute("select name from pgworker.worker order by id")]


def running(db: Db) -> int:
    """The process that runs the job."""
    (name,) = until_row(
        db,
        "select w.name from pgworker.jobs j join pgworker.worker w on w.id = j.locked_by "
        "where j.state = 'running' and j.progress is not null",
    )
    return int(name.rpartition(":")[2])


def stopped(process: Process, db: Db) -> str:
    """Stop it; everything ends well. Returns what it wrote."""
    process.terminate()
    status, _, err = ended(process)
    assert status == 0, err
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)
    return err


def test_the_processes_are_workers_of_their_own_with_names_of_their_own(spawn: Spawn, db: Db) -> None:
    jobs = [add_job(db, "meet", 0), add_job(db, "meet", 1)]
    process = spawn("run", "shop_jobs", "--processes", "2", "-j", "1", "--name", "w")
    until_row(db, "select 1 where (select count(*) from pgworker.jobs where state = 'completed') = 2")
    names = db.execute("select name from pgworker.worker order by name").fetchall()
    pid = db.execute("select result from pgworker.jobs where id = any(%s)", [[job.id for job in jobs]]).fetchall()
    err = stopped(process, db)
    assert names == [("w-1",), ("w-2",)]
    assert len(set(pid)) == 2
    assert process.pid not in {one for (one,) in pid}
    assert "process 1: worker started, concurrency 1" in err
    assert "process 2: worker started, concurrency 1" in err


def test_a_process_that_was_killed_is_replaced_and_its_job_run_again(spawn: Spawn, db: Db) -> None:
    process = spawn("run", "shop_jobs", "--processes", "2")
    first = pids(db)
    os.kill(first[0], signal.SIGKILL)
    until_row(db, "select 1 from pgworker.worker where name not like all(%s)", [f"%:{pid}" for pid in first])
    add_job(db, "crash")
    until_row(db, "select 1 where not exists (select from pgworker.jobs where task_identifier = 'crash')", timeout=60)
    err = stopped(process, db)
    assert err.count("was killed by SIGKILL; another one is started in") == 2


def test_a_process_of_which_a_part_died_does_not_live_on_and_is_replaced(spawn: Spawn, db: Db) -> None:
    process = spawn("run", "shop_jobs", "--processes", "1")
    (first,) = pids(db, 1)
    claim = db.execute(
        "select oid::regprocedure::text from pg_proc where pronamespace = 'pgworker'::regnamespace "
        "and proname = 'heartbeat'"
    ).fetchall()
    db.execute(f"alter function {claim[0][0]} rename to heartbeat_gone")
    until_row(db, "select 1 where not exists (select from pgworker.worker where name like %s)", f"%:{first}")
    renamed = claim[0][0].replace("heartbeat(", "heartbeat_gone(")
    db.execute(f"alter function {renamed} rename to heartbeat")
    (second,) = pids(db, 1)
    assert second != first
    # That one may have met the missing function too; and who is stopped while it registers leaves a row behind.
    add_job(db, "who")
    until_row(db, "select 1 where not exists (select from pgworker.jobs where state <> 'completed')", timeout=60)
    err = stopped(process, db)
    assert "process 1 ended with exit status 1; another one is started in" in err
    assert "presence died" in err


def test_the_first_signal_lets_running_jobs_end(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    job = add_job(db, "wait")
    process = spawn("run", "shop_jobs", "--processes", "2")
    pid = running(db)
    pids(db)
    # What a service manager does: it sends the signal to all of them, and the supervisor passes it on besides.
    for one in [process.pid, *pids(db)]:
        os.kill(one, signal.SIGTERM)
    until_row(db, "select 1 where (select count(*) from pgworker.worker) = 1")  # the idle one has left
    assert process.poll() is None
    (tmp_path / "go").touch()
    status, _, err = ended(process)
    assert status == 0, err
    assert db.execute("select state, result from pgworker.jobs where id = %s", [job.id]).fetchone() == (
        "completed",
        pid,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_cancels_what_runs(spawn: Spawn, db: Db, number: signal.Signals) -> None:
    add_job(db, "wait")
    process = spawn("run", "shop_jobs", "--processes", "2", "--grace", "600")
    running(db)
    pids(db)
    process.send_signal(number)
    until_row(db, "select 1 where (select count(*) from pgworker.worker) = 1")
    process.send_signal(number)
    status, _, err = ended(process)
    assert status == 0, err
    assert db.execute("select state, attempts from pgworker.jobs").fetchall() == [("ready", 0)]


def test_processes_whose_supervisor_was_killed_stop_in_good_order(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    job = add_job(db, "wait")
    process = spawn("run", "shop_jobs", "--processes", "2")
    running(db)
    alive = pids(db)
    process.kill()
    until_row(db, "select 1 where (select count(*) from pgworker.worker) = 1")
    (tmp_path / "go").touch()
    until_row(db, "select 1 where (select count(*) from pgworker.worker) = 0")
    assert db.execute("select state, attempts from pgworker.jobs where id = %s", [job.id]).fetchone() == (
        "completed",
        1,
    )
    until(lambda: not any(exists(pid) for pid in alive), "the processes have ended")


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_once_ends_when_all_are_done(spawn: Spawn, db: Db) -> None:
    add_jobs(db, [{"identifier": "who"}] * 50)
    status, _, err = ended(spawn("run", "shop_jobs", "--processes", "2", "--once"))
    assert status == 0, err
    assert db.execute("select state, count(*) from pgworker.jobs group by 1").fetchall() == [("completed", 50)]
    assert err.count("worker stopped") == 2


def test_once_replaces_a_process_that_crashed(spawn: Spawn, db: Db) -> None:
    add_job(db, "crash")
    status, _, err = ended(spawn("run", "shop_jobs", "--processes", "1", "--once"))
    assert status == 0, err
    assert "process 1 was killed by SIGKILL; another one is started in" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nope:worker"], "there is no module 'nope'"),
        (["shop_jobs", "--database", "host=/nowhere"], "/nowhere"),
        (["shop_jobs", "--database", "dbname=template1"], "no pgworker for this role in this database"),
    ],
)
def test_the_supervisor_gives_up_when_no_process_comes_up(
    spawn: Spawn, dsn: str, arguments: list[str], complaint: str
) -> None:
    arguments = [one.replace("dbname=", f"{dsn} dbname=") for one in arguments]
    status, out, err = ended(spawn("run", *arguments, "--processes", "1"))
    assert (status, out) == (1, "")
    assert complaint in err
    last = err.splitlines()[-1]
    assert last.startswith("pgworker: gave up after 5 processes in a row that ended before they could work; the last")
    assert last.endswith("ended with exit status 1")


def test_giving_up_stops_the_others_in_good_order(spawn: Spawn, db: Db, module: Path, tmp_path: Path) -> None:
    process = spawn("run", "shop_jobs", "--processes", "2")
    alive = pids(db)
    add_job(db, "wait")
    busy = running(db)
    module.write_text("import nope")
    os.kill(next(pid for pid in alive if pid != busy), signal.SIGKILL)
    (tmp_path / "go").touch()
    status, _, err = ended(process)
    assert status == 1
    assert "gave up after 5 processes in a row" in err.splitlines()[-1]
    assert db.execute("select state, result from pgworker.jobs").fetchall() == [("completed", busy)]
    assert db.execute("select count(*) from pgworker.worker where name like %s", [f"%:{busy}"]).fetchone() == (0,)


@pytest.mark.parametrize("processes", ["0", "1001"])
def test_a_number_of_processes_that_cannot_be_is_refused(spawn: Spawn, processes: str) -> None:
    status, _, err = ended(spawn("run", "shop_jobs", "--processes", processes))
    assert (status, err) == (1, f"pgworker: processes must be between 1 and 1000, not {processes}\n")
