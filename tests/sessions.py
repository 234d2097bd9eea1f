"""A statement that runs in the background, in a session that may have to wait for another."""

from __future__ import annotations

import threading
from typing import Any

from tests.calling import Conn, Row, rows
from tests.waiting import until_blocked


class Background:
    """Runs one query in its own thread; ``result()`` waits for it, and raises what it raised."""

    def __init__(self, conn: Conn, query: str, *parameters: Any) -> None:
        self._conn = conn
        self._rows: list[Row] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(query, parameters), daemon=True)
        self._thread.start()

    def _run(self, query: str, parameters: tuple[Any, ...]) -> None:
        try:
            self._rows = rows(self._conn, query, *parameters)
        except BaseException as error:
            self._error = error

    def wait_until_blocked(self, observer: Conn) -> None:
        """Wait until the query waits for a lock of another session."""
        until_blocked(observer, self._conn)

    @property
    def over(self) -> bool:
        """Whether the query has ended, well or badly."""
        return not self._thread.is_alive()

    def result(self, timeout: float = 20) -> list[Row]:
        """Return the rows of the query, waiting for it to end."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"still running after {timeout} s"
        if self._error is not None:
            raise self._error
        return self._rows
