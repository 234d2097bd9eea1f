"""Harm of every kind, in short; ``./run soak`` does more of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, Worker, add_job
from pgworker_client.embedded import EmbeddedServer
from tests.client.background import running
from tests.faults.catalog import FAULTS, tried
from tests.faults.ground import Ground
from tests.faults.of_servers import CannotBeTried
from tests.faults.standby import Standby
from tests.waiting import until

JOBS = 1_000


@pytest.fixture(scope="module")
def ground(server: EmbeddedServer) -> Iterator[Ground]:
    with Ground(server.installation, jobs=JOBS, patient=False) as ground:
        yield ground


def test_a_worker_that_is_started_on_a_standby_waits_until_it_is_promoted(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    async def handler(payload: Any, _ctx: Context) -> None:
        seen.append(payload)

    with (
        ground.database() as dbname,
        Standby(ground.server) as standby,
        running(Worker(standby.dsn(dbname), tasks={"t": handler})),
    ):
        until(lambda: "the server is a standby, and cannot be written to; trying again" in caplog.text, "a word")
        standby.promote()
        with psycopg.connect(standby.dsn(dbname), autocommit=True) as conn:
            add_job(conn, "t", 1)
        until(lambda: seen == [1], "the job")
        until(lambda: "the database works again" in caplog.text, "the good news")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_no_job_is_lost_or_runs_twice_without_reason(
    ground: Ground, name: str, record_property: Callable[[str, object], None]
) -> None:
    try:
        outcome = tried(ground, name, random.Random(name))
    except CannotBeTried as impossible:
        pytest.skip(str(impossible))
    record_property("fault", json.dumps(asdict(outcome)))
    assert outcome.survived, outcome
