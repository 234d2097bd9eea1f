"""Harm of every kind, in short; ``./run soak`` does more of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.faults.catalog import FAULTS, tried
from tests.faults.ground import Ground
from tests.faults.of_servers import CannotBeTried

JOBS = 1_000


@pytest.fixture(scope="module")
def ground(server: EmbeddedServer) -> Iterator[Ground]:
    with Ground(server.installation, jobs=JOBS, patient=False) as ground:
        yield ground


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
