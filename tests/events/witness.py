"""A session that listens to events, and compares what it hears with what became of the jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.calling import Conn, value

CHANNEL = "pgworker_events"
FINISHED = ("completed", "failed", "cancelled")

Event = tuple[int, str | None, str | None]
"""Job, state before, state after."""


class Witness:
    """Listens from now on."""

    def __init__(self, listener: Conn) -> None:
        self._listener = listener
        self._fences = 0
        listener.execute(f"listen {CHANNEL}")

    def payloads(self, conn: Conn) -> list[str]:
        """Return what was notified since the last look, by whatever has committed before ``conn`` gets to this."""
        self._fences += 1
        fence = f"fence {self._fences}"
        conn.execute("select pg_notify(%s, %s)", [CHANNEL, fence])
        heard: list[str] = []
        for notification in self._listener.notifies(timeout=20):
            if notification.payload == fence:
                return heard
            heard.append(notification.payload)
        raise AssertionError("notifications do not arrive")

    def heard(self, conn: Conn) -> list[Event]:
        """Return the events since the last look."""
        return [(told["id"], told["from"], told["to"]) for told in map(json.loads, self.payloads(conn))]

    @contextmanager
    def compares(self, conn: Conn, *, timeless: bool = False) -> Iterator[None]:
        """Expect what is done inside, by any session, to be told exactly.

        ``timeless``: the clock runs meanwhile, so what is scheduled may become ready, which nobody tells.
        """
        before = _states(conn)
        assert self.heard(conn) == []
        yield
        events = self.heard(conn)
        after = _states(conn)
        same = {"scheduled": "ready"} if timeless else {}
        path = {id: [same.get(state, state)] for id, state in before.items()}
        for id, old, new in events:
            old, new = same.get(old or "", old), same.get(new or "", new)
            known = path.setdefault(id, [None])
            assert known[-1] == old, f"job {id} was {known[-1]}, not {old}: {events}"
            known.append(new)
        for id, known in path.items():
            state = same.get(after.get(id, ""), after.get(id))
            if state is None and known[-1] is not None:  # not kept, or forgotten
                assert known[-1] in FINISHED, f"job {id} has gone without a word: {events}"
            else:
                assert known[-1] == state, f"job {id} is {state}, but was told to be {known[-1]}: {events}"


def _states(conn: Conn) -> dict[int, Any]:
    states: dict[int, Any] = dict(conn.execute("select id, state from pgworker.jobs").fetchall())
    return states


def publish(conn: Conn, *, enabled: bool = True) -> None:
    """Switch events on or off."""
    value(conn, "select pgworker.publish_events(%s)", enabled)
