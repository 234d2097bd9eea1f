"""Asking the database why a job is not running, and what is wrong with the installation.

``conn``, the first argument, is any psycopg connection or cursor; with an async one the call returns an awaitable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pgworker_client.on_connection import Request, on_connection


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something to act upon; ``severity`` is ``error`` or ``warning``."""

    severity: str
    subject: str
    finding: str
    advice: str


def _findings(rows: list[tuple[Any, ...]]) -> list[Finding]:
    return [Finding(*row) for row in rows]


def _text(rows: list[tuple[Any, ...]]) -> str:
    return str(rows[0][0])


@on_connection
def why(job_id: int) -> Request[str]:
    """Why a job is not running, in one sentence; it begins with ``ready`` when nothing holds it back."""
    return Request("select pgworker.why(%s::bigint)", (job_id,), _text)


@on_connection
def doctor() -> Request[list[Finding]]:
    """What is wrong with the installation, or soon will be, errors first; empty when all is well."""
    return Request("select severity, subject, finding, advice from pgworker.doctor()", (), _findings)
