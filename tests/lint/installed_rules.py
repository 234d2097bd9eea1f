"""Checks that need the installed schema: plpgsql_check on every PL/pgSQL function, and the bodies of the SQL ones."""

from __future__ import annotations

from typing import Any

import psycopg

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.installations import Installation, installations
from tests.lint.findings import Allowances, Finding

LIBRARY = "plpgsql_check"
RULE = "plpgsql_check"

# A trigger function is checked once for each trigger that calls it; one that has none, on a table made for it.
_CHECK = """
with target as (
  select f.oid, f.proname, coalesce(t.tgrelid, 0) as relid, t.tgoldtable as old, t.tgnewtable as new
  from pg_catalog.pg_proc f
  join pg_catalog.pg_language l on l.oid = f.prolang and l.lanname = 'plpgsql'
  left join pg_catalog.pg_trigger t on t.tgfoid = f.oid and not t.tgisinternal
  where f.pronamespace = 'pgworker'::pg_catalog.regnamespace
), checked as (
  select t.proname, c.*
  from target t
  cross join lateral plpgsql_check_function_tb(
    t.oid, case when t.relid = 0 and t.oid in (select oid from pg_catalog.pg_proc where prorettype = 'trigger'::regtype)
           then 'pg_temp.any_table'::pg_catalog.regclass else t.relid::pg_catalog.regclass end,
    fatal_errors => false, other_warnings => true, extra_warnings => true, performance_warnings => true,
    security_warnings => true, compatibility_warnings => true, oldtable => t.old, newtable => t.new) c
)
select distinct proname, coalesce(lineno, 0), level, message, coalesce(detail, ''), coalesce(query, '')
from checked order by 1, 2
"""


def find_checker() -> Installation | None:
    """Return a PostgreSQL that has plpgsql_check, the newest, or None."""
    able = [one for one in installations() if one.has_library(LIBRARY)]
    return max(able, key=lambda one: one.major, default=None)


def check_installed(installation: Installation, allowed: Allowances) -> list[Finding]:
    """Install pgworker on a server of its own and check every function there."""
    with EmbeddedServer(installation) as server, psycopg.connect(server.dsn(), autocommit=True) as conn:
        schema.install(conn)
        return sorted(check_sql_bodies(conn) + check_plpgsql(conn, allowed))


def check_plpgsql(conn: psycopg.Connection[Any], allowed: Allowances) -> list[Finding]:
    """Run plpgsql_check with every warning on."""
    conn.execute(f"create extension if not exists {LIBRARY}")
    conn.execute("create temporary table any_table (id bigint)")
    conn.execute("select pgworker.publish_events(true)")  # makes triggers
    found = []
    for name, line, level, message, detail, query in conn.execute(_CHECK).fetchall():
        entries = allowed.tables.get(RULE, {})
        entry = next((key for key in entries if f"{name}: {message}".startswith(key)), None)
        if entry is not None:
            allowed.permits(RULE, entry)
            continue
        more = " | ".join(part for part in (detail, " ".join(query.split())) if part)
        found.append(Finding(f"pgworker.{name}", line, RULE, f"{level}: {message}{' | ' + more if more else ''}"))
    return found + allowed.unused({RULE})


def check_sql_bodies(conn: psycopg.Connection[Any]) -> list[Finding]:
    """Have PostgreSQL check the bodies of SQL functions, which it does not do while an extension is created."""
    found = []
    rows = conn.execute(
        "select f.oid::pg_catalog.regprocedure::text, pg_catalog.pg_get_functiondef(f.oid) from pg_catalog.pg_proc f"
        " join pg_catalog.pg_language l on l.oid = f.prolang"
        " where f.pronamespace = 'pgworker'::pg_catalog.regnamespace and l.lanname = 'sql' and f.prosqlbody is null"
    ).fetchall()
    for signature, definition in rows:
        try:
            with conn.transaction(force_rollback=True):
                conn.execute("set local check_function_bodies = on")
                conn.execute(definition)
        except psycopg.Error as error:
            found.append(Finding(signature, 1, "sql_body", str(error).strip()))
    return found
