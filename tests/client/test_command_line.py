"""The command ``pgworker``, as processes: what it does, prints and returns."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import add_job, add_jobs
from pgworker_client.schema import version
from tests.client.command import Spawn, ended
from tests.waiting import until_row

Db = psycopg.Connection[Any]


def write_task(directory: Path, name: str, body: str) -> Path:
    directory.mkdir(exist_ok=True)
    file = directory / f"{name}.py"
    file.write_text(body)
    return file


ECHO = "async def handle(payload, ctx):\n    return payload\n"


def test_run_once_with_a_directory_of_tasks(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "echo", ECHO)
    write_task(tasks, "email", "import _shared\ndef handle(payload, ctx):\n    return _shared.ANSWER\n")
    write_task(tasks, "_shared", "import email\nANSWER = email.__name__\n")  # the library's, not the task's
    jobs = [add_job(db, "echo", {"n": 1}), add_job(db, "email"), add_job(db, "unknown")]
    status, out, err = ended(spawn("run", "--tasks", "tasks", "--once", "-j", "2"))
    assert (status, out) == (0, "")
    assert "worker started, concurrency 2" in err
    rows = db.execute("select id, state, result from pgworker.jobs order by id").fetchall()
    assert rows == [
        (jobs[0].id, "completed", {"n": 1}),
        (jobs[1].id, "completed", "email"),
        (jobs[2].id, "ready", None),
    ]


MODULE = """
from pgworker_client import Worker
worker = Worker(concurrency=3)
other = Worker()

@worker.task
def greet(payload, ctx):
    return "hello"
