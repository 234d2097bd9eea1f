"""Installing and dropping: who may, who owns what, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgworker_client import schema
from pgworker_client.embedded import EmbeddedServer
from tests.packaging.catalog import definitions, everything

Conn = psycopg.Connection[Any]


@pytest.fixture
def superuser(make_database: Callable[[str], str]) -> Iterator[Conn]:
    """A superuser in a database without pgworker, which has a role ``installer`` that has CREATE on it and no more."""
    with psycopg.connect(make_database("shop"), autocommit=True) as conn:
        conn.execute("create role installer login")
        conn.execute("grant create on database shop to installer")
        try:
            yield conn
        finally:
            conn.execute("drop owned by installer cascade")
            conn.execute("drop role installer")


@pytest.fixture
def installer(superuser: Conn, server: EmbeddedServer) -> Iterator[Conn]:
    """The role ``installer``."""
    with psycopg.connect(server.dsn("shop", "installer"), autocommit=True) as conn:
        yield conn


def install_as(conn: Conn, way: str, server: EmbeddedServer) -> None:
    if way == "by hand":
        schema.install_by_hand(conn)
    elif way == "what is offered":
        schema.install(conn)
    elif server.has_extension:
        conn.execute("create extension pgworker")
    else:
        pytest.skip(f"PostgreSQL {server.installation.major} here reads extensions from the system's directories only")


every_way = pytest.mark.parametrize("way", ["extension", "by hand", "what is offered"])


@every_way
def test_a_role_with_create_on_the_database_installs_and_owns_all(
    installer: Conn, server: EmbeddedServer, way: str
) -> None:
    install_as(installer, way, server)
    owners = installer.execute(
        "select distinct pg_get_userbyid(owner) from ("
        " select nspowner from pg_namespace where nspname = 'pgworker'"
        " union all select relowner from pg_class where relnamespace = 'pgworker'::regnamespace"
        " union all select proowner from pg_proc where pronamespace = 'pgworker'::regnamespace"
        " union all select typowner from pg_type where typnamespace = 'pgworker'::regnamespace"
        " union all select extowner from pg_extension where extname = 'pgworker') as o(owner)"
    ).fetchall()
    assert owners == [("installer",)]
    assert schema.installed_version(installer) == schema.version()
    job = installer.execute("select id, task_identifier, state from pgworker.add_job('greet', '{}')").fetchone()
    assert job is not None
    assert job[1:] == ("greet", "ready")


@every_way
def test_a_role_without_create_on_the_database_is_refused(superuser: Conn, server: EmbeddedServer, way: str) -> None:
    superuser.execute("revoke create on database shop from installer")
    before = everything(superuser)
    refused = pytest.raises((psycopg.errors.InsufficientPrivilege, schema.InstallError), match="permission denied")
    with psycopg.connect(server.dsn("shop", "installer"), autocommit=True) as conn, refused:
        install_as(conn, way, server)
    assert everything(superuser) == before


def test_drop_extension_leaves_nothing(superuser: Conn, installer: Conn, server: EmbeddedServer) -> None:
    before = everything(superuser)
    install_as(installer, "extension", server)
    installer.execute("select pgworker.add_job('greet', '{}')")
    assert everything(superuser) > before
    installer.execute("drop extension pgworker")
    assert everything(superuser) == before
    installer.execute("create extension pgworker")
    assert installer.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


def test_drop_schema_leaves_nothing_of_an_installation_by_hand(superuser: Conn, installer: Conn) -> None:
    before = everything(superuser)
    schema.install_by_hand(installer)
    installer.execute("set client_min_messages = warning")
    installer.execute("drop schema pgworker cascade")
    assert everything(superuser) == before


def test_a_squatter_s_schema_stops_the_extension(superuser: Conn, server: EmbeddedServer) -> None:
    superuser.execute("create schema pgworker authorization installer")
    before = everything(superuser)
    with pytest.raises(psycopg.errors.DuplicateSchema):
        install_as(superuser, "extension", server)
    assert everything(superuser) == before


def test_a_squatter_s_schema_stops_an_installation_by_hand(superuser: Conn) -> None:
    superuser.execute("create schema pgworker authorization installer")
    before = everything(superuser)
    with pytest.raises(schema.InstallError, match="exists already in database shop, owned by installer, and is not"):
        schema.install_by_hand(superuser)
    assert everything(superuser) == before


@every_way
def test_installing_twice_says_what_is_there(installer: Conn, server: EmbeddedServer, way: str) -> None:
    install_as(installer, way, server)
    for again in (schema.install, schema.install_by_hand):
        with pytest.raises(schema.InstallError, match=f"holds pgworker {schema.version()}: there is nothing to do"):
            again(installer)


def test_an_installation_by_hand_is_a_transaction_of_its_own(installer: Conn) -> None:
    with installer.transaction(), pytest.raises(ValueError, match="conn: a transaction is open on it"):
        schema.install_by_hand(installer)
    assert schema.installed_version(installer) is None


def test_an_installation_by_hand_is_all_or_nothing(
    superuser: Conn, installer: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(superuser)
    whole = schema.script_by_hand()
    monkeypatch.setattr(schema, "script_by_hand", lambda: whole + "select 1 / 0;")
    with pytest.raises(psycopg.errors.DivisionByZero):
        schema.install_by_hand(installer)
    assert everything(superuser) == before


def test_an_installation_by_hand_leaves_the_session_as_it_was(installer: Conn) -> None:
    installer.execute("set search_path = public")
    schema.install_by_hand(installer)
    names = ("search_path", "check_function_bodies", "client_min_messages")
    assert [installer.execute(f"show {name}").fetchone() for name in names] == [("public",), ("on",), ("notice",)]


def test_by_hand_equals_the_extension(
    make_database: Callable[[str], str], role: Callable[..., str], server: EmbeddedServer
) -> None:
    owner = role("owner")
    found = []
    for way in ("extension", "by hand"):
        dsn = make_database(way)
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                sql.SQL("grant create on database {} to {}").format(sql.Identifier(way), sql.Identifier(owner))
            )
        with psycopg.connect(make_conninfo(dsn, user=owner), autocommit=True) as conn:
            install_as(conn, way, server)
            found.append(definitions(conn))
            conn.execute("drop schema pgworker cascade" if way == "by hand" else "drop extension pgworker")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("drop owned by owner")
    by_extension, by_hand = found
    for kind, rows in by_extension.items():
        assert by_hand[kind] == rows, kind
    assert by_hand.keys() == by_extension.keys()


def test_nothing_is_open_to_public(db: Conn) -> None:
    assert db.execute("select has_schema_privilege('public', 'pgworker', 'usage, create')").fetchone() == (False,)
    functions = db.execute(
        "select oid::regprocedure::text from pg_proc where pronamespace = 'pgworker'::regnamespace"
        " and has_function_privilege('public', oid, 'execute')"
    ).fetchall()
    assert functions == []
    relations = db.execute(
        "select relname from pg_class where relnamespace = 'pgworker'::regnamespace and case relkind"
        " when 'S' then has_sequence_privilege('public', oid, 'usage, select, update')"
        " when 'r' then has_table_privilege('public', oid, 'select, insert, update, delete, truncate, references')"
        " when 'v' then has_table_privilege('public', oid, 'select, insert, update, delete')"
        " else false end"
    ).fetchall()
    assert relations == []


# An object of another schema that a name was resolved to while installing would be somebody else's code.
_LEANING = """
select pg_describe_object(d.classid, d.objid, d.objsubid), pg_describe_object(d.refclassid, d.refobjid, 0)
from (select * from pg_depend where classid <> 0 offset 0) d  -- 14 has rows for what is pinned
cross join lateral pg_identify_object(d.classid, d.objid, 0) o
cross join lateral pg_identify_object(d.refclassid, d.refobjid, 0) r
where o.identity like 'pgworker.%' and r.schema not in ('pgworker', 'pg_catalog', 'pg_toast')
"""


def test_what_is_installed_leans_on_nothing_outside_of_it(db: Conn) -> None:
    assert db.execute(_LEANING).fetchall() == []


_TRAPS = """
with type(name) as (select unnest(%(types)s::text[])), pair(a, b) as (select a.name, b.name from type a, type b)
select string_agg(made, ';') from (
  select format('create function public.%%I(%%s) returns boolean return null::boolean', f.proname, types) as made
  from (select distinct proname from pg_proc
        where pronamespace = 'pg_catalog'::regnamespace and proname = any (%(names)s)) f,
       (select name as types from type union all select a || ', ' || b from pair) given
  union all
  select format('create function public.trap(%%s, %%s) returns boolean return true', a, b) from pair
  union all
  select format('create operator public.%%s (leftarg = %%s, rightarg = %%s, function = public.trap)', o, a, b)
  from unnest(array['=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '||', '&&']) o, pair
) as t
"""


def test_an_installation_resists_what_others_left_in_public(superuser: Conn, server: EmbeddedServer) -> None:
    # For calls with other types than pg_catalog's these are the better match, were public looked at while installing.
    names = sorted(set(re.findall(r"\b([a-z_]+)\(", schema.script())))
    types = ["text", "varchar", "smallint", "int", "bigint", "timestamptz", "jsonb", "boolean"]
    (traps,) = superuser.execute(_TRAPS, {"names": names, "types": types}).fetchone() or ("",)
    superuser.execute(traps)
    install_as(superuser, "extension", server)
    assert superuser.execute(_LEANING).fetchall() == []
