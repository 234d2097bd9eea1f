"""Rules for every file of the project: how long, how named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.lint.findings import Finding

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 500
MOST_LINES_OF_A_MODULE = 400
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc", "base"}
_TEXT = {".py", ".sql", ".md", ".toml", ".json", ".sh", ".txt", ".control", ""}


def project_files(root: Path = ROOT) -> Iterator[Path]:
    """Yield the files that belong to the project: not what is hidden, built or fetched."""
    for directory, names, files in os.walk(root):
        names[:] = sorted(
            name
            for name in names
            if name == ".ci" or (not name.startswith(".") and name not in ("__pycache__", "build", "dist"))
        )
        for name in sorted(files):
            # The assembled script is built from files that are checked themselves.
            if not (name.startswith(("pgworker--", ".")) or name.endswith(".pyc")):
                yield Path(directory, name)


def check_files(root: Path = ROOT) -> list[Finding]:
    """Return the files that are too long or whose name says nothing."""
    found = []
    for path in project_files(root):
        shown = path.relative_to(root)
        if shown.stem.lower() in SAYS_NOTHING or SAYS_NOTHING & {part.lower() for part in shown.parts[:-1]}:
            found.append(Finding(str(shown), 1, "names", "the name says nothing: name what it does"))
        if path.suffix in _TEXT and shown.parts[:2] != ("bench", "results"):  # which nobody wrote
            lines = len(path.read_bytes().splitlines())
            most = MOST_LINES_OF_A_MODULE if shown.parts[0] == "pgworker_client" else MOST_LINES
            if lines > most:
                found.append(Finding(str(shown), most, "length", f"{lines} lines, at most {most}: split it by theme"))
    return found
