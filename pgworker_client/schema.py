"""The extension's SQL, and installing it where ``CREATE EXTENSION`` is not to be had.

The source is the directory ``extension/`` of a checkout, which a wheel carries as ``pgworker_client/_extension``. Its
file ``load_order`` names the parts, one a line; `script` joins them into exactly what ``make`` builds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import psycopg.rows
from psycopg import sql
from psycopg.pq import TransactionStatus

EXTENSION_ONLY = frozenset({"99_dump.sql"})
"""Parts that only make sense inside ``CREATE EXTENSION`` (they mark what pg_dump takes along)."""

_HEADER = '\\echo Use "CREATE EXTENSION pgworker" to load this file. \\quit\n'


class InstallError(RuntimeError):
    """The schema could not be installed; nothing was changed, and the message says what to do."""


def source_dir() -> Path:
    """Return the directory that holds ``load_order`` and the parts.

    Raises `InstallError` where neither a wheel's copy nor a checkout's is found.
    """
    here = Path(__file__).resolve().parent
    candidates = (here / "_extension", here.parent / "extension")
    for directory in candidates:
        if (directory / "load_order").is_file():
            return directory
    raise InstallError(
        f"the extension's SQL is not there: looked for load_order in {candidates[0]} and {candidates[1]}; "
        "reinstall pgworker-client, or work in a full checkout"
    )


def control() -> str:
    """Return the text of ``pgworker.control``."""
    directory = source_dir()
    beside = directory / "pgworker.control"  # in a wheel; in a checkout it lies one higher
    return (beside if beside.is_file() else directory.parent / "pgworker.control").read_text(encoding="utf-8")


def version() -> str:
    """Return the version that this package would install, for example ``0.1.0``."""
    found = re.search(r"^default_version\s*=\s*'([^']+)'", control(), re.MULTILINE)
    if found is None:
        raise InstallError("pgworker.control has no line default_version = '…'; reinstall pgworker-client")
    return found[1]


def parts() -> list[Path]:
    """Return the files of the script in the order in which they are loaded."""
    directory = source_dir()
    names = (directory / "load_order").read_text(encoding="utf-8").split()
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InstallError(f"{directory / 'load_order'} names {', '.join(missing)}, not found in {directory}")
    return [directory / name for name in names]


def script() -> str:
    """Return the extension script, byte for byte what ``make`` writes to ``pgworker--VERSION.sql``."""
    return _HEADER + "".join(part.read_text(encoding="utf-8") for part in parts())


def script_by_hand() -> str:
    """Return the same SQL without what only ``CREATE EXTENSION`` can run (psql's header, the marks for pg_dump)."""
    return "".join(part.read_text(encoding="utf-8") for part in parts() if part.name not in EXTENSION_ONLY)


def installed_version(conn: psycopg.Connection[Any]) -> str | None:
    """Return the version of pgworker in this database, or None where there is none or it cannot be asked."""
    with conn.cursor(row_factory=psycopg.rows.scalar_row) as cur:
        known = cur.execute("select pg_catalog.to_regprocedure('pgworker.version()') is not null").fetchone()
        return str(cur.execute("select pgworker.version()").fetchone()) if known else None


def install(conn: psycopg.Connection[Any]) -> str:
    """Install with ``CREATE EXTENSION`` where the server offers this version, else as `install_by_hand` does.

    Returns the version installed; raises what `install_by_hand` raises.
    """
    return _install(conn, extension=True)


def install_by_hand(conn: psycopg.Connection[Any]) -> str:
    """Create the schema ``pgworker`` and all in it, in one transaction, as the connection's role.

    The role needs CREATE on the database and becomes the owner of everything. The outcome is that of
    ``CREATE EXTENSION pgworker``, only that PostgreSQL lists no extension, so that pg_dump takes the definitions along.

    Returns the version installed. Raises ValueError for a connection in the middle of a transaction, and
    `InstallError` where a schema of that name exists already or the role may not create one.
    """
    return _install(conn, extension=False)


def _install(conn: psycopg.Connection[Any], *, extension: bool) -> str:
    status = conn.info.transaction_status
    if status != TransactionStatus.IDLE:
        raise ValueError(
            f"conn: a transaction is open on it (status {status.name}); commit or roll back first, "
            "because the installation is a transaction of its own"
        )
    with conn.transaction(), conn.cursor(row_factory=psycopg.rows.scalar_row) as cur:
        owner = cur.execute(
            "select nspowner::pg_catalog.regrole::text from pg_catalog.pg_namespace where nspname = 'pgworker'"
        ).fetchone()
        if owner is not None:
            raise InstallError(_occupied(conn, str(owner)))
        try:
            if not (extension and _create_extension(conn)):
                _run_script(cur)
        except psycopg.errors.InsufficientPrivilege as refused:
            raise InstallError(
                f"role {conn.info.user} cannot install pgworker in database {conn.info.dbname}: "
                f"{refused.diag.message_primary}; grant it CREATE on the database, or install as another role"
            ) from refused
    return version()


def _create_extension(conn: psycopg.Connection[Any]) -> bool:
    """Create the extension in this version; False where the server has no files of it.

    Trying tells: pg_available_extensions leaves out what Debian's servers find through extension_destdir.
    """
    try:
        with conn.transaction():
            conn.execute(sql.SQL("create extension pgworker version {}").format(version()))
    except (
        psycopg.errors.FeatureNotSupported,  # no control file
        psycopg.errors.InvalidParameterValue,  # no way to this version
        psycopg.errors.UndefinedFile,  # no script
    ):
        return False
    return True


def _run_script(cur: psycopg.Cursor[Any]) -> None:
    """Run the script with the settings that CREATE EXTENSION would make; they are gone with the transaction."""
    cur.execute("set local search_path = pg_catalog, pg_temp")
    cur.execute("set local check_function_bodies = off")
    cur.execute("set local client_min_messages = warning")
    cur.execute(script_by_hand().encode())


def _occupied(conn: psycopg.Connection[Any], owner: str) -> str:
    """Say what stands where the schema should go, and the way out."""
    where = f"schema pgworker exists already in database {conn.info.dbname}, owned by {owner}"
    try:
        with conn.transaction():
            found = installed_version(conn)
    except psycopg.Error:
        found = None
    if found is None:
        return f"{where}, and is not pgworker's as far as this role can tell: rename it, or use another database"
    if found == version():
        return f"{where}, and holds pgworker {found}: there is nothing to do"
    return f"{where}, and holds pgworker {found}, not {version()}: upgrade it instead"
