"""The jobs that run while harm is done: numbered, so that what ran how often can be counted in tables.

Single jobs, a tenth of which complete in the transaction of their effect, jobs in serial queues, jobs that fail the
first time, and trees, whose parents fail for good if they run before their children are done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg

TABLES = """
create table public.run (
  n int not null, job_id bigint not null, attempt int not null, raised boolean not null default false,
  at timestamptz not null default clock_timestamp(),
  claimed timestamptz, worker bigint, registered timestamptz, inherited boolean);
create index on public.run (job_id, at);
create function public.note_claim() returns trigger language plpgsql security definer as $$
begin
  select j.locked_at, w.id, w.registered_at into new.claimed, new.worker, new.registered
  from pgworker.job j join pgworker.worker w on w.id = j.locked_by
  where j.id = new.job_id and j.attempts = new.attempt;
  new.inherited := (select not exists (select from pgworker.worker w where w.id = r.worker)
                    from public.run r where r.job_id = new.job_id order by r.at desc limit 1);
  return new;
end $$;
create trigger note_claim before insert on public.run for each row execute function public.note_claim();
create table public.effect (n int not null);
create table public.told (job_id bigint not null);
grant insert on public.run, public.effect, public.told to worker;
"""

_RECORD = '''
import time

def handle(payload, ctx):
    """Record the run; some jobs take a while, so that harm meets them at work."""
    with ctx.connection() as conn:
        conn.execute("insert into public.run (n, job_id, attempt) values (%s, %s, %s)",
                     (payload, ctx.job.id, ctx.job.attempts))
    if payload % 100 == 0:
        time.sleep(0.05)
    return payload if ctx.job.parent_id else None
'''

_ONCE = '''
async def handle(payload, ctx):
    """Record the run, then have an effect in the transaction that completes the job."""
    async with ctx.connection() as conn:
        await conn.execute("insert into public.run (n, job_id, attempt) values (%s, %s, %s)",
                           (payload, ctx.job.id, ctx.job.attempts))
    async with ctx.transaction() as conn:
        await conn.execute("insert into public.effect values (%s)", (payload,))
'''

_AGAIN = '''
async def handle(payload, ctx):
    """Fail the first time."""
    first = ctx.job.attempts == 1
    async with ctx.connection() as conn:
        await conn.execute("insert into public.run (n, job_id, attempt, raised) values (%s, %s, %s, %s)",
                           (payload, ctx.job.id, ctx.job.attempts, first))
    if first:
        raise RuntimeError("the first time")
'''

_PARENT = '''
from pgworker_client import Fail

def handle(payload, ctx):
    """Record the run, with the children done."""
    if sorted(ctx.children_values().values()) != [payload + 1, payload + 2, payload + 3]:
        raise Fail(f"ran before its children were done: {ctx.children_values()}")
    with ctx.connection() as conn:
        conn.execute("insert into public.run (n, job_id, attempt) values (%s, %s, %s)",
                     (payload, ctx.job.id, ctx.job.attempts))
'''

_HOLD = '''
import psycopg

def handle(payload, ctx):
    """The first time, wait until told to stop, and tell that, if need be on a connection that was not cut off."""
    if ctx.job.attempts == 1:
        ctx.cancelled.wait()
    for last in (False, False, True):
        try:
            with ctx.connection() as conn:
                if ctx.job.attempts == 1:
                    conn.execute("insert into public.told values (%s)", (ctx.job.id,))
                conn.execute("insert into public.run (n, job_id, attempt, raised) values (%s, %s, %s, %s)",
                             (payload, ctx.job.id, ctx.job.attempts, ctx.job.attempts == 1))
            return
        except psycopg.OperationalError:
            if last:
                raise
'''

_TASKS = {"record": _RECORD, "once": _ONCE, "again": _AGAIN, "parent": _PARENT, "hold": _HOLD}

_ADD = """
select count(*) from pgworker.add_jobs((
  select jsonb_agg(jsonb_build_object(
    'identifier', case when mod(n, 10) = 0 then 'once' when mod(n, 25) = 1 then 'again' else 'record' end,
    'payload', n, 'priority', mod(n, 3),
    'queue_name', case when mod(n, 25) = 2 then 'q' || mod(n / 25, 15) end))
  from generate_series(%s::int, %s::int) n))
"""

_ADD_TREE = """
select pgworker.add_job_tree(jsonb_build_object('identifier', 'parent', 'payload', n, 'children',
  (select jsonb_agg(jsonb_build_object('identifier', 'record', 'payload', n + child))
   from generate_series(1, 3) child)))
from generate_series(%s::int, %s::int, 4) n
"""


def write_tasks(directory: Path) -> None:
    """Write the handlers as files of tasks."""
    for name, text in _TASKS.items():
        (directory / f"{name}.py").write_text(text)


def add(conn: psycopg.Connection[Any], first: int, last: int) -> int:
    """Add the jobs with these numbers, one in twenty-five of them in trees; return how many have an effect."""
    singles = last - 4 * ((last - first + 1) // 100)
    for start in range(first, singles + 1, 10_000):
        conn.execute(_ADD, [start, min(start + 9_999, singles)])
    conn.execute(_ADD_TREE, [singles + 1, last])
    return singles // 10 - (first - 1) // 10
