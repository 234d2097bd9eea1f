"""Running a document's examples from top to bottom: one database, one directory, one SQL session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pglast
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import ExecStatus

from tests.docs.examples import Example

_GOOD = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}


class DocumentSession:
    """What a reader has open: a shell in ``directory``, whose environment leads to the database, and psql."""

    def __init__(self, dsn: str, directory: Path, make_role: Callable[[str], object]) -> None:
        known = conninfo_to_dict(dsn)
        self._directory = directory
        self._make_role = make_role
        self._conn = psycopg.connect(dsn, autocommit=True)
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DATABASE_URL": dsn,
            **{f"PG{'DATABASE' if key == 'dbname' else key.upper()}": str(value) for key, value in known.items()},
        }

    def close(self) -> None:
        """Close psql."""
        self._conn.close()

    def run(self, example: Example) -> None:
        """Run one example as its marks say; AssertionError, with its place, when it does not do what it says."""
        if "not run" in example.marks:
            return
        for role in filter(None, example.marks.get("roles", "").split(", ")):
            self._make_role(role)
        if "file" in example.marks:
            file = self._directory / example.marks["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(example.code, encoding="utf-8")
            compile(example.code, str(file), "exec")
        elif example.language == "sql":
            self._sql(example)
        elif example.language == "python":
            self._process(example, [sys.executable, "-"], example.code)
        elif example.language == "sh":
            self._process(example, ["sh", "-e"], example.code)
        else:
            assert example.language in ("text", ""), f"{example.place}: nobody knows how to run {example.language!r}"

    def _process(self, example: Example, command: list[str], code: str) -> None:
        done = subprocess.run(
            command,
            input=code,
            text=True,
            cwd=self._directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{example.place} ended with status {done.returncode}:\n{done.stdout}"

    def _sql(self, example: Example) -> None:
        shown: list[list[str]] = []
        failed: str | None = None
        for statement in pglast.split(example.code):
            assert failed is None, f"{example.place}: a statement before {statement!r} failed with {failed}"
            result = self._conn.pgconn.exec_(statement.encode())
            if result.status not in _GOOD:
                failed = (result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) or b"").decode()
                said = result.error_message.decode()
                assert failed == example.marks.get("fails"), f"{example.place}: {said}"
                continue
            names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
            shown = [names] + [
                [(result.get_value(row, column) or b"").decode() for column in range(result.nfields)]
                for row in range(result.ntuples)
            ]
        assert failed == example.marks.get("fails"), f"{example.place} should have failed"
        if example.output is not None:
            assert _cells(example.output) == _lines(shown), f"{example.place} shows something else"


def _cells(text: str) -> list[list[str]]:
    """The cells of a table as psql draws it, line by line."""
    lines = [line for line in text.splitlines() if line.strip("-+ ")]
    return [[cell.strip().removesuffix("+").strip() for cell in line.split("|")] for line in lines]


def _lines(rows: list[list[str]]) -> list[list[str]]:
    """The same of a result: a value of several lines takes several lines."""
    split = [[value.split("\n") for value in row] for row in rows]
    return [
        [value[number].strip() if number < len(value) else "" for value in row]
        for row in split
        for number in range(max(map(len, row), default=0))
    ]
