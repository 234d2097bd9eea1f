"""The ground that the other tests stand on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import Installation, NoPostgresError, find_installation, installations
from pgworker_client.throwaway import ThrowawayDirectory
from tests import waiting
from tests.clock import move_clock
from tests.connections import Connections

Conn = psycopg.Connection[Any]


@pytest.mark.parametrize("_", range(2))
def test_every_test_gets_a_fresh_database(db: Conn, _: int) -> None:
    db.execute("create table public.left_over ()")
    assert schema.installed_version(db) == schema.version()


@pytest.mark.parametrize("_", range(2))
def test_work_in_tx_is_rolled_back(tx: Conn, _: int) -> None:
    tx.execute("create table public.left_over ()")


def test_further_connections_see_what_another_committed(db: Conn, connect: Connections, dsn: str) -> None:
    db.execute("create table public.t as select 1 as n")
    assert connect().execute("select n from public.t").fetchone() == (1,)
    with psycopg.connect(dsn) as conn:
        assert conn.execute("select n from public.t").fetchone() == (1,)


def test_roles_are_dropped_with_what_they_own(db: Conn, connect: Connections, role: Callable[..., str]) -> None:
    db.execute("create schema s")
    db.execute(f"grant all on schema s to {role('shop')}")
    theirs = connect(user="shop")
    theirs.execute("create table s.t ()")
    assert theirs.execute("select current_user").fetchone() == ("shop",)


def test_the_clock_moves_for_one_session_only(db: Conn, connect: Connections) -> None:
    other = connect()
    move_clock(db, "2026-01-01 00:00+00")
    assert db.execute("select pgworker.clock() = '2026-01-01 00:00+00'").fetchone() == (True,)
    assert other.execute("select pgworker.clock() > '2026-01-02 00:00+00'").fetchone() == (True,)
    move_clock(db, "")
    assert db.execute("select pgworker.clock() > '2026-01-02 00:00+00'").fetchone() == (True,)


def test_waiting_for_a_blocked_session_finds_who_blocks(db: Conn, connect: Connections) -> None:
    holder, blocked = connect(), connect()
    holder.execute("select pg_advisory_lock(1)")
    thread = threading.Thread(target=blocked.execute, args=("select pg_advisory_lock(1)",))
    thread.start()
    assert waiting.until_blocked(db, blocked) == [holder.info.backend_pid]
    pid = holder.info.backend_pid
    holder.close()
    waiting.until_gone(db, pid)
    thread.join()
    waiting.until_idle(db, blocked.info.backend_pid)
    blocked.execute("select pg_advisory_unlock_all()")
    waiting.until_locks_free(db, blocked.info.backend_pid)


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(AssertionError, match="in vain for: the moon"):
        waiting.until(lambda: None, "the moon", timeout=0.01)


def test_what_was_committed_survives_a_crash_of_the_server(own_server: EmbeddedServer) -> None:
    with psycopg.connect(own_server.dsn()) as conn:
        conn.execute("create table public.kept as select 1 as n")
    own_server.restart("immediate")
    with psycopg.connect(own_server.dsn()) as conn:
        assert conn.execute("select n from public.kept").fetchone() == (1,)
        assert schema.installed_version(conn) == schema.version()
    own_server.stop("fast")
    assert not own_server.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(own_server.dsn())


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(server: EmbeddedServer) -> None:
    broken = EmbeddedServer(server.installation, settings={"shared_buffers": "plenty"})
    with pytest.raises(RuntimeError, match='invalid value for parameter "shared_buffers"'), broken:
        pass
    assert not broken.directory.exists()


_OWNER = """
import sys, time
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import find_installation
with EmbeddedServer(find_installation(sys.argv[1])) as server:
    print(server.directory, (server.directory / "data/postmaster.pid").read_text().split()[0], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_server_outlives_its_process(server: EmbeddedServer, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _OWNER, str(server.installation.major)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        directory, pid = owner.stdout.readline().split()
        owner.send_signal(how)
    waiting.until(lambda: not _alive(int(pid)), f"the end of process {pid}")
    ThrowawayDirectory([Path(directory).parent]).close()  # clears away what a killed process left
    assert not Path(directory).exists()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_directory_in_use_is_not_taken_for_abandoned() -> None:
    first = ThrowawayDirectory([Path("/tmp")])
    second = ThrowawayDirectory([Path("/tmp")])
    assert first.path.exists()
    first.close()
    second.close()
    assert not first.path.exists()


def test_an_unknown_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'old': expected best, newest, or a major"):
        find_installation("old")
    with pytest.raises(NoPostgresError, match="no PostgreSQL 3 found, only"):
        find_installation("3")
    monkeypatch.setenv("PG_CONFIG", "/nowhere/pg_config")
    with pytest.raises(NoPostgresError, match="PG_CONFIG=/nowhere/pg_config did not run"):
        installations()
    monkeypatch.delenv("PG_CONFIG")
    monkeypatch.setenv("PGWORKER_PG_BINDIR", "/usr")
    with pytest.raises(NoPostgresError, match="PGWORKER_PG_BINDIR=/usr: /usr has no initdb and postgres"):
        installations()


def test_the_directory_that_the_user_names_comes_first(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> None:
    every: list[Installation] = installations()
    monkeypatch.setenv("PGWORKER_PG_BINDIR", os.fspath(every[-1].bindir))
    assert installations()[0].bindir == every[-1].bindir
