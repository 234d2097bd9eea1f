"""Which statements of the PL/pgSQL functions the tests ran, by the profiler of the extension plpgsql_check.

The profiler counts per database and function in shared memory; every test has a database of its own, so the counts are
taken before each is dropped, and added up here by function signature and number of the statement. Where several
processes run the tests, each counts for itself, and the one that prints adds their counts up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import psycopg

from pgworker_client.installations import Installation

LIBRARY = "plpgsql_check"

SETTINGS = {
    "shared_preload_libraries": f"plpgsql,{LIBRARY}",
    "plpgsql_check.profiler": "on",
}
"""What the server has to be started with."""

# Dropped or rolled back with whatever else is in the database, and in nobody's way as long as it is there.
_SCHEMA = "plpgsql_coverage"

_EVERY_STATEMENT = f"""
select f.oid::regprocedure::text, f.prosrc, s.stmtid, s.lineno
from pg_proc f
join pg_language l on l.oid = f.prolang and l.lanname = 'plpgsql'
cross join lateral {_SCHEMA}.plpgsql_profiler_function_statements_tb(f.oid) s
where f.pronamespace = 'pgworker'::regnamespace and s.stmtname <> 'statement block'
"""

# The three that counting takes, without the other twenty of the extension: a fifth of its time.
_DEFINITIONS = f"""
select pg_get_functiondef(f.oid)
from pg_proc f
where f.pronamespace = '{_SCHEMA}'::regnamespace
  and f.oid::regprocedure::text in ('{_SCHEMA}.plpgsql_profiler_functions_all()',
                                    '{_SCHEMA}.plpgsql_profiler_function_statements_tb(regprocedure)',
                                    '{_SCHEMA}.plpgsql_profiler_reset(regprocedure)')
"""

_COUNTS = f"""
select f.oid::regprocedure::text, s.stmtid, s.exec_stmts, {_SCHEMA}.plpgsql_profiler_reset(f.oid)
from {_SCHEMA}.plpgsql_profiler_functions_all() p
join pg_proc f on f.oid = p.funcoid and f.pronamespace = to_regnamespace('pgworker')
cross join lateral {_SCHEMA}.plpgsql_profiler_function_statements_tb(f.oid) s
where s.stmtname <> 'statement block'
"""


@dataclass
class _Function:
    source: str
    lines: dict[int, int] = field(default_factory=dict)
    executed: dict[int, int] = field(default_factory=dict)

    @property
    def covered(self) -> int:
        return sum(1 for count in self.executed.values() if count)

    def missed(self) -> list[str]:
        """Return the lines, with their numbers, of statements that no test ran."""
        source = self.source.splitlines()
        numbers = {self.lines[statement] for statement, count in self.executed.items() if not count}
        return [f"line {number}: {source[number - 1].strip()}" for number in sorted(numbers)]


Counts = dict[str, tuple[str, dict[int, int], dict[int, int]]]
"""By signature: the function's source, and its statements' lines and executions; nothing but what xdist can send."""


class PlpgsqlCoverage:
    """The counts of one run of the tests."""

    def __init__(self) -> None:
        self.available: bool | None = None  # not known before there is a server
        self._functions: dict[str, _Function] = {}
        self._define = ""

    def settings(self, installation: Installation) -> dict[str, str]:
        """Return the server settings that switch counting on; none where the library is not there."""
        self.available = installation.has_library(LIBRARY)
        return dict(SETTINGS) if self.available else {}

    def prepare(self, dsn: str) -> None:
        """Learn from a database that has pgworker in it what there is to be run; nothing is left behind there."""
        if not self.available:
            return
        with psycopg.connect(dsn) as conn, conn.transaction(force_rollback=True):
            conn.execute(f"create schema {_SCHEMA}; create extension {LIBRARY} schema {_SCHEMA}")
            definitions = [definition for (definition,) in conn.execute(_DEFINITIONS)]
            assert len(definitions) == 3, definitions
            self._define = ";\n".join([f"create schema {_SCHEMA}", *definitions])
            for signature, source, statement, line in conn.execute(_EVERY_STATEMENT):
                function = self._functions.setdefault(signature, _Function(source))
                function.lines[statement], function.executed[statement] = line, 0

    def collect(self, dsn: str) -> None:
        """Add what was counted in that database since it was made, and start anew there."""
        if not self.available:
            return
        with psycopg.connect(dsn) as conn, conn.transaction(force_rollback=True):
            conn.execute(self._define.encode())
            for signature, statement, count, _ in conn.execute(_COUNTS):
                function = self._functions.get(signature)
                if function and statement in function.executed:  # not one that a test has put there
                    function.executed[statement] += count

    def counts(self) -> Counts:
        """Return all of it, for `merge` in another process."""
        return {
            name: (function.source, function.lines, function.executed) for name, function in self._functions.items()
        }

    def merge(self, available: bool | None, counts: Counts) -> None:
        """Add what was counted in another process."""
        self.available = available if self.available is None else self.available
        for name, (source, lines, executed) in counts.items():
            function = self._functions.setdefault(name, _Function(source, lines))
            for statement, count in executed.items():
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
            lines += [f"{'':14}{missed}" for missed in function.missed()]
        return lines
