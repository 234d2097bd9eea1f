"""An idle worker writes nothing: neither to show that it is there nor to look for work."""

from __future__ import annotations

from typing import Any

import psycopg

from pgworker_client import Worker
from tests.calling import register, value
from tests.client.background import running
from tests.waiting import until

Db = psycopg.Connection[Any]

_CALLS = """
select coalesce(sum(calls), 0)::int from pg_stat_user_functions where schemaname = 'pgworker' and funcname = %s
"""
_WRITTEN = """
select sum(n_tup_ins + n_tup_upd + n_tup_del)::int from pg_stat_all_tables
where schemaname in ('pgworker', 'pg_catalog')
"""


def test_an_idle_worker_writes_no_row(dsn: str, db: Db) -> None:
    db.execute(f"alter database {db.info.dbname} set track_functions = 'all'")
    parts = ("heartbeat", "maintain", "get_jobs")
    with running(Worker(dsn, tasks={"t": print}, poll_interval=0.02)):
        # The server counts a session's writes not later than its calls.
        until(
            lambda: all(value(db, _CALLS, name) for name in parts), "it is there, and knows that nothing is to be done"
        )
        before = {name: value(db, _CALLS, name) for name in parts}
        written = value(db, _WRITTEN)
        until(lambda: all(value(db, _CALLS, name) >= before[name] + 3 for name in parts), "some rounds")
        assert value(db, _WRITTEN) == written


def test_an_idle_session_takes_no_transaction_id(db: Db) -> None:
    worker = register(db)
    value(db, "select count(*) from pgworker.get_jobs(%s, 10, '{t}')", worker)  # notes what it asks for
    for call in (f"heartbeat({worker})", "maintain()", f"get_jobs({worker}, 10, '{{t}}')", "next_run_at('{t}')"):
        for _ in range(60):
            with db.transaction():
                db.execute(f"select pgworker.{call}".encode())
                assert value(db, "select pg_current_xact_id_if_assigned()") is None, call
