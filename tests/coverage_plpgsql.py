"""Which statements of the PL/pgSQL functions the tests ran, by the profiler of the extension plpgsql_check.

The profiler counts per database and function in shared memory; every test has a database of its own, so the counts are
taken before each is dropped, and added up here by function signature and number of the statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psycopg

from pgworker_client.installations import Installation

LIBRARY = "plpgsql_check"

SETTINGS = {
    "shared_preload_libraries": f"plpgsql,{LIBRARY}",
    "plpgsql_check.profiler": "on",
}
"""What the server has to be started with."""

_COUNTS = """
select f.oid::regprocedure::text, s.stmtid, s.lineno, s.exec_stmts, f.prosrc, plpgsql_profiler_reset(f.oid)
from pg_proc f
join pg_language l on l.oid = f.prolang and l.lanname = 'plpgsql'
cross join lateral plpgsql_profiler_function_statements_tb(f.oid) s
where f.pronamespace = to_regnamespace('pgworker') and s.stmtname <> 'statement block'
"""


@dataclass
class _Function:
    source: list[str]
    executed: dict[int, int] = field(default_factory=dict)
    lines: dict[int, int] = field(default_factory=dict)

    @property
    def covered(self) -> int:
        return sum(1 for count in self.executed.values() if count)


class PlpgsqlCoverage:
    """The counts of one run of the tests."""

    def __init__(self) -> None:
        self.available: bool | None = None  # not known before there is a server
        self._functions: dict[str, _Function] = {}

    def settings(self, installation: Installation) -> dict[str, str]:
        """Return the server settings that switch counting on; none where the library is not there."""
        self.available = installation.has_library(LIBRARY)
        return dict(SETTINGS) if self.available else {}

    def collect(self, dsn: str) -> None:
        """Add what was counted in that database since it was made, and start anew there."""
        if not self.available:
            return
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(f"create extension if not exists {LIBRARY}")
            self._add(conn.execute(_COUNTS).fetchall())

    def _add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        for signature, statement, line, count, source, _ in rows:
            function = self._functions.setdefault(signature, _Function(source.splitlines()))
            function.lines[statement] = line
            function.executed[statement] = function.executed.get(statement, 0) + count

    def summary(self) -> str:
        """Return one line."""
        if self.available is None:
            return "PL/pgSQL coverage: no test needed a server"
        if not self.available:
            return f"PL/pgSQL coverage: not measured, this server has no {LIBRARY}"
        covered = sum(function.covered for function in self._functions.values())
        total = sum(len(function.executed) for function in self._functions.values())
        share = 100 * covered / total if total else 0
        return f"PL/pgSQL coverage: {covered} of {total} statements ({share:.1f} %) in {len(self._functions)} functions"

    def report(self) -> list[str]:
        """Return the table: a line per function, and under it the lines that no test ran."""
        lines: list[str] = []
        for signature, function in sorted(self._functions.items()):
            lines.append(f"{function.covered:5} / {len(function.executed):<5} {signature}")
            missed = {function.lines[number] for number, count in function.executed.items() if not count}
            lines += [f"{'':14}line {line}: {function.source[line - 1].strip()}" for line in sorted(missed)]
        return lines
