"""Plans of the statements that run inside functions, as auto_explain tells them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg

Conn = psycopg.Connection[Any]
Plan = dict[str, Any]

_SETTINGS = {
    "log_min_duration": "0",
    "log_nested_statements": "on",
    "log_analyze": "on",
    "log_format": "json",
    "log_level": "notice",
}


class Explained:
    """Listens on a superuser's connection: ``plans`` are those of all statements since the last `forget`."""

    def __init__(self, conn: Conn) -> None:
        self.plans: list[tuple[str, Plan]] = []
        self.contexts: list[str] = []
        conn.execute("load 'auto_explain'")
        conn.add_notice_handler(self._hear)
        for name, setting in _SETTINGS.items():
            conn.execute("select set_config('auto_explain.' || %s, %s, false)", [name, setting])

    def _hear(self, said: psycopg.errors.Diagnostic) -> None:
        text = said.message_primary or ""
        if "plan:" in text:
            told = json.loads(text.partition("plan:")[2])
            self.plans.append((told["Query Text"], told["Plan"]))
            self.contexts.append(said.context or "")

    def forget(self) -> None:
        """Start anew."""
        self.plans.clear()
        self.contexts.clear()

    def of(self, words: str) -> Plan:
        """Return the plan of the statement that contains ``words``."""
        found = [plan for query, plan in self.plans if words in query]
        assert found, f"no statement with {words!r} ran; there were: {[query[:80] for query, _ in self.plans]}"
        return found[-1]


def nodes(plan: Plan) -> Iterator[Plan]:
    """Yield all nodes of a plan, its own root first."""
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def cte(plan: Plan, name: str) -> Plan:
    """Return the part of a plan that makes that CTE."""
    (found,) = [node for node in nodes(plan) if node.get("Subplan Name") == f"CTE {name}"]
    return found


def scans(plan: Plan, table: str) -> set[tuple[str, str | None]]:
    """Return how a plan reads a table: (kind of node, index)."""
    return {
        (node["Node Type"], node.get("Index Name"))
        for node in nodes(plan)
        if node.get("Relation Name") == table and "Scan" in node["Node Type"]
    }


def buffers(conn: Conn, query: str, *parameters: Any) -> int:
    """Run a query and return how many pages it touched, those of the functions that it calls included."""
    row = conn.execute(f"explain (analyze, buffers, format json) {query}".encode(), parameters).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