"""


@pytest.mark.parametrize("target", ["shop_jobs", "shop_jobs:worker"])
def test_run_a_worker_of_a_module(spawn: Spawn, db: Db, tmp_path: Path, target: str) -> None:
    (tmp_path / "shop_jobs.py").write_text(MODULE)
    add_job(db, "greet")
    status, _, err = ended(spawn("run", target, "--once", "--name", "w7"))
    assert status == 0
    assert "concurrency 3" in err
    assert db.execute("select result from pgworker.jobs").fetchall() == [("hello",)]


def test_a_failing_job_is_logged_and_not_the_commands_failure(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "bad", "def handle(payload, ctx):\n    raise ValueError('no luck')\n")
    job = add_job(db, "bad")
    status, _, err = ended(spawn("run", "--tasks", "tasks", "--once"))
    assert status == 0
    assert f"attempt 1 of 25 failed: ValueError: no luck [bad #{job.id}]" in err


@pytest.mark.parametrize(
    ("files", "arguments", "complaint"),
    [
        ({}, ["--tasks", "tasks"], "tasks is not a directory; --tasks wants one with a file NAME.py for each task"),
        ({"tasks/_x.py": ""}, ["--tasks", "tasks"], "tasks has no task: put a file NAME.py"),
        ({"tasks/a.py": "x = 1"}, ["--tasks", "tasks"], "tasks/a.py has no function handle(payload, ctx)"),
        (
            {"tasks/a.py": "import nope"},
            ["--tasks", "tasks"],
            "tasks/a.py cannot be imported: ModuleNotFoundError: No ",
        ),
        ({"tasks/a.py": "def handle(:"}, ["--tasks", "tasks"], "tasks/a.py cannot be imported: SyntaxError: "),
        ({"tasks/a.py": "def handle(x): 0"}, ["--tasks", "tasks"], "tasks/a.py: task 'a': the handler must take"),
        ({}, ["nope:worker"], "there is no module 'nope' in "),
        ({"m.py": "import nope"}, ["m:worker"], "module 'm' cannot be imported: No module named 'nope'"),
        ({"m.py": "1/0"}, ["m:worker"], "module 'm' cannot be imported: ZeroDivisionError: division by zero"),
        ({"m.py": MODULE}, ["m:wrong"], "has no 'wrong'; its workers: worker, other"),
        ({"m.py": "worker = 1"}, ["m:worker"], "m:worker is not a Worker but 1"),
        ({"m.py": MODULE}, ["m:other"], "this worker has no tasks: add one with @worker.task"),
        ({"m.py": MODULE}, ["m:worker", "-j", "0"], "concurrency must be between 1 and 10000, not 0"),
        ({"m.py": MODULE}, ["m:worker", "--database", "nonsense"], "dsn is not a connection string"),
        ({"m.py": MODULE}, ["m:worker", "--database", "host=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_run_fails_with_one_line(
    spawn: Spawn, tmp_path: Path, files: dict[str, str], arguments: list[str], complaint: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    status, out, err = ended(spawn("run", *arguments))
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("pgworker: ")
    assert complaint in line


def test_verbose_shows_the_traceback_too(spawn: Spawn, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "a", "1/0")
    status, _, err = ended(spawn("run", "--tasks", "tasks", "--verbose"))
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert "1/0" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["run", "m:w", "--tasks", "d"],
        ["run", "m:w", "-j", "many"],
        ["add"],
        ["add", "t", "{not json}"],
        ["add", "t", "--run-at", "tomorrow"],
        ["add", "t", "--key-mode", "other"],
        ["tree"],
        ["tree", "first"],
    ],
)
def test_wrong_usage_is_status_2(spawn: Spawn, db: Db, arguments: list[str]) -> None:
    status, out, err = ended(spawn(*arguments))
    assert (status, out) == (2, "")
    assert "usage: pgworker" in err
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


def test_add_prints_the_id(spawn: Spawn, db: Db) -> None:
    status, out, err = ended(spawn("add", "send", '{"to": "ä"}'))
    assert (status, err) == (0, "")
    row = db.execute("select id, payload, state from pgworker.jobs").fetchone()
    assert row == (int(out), {"to": "ä"}, "ready")


def test_add_takes_every_option(spawn: Spawn, db: Db) -> None:
    options = ["--queue", "q", "--run-at", "2100-01-01T00:00+02:00", "--max-attempts", "2", "--key", "k"]
    options += ["--key-mode", "preserve_run_at", "--priority", "-3", "--flag", "a", "--flag", "b"]
    assert ended(spawn("add", "send", *options))[0] == 0
    row = db.execute(
        "select queue_name, run_at at time zone 'UTC' = '2099-12-31 22:00', max_attempts, key, priority, flags, payload"
        " from pgworker.jobs"
    ).fetchone()
    assert row == ("q", True, 2, "k", -3, ["a", "b"], {})


def test_add_tells_a_refusal_in_one_line(spawn: Spawn, db: Db) -> None:
    status, out, err = ended(spawn("add", "send", "--max-attempts", "0"))
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "max_attempts" in err
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


def test_version_and_help(spawn: Spawn) -> None:
    assert ended(spawn("--version")) == (0, f"pgworker {version()}\n", "")
    status, out, _ = ended(spawn("--help"))
    assert status == 0
    assert all(command in out for command in ("run", "add", "tree", "install", "upgrade", "demo"))


def test_install_upgrade_and_install_again(spawn: Spawn, db: Db) -> None:
    db.execute("drop extension if exists pgworker")
    db.execute("drop schema if exists pgworker cascade")
    status, _, err = ended(spawn("run", "--tasks", "tasks"))
    assert (status, len(err.splitlines())) == (1, 1)
    status, _, err = ended(spawn("upgrade"))
    assert status == 1
    assert "no pgworker in database" in err
    status, out, _ = ended(spawn("install"))
    assert status == 0
    assert f"pgworker {version()} installed in database " in out
    assert ended(spawn("upgrade"))[0] == 0
    status, _, err = ended(spawn("install"))
    assert (status, len(err.splitlines())) == (1, 1)
    assert ended(spawn("add", "t"))[0] == 0


def test_libpqs_variables_are_heard(spawn: Spawn, db: Db) -> None:
    environment = {"PGHOST": db.info.host, "PGPORT": str(db.info.port), "PGUSER": db.info.user}
    status, out, _ = ended(spawn("add", "t", DATABASE_URL="", PGDATABASE=db.info.dbname, **environment))
    assert status == 0
    assert db.execute("select id from pgworker.jobs").fetchall() == [(int(out),)]


BLOCKING = """
import time
def handle(payload, ctx):
    with ctx.connection() as conn:
        conn.execute("insert into begun values (%s)", [payload["n"]])
        conn.commit()
    deadline = time.monotonic() + payload["seconds"]
    while time.monotonic() < deadline:
        time.sleep(0.01)
        with ctx.connection() as conn:
            if conn.execute("select count(*) from go").fetchone()[0]:
                break
    return payload["n"]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_running_jobs_end(spawn: Spawn, db: Db, tmp_path: Path, number: signal.Signals) -> None:
    db.execute("create table begun (n int)")
    db.execute("create table go (n int)")
    write_task(tmp_path / "tasks", "slow", BLOCKING)
    add_jobs(db, [{"identifier": "slow", "payload": {"n": n, "seconds": 60}} for n in range(3)])
    process = spawn("run", "--tasks", "tasks", "-j", "2")
    until_row(db, "select 1 where (select count(*) from begun) = 2")
    process.send_signal(number)
    db.execute("insert into go values (1)")
    status, _, err = ended(process)
    assert (status, err.count("Traceback")) == (0, 0)
    assert db.execute("select state, attempts, result from pgworker.jobs order by id").fetchall() == [
        ("completed", 1, 0),
        ("completed", 1, 1),
        ("ready", 0, None),
    ]


