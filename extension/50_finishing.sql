-- 50_finishing.sql: how jobs end, whatever the cause
--
--   finish         the one way out of job: into finished, or into nothing
--   retry_later    a failed attempt goes back, behind
--
-- What workers report is in 51_reporting.sql.
-- Locks: job rows by id, then queue rows by name, then permits; who holds a queue row waits for nobody that waits for it.

-- Moves jobs out of the live table; what that means for others, in their trees and behind them in queues, follows from it
-- (57_settling.sql). What is kept, and for how long, is the task's setting or else that of the installation: keep_failed
-- for failed and cancelled jobs, keep_completed for completed ones, and if they have a result, belong to a tree or were
-- ended by hand (p_keep) at least keep_results; with unique_for at least until the window ends. The nodes of a tree stay until their root goes.
-- p_worker_id: the rows are not locked, and only those go that this worker holds (in the attempts p_attempts, if given),
-- that nobody asked to stop, and that belong to no tree unless p_trees says that they are locked after all. What one
-- transaction ends in trees goes in one call: counters are locked once, from the deepest level upwards. p_lost: rescued.
create function pgworker.finish(
  p_ids bigint[], p_states text[], p_errors text[], p_results jsonb[], p_keep boolean default false,
  p_causes bigint[] default null, p_lost boolean default false, p_worker_id bigint default null,
  p_attempts int[] default null, p_trees boolean default false
) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_now   constant timestamptz := pgworker.clock();
  v_gone  bigint[];
  v_said  text;
begin
  -- For settle(), a trigger of this very statement and of none that another trigger may execute.
  v_said := set_config('pgworker.completing',
                       case when 'completed' = all (p_states) then (pg_trigger_depth() + 1)::text else '' end, true);
  with ending as materialized (
    select e.id, e.state, e.error, e.result, e.cause_id, e.attempt
    from unnest(p_ids, p_states, p_errors, p_results, p_causes, p_attempts) as e(id, state, error, result, cause_id, attempt)
    order by e.id
  ), gone as (
    delete from pgworker.job j
    using ending e
    where j.id = any (array[e.id])
      and (p_worker_id is null
           or j.locked_by = p_worker_id and (e.attempt is null or j.attempts = e.attempt)
              and j.ends_as is null and (p_trees or j.root_id is null))
    -- What is asked of every row comes first: to read a column, all before it are gone through.
    returning j.id, j.locked_by is not null and e.state <> 'completed' and (select pgworker.records()) as records,
              j.root_id, e.state, j.locked_by, j.queue_name, j.run_at, j.created_at, j.parent_id,
              coalesce(e.cause_id, j.cause_id) as cause_id, j.revision, j.depth, j.priority, j.attempts, j.max_attempts,
              j.has_children, j.has_followers, j.task_identifier, j.payload, j.key, j.flags,
              coalesce(e.error, j.last_error) as last_error, j.progress, e.result, j.name, j.on_failure, j.locked_at,
              j.limit_key,
              case when e.state <> 'cancelled' then j.unique_until end as unique_until, j.recorded,
              -- What is the same for all is reckoned once: adding an interval to a time takes as long as an index entry.
              case
                when j.parent_id is not null then 'infinity'
                when e.state = 'completed' then greatest(
                  j.unique_until,
                  coalesce(
                    v_now + case when (select exists (select from pgworker.task o where o.keep_completed is not null))
                                 then (select t.keep_completed from pgworker.task t
                                       where t.identifier = j.task_identifier) end,
                    greatest((select v_now + coalesce((select s.value from pgworker.setting s
                                                       where s.name = 'keep_completed'),
                                                      pgworker.default_setting('keep_completed'))::interval),
                             case when p_keep or e.result is not null or j.root_id is not null
                                  then (select v_now + coalesce((select s.value from pgworker.setting s
                                                                 where s.name = 'keep_results'),
                                                                pgworker.default_setting('keep_results'))::interval)
                             end)))
                else greatest(
                  case when e.state = 'failed' then j.unique_until end,
                  coalesce(v_now + (select t.keep_failed from pgworker.task t where t.identifier = j.task_identifier),
                           (select v_now + coalesce((select s.value from pgworker.setting s where s.name = 'keep_failed'),
                                                    pgworker.default_setting('keep_failed'))::interval)))
              end as keep_until,
              case when j.locked_by = p_worker_id then (select w.name from pgworker.worker w where w.id = p_worker_id)
                   when j.locked_by is not null then (select w.name from pgworker.worker w where w.id = j.locked_by)
              end as worker_name
  ), noted as (
    insert into pgworker.attempt (job_id, started_at, ended_at, worker_id, attempt, outcome, worker_name, error)
    select g.id, g.locked_at, v_now, g.locked_by, g.attempts, case when p_lost then 'rescued' else g.state end,
           g.worker_name, g.last_error
    from gone g
    where g.records
  ), kept as (
    insert into pgworker.finished (id, run_at, created_at, started_at, finished_at, keep_until, parent_id, root_id, cause_id,
                                   revision, depth, priority, attempts, max_attempts, has_children, has_followers,
                                   state, task_identifier, payload, queue_name, key, flags, last_error, progress,
                                   result, name, on_failure, limit_key, unique_until, recorded, worker_id,
                                   worker_name)
    select g.id, g.run_at, g.created_at, g.locked_at, v_now, g.keep_until, g.parent_id, g.root_id, g.cause_id, g.revision,
           g.depth, g.priority, g.attempts, g.max_attempts, g.has_children, g.has_followers, g.state, g.task_identifier,
           g.payload, g.queue_name, g.key, g.flags, g.last_error, g.progress, g.result, g.name, g.on_failure, g.limit_key,
           g.unique_until, g.recorded or g.records, g.locked_by, g.worker_name
    from gone g
    -- What has not completed, or was ended by hand, is kept until the next maintain() at least: whoever ended it gets it
    -- back, and by that events tell how it ended (65_events.sql).
    where g.root_id is not null or g.keep_until > v_now or g.state <> 'completed' or p_keep
  )
  select coalesce(array_agg(g.id), '{}') into v_gone from gone g;
  if v_said <> '' then
    v_said := set_config('pgworker.completing', '', true);
  end if;
  return v_gone;
