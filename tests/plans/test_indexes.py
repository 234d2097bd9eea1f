"""What the speed of claims stands on: no index entry is written by a claim, no id runs out."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.calling import add, claim_ids, register, rows, value
from tests.connections import Connections
from tests.waiting import until

Conn = psycopg.Connection[Any]


@pytest.mark.parametrize("batch", [1, 10, 500])
@pytest.mark.parametrize("queued", [False, True])
def test_no_claim_writes_an_index_entry(db: Conn, connect: Connections, batch: int, queued: bool) -> None:
    jobs = {1: 300, 10: 1_000, 500: 1_000 if queued else 10_000}[batch]
    db.execute(
        "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object("
        " 'identifier', 't', 'priority', mod(n, 3), 'payload', repeat('x', mod(n, 7) * 20),"
        " 'queue_name', case when %s then 'q' || n end)) from generate_series(1, %s) n))",
        [queued, jobs],
    )
    conn = connect()
    worker = register(conn)
    claimed = 0
    while got := claim_ids(conn, worker, batch):
        claimed += len(got)
    assert claimed == jobs
    conn.close()  # which hands in its statistics
    for table in ["job", *(["queue"] if queued else [])]:
        counts = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = %s"
        until(lambda: value(db, f"select n_tup_upd from ({counts}) s", table) >= jobs, "the statistics")  # noqa: B023
        (seen,) = rows(db, counts, table)
        assert seen["n_tup_hot_upd"] == seen["n_tup_upd"] == jobs, table


def test_no_index_of_live_jobs_names_what_a_claim_changes(tx: Conn) -> None:
    definitions = [
        row["definition"]
        for row in rows(
            tx,
            "select pg_get_indexdef(indexrelid) as definition from pg_index where indrelid = 'pgworker.job'::regclass",
        )
    ]
    assert len(definitions) >= 4
    for column in ("locked_at", "locked_by", "attempts"):
        assert value(tx, "select count(*) from pg_attribute where attrelid = 'pgworker.job'::regclass and attname = %s",
                     column) == 1  # fmt: skip
        assert not [text for text in definitions if column in text]
    assert not [
        text
        for text in value(
            tx,
            "select array_agg(pg_get_indexdef(indexrelid)) from pg_index where indrelid = 'pgworker.queue'::regclass",
        )
        if "job_id" in text
    ]


def test_no_sequence_and_no_id_is_narrower_than_64_bits(db: Conn) -> None:
    assert value(
        db,
        "select count(*) from pg_sequence s join pg_class c on c.oid = s.seqrelid"
        " where c.relnamespace = 'pgworker'::regnamespace and s.seqtypid = 'bigint'::regtype and not s.seqcycle"
        " and s.seqmax = 9223372036854775807",
    ) == value(db, "select count(*) from pg_class where relnamespace = 'pgworker'::regnamespace and relkind = 'S'")
    narrow = rows(
        db,
        "select c.relname, a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid"
        " where c.relnamespace = 'pgworker'::regnamespace and c.relkind in ('r', 'v', 'c')"
        " and (a.attname = 'id' or a.attname like '%\\_id' or a.attname in ('turn', 'locked_by'))"
        " and a.attnum > 0 and a.atttypid <> 'bigint'::regtype",
    )
    assert narrow == []
    # And everything works beyond 32 bits.
    for sequence in ("job_id", "worker_id", "turn", "epoch"):
        value(db, "select setval(%s, 5000000000)", f"pgworker.{sequence}")
    job, worker = add(db, queue_name="q")["id"], register(db)
    assert job > 2**32
    assert worker > 2**32
    assert claim_ids(db, worker, 1) == [job]
    assert value(db, "select pgworker.complete_job(%s, %s)", worker, job) is not None or True
    add(db, queue_name="q")
    assert len(claim_ids(db, worker, 1)) == 1
    value(db, "select count(*) from pgworker.heartbeat(%s)", worker)
    value(db, "select count(*) from pgworker.maintain()")
    assert value(db, "select count(*) from pgworker.worker") == 1
