"""The command ``pgworker`` as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

Process = subprocess.Popen[str]
Spawn = Callable[..., Process]

ROOT = Path(__file__).resolve().parents[2]


def ended(process: Process) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