end
$$;
comment on function pgworker.finish(
  bigint[], text[], text[], jsonb[], boolean, bigint[], boolean, bigint, int[], boolean) is
  'Internal: ends jobs whose rows the caller has locked, or those of them that p_worker_id holds, and returns their ids.';

create function pgworker.retry_later(p_ids bigint[], p_errors text[], p_retry_at timestamptz, p_payload jsonb)
returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_now   constant timestamptz := pgworker.clock();
  v_names text[];
  v_held  bigint[];
  v_soon  timestamptz;
  v_limited bigint[];
  v_errors text[] := p_errors;
  v_delays interval[];
  v_records constant boolean := pgworker.records();
begin
  if p_retry_at is null and exists (select from pgworker.task t where t.backoff is not null) then
    -- The default is reckoned below, for all alike.
    select array_agg(concat_ws('; ', f.error, d.complaint) order by f.n), array_agg(d.delay order by f.n)
    into v_errors, v_delays
    from unnest(p_ids, p_errors) with ordinality as f(id, error, n)
    cross join lateral (select o.task_identifier, o.attempts from pgworker.job o where o.id = f.id offset 0) as j
    left join lateral (select o.backoff from pgworker.task o
                       where o.identifier = j.task_identifier and o.backoff is not null offset 0) as t on true
    left join lateral pgworker.retry_delay(t.backoff, j.attempts) d on t.backoff is not null;
  end if;
  with failed as materialized (
    select f.id, f.error, f.delay from unnest(p_ids, v_errors, v_delays) as f(id, error, delay) order by f.id
  ), noted as (
    insert into pgworker.attempt (job_id, started_at, ended_at, worker_id, attempt, outcome, worker_name, error)
    select r.id, r.locked_at, v_now, r.locked_by, r.attempts, 'failed',
           (select w.name from pgworker.worker w where w.id = r.locked_by), f.error
    from failed f
    cross join lateral (
      select j.id, j.locked_at, j.locked_by, j.attempts from pgworker.job j where j.id = f.id offset 0) as r
    where v_records
  ), back as (
    update pgworker.job j
    set locked_at = null, locked_by = null, last_error = f.error, recorded = j.recorded or v_records,
        run_at = coalesce(p_retry_at, greatest(v_now, j.run_at)
                                      + coalesce(f.delay, exp(least(j.attempts, 10)) * interval '1 second')),
        payload = coalesce(p_payload, j.payload)
    from failed f
    where j.id = any (array[f.id])
    returning j.id, j.queue_name, j.lane, j.run_at
  )
  select array_agg(b.queue_name) filter (where b.queue_name is not null),
         array_agg(b.id) filter (where b.queue_name is not null),
         array_agg(b.id) filter (where b.lane is not null), min(b.run_at)
  into v_names, v_held, v_limited, v_soon
  from back b;
  if v_names is not null or v_limited is not null then
    perform pgworker.free_places(v_names, v_held, v_limited);
  end if;
  if v_soon <= v_now then
    perform pgworker.wake_to_sweep();           -- behind the cursors
  end if;
end
$$;
comment on function pgworker.retry_later(bigint[], text[], timestamptz, jsonb) is
  'Internal: gives failed jobs, whose rows the caller has locked, back for their next attempt: at the time given, or '
  'by the backoff of their task, else exp(least(attempts, 10)) seconds, from now or from when they were due, whichever is '
  'later.';
