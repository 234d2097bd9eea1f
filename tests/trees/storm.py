"""What the sessions of a storm do to trees: everything, at random, in one process each or in a thread of one.

``python -m tests.trees.storm DSN SEED SECONDS`` is one process with a few sessions, to be killed at any moment. It
writes a line for each error that is not among those expected, and at the end what it has done.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg

from tests.calling import Conn, value, values

SESSIONS = 6
QUEUES = [None, None, None, "q0", "q1"]
POLICIES = ["fail-parent", "fail-parent", "ignore", "ignore", "remove"]
# What a terminated session or a server that crashes says; not held any more; a key that is taken.
EXPECTED = {"57P01", "57P02", "57P03", "PW001", "PW002", "PW003", None}

Act = Callable[["Session"], object]


def nodes(chance: random.Random, depth: int, widths: list[int]) -> list[dict[str, Any]]:
    """Return siblings with whatever is below them."""
    siblings: list[dict[str, Any]] = []
    for place in range(chance.choice(widths)):
        node: dict[str, Any] = {
            "identifier": "t",
            "name": f"n{place}",
            "on_failure": chance.choice(POLICIES),
            "max_attempts": chance.choice([1, 1, 2, 3]),
            "priority": chance.choice([0, 0, 0, -1, 1]),
        }
        if queue := chance.choice(QUEUES):
            node["queue_name"] = queue
        if chance.random() < 0.05:
            node["job_key"] = f"k{chance.randrange(40)}"
        if place and chance.random() < 0.25:
            node["after"] = sorted({f"n{chance.randrange(place)}" for _ in range(2)})
        if chance.random() < 0.1:
            node["compensate"] = {"identifier": "t", "max_attempts": chance.choice([1, 2])}
        if depth and chance.random() < 0.5:
            node["children"] = nodes(chance, depth - 1, [1, 2, 3])
        siblings.append(node)
    return siblings


class Session:
    """One session: a worker, a producer and an administrator by turns."""

    def __init__(self, dsn: str, chance: random.Random, counts: Counter[str]) -> None:
        self.dsn = dsn
        self.chance = chance
        self.counts = counts
        self.conn: Conn
        self.worker = 0
        self.held: list[int] = []

    def run(self, until: float) -> None:
        """Do things until that time; whoever loses its session begins a new one."""
        connected = False
        while time.monotonic() < until:
            try:
                if not connected:
                    self.conn = psycopg.connect(self.dsn, autocommit=True, options="-cstatement_timeout=30s")
                    self.worker = value(self.conn, "select pgworker.register_worker('storm')")
                    self.held = []
                    connected = True
                act = self.chance.choices(ACTS, WEIGHTS)[0]
                name = act.__name__
                # Undone, or later than others would like; ending jobs in two statements has its own order of locks.
                if self.chance.random() < 0.1 and act is not hear:
                    with self.conn.transaction(force_rollback=self.chance.random() < 0.6):
                        act(self)
                        time.sleep(self.chance.random() * 0.01)
                else:
                    act(self)
                self.counts[name] += 1
            except psycopg.Error as error:
                self.counts[f"error {error.sqlstate}"] += 1
                if error.sqlstate not in EXPECTED:
                    print(f"{error.sqlstate} in {name}: {error}".replace("\n", " | "), flush=True)
                if not isinstance(error, psycopg.OperationalError) and not self.conn.closed:
                    continue
                connected = False
                if error.sqlstate is None:
                    time.sleep(0.05)

    def some(self, query: str, most: int) -> list[int]:
        """Return a few ids out of one tree, or out of any."""
        return values(
            self.conn, f"select id from ({query}) as s order by random() limit {self.chance.randint(1, most)}"
        )

    def of_one_tree(self, live: bool, most: int = 5) -> list[int]:
        table = "pgworker.job" if live else "pgworker.finished"
        which = "" if live else "and state in ('failed', 'cancelled')"
        return self.some(
            f"select id from {table} where root_id = (select root_id from {table} tablesample bernoulli (20)"
            f" where root_id is not null limit 1) {which}",
            most,
        )


def add(session: Session) -> None:
    if value(session.conn, "select count(*) < 3000 from pgworker.job"):
        depth, widths = session.chance.choice([(4, [1, 2, 3]), (2, [4, 8]), (1, [40, 120]), (8, [1])])
        tree = {"identifier": "t", "max_attempts": 1, "children": nodes(session.chance, depth, widths)}
        session.conn.execute("select pgworker.add_job_tree(%s::text::jsonb)", [json.dumps(tree)])


def claim(session: Session) -> None:
    if len(session.held) < 40:
        most = session.chance.choice([1, 3, 10, 30])
        claimed = values(session.conn, "select id from pgworker.get_jobs(%s, %s)", session.worker, most)
        session.held += claimed


def _one(session: Session) -> int:
    return session.held.pop(session.chance.randrange(len(session.held))) if session.held else 0


def finish(session: Session) -> None:
    chance = session.chance
    ended = [_one(session) for _ in range(min(len(session.held), chance.choice([1, 2, 10])))]
    cut = len(ended) - (chance.random() < 0.4) * chance.randint(0, len(ended))
    session.conn.execute(
        "select pgworker.finish_jobs(%s, %s, null, %s, null)", [session.worker, ended[:cut], ended[cut:]]
    )


def complete(session: Session) -> None:
    session.conn.execute("select pgworker.complete_job(%s, %s, '1')", [session.worker, _one(session)])


def fail(session: Session) -> None:
    session.conn.execute(
        "select pgworker.fail_job(%s, %s, 'broken', retry_at => now(), permanent => %s)",
        [session.worker, _one(session), session.chance.random() < 0.3],
    )


def add_children(session: Session) -> None:
    """The worker adds children to what it runs, and waits for them or does not."""
    if not (job := _one(session)):
        return
    children = nodes(session.chance, 1, [1, 2, 40])
    for child in children:
        child.pop("name", None)
        child.pop("after", None)
        child.pop("compensate", None)  # the job may be a compensation itself
    with session.conn.transaction():
        session.conn.execute(
            "select pgworker.add_children(%s, %s, %s::text::jsonb)", [session.worker, job, json.dumps(children)]
        )
    if session.chance.random() < 0.7:
        if not value(session.conn, "select pgworker.wait_for_children(%s, %s)", session.worker, job):
            session.held.append(job)
    else:
        session.held.append(job)


def hear(session: Session) -> None:
    for job, _ in session.conn.execute("select * from pgworker.heartbeat(%s)", [session.worker]).fetchall():
        if job in session.held:
            session.held.remove(job)
            session.conn.execute("select pgworker.cancel_job(%s, %s)", [session.worker, job])


def cancel(session: Session) -> None:
    session.conn.execute("select pgworker.cancel_jobs(%s)", [session.of_one_tree(live=session.chance.random() < 0.9)])


def permanently_fail(session: Session) -> None:
    session.conn.execute("select pgworker.permanently_fail_jobs(%s)", [session.of_one_tree(live=True)])


def complete_by_hand(session: Session) -> None:
    ids = session.of_one_tree(live=True) + session.of_one_tree(live=False)
    session.conn.execute("select pgworker.complete_jobs(%s)", [ids])


def retry(session: Session) -> None:
    session.conn.execute("select pgworker.retry_jobs(%s)", [session.of_one_tree(live=False, most=20)])


def reschedule(session: Session) -> None:
    ids = session.of_one_tree(live=True) + session.of_one_tree(live=False)
    session.conn.execute("select pgworker.reschedule_jobs(%s, now(), attempts => 0)", [ids])


def remove(session: Session) -> None:
    session.conn.execute("select pgworker.remove_job(%s)", [f"k{session.chance.randrange(40)}"])


def replace(session: Session) -> None:
    """A producer replaces what waits under a key."""
    session.conn.execute("select pgworker.add_job('t', job_key => %s)", [f"k{session.chance.randrange(40)}"])


def delete(session: Session) -> None:
    """One job, as several would be locked in any order."""
    for job in session.of_one_tree(live=True, most=1):
        session.conn.execute("delete from pgworker.job where id = %s and locked_by is null", [job])


def take_away(session: Session) -> None:
    workers = values(session.conn, "select id from pgworker.worker order by random() limit 1")
    session.conn.execute("select pgworker.force_unlock_workers(%s)", [workers])


def maintain(session: Session) -> None:
    session.conn.execute("select pgworker.maintain()")


_WEIGHTED: dict[Act, int] = {
    add: 4, claim: 14, finish: 14, complete: 5, fail: 6, add_children: 4, hear: 2, cancel: 2, permanently_fail: 2,
    complete_by_hand: 2, retry: 6, reschedule: 1, remove: 2, replace: 2, delete: 1, take_away: 1, maintain: 6,
}  # fmt: skip
ACTS, WEIGHTS = list(_WEIGHTED), list(_WEIGHTED.values())


def main(dsn: str, seed: int, seconds: float) -> None:
    """Run sessions in threads until the time is over."""
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it says that a lost session cannot be rolled back
    counts: Counter[str] = Counter()
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=Session(dsn, random.Random(seed * 100 + n), counts).run, args=[until], daemon=True)
        for n in range(SESSIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("did " + json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
