"""Every example in the README and in the documentation does what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from tests.docs.examples import DOCUMENTS, ROOT, Example, read_examples
from tests.docs.session import DocumentSession


@pytest.fixture
def roles(server: EmbeddedServer) -> Iterator[Callable[[str], None]]:
    """Make roles that are dropped at the end, after the databases in which they have rights."""
    made: list[str] = []
    with psycopg.connect(server.dsn(), autocommit=True) as conn:

        def make(name: str) -> None:
            conn.execute(sql.SQL("create role {}").format(sql.Identifier(name)))
            made.append(name)

        yield make
        for name in made:
            conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_examples_of(
    document: Path, roles: Callable[[str], None], make_database: Callable[..., str], tmp_path: Path
) -> None:
    dsn = make_database("shop")
    if document.name != "README.md":  # which says how to install it
        with psycopg.connect(dsn, autocommit=True) as conn:
            schema.install(conn)
    session = DocumentSession(dsn, tmp_path, roles)
    try:
        for example in read_examples(document):
            session.run(example)
    finally:
        session.close()


def _example(code: str, language: str = "sql", output: str | None = None, **marks: str) -> Example:
    return Example(ROOT / "README.md", 1, language, code, marks, output)


@pytest.mark.parametrize(
    ("example", "complaint"),
    [
        (_example("select 1 / 0"), "division by zero"),
        (_example("select 1", fails="22012"), "should have failed"),
        (_example("select 1 / 0", fails="42501"), "division by zero"),
        (_example("select 1 as n", output=" n\n---\n 2\n"), "shows something else"),
        (_example("raise SystemExit(3)", "python"), "status 3"),
        (_example("false", "sh"), "status 1"),
        (_example("puts 1", "ruby"), "how to run"),
    ],
)
def test_an_example_that_does_not_do_what_it_says_is_found(
    example: Example, complaint: str, dsn: str, tmp_path: Path
) -> None:
    session = DocumentSession(dsn, tmp_path, lambda _: None)
    try:
        with pytest.raises(AssertionError, match=complaint):
            session.run(example)
    finally:
        session.close()


def test_blocks_are_found_with_marks_indents_and_outputs(tmp_path: Path) -> None:
    document = tmp_path / "some.md"
    document.write_text(
        "a\n\n<!-- roles: a, b -->\n```sql\nselect 1\n```\n\n```text\n 1\n```\n\n* b\n\n  <!-- not run: no -->\n"
        "  ```sh\n  if true\n    then\n  ```\n"
    )
    first, second = read_examples(document)
    assert (first.language, first.code, first.output, first.marks) == ("sql", "select 1\n", "1\n", {"roles": "a, b"})
    assert (second.line, second.code, second.marks) == (15, "if true\n  then\n", {"not run": "no"})
