"""doctor() about the database: each finding is made by the real thing, and goes when that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.diagnosis.examined import found
from tests.waiting import until

_TRANSACTIONS = """
do $$
begin
  create temp table written (n int) on commit drop;
  for n in 1..%s loop
    begin
      insert into written values (n);
    exception when division_by_zero then null;  -- the block is a transaction of its own
    end;
  end loop;
end $$"""


def let_pass(conn: Conn, transactions: int) -> None:
    """Have so many transactions write."""
    conn.execute((_TRANSACTIONS % transactions).encode())


def later(conn: Conn, **by: float) -> None:
    """Move the clock ahead of the real one."""
    move_clock(conn, str(datetime.now(UTC) + timedelta(**by)))


def test_an_old_snapshot_is_found_with_who_holds_it(db: Conn, connect: Connections) -> None:
    holder = connect(application_name="report", autocommit=False)
    holder.execute("set transaction isolation level repeatable read")
    holder.execute("select 1")
    pid = holder.info.backend_pid
    assert found(db) == []
    later(db, minutes=6)
    ((severity, subject, finding),) = found(db)
    assert (severity, subject) == ("warning", f"session {pid}")
    assert finding.startswith("holds a snapshot since 20")
    assert f"(role {db.info.user}, report, idle in transaction)" in finding
    later(db, minutes=61)
    assert found(db)[0][:2] == ("error", f"session {pid}")
    holder.rollback()
    assert found(db) == []


def test_an_open_transaction_that_has_written_is_found_too(db: Conn, connect: Connections) -> None:
    holder = connect(autocommit=False)
    holder.execute("select pgworker.add_job('a')")
    later(db, minutes=6)
    assert [each[:2] for each in found(db)] == [("warning", f"session {holder.info.backend_pid}")]
    holder.commit()
    assert found(db, "session") == []


def test_an_owner_who_does_not_see_other_roles_transactions_says_so(
    server: EmbeddedServer, connect: Connections, make_database: Callable[..., str], role: Callable[..., str]
) -> None:
    dsn, owner = make_database("owned"), role("plain_owner")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("grant create on database owned to plain_owner")
    with (
        psycopg.connect(dsn, user=owner, autocommit=True) as db,
        psycopg.connect(dsn, application_name="report") as holder,
    ):
        schema.install(db)
        holder.execute("set transaction isolation level repeatable read")
        holder.execute("select 1")
        later(db, hours=3)
        assert found(db) == []  # nothing says that it is old
        let_pass(db, 100_001)
        ((severity, subject, finding),) = found(db)
        assert (severity, subject) == ("warning", f"session {holder.info.backend_pid}")
        assert "transactions old (role " in finding
        assert finding.endswith("since when is not shown to role plain_owner): rows that died since cannot be removed")
        assert "grant pg_read_all_stats to plain_owner" in value(db, "select advice from pgworker.doctor()")
        holder.rollback()
        assert found(db) == []
        db.execute("drop extension pgworker")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("drop owned by plain_owner")


@pytest.fixture
def two_phase(own_server: EmbeddedServer) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a server with prepared transactions and logical decoding."""
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        conn.execute("alter system set max_prepared_transactions = 5")
        conn.execute("alter system set wal_level = logical")
    own_server.restart("fast")
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        yield conn


def test_prepared_transactions_and_replication_slots_that_hold_a_snapshot(two_phase: Conn) -> None:
    conn = two_phase
    conn.execute("select pg_create_logical_replication_slot('elsewhere', 'test_decoding')")
    conn.execute("begin")
    conn.execute("select pgworker.add_job('a')")
    conn.execute("prepare transaction 'it''s mine'")
    assert found(conn) == []
    later(conn, minutes=6)
    ((severity, subject, finding),) = found(conn)
    assert (severity, subject) == ("warning", "prepared transaction 'it''s mine'")
    assert finding.startswith("holds a snapshot since 20")
    assert f"(role {conn.info.user})" in finding
    later(conn, minutes=61)
    assert [each[0] for each in found(conn)] == ["error"]
    conn.execute("commit prepared 'it''s mine'")
    move_clock(conn, "")
    assert found(conn) == []
    let_pass(conn, 1_000_001)
    ((severity, subject, finding),) = found(conn)
    assert (severity, subject) == ("warning", "replication slot elsewhere")
    assert "transactions old (used by nobody)" in finding
    conn.execute("select pg_drop_replication_slot('elsewhere')")
    assert found(conn) == []
    for setting in ("autovacuum", "track_counts"):
        conn.execute(f"alter system set {setting} = off".encode())
        conn.execute("select pg_reload_conf()")
        (off,) = until(lambda: found(conn), "the setting to be seen")
        assert off == ("error", "autovacuum", f"setting {setting} is off: nothing removes dead rows")
        conn.execute(f"alter system reset {setting}".encode())
        conn.execute("select pg_reload_conf()")
        until(lambda: not found(conn), "the setting to be back")


def test_autovacuum_that_is_off_for_one_of_the_tables(db: Conn) -> None:
    db.execute("alter table pgworker.job set (autovacuum_enabled = off)")
    finding = "autovacuum is off for this table: nothing removes its dead rows"
    assert found(db) == [("error", "table job", finding)]
    db.execute("alter table pgworker.job reset (autovacuum_enabled)")
    assert found(db) == []


def test_dead_rows_that_vacuum_does_not_remove(db: Conn, connect: Connections) -> None:
    holder = connect(autocommit=False)
    holder.execute("set transaction isolation level repeatable read")
    holder.execute("select 1")
    db.execute("insert into pgworker.notice select 1, n, 'lost' from generate_series(1, 100001) n")
    db.execute("delete from pgworker.notice where job_id > 1")
    later(db, minutes=11)  # whether autovacuum comes by or not, the last one is then long ago
    ((severity, subject, finding),) = until(lambda: found(db, "table"), "the statistics")
    assert (severity, subject) == ("warning", "table notice")
    assert finding.startswith("100000 dead rows against 1 live ones; last vacuum: ")
    holder.rollback()
    db.execute("vacuum pgworker.notice")
    until(lambda: not found(db), "the statistics")


def test_the_queue_of_notifications_that_fills(db: Conn, connect: Connections) -> None:
    listener = connect()
    listener.execute("listen somewhere")
    listener.execute("begin")
    db.execute("select pg_notify('elsewhere', lpad(n::text, 7900, '.')) from generate_series(1, 11500) n")
    ((severity, subject, finding),) = found(db)
    assert (severity, subject) == ("warning", "notifications")
    assert finding.startswith("their queue is 1.")
    listener.execute("rollback")
    until(lambda: not found(db), "the queue to be read")
