"""The reference names every public function of the schema, and nothing that is not there; links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.docs.examples import DOCUMENTS, ROOT

_THEMES = ("reference", "schedules", "events")
"""The documents that describe functions."""

_REFERENCE = "\n".join((ROOT / f"docs/{theme}.md").read_text(encoding="utf-8") for theme in _THEMES)
_FUNCTIONS = """
select p.proname, pg_get_function_arguments(p.oid) as arguments,
       obj_description(p.oid, 'pg_proc') like 'Internal:%%' as internal,
       has_function_privilege('reader_producer', p.oid, 'execute')
       or has_function_privilege('reader_worker', p.oid, 'execute')
       or has_function_privilege('reader_observer', p.oid, 'execute') as granted
from pg_proc p
where p.pronamespace = 'pgworker'::regnamespace
"""


@pytest.fixture
def functions(db: psycopg.Connection[Any], role: Callable[..., str]) -> list[tuple[str, str, bool, bool]]:
    for kind in ("producer", "worker", "observer"):
        name = role(f"reader_{kind}")
        db.execute(f"select pgworker.grant_{kind}('{name}')")
    return db.execute(_FUNCTIONS).fetchall()


def test_every_public_function_is_described(functions: list[tuple[str, str, bool, bool]]) -> None:
    named = set(re.findall(r"\bpgworker\.(\w+)\(", _REFERENCE))
    public = {name for name, _, internal, granted in functions if granted or not internal}
    assert public - named == set()
    assert named - public == set()


def test_the_arguments_and_defaults_are_the_real_ones(functions: list[tuple[str, str, bool, bool]]) -> None:
    described = {
        (name, _normal(arguments)) for name, arguments in re.findall(r"\bpgworker\.(\w+)\(([^()]*)\)", _REFERENCE)
    }
    overloads = ("payload json,", "payload text,")  # said in words
    for name, arguments, internal, _ in functions:
        if arguments and not internal and name != "clock" and not any(one in arguments for one in overloads):
            assert (name, _normal(arguments)) in described, f"{name}({arguments})"


def _normal(arguments: str) -> str:
    """Arguments without what can be said in two ways."""
    text = re.sub(r"::[a-z ]+(\[\])?", "", " ".join(arguments.lower().split()))
    return (
        text.replace("timestamp with time zone", "timestamptz").replace("integer", "int").replace("'00:00:00'", "'0'")
    )


def test_every_column_of_the_view_is_described(db: psycopg.Connection[Any]) -> None:
    columns = [
        name for (name,) in db.execute("select attname from pg_attribute where attrelid = 'pgworker.jobs'::regclass")
    ]
    table = _REFERENCE.partition("## The view")[2].partition("## Producing")[0]
    described = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(described) == sorted(columns)


def test_every_error_of_the_schema_is_described(db: psycopg.Connection[Any]) -> None:
    bodies = db.execute("select string_agg(prosrc, ' ') from pg_proc where pronamespace = 'pgworker'::regnamespace")
    row = bodies.fetchone()
    assert row is not None
    raised = set(re.findall(r"'(PW\d{3}|22\d{3})'", row[0]))
    described = set(re.findall(r"^\| `(\w{5})` \|", _REFERENCE, re.MULTILINE))
    inner = {"22021", "PW000"}  # which load_crontab turns into 22023, and upon which revive() begins anew
    assert raised - inner <= described


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    prose = re.sub(
        r"^ *```.*?^ *```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.is_file(), f"{document.name}: {target}"
        assert not anchor or anchor in _anchors(file), f"{document.name}: {target}"


def _anchors(document: Path) -> set[str]:
    """The anchors of its headings, as they are made for display."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
