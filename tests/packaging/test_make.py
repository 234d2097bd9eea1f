"""What packagers use: make, the control file, META.json, and the shell script that does without make."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[2]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def tree() -> Iterator[Path]:
    """A copy of what make needs, in a directory whose name has a space, readable by the server."""
    with tempfile.TemporaryDirectory(prefix="pgworker-make-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        copy = Path(directory, "a checkout")
        copy.mkdir()
        for name in ("Makefile", "pgworker.control", "run"):
            shutil.copy2(ROOT / name, copy)
        shutil.copytree(ROOT / "extension", copy / "extension")
        yield copy


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PG_CONFIG"))}
    return subprocess.run(["make", *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False)


@needs_make
def test_the_script_is_the_same_from_make_and_from_python(tree: Path) -> None:
    done = make(tree, "PG_CONFIG=/nowhere")
    assert done.returncode == 0, done.stderr
    built = tree / f"pgworker--{schema.version()}.sql"
    assert built.read_bytes() == schema.script().encode()
    assert built.read_text().startswith('\\echo Use "CREATE EXTENSION pgworker" to load this file. \\quit\n')


@needs_make
def test_make_rebuilds_after_a_change(tree: Path) -> None:
    make(tree)
    part = tree / "extension/10_schema.sql"
    part.write_text(part.read_text() + "-- changed\n")
    os.utime(part, (2**31, 2**31))
    make(tree)
    assert "-- changed" in (tree / f"pgworker--{schema.version()}.sql").read_text()


@needs_make
def test_make_install_and_create_extension(tree: Path, server: EmbeddedServer) -> None:
    pg_config = server.installation.bindir / "pg_config"
    if " " in str(pg_config):
        pytest.skip(f"PGXS cannot cope with the space in {pg_config}")
    pgxs = subprocess.run([pg_config, "--pgxs"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(pgxs).is_file():
        pytest.skip(f"{pg_config} names {pgxs}, which is not there")
    stage = tree.parent / "stage"
    plain = tree.parent / "tree"  # PGXS does not know of spaces
    tree.rename(plain)
    done = make(plain, "install", f"PG_CONFIG={pg_config}", f"DESTDIR={stage}")
    assert done.returncode == 0, done.stderr
    (script,) = stage.rglob(f"pgworker--{schema.version()}.sql")
    assert script.read_bytes() == schema.script().encode()
    assert (script.parent / "pgworker.control").read_text() == schema.control()
    if not server.installation.keeps_extensions_apart:
        return  # the files are where they should be; this server looks elsewhere
    where = (
        {"extension_control_path": f"$system:{script.parent.parent}"}
        if server.installation.major >= 18
        else {"extension_destdir": str(stage)}
    )
    with EmbeddedServer(server.installation, settings=where) as own, psycopg.connect(own.dsn()) as conn:
        conn.execute("create extension pgworker")
        assert schema.installed_version(conn) == schema.version()


@needs_make
def test_make_help_names_every_goal(tree: Path) -> None:
    said = make(tree, "help", "PG_CONFIG=/nowhere").stdout
    assert set(re.findall(r"^  make (\w+)", said, re.MULTILINE)) == {
        "all", "install", "uninstall", "clean", "demo", "test", "lint", "bench", "help",
    }  # fmt: skip


@needs_make
@pytest.mark.parametrize("goal", ["demo", "test", "lint", "bench"])
def test_make_forwards_without_pg_config(tree: Path, goal: str) -> None:
    assert make(tree, "-n", goal, "PG_CONFIG=/nowhere").stdout.strip() == f"./run {goal}"


@needs_make
def test_make_install_without_pg_config_says_what_is_missing(tree: Path) -> None:
    done = make(tree, "install", "PG_CONFIG=/nowhere")
    assert done.returncode != 0
    assert "/nowhere did not run: install PostgreSQL's development files or name its pg_config" in done.stderr


def test_meta_json_agrees_with_the_control_file() -> None:
    meta = json.loads((ROOT / "META.json").read_text())
    assert {meta["version"], meta["provides"]["pgworker"]["version"]} == {schema.version()}
    assert (ROOT / meta["provides"]["pgworker"]["file"]).is_file()
    assert meta["name"] == "pgworker"
    assert meta["meta-spec"]["version"] == "1.0.0"


def test_the_control_file_asks_for_no_superuser() -> None:
    options = dict(re.findall(r"^(\w+)\s*=\s*(.+)$", schema.control(), re.MULTILINE))
    assert options["superuser"] == options["relocatable"] == "false"
    assert not {"trusted", "schema"} & options.keys()


def test_every_part_is_loaded() -> None:
    assert sorted(part.name for part in schema.parts()) == sorted(
        path.name for path in schema.source_dir().glob("*.sql")
    )


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "run", *arguments], cwd="/", env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_run_help_and_an_unknown_command(tree: Path) -> None:
    assert (done := run(tree, "help")).returncode == 0
    assert all(f"  {name} " in done.stdout for name in ("demo", "test", "lint", "bench"))
    assert (done := run(tree, "dmeo")).returncode == 2
    assert "no command 'dmeo'" in done.stderr


def test_run_says_that_python_is_too_old(tree: Path) -> None:
    old = tree / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run(tree, "demo", PYTHON=str(old))
    assert (done.returncode, done.stderr) == (1, f"run: PYTHON={old} is not Python 3.11 or newer\n")


def test_run_says_that_venv_is_missing(tree: Path) -> None:
    bare = tree / "python3"
    bare.write_text(f'#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    bare.chmod(0o755)
    done = run(tree, "demo", PYTHON=str(bare))
    assert (done.returncode, done.stderr) == (
        1,
        "run: needs Python's venv module; on Debian and Ubuntu: apt-get install python3-venv\n",
    )
