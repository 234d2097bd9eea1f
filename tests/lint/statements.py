"""The extension's SQL as parsed statements, functions apart, each with the place where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pglast import ast, parse_plpgsql, parse_sql
from pglast.visitors import Visitor

SCHEMA = "pgworker"

_DECLARED = ("PLpgSQL_var", "PLpgSQL_rec")
_NOT_OURS = {"found", "sqlstate", "sqlerrm", "new", "old"}


@dataclass(frozen=True)
class Statement:
    """One top-level statement of one file."""

    path: str
    line: int
    text: str
    node: Any


@dataclass(frozen=True)
class Piece:
    """One SQL statement or expression in the body of a function."""

    line: int
    node: Any


@dataclass(frozen=True)
class Function:
    """One CREATE FUNCTION or CREATE PROCEDURE."""

    statement: Statement

    @property
    def node(self) -> Any:
        """The syntax tree."""
        return self.statement.node

    @property
    def name(self) -> str:
        """The name without the schema."""
        return str(self.node.funcname[-1].sval)

    @property
    def signature(self) -> str:
        """Schema, name and input types, the same for every way to write them."""
        inputs = [p.argType for p in self.node.parameters or () if p.mode.value not in ("o", "t")]
        return f"{dotted(self.node.funcname)}({', '.join(map(type_name, inputs))})"

    @property
    def options(self) -> dict[str, Any]:
        """The options but SET, by name."""
        return {option.defname: option.arg for option in self.node.options if option.defname != "set"}

    @property
    def language(self) -> str:
        """The language, in lower case."""
        return str(self.options["language"].sval).lower() if "language" in self.options else "sql"

    @property
    def is_bound(self) -> bool:
        """Whether its body is SQL-standard, and so was bound to the objects it names when it was created."""
        return self.node.sql_body is not None

    @property
    def body(self) -> str:
        """The text of its body, if it is one."""
        parts = self.options.get("as")
        return str(parts[0].sval) if parts else ""

    @property
    def body_line(self) -> int:
        """The line of the file on which its body begins."""
        return self.statement.line + self.statement.text[: self.statement.text.find(self.body)].count("\n")

    @property
    def returns(self) -> str:
        """The type it returns, without schema and set."""
        return str(self.node.returnType.names[-1].sval) if self.node.returnType else ""

    def plpgsql(self) -> Any:
        """Return the syntax tree of its PL/pgSQL body.

        The parser knows the types of pg_catalog and public only, and few row types: it is given others.
        """
        text = re.sub(rf"\b{SCHEMA}\.\w+\[\]", "text[]", self.statement.text)
        text = re.sub(rf"\b{SCHEMA}\.\w+%rowtype\b", "record", text, flags=re.IGNORECASE)
        return parse_plpgsql(re.sub(rf"\b{SCHEMA}\.", "public.", text))[0]["PLpgSQL_function"]

    def nodes(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield kind, line of the file, and content of everything in a PL/pgSQL body."""
        yield from _walk(self.plpgsql()["action"], self.body_line, 1)

    def variables(self) -> Iterator[tuple[str, int]]:
        """Yield name and line of everything that a PL/pgSQL body declares."""
        arguments = {p.name for p in self.node.parameters or ()}
        for datum in self.plpgsql()["datums"]:
            for kind, content in datum.items():
                name = content.get("refname", "")
                if kind in _DECLARED and "lineno" in content and name not in arguments | _NOT_OURS and name[:2] != "__":
                    yield name, self.body_line + content["lineno"] - 1

    def pieces(self) -> Iterator[Piece]:
        """Yield the SQL in its body, whatever the language."""
        if self.is_bound:
            yield Piece(self.statement.line, self.node.sql_body)
        elif self.language == "sql":
            for raw in parse_sql(self.body):
                at = _first_line(self.body, raw.stmt_location)
                yield Piece(self.body_line + at, raw.stmt)
        elif self.language == "plpgsql":
            for kind, line, content in self.nodes():
                if kind == "PLpgSQL_expr":
                    for raw in parse_sql(_as_statement(content)):
                        yield Piece(line, raw.stmt)


def dotted(names: Any) -> str:
    """Return a qualified name as text."""
    return ".".join(part.sval for part in names)


def type_name(node: Any) -> str:
    """Return a type as text, ``pg_catalog.`` left out."""
    names = [part.sval for part in node.names]
    return ".".join(names[1:] if names[0] == "pg_catalog" else names) + "[]" * len(node.arrayBounds or ())


def read_statements(path: Path, text: str | None = None) -> list[Statement]:
    """Parse one file."""
    text = path.read_text(encoding="utf-8") if text is None else text
    statements = []
    for raw in parse_sql(text):
        begin = raw.stmt_location
        # The parser counts what stands before a statement to it: comments, blank lines.
        line = _first_line(text, begin)
        end = begin + raw.stmt_len if raw.stmt_len else len(text)
        start = sum(len(one) for one in text.splitlines(keepends=True)[:line])
        statements.append(Statement(path.name, line + 1, text[start:end], raw.stmt))
    return statements


def functions(statements: list[Statement]) -> list[Function]:
    """Return the functions and procedures among them."""
    return [Function(one) for one in statements if isinstance(one.node, ast.CreateFunctionStmt)]


def find_all(node: Any, *kinds: type) -> list[Any]:
    """Return the nodes of these kinds in a syntax tree (or in a tuple of trees), the outermost first."""
    found: list[Any] = []

    class Collector(Visitor):  # type: ignore[misc]  # the library is untyped
        def visit(self, _: Any, inner: Any) -> None:
            if isinstance(inner, kinds):
                found.append(inner)

    for tree in node if isinstance(node, tuple) else (node,):
        if isinstance(tree, tuple):
            found += find_all(tree, *kinds)
        elif isinstance(tree, ast.Node):
            Collector()(tree)
    return found


def _first_line(text: str, offset: int) -> int:
    """Return the number (from 0) of the line with the first word at or after ``offset`` that is no comment."""
    blank = re.compile(r"(?:\s+|--[^\n]*|/\*.*?\*/)*", re.DOTALL)
    found = blank.match(text, offset)
    return text.count("\n", 0, found.end() if found else offset)


def _walk(tree: Any, first_line: int, line: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if isinstance(tree, dict):
        line = tree.get("lineno", line)
        for key, value in tree.items():
            if isinstance(value, dict) and key.startswith("PLpgSQL_"):
                yield key, first_line + value.get("lineno", line) - 1, value
            if isinstance(value, dict | list):
                yield from _walk(value, first_line, line)
    elif isinstance(tree, list):
        for value in tree:
            yield from _walk(value, first_line, line)


def _as_statement(expression: dict[str, Any]) -> str:
    """Return what stands in a PL/pgSQL expression as a statement: 0 is one, 2 an expression, from 3 an assignment."""
    query, mode = str(expression["query"]), expression.get("parseMode", 0)
    if mode == 0:
        return query
    if mode >= 3:
        query = re.sub(r"^[^=]*?:?=", "", query, count=1)
    return f"select {query}"
