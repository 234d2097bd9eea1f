"""Everything happens to overlapping trees at once, while processes are killed and the server crashes.

No deadlock, no counter that is wrong, and every tree ends. PGWORKER_STORM_SECONDS sets how long (default 10).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, register, value, values
from tests.invariants import violations
from tests.server_errors import errors
from tests.waiting import until

SECONDS = float(os.environ.get("PGWORKER_STORM_SECONDS", "10"))
SEED = int(os.environ.get("PGWORKER_STORM_SEED", "1"))
PROCESSES = 3


def _start(dsn: str, seed: int, seconds: float, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.trees.storm", dsn, str(seed), str(seconds)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def _drain(db: Conn) -> None:
    """Work until nothing is live, as fast as it is released; what fails is given back once more."""
    worker = register(db, "the one who clears up")

    def over() -> bool:
        db.execute("select pgworker.maintain()")
        db.execute("update pgworker.job set run_at = now() where run_at > now()")
        ids = values(db, "select id from pgworker.get_jobs(%s, 1000)", worker)
        db.execute("select pgworker.finish_jobs(%s, %s, null, %s, null)", [worker, ids[1:], ids[:1]])
        left = "select exists (select from pgworker.job) or exists (select from pgworker.unsettled)"
        return not ids and not value(db, left)

    try:
        until(over, "the end of all trees", timeout=60)
    except AssertionError as error:
        left = db.execute("select state, count(*), min(id) from pgworker.jobs where finished_at is null group by 1")
        raise AssertionError(f"{error}; live: {left.fetchall()}; {violations(db)[:20]}") from error


@pytest.mark.timeout(SECONDS * 2 + 150)
def test_a_storm_on_overlapping_trees_ends_with_every_tree_ended(own_server: EmbeddedServer, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    dsn = own_server.dsn()
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("insert into pgworker.setting values ('rescue_grace', '200 ms')")
        db.execute("alter system set deadlock_timeout = '100ms'")
        db.execute("alter system set log_lock_waits = on")
        db.execute("alter system set log_line_prefix = '%m [%p] %e '")
        db.execute("select pg_reload_conf()")
    stop_at = time.monotonic() + SECONDS
    log = tmp_path / "log"
    processes = [_start(dsn, SEED * 1000 + n, SECONDS, log) for n in range(PROCESSES)]
    started, crashes, killed = PROCESSES, 1 + int(SECONDS // 30), 0
    while (left := stop_at - time.monotonic()) > 0:
        time.sleep(chance.uniform(0.2, 0.8))
        if crashes and left < SECONDS * crashes / (2 + int(SECONDS // 30)):
            crashes -= 1
            own_server.restart("immediate")
        elif chance.random() < 0.5 and left > 3:
            victim = chance.randrange(PROCESSES)
            processes[victim].send_signal(signal.SIGKILL)
            processes[victim].wait()
            processes[victim] = _start(dsn, SEED * 1000 + started, left, log)
            started += 1
            killed += 1
        else:
            with psycopg.connect(dsn, autocommit=True) as db:
                db.execute(
                    "select pg_terminate_backend(pid) from (select pid from pg_stat_activity"
                    " where backend_type = 'client backend' and pid <> pg_backend_pid() order by random() limit 2) v"
                )
    for process in processes:
        process.wait(60)

    said = log.read_text()
    did: Counter[str] = Counter()
    for line in re.findall(r"^did (.*)$", said, re.M):
        did.update(json.loads(line))
    assert not errors(own_server), "\n\n".join(errors(own_server)[:3])
    assert not [line for line in said.splitlines() if not line.startswith("did ")], said[:5000]
    assert killed
    assert len([name for name in did if not name.startswith("error")]) > 15, did
    with psycopg.connect(dsn, autocommit=True) as db:

        def settled() -> bool:
            db.execute("select pgworker.maintain()")
            # What is to be undone may wait for jobs that were retried, and that nobody runs yet.
            return not value(
                db,
                "select exists (select from pgworker.worker)"
                " or exists (select from pgworker.unsettled where what <> 'compensate')",
            )

        until(settled, "the rescue of all jobs and the rest of the settling", timeout=60)
        assert violations(db) == []
        _drain(db)
        assert violations(db) == []
        assert value(db, "select count(*) from pgworker.counter") == 0
        assert value(db, "select count(*) from pgworker.unsettled") == 0
        undone = "select count(*) from pgworker.compensations where state in ('completed', 'failed', 'cancelled')"
        assert value(db, undone) > 0
