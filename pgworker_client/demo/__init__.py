"""``pgworker demo``: a small shop whose orders queue jobs by a trigger, run by a worker, before your eyes.

Everything that it prints was measured or read from the database in that very run. It needs nothing: a PostgreSQL is
started for it and removed again, unless ``--dsn`` names one.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg

from pgworker_client import schema
from pgworker_client.demo.files import Files, FilesError
from pgworker_client.demo.interruption import Interrupted, Interruption
from pgworker_client.demo.screen import say
from pgworker_client.demo.shop import Shop, ShopError
from pgworker_client.demo.story import DemoFailed, check, open_shop, take_orders, tell, watch, what_next
from pgworker_client.demo.worker_process import WorkerError, WorkerProcess
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.errors import PgworkerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Exit status: 0 all went as described, 1 it did not, 2 wrong usage, 128 + n stopped by signal n."""
    options = _parser().parse_args(arguments)
    # A transaction in which a signal comes is not rolled back, it ends with its connection; psycopg would warn of that.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    try:
        with Interruption() as stop:
            _run(options, stop)
        return 0
    except Interrupted as interrupted:
        return interrupted.status
    except (DemoFailed, ShopError, FilesError, WorkerError, PgworkerError, schema.InstallError) as failed:
        reason = str(failed)
    except (psycopg.Error, RuntimeError, OSError, ValueError) as failed:
        reason = f"{type(failed).__name__}: {str(failed).strip()}"
    sys.stderr.write(f"pgworker demo: {reason}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgworker demo", description="A small shop's jobs, run before your eyes.")
    parser.add_argument("--orders", type=_positive, default=1000, metavar="N", help="orders to come in (default 1000)")
    parser.add_argument(
        "--dsn",
        help="a database to use, in which the demo makes a schema of its own, pgworker_demo, that stays; "
        "without it a PostgreSQL is started for the demo and removed again",
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where files go (default: a new one)")
    parser.add_argument("-j", "--concurrency", type=_positive, default=10, metavar="N", help="jobs that run at once")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def _run(options: argparse.Namespace, stop: Interruption) -> None:
    files: Files | None = None
    try:
        with stop.shielded():
            files = Files(options.directory)
        with _database(options.dsn, stop) as dsn:
            _run_shop(options, stop, files, dsn)
    except Interrupted as interrupted:
        if files is None:
            raise
        gone = files.discard()
        say(f"\nStopped by {interrupted}. The worker is gone{'' if options.dsn else ', and so is the server'}.")
        say("Nothing is left of the demo." if gone else f"The files stay in {files.path}.")
        raise
    except BaseException:
        if files is not None and not files.log.exists():  # nothing was begun
            files.discard()
        raise


def _run_shop(options: argparse.Namespace, stop: Interruption, files: Files, dsn: str) -> None:
    conn = psycopg.connect(dsn, autocommit=True)
    worker: WorkerProcess | None = None
    try:
        shop = Shop(conn, options.orders)
        open_shop(shop)
        with stop.shielded():
            worker = WorkerProcess(dsn, files, options.concurrency)
        worker.wait_until_started()
        say(f"A worker waits for jobs: pgworker run --tasks DIR -j {options.concurrency}, process {worker.pid}.")
        committed = take_orders(shop)
        watch(shop, worker)
        status = worker.stop()
        tell(shop, files, shop.seconds_since(committed))
        check(shop, files, status)
        say(what_next(shop, options.dsn))
    except BaseException:
        conn.close()  # in the middle of something, perhaps
        if options.dsn:
            _clear_away(options.dsn, worker)
        elif worker is not None:
            worker.kill()
        raise
    conn.close()


def _clear_away(dsn: str, worker: WorkerProcess | None) -> None:
    """Leave the named database as it was found, but for pgworker itself and the jobs that ended."""
    if worker is not None:
        worker.stop()
    with contextlib.suppress(psycopg.Error, ShopError), psycopg.connect(dsn, autocommit=True) as conn:
        Shop(conn, 0).clean()


@contextlib.contextmanager
def _database(dsn: str | None, stop: Interruption) -> Iterator[str]:
    """The database to use: the one named, or one of a server that lives as long as the block."""
    if dsn is not None:
        yield dsn
        return
    for name in list(os.environ):  # libpq's variables mean another server
        if name.startswith("PG") and not name.startswith(("PG_", "PGWORKER_")):
            del os.environ[name]
    begun = time.monotonic()
    server: EmbeddedServer | None = None
    try:
        with stop.shielded():
            server = EmbeddedServer()
            server.start()
        found = server.installation
        say(
            f"PostgreSQL {found.major} ({found.wheel or found.bindir}) started in {time.monotonic() - begun:.1f} s; "
            f"its data is in {server.directory} until the demo ends."
        )
        yield server.dsn()
    finally:
        if server is not None:
            with stop.shielded():
                server.close()
