"""`ctx.transaction()`: wherever its worker is killed, both the writes and the completion are there, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Context, Worker, add_job
from tests.client.background import running
from tests.waiting import until_row

Db = psycopg.Connection[Any]

_DIES = """
import os, signal

def die(step):
    if step == os.environ["KILL_AT"]:
        os.kill(os.getpid(), signal.SIGKILL)

WRITE = "insert into public.effect (job_id, attempt) values (%s, %s)"
"""
# Every statement of the connection goes through its `wait`: the last one of the block is the commit.
_TASKS = {
    "thread": _DIES
    + """
def handle(payload, ctx):
    die("before it")
    with ctx.transaction({"charged": 1}) as conn:
        die("begun")
        conn.execute(WRITE, [ctx.job.id, ctx.job.attempts])
        die("written")
        execute, wait = conn.execute, conn.wait

        def completing(query, *arguments, **options):
            die("not completed")
            done = execute(query, *arguments, **options)
            die("completed")
            conn.wait = committing
            return done

        def committing(*arguments, **options):
            die("not committed")
            done = wait(*arguments, **options)
            die("commit answered")
            return done

        conn.execute = completing
    die("over")
""",
    "coroutine": _DIES
    + """
async def handle(payload, ctx):
    die("before it")
    async with ctx.transaction({"charged": 1}) as conn:
        die("begun")
        await conn.execute(WRITE, [ctx.job.id, ctx.job.attempts])
        die("written")
        execute, wait = conn.execute, conn.wait

        async def completing(query, *arguments, **options):
            die("not completed")
            done = await execute(query, *arguments, **options)
            die("completed")
            conn.wait = committing
            return done

        async def committing(*arguments, **options):
            die("not committed")
            done = await wait(*arguments, **options)
            die("commit answered")
            return done

        conn.execute = completing
    die("over")
""",
}
_STEPS = ("before it", "begun", "written", "not completed", "completed", "not committed", "commit answered", "over")
_WRITE = "insert into public.effect (job_id, attempt) values (%s, %s)"


def _another(dsn: str, kind: str) -> Worker:
    """Return a worker that lives, with the same handler."""
    worker = Worker(dsn, poll_interval=0.05)
    if kind == "thread":

        @worker.task("charge")
        def charge(_payload: Any, ctx: BlockingContext) -> None:
            with ctx.transaction({"charged": 1}) as conn:
                conn.execute(_WRITE, [ctx.job.id, ctx.job.attempts])
    else:

        @worker.task("charge")
        async def charge_async(_payload: Any, ctx: Context) -> None:
            async with ctx.transaction({"charged": 1}) as conn:
                await conn.execute(_WRITE, [ctx.job.id, ctx.job.attempts])

    return worker


@pytest.mark.parametrize("kind", list(_TASKS))
@pytest.mark.parametrize("step", _STEPS)
def test_killed_at_any_step_it_has_its_effect_once(dsn: str, db: Db, tmp_path: Path, kind: str, step: str) -> None:
    (tmp_path / "charge.py").write_text(_TASKS[kind])
    db.execute("create table public.effect (job_id bigint, attempt int)")
    db.execute("select pgworker.configure('rescue_grace', '0')")
    job = add_job(db, "charge")
    victim = subprocess.run(
        [sys.executable, "-m", "pgworker_client", "run", "--once", "--database", dsn, "--tasks", str(tmp_path)],
        env={**os.environ, "KILL_AT": step, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    with running(_another(dsn, kind)):
        until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'completed'", job.id)
    committed = step in ("commit answered", "over")
    attempt = 1 if committed else 2
    assert db.execute("select job_id, attempt from public.effect").fetchall() == [(job.id, attempt)]
    assert db.execute("select result, attempts from pgworker.jobs").fetchall() == [({"charged": 1}, attempt)]
