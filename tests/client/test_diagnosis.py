"""why() and doctor() from Python, and ``pgworker doctor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from pgworker_client import Finding, Worker, add_job, doctor, why
from pgworker_client.schema import version
from tests.client.background import Background
from tests.client.command import Spawn, ended
from tests.waiting import until_row

Db = psycopg.Connection[Any]


def test_why_a_job_is_not_running(db: Db) -> None:
    assert why(db, add_job(db, "a").id) == "no worker is live"


@pytest.mark.asyncio
async def test_on_async_connections(dsn: str, db: Db) -> None:
    job = add_job(db, "a")
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        assert await why(conn, job.id) == "no worker is live"
        assert await doctor(conn) == []


def test_a_worker_says_for_which_version_it_is(dsn: str, db: Db, start: Callable[[Worker], Background]) -> None:
    start(Worker(dsn, name="w", tasks={"a": lambda payload, ctx: None}, forbidden_flags=["slow"]))
    until_row(db, "select 1 from pgworker.interest where tasks = '{a}' and forbidden_flags = '{slow}'")
    assert db.execute("select version from pgworker.worker").fetchall() == [(version(),)]
    assert doctor(db) == []


def test_the_command_prints_findings_and_tells_errors_by_its_status(spawn: Spawn, db: Db) -> None:
    assert ended(spawn("doctor")) == (0, f"nothing found in database {db.info.dbname}\n", "")
    db.execute("select pgworker.register_worker('old', version := '0.0.9')")
    finding = Finding(
        "warning",
        "worker 1 (old)",
        f"was made for pgworker 0.0.9, this is {version()}",
        "Restart it with the client of this version.",
    )
    assert doctor(db) == [finding]
    status, out, err = ended(spawn("doctor"))
    assert (status, err) == (0, "")
    assert [line.split("  ")[0].strip() for line in out.splitlines()] == ["SEVERITY", "warning"]
    assert f"{finding.finding}  {finding.advice}\n" in out
    db.execute("select pgworker.add_job('a', run_at := now() - interval '1 hour')")
    status, out, err = ended(spawn("doctor"))
    assert (status, err) == (1, "")
    assert [line.split()[0] for line in out.splitlines()] == ["SEVERITY", "error", "warning"]
    advice = out.splitlines()[0].index("ADVICE")
    unknown = "Start a worker that has a handler for it, or cancel the jobs."
    assert [line[advice:] for line in out.splitlines()] == ["ADVICE", unknown, finding.advice]
