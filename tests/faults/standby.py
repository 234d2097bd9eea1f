"""A physical replica that can be promoted."""

from __future__ import annotations

import psycopg
from psycopg.conninfo import make_conninfo

from pgworker_client.embedded import EmbeddedServer
from tests.faults.ground import SETTINGS
from tests.waiting import until


class Standby(EmbeddedServer):
    """A hot standby of a running server, made by ``pg_basebackup -R``."""

    def __init__(self, primary: EmbeddedServer) -> None:
        self._primary = primary
        super().__init__(primary.installation, settings={**SETTINGS, "wal_retrieve_retry_interval": "100ms"})

    def _make_data(self) -> None:
        options = ("-D", "data", "-R", "-X", "stream", "-c", "fast", "--no-sync")
        self._run("pg_basebackup", "-d", make_conninfo(host=self._primary.host, user=self.user), *options)

    def keep_up(self) -> None:
        """Restart the primary: until it is started again, it confirms no commit that this has not got, too."""
        with psycopg.connect(self._primary.dsn(), autocommit=True) as conn:
            conn.execute("alter system set synchronous_standby_names = '*'")
        self._primary.restart("fast")
        with psycopg.connect(self._primary.dsn(), autocommit=True) as conn:
            conn.execute("alter system reset synchronous_standby_names")  # takes effect with the next start
            query = "select count(*) from pg_stat_replication where sync_state = 'sync'"
            until(lambda: conn.execute(query).fetchone() == (1,), "the standby is back", timeout=60)

    def catch_up(self) -> None:
        """Wait until it has all that the primary has at this moment."""
        with psycopg.connect(self._primary.dsn(), autocommit=True) as conn:
            (position,) = conn.execute("select pg_current_wal_lsn()::text").fetchone() or (None,)
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            query = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
            until(
                lambda: conn.execute(query, [position]).fetchone() == (True,), "the standby has caught up", timeout=60
            )

    def promote(self) -> None:
        """Make it a primary, and return when it is one."""
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            conn.execute("select pg_promote(true, 60)")
            until(
                lambda: conn.execute("select pg_is_in_recovery()").fetchone() == (False,), "the promotion", timeout=60
            )
