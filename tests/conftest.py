"""The server that the tests of one process run on, and a database of its own for each test that wants one.

One version of PostgreSQL per run: ``--pg 15`` (any major that is here), ``--pg newest``; by default ``PG_CONFIG``'s,
else an installed one, else an embedded one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import hypothesis
import psycopg
import pytest
from psycopg import sql
from pytest_postgresql import factories

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import Installation, NoPostgresError, find_installation
from tests import distribution
from tests.connections import Connections
from tests.coverage_plpgsql import PlpgsqlCoverage
from tests.faults import table
from tests.faults.trial import Outcome
from tests.invariants import assert_consistent

hypothesis.settings.register_profile("pgworker", deadline=None)  # no test fails because the machine is slow
hypothesis.settings.load_profile("pgworker")

SETTINGS = {"max_connections": "300", "shared_buffers": "64MB", "timezone": "UTC", "jit": "off"}

_COVERAGE = pytest.StashKey[PlpgsqlCoverage]()
_INSTALLATION = pytest.StashKey[Installation]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pg", default="best", metavar="MAJOR", help="PostgreSQL to test on: 14 … 18, newest, or best")


def pytest_configure(config: pytest.Config) -> None:
    # To compile the tests, and the package in each of hundreds of processes that they start, takes minutes; what
    # comes of it is kept even where PYTHONDONTWRITEBYTECODE wants no bytecode beside the sources.
    if sys.dont_write_bytecode:
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(config.rootpath / ".venv/bytecode")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    for name in list(os.environ):  # libpq's variables, which would lead the tests to another server
        if (name.startswith("PG") and not name.startswith(("PG_", "PGWORKER_"))) or name == "DATABASE_URL":
            del os.environ[name]
    # Whoever stops a run wants it gone like Ctrl-C does: with its servers and their directories.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell makes its background processes deaf to Ctrl-C; the processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        config.stash[_INSTALLATION] = find_installation(config.getoption("--pg"))
    except (NoPostgresError, ValueError) as error:
        raise pytest.UsageError(f"--pg: {error}") from error
    config.stash[_COVERAGE] = PlpgsqlCoverage()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return distribution.processes(config)


@pytest.hookimpl(tryfirst=True)  # before the groups are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    distribution.keep_apart(items, config.rootpath)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    return distribution.sendable((yield))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # one of several processes
        coverage = session.config.stash[_COVERAGE]
        output["plpgsql"] = [coverage.available, coverage.counts()]


def pytest_testnodedown(node: Any) -> None:
    if (output := getattr(node, "workeroutput", None)) is not None:  # it has not crashed
        node.config.stash[_COVERAGE].merge(*output["plpgsql"])


def pytest_report_header(config: pytest.Config) -> str:
    installation = config.stash[_INSTALLATION]
    return f"PostgreSQL {installation.major}: {installation.bindir}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = [
        Outcome(**json.loads(value))
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "fault" and report.when == "call"
    ]
    if outcomes:
        terminalreporter.section("faults")
        for line in table.lines(outcomes):
            terminalreporter.write_line(line)
    coverage = config.stash[_COVERAGE]
    terminalreporter.section("PL/pgSQL")
    narrowed = config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("-k") or config.getoption("-m")
    if not narrowed:
        for line in coverage.report():
            terminalreporter.write_line(line)
    terminalreporter.write_line(coverage.summary())


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """The server of the run. Do not stop it: `own_server` is there for that."""
    installation = pytestconfig.stash[_INSTALLATION]
    counting = pytestconfig.stash[_COVERAGE].settings(installation)
    with EmbeddedServer(installation, settings=SETTINGS | counting) as running:
        yield running


@pytest.fixture
def own_server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """A server for this test alone, to be stopped and started at will; pgworker is in its database ``postgres``."""
    with EmbeddedServer(pytestconfig.stash[_INSTALLATION], settings=SETTINGS) as running:
        with psycopg.connect(running.dsn(), autocommit=True) as conn:
            schema.install(conn)
        yield running


@pytest.fixture(scope="session")
def _pg_server(server: EmbeddedServer) -> SimpleNamespace:
    """The server as pytest-postgresql wants it described."""
    return SimpleNamespace(
        host=server.host,
        port=server.port,
        user=server.user,
        password=None,
        options="",
        maintenance_dbname="postgres",
        template_dbname="template1",
    )


def _install(*, host: str, port: int, user: str, dbname: str, **_: Any) -> None:
    with psycopg.connect(host=host, port=port, user=user, dbname=dbname, autocommit=True) as conn:
        schema.install(conn)


_template = factories.postgresql_noproc(depends_on="_pg_server", dbname="pgworker_test", load=[_install])


@pytest.fixture(scope="session")
def _databases(
    server: EmbeddedServer, _template: SimpleNamespace, pytestconfig: pytest.Config
) -> Iterator[Callable[[str], AbstractContextManager[str]]]:
    """Make a database with pgworker in it for as long as a ``with`` block lasts, which gets its connection string."""
    coverage = pytestconfig.stash[_COVERAGE]
    coverage.prepare(server.dsn(_template.template_dbname))
    # To copy files is nearly twice as fast as to write every page of them to the log as well.
    how = "strategy file_copy" if server.installation.major >= 15 else ""

    # One connection makes and drops them all: to connect takes longer than to copy.
    with psycopg.connect(server.dsn(), autocommit=True) as admin:

        @contextmanager
        def database(name: str) -> Iterator[str]:
            admin.execute(f"create database {name} template {_template.template_dbname} {how}".encode())
            try:
                yield server.dsn(name)
                coverage.collect(server.dsn(name))
            finally:
                admin.execute(f"drop database {name} with (force)".encode())

        yield database


@pytest.fixture
def dsn(_databases: Callable[[str], AbstractContextManager[str]]) -> Iterator[str]:
    """The connection string of a fresh database that has pgworker in it, dropped after the test."""
    with _databases("pgworker_test") as string:
        yield string


@pytest.fixture
def connect(dsn: str) -> Iterator[Connections]:
    """Open more connections to the test's database, in autocommit: ``connect()``, ``connect(user="shop")``."""
    connections = Connections(dsn)
    yield connections
    connections.close()


