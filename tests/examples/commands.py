"""The commands that the text of an example tells, and running them as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def commands(example: ModuleType) -> list[list[str]]:
    """The commands that the example's text tells."""
    lines = re.findall(r"^    ((?:python|pgworker) .*?)(?:   .*)?$", example.__doc__ or "", re.MULTILINE)
    return [line.split() for line in lines]


def run(command: list[str], dsn: str, directory: Path, *more: str) -> str:
    """Run one of them in that directory, and return what it writes; it must succeed."""
    programs = {"python": [sys.executable], "pgworker": [sys.executable, "-m", "pgworker_client"]}
    done = subprocess.run(
        [*programs[command[0]], *command[1:], *more],
        cwd=directory,
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
