"""The command ``pgworker``. Exit status: 0 success, 1 failure (one line on standard error says why), 2 wrong usage."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from pgworker_client import schema
from pgworker_client.cli_tree import show_tree
from pgworker_client.connection import connection_string
from pgworker_client.diagnosis import doctor
from pgworker_client.enqueue import add_job
from pgworker_client.errors import PgworkerError, one_line
from pgworker_client.loading import load_directory, load_worker
from pgworker_client.logs import log_to_stderr
from pgworker_client.scheduling import load_crontab
from pgworker_client.worker import Worker

_Command = Callable[[argparse.Namespace], int]


class _UsageError(Exception):
    """The arguments do not go together."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's) and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:  # it has arguments of its own, and is not needed by anything else
        return int(importlib.import_module("pgworker_client.demo").main(given[1:]) or 0)
    parser = _parser()
    options = parser.parse_args(given)
    command: _Command = options.command
    try:
        return command(options)
    except _UsageError as exc:
        parser.error(str(exc))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; what is left of it must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PgworkerError, schema.InstallError, psycopg.Error, OSError, ValueError, TypeError) as exc:
        if options.verbose:
            traceback.print_exc()
        print(f"pgworker: {_reason(exc)}", file=sys.stderr)
        return 1


def _reason(exc: Exception) -> str:
    """One line; a hint of the database is part of it."""
    if not isinstance(exc, psycopg.Error) or exc.diag.message_primary is None:
        return " ".join(str(exc).split()) or one_line(exc)
    hint = exc.diag.message_hint
    if exc.sqlstate in ("3F000", "42P01", "42883"):
        hint = "no pgworker in this database: run `pgworker install` or CREATE EXTENSION pgworker"
    return exc.diag.message_primary + (f" ({hint})" if hint else "")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--database",
        "--dsn",
        metavar="DSN",
        help="connection string or URL (default: DATABASE_URL, else libpq's PG* variables)",
    )
    common.add_argument("-v", "--verbose", action="store_true", help="more to read: debug records, tracebacks")

    parser = argparse.ArgumentParser(prog="pgworker", description="Background jobs inside PostgreSQL.")
    parser.add_argument("--version", action="version", version=f"pgworker {schema.version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: _Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "Run a worker until it is stopped, or with --once until nothing is due.")
    run.add_argument("worker", nargs="?", metavar="MODULE:WORKER", help="a Worker in a Python module")
    run.add_argument("--tasks", type=Path, metavar="DIR", help="a directory: DIR/NAME.py is task NAME, by handle()")
    run.add_argument("-j", "--concurrency", type=int, metavar="N", help="handlers that run at the same time")
    run.add_argument("--once", action="store_true", help="run what is due, then exit")
    run.add_argument("--poll-interval", type=float, metavar="S", help="seconds between looks when nothing is heard")
    run.add_argument("--lease", type=float, metavar="S", help="presence by a lease of S seconds: for poolers")
    run.add_argument("--grace", type=float, metavar="S", help="seconds that running jobs get after the first signal")
    run.add_argument("--name", help="the worker's name in the database and in logs")

    job = add("add", _add, "Add a job and print its id.")
    job.add_argument("identifier", help="the task that is to handle it")
    job.add_argument("payload", nargs="?", metavar="PAYLOAD-JSON", help="default: {}")
    job.add_argument("--queue", metavar="NAME", help="serial queue")
    job.add_argument("--run-at", metavar="TIME", help="ISO 8601; without an offset it is local time")
    job.add_argument("--max-attempts", type=int, metavar="N")
    job.add_argument("--key", help="job key: unique among live jobs")
    job.add_argument("--key-mode", choices=["replace", "preserve_run_at", "unsafe_dedupe", "debounce"])
    job.add_argument("--priority", type=int, metavar="N", help="lower runs sooner")
    job.add_argument("--flag", action="append", metavar="FLAG", help="may be given more than once")

    tree = add("tree", _tree, "Draw the tree that a job belongs to.")
    tree.add_argument("id", type=int, metavar="ID", help="the root, or any other job of the tree")
    tree.add_argument(
        "--follow", action="store_true", help="draw it anew until the root has ended; status 1 if it did not complete"
    )
    tree.add_argument("--all", action="store_true", help="every job, however many siblings it has")

    crontab = add("crontab", _crontab, "Make the schedules of a crontab, and print them with their next ticks.")
    crontab.add_argument("file", type=argparse.FileType(encoding="utf-8"), metavar="FILE", help="- is standard input")
    crontab.add_argument("--prune", action="store_true", help="remove those made so before that are not in it any more")

    add("doctor", _doctor, "Say what is wrong with the installation, or soon will be; status 1 on an error.")
    add("install", _install, "Install pgworker in the database: as an extension if offered, else the same SQL by hand.")
    add("upgrade", _upgrade, "Bring pgworker in the database to the version of this client.")
    commands.add_parser("demo", help="A small shop's jobs, run before your eyes.")
    return parser


def _run(options: argparse.Namespace) -> int:
    if (options.worker is None) == (options.tasks is None):
        raise _UsageError("run: give MODULE:WORKER or --tasks DIR, one of the two")
    log_to_stderr(logging.DEBUG if options.verbose else logging.INFO)
    worker = load_worker(options.worker) if options.worker else Worker(tasks=load_directory(options.tasks))
    given = {
        "dsn": options.database,
        "concurrency": options.concurrency,
        "poll_interval": options.poll_interval,
        "lease": options.lease,
        "grace": options.grace,
        "name": options.name,
    }
    worker.settings = dataclasses.replace(worker.settings, **{key: to for key, to in given.items() if to is not None})
    worker.run(once=options.once)
    return 0


def _add(options: argparse.Namespace) -> int:
    run_at = None
    if options.run_at is not None:
        try:
            run_at = datetime.fromisoformat(options.run_at).astimezone()
        except ValueError:
            raise _UsageError(f"add: --run-at {options.run_at!r} is not a time like 2026-10-01T08:00+02:00") from None
    payload = None
    if options.payload is not None:
        try:
            payload = json.loads(options.payload)
        except ValueError as exc:
            raise _UsageError(f"add: the payload {options.payload!r} is not JSON: {exc}") from None
    with _connect(options) as conn:
        job = add_job(
            conn,
            options.identifier,
            payload,
            queue_name=options.queue,
            run_at=run_at,
            max_attempts=options.max_attempts,
            job_key=options.key,
            job_key_mode=options.key_mode,
            priority=options.priority,
            flags=options.flag,
        )
    print(job.id)
    return 0


def _tree(options: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without box characters still shows the rest
        sys.stdout.reconfigure(errors="replace")
    with _connect(options) as conn:
        return show_tree(conn, options.id, follow=options.follow, everything=options.all)


def _crontab(options: argparse.Namespace) -> int:
    with options.file as file, _connect(options) as conn:
        made = load_crontab(conn, file.read(), prune=options.prune)
    for one in made:
        print(f"{one.name}  {one.next_tick or 'paused'}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    with _connect(options) as conn:
        findings, database = doctor(conn), conn.info.dbname
    table = [("SEVERITY", "SUBJECT", "FINDING", "ADVICE"), *map(dataclasses.astuple, findings)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table if findings else ():
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    if not findings:
        print(f"nothing found in database {database}")
    return int(any(finding.severity == "error" for finding in findings))


def _install(options: argparse.Namespace) -> int:
    with _connect(options) as conn:
        print(f"pgworker {schema.install(conn)} installed in database {conn.info.dbname}")
    return 0


def _upgrade(options: argparse.Namespace) -> int:
    with _connect(options) as conn:
        installed, wanted = schema.installed_version(conn), schema.version()
        if installed is None:
            raise schema.InstallError(f"no pgworker in database {conn.info.dbname}: run `pgworker install`")
        if installed != wanted:
            raise schema.InstallError(f"there is no way from pgworker {installed} to {wanted} in this client")
        print(f"pgworker {installed} in database {conn.info.dbname} is up to date")
    return 0


def _connect(options: argparse.Namespace) -> psycopg.Connection[Any]:
    return psycopg.connect(connection_string(options.database), application_name="pgworker")
