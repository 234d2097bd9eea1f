"""The wheel: what is in it, and that it installs the schema without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from tests.packaging.catalog import definitions

ROOT = Path(__file__).resolve().parents[2]


def pip(*arguments: str | Path) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the checkout."""
    source, built = tmp_path_factory.mktemp("source") / "pgworker", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=unwanted)
    pip("wheel", "--no-build-isolation", "--wheel-dir", built, source)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel was installed."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheel)
    return target


def test_the_wheel_carries_the_sql_and_no_more_than_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = HeaderParser().parsestr(archive.read(metadata).decode())
        for part in [*schema.parts(), schema.source_dir() / "load_order"]:
            assert archive.read(f"pgworker_client/_extension/{part.name}") == part.read_bytes()
        assert archive.read("pgworker_client/_extension/pgworker.control").decode() == schema.control()
    assert {name.split("/")[0] for name in names} == {"pgworker_client", metadata.split("/")[0]}
    assert (about["Name"], about["Version"]) == ("pgworker-client", schema.version())
    needed = [one for one in about.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert needed == ["psycopg>=3.2"]


@pytest.fixture(scope="module")
def bare_server(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server that offers no extension pgworker, as most hosted ones."""
    installation = server.installation
    if not installation.keeps_extensions_apart and server.has_extension:
        pytest.skip(f"PostgreSQL {installation.major} here always offers the extension")
    nowhere = {"extension_control_path": "$system"} if installation.major >= 18 else {}
    with EmbeddedServer(installation, settings=nowhere or {"extension_destdir": ""}) as running:
        yield running


@pytest.mark.parametrize("command", ["script", "module"])
@pytest.mark.parametrize("offered", [True, False])
def test_pgworker_install_from_the_wheel(
    site: Path, command: str, offered: bool, db: psycopg.Connection[Any], request: pytest.FixtureRequest
) -> None:
    server: EmbeddedServer = request.getfixturevalue("server" if offered else "bare_server")
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("create database target template template0")
        try:
            environment = os.environ | {
                "PYTHONPATH": str(site),
                "PGHOST": server.host,
                "PGPORT": str(server.port),
                "PGUSER": server.user,
                "PGDATABASE": "target",
            }
            _installs(site, command, environment)
            with psycopg.connect(server.dsn("target"), autocommit=True) as target:
                assert definitions(target) == definitions(db)
                listed = target.execute("select true from pg_extension where extname = 'pgworker'").fetchone()
                assert bool(listed) == (offered and server.has_extension)
        finally:
            conn.execute("drop database target with (force)")


def _installs(site: Path, command: str, environment: dict[str, str]) -> None:
    """Run ``pgworker install`` twice: it works, and then says that there is nothing to do."""
    imported = [sys.executable, "-c", "import pgworker_client; print(pgworker_client.__file__)"]
    where = subprocess.run(imported, cwd="/", env=environment, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(site))
    started = [sys.executable, *([site / "bin/pgworker"] if command == "script" else ["-m", "pgworker_client"])]
    done = subprocess.run([*started, "install"], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*started, "install"], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert f"holds pgworker {schema.version()}: there is nothing to do" in again.stderr