@pytest.fixture
def db(connect: Connections) -> psycopg.Connection[Any]:
    """An autocommit connection to a fresh database: for whatever commits or takes several sessions."""
    return connect()


@pytest.fixture
def role(connect: Connections) -> Iterator[Callable[..., str]]:
    """Make a role that may log in and nothing else: ``role("shop")``; dropped with its rights and objects."""
    made: list[str] = []

    def make(name: str, options: str = "") -> str:
        with connect() as conn:
            conn.execute(sql.SQL("create role {} login " + options).format(sql.Identifier(name)))
        made.append(name)
        return name

    yield make
    connect.close()  # a session of that role would be in the way
    with connect() as conn:
        for name in reversed(made):
            conn.execute(sql.SQL("drop owned by {} cascade").format(sql.Identifier(name)))
            conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def make_database(server: EmbeddedServer) -> Iterator[Callable[..., str]]:
    """Make a database without pgworker: ``make_database("shop")`` returns its connection string; dropped at the end."""
    made: list[str] = []
    with psycopg.connect(server.dsn(), autocommit=True) as conn:

        def make(name: str) -> str:
            conn.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
            made.append(name)
            return server.dsn(name)

        yield make
        for name in made:
            conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def _shared(_databases: Callable[[str], AbstractContextManager[str]]) -> Iterator[psycopg.Connection[Any]]:
    with _databases("pgworker_shared") as string, psycopg.connect(string) as conn:
        yield conn


@pytest.fixture
def tx(_shared: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """A connection in a transaction that is rolled back after the test: for whatever needs no commit; a millisecond."""
    with _shared.transaction(force_rollback=True):
        yield _shared


@pytest.fixture
def consistent_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does in `tx` or `db`, every counter, state and link agrees afterwards."""
    # Asked for before the test, so that it is torn down after the look: a rolled back tree has nothing wrong with it.
    name = next((name for name in ("tx", "db") if name in request.fixturenames), None)
    conn = request.getfixturevalue(name) if name else None
    yield
    if conn is not None and not conn.closed:
        assert_consistent(conn)
