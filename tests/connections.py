"""Connections to the database of one test, closed when it ends."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo


class Connections:
    """Opens autocommit connections; an instance is called like ``psycopg.connect``, with what differs."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._opened: list[psycopg.Connection[Any]] = []

    def __call__(self, *, autocommit: bool = True, **parameters: Any) -> psycopg.Connection[Any]:
        """Return a new connection; parameters are libpq's (``user``, ``dbname``, ``options``, …)."""
        conn = psycopg.connect(make_conninfo(self._dsn, **parameters), autocommit=autocommit)
        self._opened.append(conn)
        return conn

    def close(self) -> None:
        """Close all that are open still."""
        for conn in self._opened:
            conn.close()
        self._opened.clear()
