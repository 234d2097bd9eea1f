"""Schedules run without any worker: a real pg_cron calls maintain()."""

from __future__ import annotations

import psycopg
import pytest

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from tests.calling import row, rows, value
from tests.conftest import SETTINGS
from tests.schedules.ticking import schedule
from tests.waiting import until_row


@pytest.mark.timeout(240)  # pg_cron begins its work with the next minute
def test_pg_cron_drives_schedules_where_no_worker_runs(server: EmbeddedServer) -> None:
    if not server.installation.has_library("pg_cron"):
        pytest.skip("this PostgreSQL has no pg_cron; on Debian: apt-get install postgresql-15-cron")
    preloaded = {
        "shared_preload_libraries": "pg_cron",
        "cron.database_name": "postgres",
        "cron.use_background_workers": "on",
    }
    with (
        EmbeddedServer(server.installation, settings=SETTINGS | preloaded) as own,
        psycopg.connect(own.dsn(), autocommit=True) as conn,
    ):
        schema.install(conn)
        conn.execute("create extension pg_cron")
        made = schedule(conn, "* * * * *", payload='{"n": 1}')
        conn.execute("select cron.schedule('pgworker', '* * * * *', 'select pgworker.maintain()')")
        until_row(conn, "select 1 from pgworker.jobs", timeout=150)
        until_row(conn, "select 1 from cron.job_run_details where status = 'succeeded'")
        job = row(conn, "select * from pgworker.jobs order by id limit 1")
        assert job["run_at"] == made["next_tick"]
        assert job["payload"] == {
            "n": 1,
            "_cron": {"ts": made["next_tick"].strftime("%Y-%m-%dT%H:%M:%SZ"), "backfilled": False},
        }
        assert value(conn, "select count(*) from pgworker.worker") == 0
        assert rows(conn, "select from cron.job_run_details where status = 'failed'") == []
