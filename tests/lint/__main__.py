"""``python -m tests.lint``: what can be said of the project without its tests. Status 1 on findings."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from pglast.parser import ParseError

from pgworker_client import schema
from tests.lint.file_rules import ROOT, check_files
from tests.lint.findings import Allowances, Finding
from tests.lint.installed_rules import LIBRARY, check_installed, find_checker
from tests.lint.sql_rules import check_beginning, check_sql
from tests.lint.statements import Statement, read_statements

PYTHON = [name for name in ("pgworker_client", "tests", "bench", "examples") if any((ROOT / name).glob("**/*.py"))]


def main() -> int:
    """Run every check, print what each finds, and return the process's status."""
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("ruff", lambda: _tool("ruff", "check", "--quiet", "--output-format=concise", ".")),
        ("format", lambda: _tool("ruff", "format", "--check", "--quiet", "--output-format=concise", ".")),
        ("mypy", lambda: _tool("mypy", "--no-error-summary", *PYTHON)),
        ("files", lambda: _lines(check_files())),
        ("sql", lambda: _lines(check_parts())),
        (LIBRARY, _installed),
    ]
    failed = 0
    for name, step in steps:
        begun = time.perf_counter()
        said = step()
        print(
            f"{name:14} {'ok' if not said else f'{len(said)} findings':12} {time.perf_counter() - begun:5.1f} s",
            flush=True,
        )
        for line in said:
            print(f"  {line}", flush=True)
        failed += bool(said)
    return 1 if failed else 0


def check_parts() -> list[Finding]:
    """Check the parts of the extension's script, each file by itself, for the sake of the line numbers."""
    statements: list[Statement] = []
    broken: list[Finding] = []
    for part in schema.parts():
        try:
            statements += read_statements(part)
        except ParseError as error:
            broken.append(Finding(part.name, 1, "parse", str(error)))
    return broken or check_beginning(statements) + check_sql(statements, Allowances.read())


def _installed() -> list[str]:
    checker = find_checker()
    if checker is None:
        print(f"*** {LIBRARY} IS NOT INSTALLED FOR ANY PostgreSQL HERE: the functions' bodies are NOT checked ***")
        return []
    return _lines(check_installed(checker, Allowances.read()))


def _lines(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings]


def _tool(module: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not done.returncode:
        return []
    return done.stdout.splitlines() or [f"{module} failed with status {done.returncode}"]


if __name__ == "__main__":
    sys.exit(main())