def test_two_signals_end_at_once_and_give_everything_back(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    db.execute("create table begun (n int)")
    write_task(
        tmp_path / "tasks",
        "slow",
        "import asyncio\n"
        "async def handle(payload, ctx):\n"
        "    async with ctx.connection() as conn:\n"
        "        await conn.execute('insert into begun values (1)')\n"
        "    await asyncio.sleep(600)\n",
    )
    add_jobs(db, [{"identifier": "slow"}] * 5)
    process = spawn("run", "--tasks", "tasks", "-j", "2")
    until_row(db, "select 1 where (select count(*) from begun) = 2")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == 0
    assert "cancelling 2 jobs that still run; they go back" in err
    assert db.execute("select state, attempts, count(*) from pgworker.jobs group by 1, 2").fetchall() == [
        ("ready", 0, 5)
    ]


def test_a_thread_that_never_ends_does_not_keep_the_process(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    write_task(
        tmp_path / "tasks",
        "deaf",
        "import time\ndef handle(payload, ctx):\n    print('begun', flush=True)\n    time.sleep(600)\n",
    )
    add_job(db, "deaf")
    process = spawn("run", "--tasks", "tasks", "--grace", "0.1")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process)
    assert status == 0
    assert "its thread is left behind" in err
    assert db.execute("select state, attempts from pgworker.jobs").fetchall() == [("ready", 0)]


def test_a_dead_part_is_status_1_with_the_reason(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "echo", ECHO)
    process = spawn("run", "--tasks", "tasks", "--poll-interval", "0.05")
    until_row(db, "select 1 from pgworker.worker")
    db.execute("alter function pgworker.get_jobs set schema public")
    status, _, err = ended(process)
    assert status == 1
    assert err.splitlines()[-1].startswith("pgworker: claim died: UndefinedFunction: function pgworker.get_jobs")


def test_a_worker_that_was_killed_leaves_its_jobs_to_others(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    db.execute("insert into pgworker.setting values ('rescue_grace', '0.2 s')")
    db.execute("create table begun (n int)")
    db.execute("create table go (n int)")
    write_task(tmp_path / "tasks", "slow", BLOCKING)
    add_job(db, "slow", {"n": 1, "seconds": 60})
    process = spawn("run", "--tasks", "tasks")
    until_row(db, "select 1 from begun")
    process.kill()
    process.wait()
    db.execute("insert into go values (1)")
    other = spawn("run", "--tasks", "tasks")
    until_row(db, "select 1 from pgworker.jobs where state = 'completed' and attempts = 2")
    other.send_signal(signal.SIGTERM)
    assert ended(other)[0] == 0


def test_output_of_run_is_nothing_but_the_tasks_own(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "say", "import json\ndef handle(payload, ctx):\n    print(json.dumps(payload))\n")
    add_job(db, "say", {"n": 1})
    status, out, _ = ended(spawn("run", "--tasks", "tasks", "--once"))
    assert (status, json.loads(out)) == (0, {"n": 1})
