"""Workers in threads and commands in processes, ended with the test whatever becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgworker_client import Worker
from tests.client.background import Background
from tests.client.command import ROOT, Process, Spawn


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


@pytest.fixture
def spawn(dsn: str, tmp_path: Path) -> Iterator[Spawn]:
    """Start ``pgworker ARGUMENT…`` in an empty directory; killed with the test."""
    started: list[Process] = []

    def start(*arguments: str, **environment: str) -> Process:
        variables = {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT), **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "pgworker_client", *arguments],
            cwd=tmp_path,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
