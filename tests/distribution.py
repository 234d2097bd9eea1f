"""How the tests are spread over processes, each of which has a server of its own.

One process more than there are processors, at most four; one, the usual way, for a few tests: a further process needs
seconds before its first. ``-n 0`` forces that, ``-n 3`` any other number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import pytest

MOST = 4

BUSY = (
    "bench",
    "concurrency/test_claims_are_exclusive.py",
    "concurrency/test_no_deadlocks.py",
    "demo",
    "faults",
    "harness/test_processes.py",
    "packaging/test_wheel.py",
    "trees/test_interleavings.py",
    "trees/test_storm.py",
)
"""What keeps several processors or hundreds of sessions busy: never two of these at once."""


def processes(config: pytest.Config) -> int:
    """Return how many processes ``-n auto`` means for these arguments; 0 is this one alone."""
    few = config.getoption("keyword") or config.getoption("markexpr") or all(_is_one_file(arg) for arg in config.args)
    watched = config.getoption("capture") == "no"
    if few or watched:
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors + 1, MOST) if processors > 1 else 0  # one more, for a fifth of the time is spent waiting


def _is_one_file(argument: str) -> bool:
    return PurePath(argument.partition("::")[0]).suffix == ".py"


def keep_apart(items: Iterable[pytest.Item], root: PurePath) -> None:
    """Put all that is `BUSY` into one group, which one process runs from first to last."""
    busy = [root / "tests" / path for path in BUSY]
    for item in items:
        if any(path == item.path or path in item.path.parents for path in busy):
            item.add_marker(pytest.mark.xdist_group("busy"))


def sendable(data: Any) -> Any:
    """Return a report without what cannot be sent to another process: lone surrogates, say in a log that it quotes."""
    match data:
        case str():
            return data.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {key: sendable(value) for key, value in data.items()}
        case list() | tuple():
            return type(data)(sendable(value) for value in data)
    return data
