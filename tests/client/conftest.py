"""Workers in threads, ended with the test whatever becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pgworker_client import Worker
from tests.client.background import Background


@pytest.fixture
def start() -> Iterator[Callable[[Worker], Background]]:
    """Run a worker in a thread: ``start(worker)``. One that the test leaves running is stopped after it."""
    started: list[Background] = []

    def run(worker: Worker) -> Background:
        started.append(Background(worker))
        return started[-1]

    yield run
    for background in started:
        background.worker.stop()
        background.worker.stop()
