"""What the system catalogs hold, in forms that can be compared."""

from __future__ import annotations

from typing import Any

import psycopg

Conn = psycopg.Connection[Any]

_OBJECTS = """
select c.relname || ' ' || o.oid from {catalog} o join pg_catalog.pg_class c on c.oid = o.tableoid
"""
_WITH_OIDS = (
    "pg_namespace",
    "pg_class",
    "pg_proc",
    "pg_type",
    "pg_operator",
    "pg_cast",
    "pg_constraint",
    "pg_attrdef",
    "pg_trigger",
    "pg_rewrite",
    "pg_policy",
    "pg_extension",
    "pg_event_trigger",
    "pg_default_acl",
    "pg_collation",
    "pg_ts_config",
    "pg_publication",
)
_WITHOUT_OIDS = ("pg_depend", "pg_description", "pg_init_privs", "pg_shdepend", "pg_shdescription", "pg_sequence")

_DEFINITIONS = {
    "schema": """
        select nspname, nspacl::text, obj_description(oid, 'pg_namespace')
        from pg_namespace n where nspname = 'pgworker'""",
    "functions": """
        select p.oid::regprocedure, pg_get_functiondef(p.oid), p.proacl::text, obj_description(p.oid, 'pg_proc')
        from pg_proc p where p.pronamespace = 'pgworker'::regnamespace""",
    "relations": """
        select c.relname, c.relkind, c.relacl::text, c.reloptions, c.relrowsecurity, obj_description(c.oid, 'pg_class'),
               case when c.relkind = 'v' then pg_get_viewdef(c.oid)
                    when c.relkind in ('i', 'I') then pg_get_indexdef(c.oid) end
        from pg_class c where c.relnamespace = 'pgworker'::regnamespace""",
    "columns": """
        select a.attrelid::regclass, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               a.attidentity, a.attstorage, a.attacl::text, pg_get_expr(d.adbin, d.adrelid),
               col_description(a.attrelid, a.attnum)
        from pg_attribute a join pg_class c on c.oid = a.attrelid
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where c.relnamespace = 'pgworker'::regnamespace and a.attnum > 0""",
    "constraints": """
        select conrelid::regclass, conname, pg_get_constraintdef(oid) from pg_constraint
        where connamespace = 'pgworker'::regnamespace""",
    "triggers": """
        select t.tgrelid::regclass, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled
        from pg_trigger t join pg_class c on c.oid = t.tgrelid
        where c.relnamespace = 'pgworker'::regnamespace and not t.tgisinternal""",
    "types": """
        select t.typname, t.typtype, t.typacl::text, obj_description(t.oid, 'pg_type')
        from pg_type t where t.typnamespace = 'pgworker'::regnamespace""",
    "sequences": """
        select s.seqrelid::regclass, format_type(s.seqtypid, null), s.seqstart, s.seqincrement, s.seqmax, s.seqcycle
        from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace = 'pgworker'::regnamespace""",
}


def everything(conn: Conn) -> set[str]:
    """Return every object and every dependency of the database."""
    found: set[str] = set()
    for catalog in _WITH_OIDS:
        found |= {row[0] for row in conn.execute(_OBJECTS.format(catalog=catalog))}
    for catalog in _WITHOUT_OIDS:
        rows = conn.execute(f"select '{catalog} ' || c::text from pg_catalog.{catalog} c")
        found |= {row[0] for row in rows}
    return found


def definitions(conn: Conn) -> dict[str, list[str]]:
    """Return how everything in the schema pgworker is defined, described and granted, and the rows it begins with."""
    found = {kind: sorted(str(row) for row in conn.execute(query)) for kind, query in _DEFINITIONS.items()}
    tables = conn.execute(
        "select oid::regclass::text from pg_class where relnamespace = 'pgworker'::regnamespace and relkind = 'r'"
    ).fetchall()
    for (table,) in tables:
        rows = conn.execute(f"select t::text from {table} t")
        found[f"rows of {table}"] = sorted(row[0] for row in rows)
    return found
