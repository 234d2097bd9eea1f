"""What must be true of a pgworker database at any moment, whatever happened to it before."""

from __future__ import annotations

from typing import Any

import psycopg

from tests.waiting import until

_BROKEN = """
select 'queue ' || q.name || ' says it runs job ' || q.job_id || ', which does not run in it'
from pgworker.queue q
where q.job_id is not null
  and not exists (select from pgworker.job j
                  where j.id = q.job_id and j.queue_name = q.name and j.locked_by is not null)
union all
select 'job ' || j.id || ' runs in queue ' || j.queue_name || ', which says it runs '
       || coalesce(q.job_id::text, 'none')
from pgworker.job j
left join pgworker.queue q on q.name = j.queue_name
where j.locked_by is not null and j.queue_name is not null and q.job_id is distinct from j.id
union all
select 'job ' || j.id || ' is held by worker ' || j.locked_by || ', whom nobody knows'
from pgworker.job j
where j.locked_by is not null and not exists (select from pgworker.worker w where w.id = j.locked_by)
union all
select 'job ' || j.id || ' is locked by ' || coalesce(j.locked_by::text, 'nobody') || ' since '
       || coalesce(j.locked_at::text, 'never')
from pgworker.job j
where (j.locked_by is null) <> (j.locked_at is null)
union all
select 'job ' || j.id || case when j.locked_by is null then ' waits' else ' runs' end || ' with attempts '
       || j.attempts || ' of ' || j.max_attempts
from pgworker.job j
where j.attempts < (j.locked_by is not null)::int
   or j.attempts > j.max_attempts
   or (j.locked_by is null and j.attempts = j.max_attempts)
union all
select 'job ' || j.id || ' runs with ' || p.taken || ' permits of ' || g.kind || ' ' || g.task || ' ' || g.lane_key
from pgworker.job j
cross join lateral pgworker.gates_of(j.id) g
cross join lateral (select count(*) as taken from pgworker.permit p
                    where p.job_id = j.id and p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key
                      and p.free_at = 'infinity') p
where j.locked_by is not null and g.kind = 'concurrency' and p.taken <> 1
union all
select 'permit ' || p.n || ' of ' || p.task_identifier || ' ' || p.lane_key || ' is held by job '
       || coalesce(p.job_id::text, 'none') || ', which does not run'
from pgworker.permit p
where p.kind = 'concurrency' and p.free_at = 'infinity'
  and not exists (select from pgworker.job j where j.id = p.job_id and j.lane is not null and j.locked_by is not null)
union all
select 'job ' || j.id || ' stands in lane ' || coalesce(j.lane, 'none') || ', which is not its own'
from pgworker.job j
left join pgworker.task t on t.identifier = j.task_identifier and t.limited
where j.lane is distinct from case when t.limited then pgworker.lane(t.keyed, j.limit_key, j.queue_name) end
union all
select 'job ' || j.id || ' waits and is asked to stop'
from pgworker.job j
where j.locked_by is null and j.cancel_reason is not null
union all
select 'job ' || a.job_id || ' ' || a.problem
from pgworker.audit() a
union all
select 'job ' || f.id || ' is finished and live'
from pgworker.finished f
join pgworker.job j on j.id = f.id
union all
select 'worker ' || n.worker_id || ' is to be told of job ' || n.job_id || ', but is unknown'
from pgworker.notice n
where not exists (select from pgworker.worker w where w.id = n.worker_id)
"""


def violations(conn: psycopg.Connection[Any]) -> list[str]:
    """Return a sentence for each thing that contradicts another, as this connection sees the database."""
    return [sentence for (sentence,) in conn.execute(_BROKEN)]


def assert_consistent(conn: psycopg.Connection[Any]) -> None:
    """Fail, saying what is wrong, unless all that is stored agrees."""
    found = violations(conn)
    assert not found, f"{len(found)} contradictions, among them:\n" + "\n".join(found[:20])


def assert_all_claimable(conn: psycopg.Connection[Any]) -> list[int]:
    """Make all that is live due, have a new worker claim and complete it, and return the ids, in claim order.

    Fails when some live job cannot be claimed, which is what is left of a job that was lost. Nothing may be running,
    paused or forbidden.
    """
    assert conn.execute("select count(*) from pgworker.job where locked_by is not null").fetchone() == (0,)
    live = {row[0] for row in conn.execute("select id from pgworker.job")}  # what waits is released on the way
    conn.execute("select count(*) from pgworker.reschedule_jobs(%s, run_at => now())", [list(live)])
    (worker_id,) = conn.execute("select pgworker.register_worker('the one who clears up')").fetchone() or (0,)
    claimed: list[int] = []

    def more() -> bool:
        batch = [row[0] for row in conn.execute("select id from pgworker.get_jobs(%s, 1000)", [worker_id])]
        claimed.extend(batch)
        conn.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker_id, batch])
        return bool(batch) or live <= set(claimed)

    while not live <= set(claimed):  # however many claims that takes; each is given a while
        try:
            until(more, "the next claim", timeout=10)  # what was released lies behind the cursor: within a second or so
        except AssertionError as error:
            raise AssertionError(f"never claimed: {sorted(live - set(claimed))[:20]}") from error
    more()  # nothing is left, or the lists differ
    conn.execute("select pgworker.unregister_worker(%s)", [worker_id])
    assert sorted(claimed) == sorted(live)
    return claimed
