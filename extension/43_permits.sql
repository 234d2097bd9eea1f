-- 43_permits.sql: how limited jobs are claimed, and what their ends give back
--
--   make_permits       rows for gates that let more through than ever before
--   remember_turns     whose turn it was
--   claim_limited      claims those that come first, of what limited_heads() found
--   free_permits       runs have ended or were given back
--   free_places        the same of jobs of queues and of limited ones
--   refund_permits     runs that never were give their part of a rate back
--
-- What a permit is says 42_limits.sql. Locks of a claim: queues, permits, then jobs, all with SKIP LOCKED. Ends: jobs, queues,
-- then their own permits, which no claim can hold.

-- As with queues (45_queues.sql): under an advisory try-lock, so that claims do not wait for each other's commit.
create function pgworker.make_permits(
  p_tasks text[], p_kinds text[], p_keys text[], p_mosts int[], p_jobs int[], p_now timestamptz
) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  with gate as materialized (
    select g.task, g.kind, g.lane_key, c.made, least(g.most, c.made + g.jobs - f.free) as wanted
    from unnest(p_tasks, p_kinds, p_keys, p_mosts, p_jobs) as g(task, kind, lane_key, most, jobs)
    cross join lateral (
      select coalesce((select p.n from pgworker.permit p
                       where p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key
                       order by p.n desc limit 1), 0) as made) as c
    cross join lateral (
      select count(*) as free
      from (select from pgworker.permit p
            where p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key
              and p.free_at <= pgworker.free_by(g.kind, p_now) and p.n > 0
            limit g.jobs) as p) as f
    where c.made < g.most and f.free < g.jobs
    limit 128
  ), mine as materialized (
    select g.task, g.kind, g.lane_key, g.made, g.wanted
    from (select o.task, o.kind, o.lane_key, o.made, o.wanted from gate o
          where pg_try_advisory_xact_lock(1886874485, hashtext(concat_ws(' ', o.kind, o.task, o.lane_key))) offset 0) as g
    -- Who is just taking a gate's rows away (cleanup, a change of limits) has this one, and a row that was made after it
    -- would leave a gap. Nor can anybody begin to before we commit.
    left join lateral (select p.n from pgworker.permit p
                       where p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key and p.n = g.made
                       for key share skip locked) as top on true
    where g.made = 0 or top.n is not null
  )
  insert into pgworker.permit (task_identifier, kind, lane_key, n)
  select m.task, m.kind, m.lane_key, i.n
  from mine m
  cross join lateral generate_series(m.made + 1, m.wanted) as i(n)
  order by m.task, m.kind, m.lane_key, i.n
  on conflict (task_identifier, kind, lane_key, n) do nothing;
end
$$;
comment on function pgworker.make_permits(text[], text[], text[], int[], int[], timestamptz) is
  'Internal: makes rows of these gates, as far as they have fewer free ones than jobs want and than they let through.';

create function pgworker.remember_turns(p_tasks text[], p_lanes text[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_text  constant text := current_setting('pgworker.lanes', true);
  v_json  constant text := substr(v_text, position('#' in v_text) + 1);
  v_turns jsonb;
  v_state jsonb := jsonb_build_object();
begin
  select jsonb_object_agg(c.task, jsonb_build_object('lane', c.lane)) into v_turns
  from (select distinct on (u.task) u.task, u.lane
        from unnest(p_tasks, p_lanes) with ordinality as u(task, lane, n)
        where exists (select from pgworker.task t where t.identifier = u.task and t.fair offset 0)
        order by u.task, u.n desc) as c;
  if v_turns is not null then
    if hashtext(v_json)::text = split_part(v_text, '#', 1) then
      v_state := v_json::jsonb;
    end if;
    v_state := v_state || v_turns;
    perform set_config('pgworker.lanes', hashtext(v_state::text) || '#' || v_state::text, false);
  end if;
end
$$;
comment on function pgworker.remember_turns(text[], text[]) is
  'Internal: the session goes on after these lanes with the next claim from tasks whose keys take turns.';

create function pgworker.claim_limited(
  p_worker_id bigint, p_now timestamptz, p_limit int, p_ids bigint[], p_priorities smallint[], p_run_ats timestamptz[],
  p_tasks text[], p_flags text[], p_paused text[], p_cursor bigint[], out tids tid[]
)
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_hashjoin = on
as $$
declare
  v_wanted bigint[];
  v_gates  record;
  v_names  text[];
  v_taken  record;
  v_tasks  text[];
  v_lanes  text[];
begin
  tids := '{}';
  -- Those that come before the last of the other jobs that would fill the batch; one of a serial queue.
  select array_agg(w.id order by w.n), array_agg(distinct w.queue_name) filter (where w.queue_name is not null)
  into v_wanted, v_names
  from (select f.id, f.n, j.queue_name, row_number() over (partition by j.queue_name order by f.n) as nth
        from (select b.id, b.n
              from (select u.id, u.n, u.priority, u.run_at, u.id as tie
                    from unnest(p_ids, p_priorities, p_run_ats) with ordinality as u(id, priority, run_at, n)
                    union all
                    select null, null, o.priority, o.run_at, o.id
                    from pgworker.plain_heads(p_cursor, p_now, p_limit, p_tasks, p_flags, p_paused) o) as b
              order by b.priority, b.run_at, b.tie
              limit p_limit) as f
        cross join lateral (select o.queue_name from pgworker.job o where o.id = f.id offset 0) as j) as w
  where w.queue_name is null or w.nth = 1;
  if v_wanted is null then
    return;
  end if;

  -- What each needs: one permit at each gate, the r-th that the gate still has for the r-th job that wants one.
  select array_agg(n.task) as tasks, array_agg(n.kind) as kinds, array_agg(n.lane_key) as keys, array_agg(n.most) as mosts,
         array_agg(n.jobs) as jobs
  into v_gates
  from (select g.task, g.kind, g.lane_key, g.most, count(*)::int as jobs
        from unnest(v_wanted) as w(id)
        cross join lateral pgworker.gates_of(w.id) g
        group by g.task, g.kind, g.lane_key, g.most) as n;
  perform pgworker.make_permits(v_gates.tasks, v_gates.kinds, v_gates.keys, v_gates.mosts, v_gates.jobs, p_now);
  if v_names is not null then
    perform pgworker.make_queues(v_names, cardinality(v_names));
    v_names := array(select q.name
                     from unnest(v_names) as u(name)
                     cross join lateral (select f.name from pgworker.queue f
                                         where f.name = u.name and f.job_id is null and not f.paused
                                         for update skip locked) as q);
  end if;
  -- Locked in a statement of its own: the next one sees the jobs as they are under these locks.
  select array_agg(p.task) as tasks, array_agg(p.kind) as kinds, array_agg(p.lane_key) as keys,
         array_agg(p.tid) as tids
  into v_taken
  from (select g.task, g.kind, g.lane_key, l.tid
        from unnest(v_gates.tasks, v_gates.kinds, v_gates.keys, v_gates.mosts, v_gates.jobs)
          as g(task, kind, lane_key, most, jobs)
        cross join lateral (
          select p.ctid as tid from pgworker.permit p
          where p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key
            and p.free_at <= pgworker.free_by(g.kind, p_now) and p.n - g.most <= 0 and p.n > 0
            and not exists (select from pgworker.permit o
                            where o.task_identifier = g.task and o.kind = g.kind and o.lane_key = g.lane_key
                              and o.n > g.most and o.free_at > pgworker.free_by(g.kind, p_now))
          order by p.free_at limit g.jobs
          for no key update of p skip locked) as l) as p;

  with job as materialized (
    select w.n, o.tid, o.id, o.queue_name, o.lane
    from unnest(v_wanted) with ordinality as w(id, n)
    cross join lateral (
      select j.ctid as tid, j.id, j.queue_name, j.lane from pgworker.job j
      -- num_nulls(): by its id, and not by an index of those that have a lane
      where j.id = w.id and num_nulls(j.lane) = 0 and not j.waiting and j.locked_by is null and j.run_at <= p_now
        and (p_flags is null or j.flags is null or not j.flags && p_flags)
        and (j.queue_name is null or j.queue_name = any (v_names))
      for update skip locked) as o
  ), need as materialized (
    select j.id, g.task, g.kind, g.lane_key, g.per,
           row_number() over (partition by g.task, g.kind, g.lane_key order by j.n) as r
    from job j
    cross join lateral pgworker.gates_of(j.id) g
  ), permit as materialized (
    select t.task, t.kind, t.lane_key, t.tid,
           row_number() over (partition by t.task, t.kind, t.lane_key order by t.tid) as r
    from unnest(v_taken.tasks, v_taken.kinds, v_taken.keys, v_taken.tids) as t(task, kind, lane_key, tid)
  ), pass as materialized (
    select d.id, d.per, p.tid, bool_and(p.tid is not null) over (partition by d.id) as through
    from need d
    left join permit p on p.task = d.task and p.kind = d.kind and p.lane_key = d.lane_key and p.r = d.r
  ), claimed as (
    update pgworker.job j
    set locked_at = p_now, locked_by = p_worker_id, attempts = j.attempts + 1
    from (select o.tid from job o where not exists (select from pass p where p.id = o.id and not p.through)) as f
    where j.ctid = f.tid
    returning j.ctid as tid, j.id, j.task_identifier, j.queue_name, j.lane
  ), used as (
    update pgworker.permit p
    set job_id = c.id, lane = c.lane, free_at = coalesce(pgworker.later(p_now, s.per), 'infinity')
    from claimed c
    join pass s on s.id = c.id
    where p.ctid = s.tid                           -- locked above
  ), queued as (
    update pgworker.queue q set job_id = c.id
    from claimed c
    where q.name = any (array[c.queue_name]) and c.queue_name is not null
  )
  select coalesce(array_agg(c.tid), '{}'),
         array_agg(c.task_identifier order by j.n), array_agg(c.lane order by j.n)
  into tids, v_tasks, v_lanes
  from claimed c
  join job j on j.id = c.id;
  perform pgworker.remember_turns(v_tasks, v_lanes);
end
$$;
comment on function pgworker.claim_limited(
  bigint, timestamptz, int, bigint[], smallint[], timestamptz[], text[], text[], text[], bigint[]) is
  'Internal: claims those of the given limited jobs that are among the first p_limit jobs, as far as their gates let them '
  'through.';

create function pgworker.free_permits(p_job_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_now   constant timestamptz := pgworker.clock();
  v_tasks text[];
begin
  if p_job_ids is null then
    return;
  end if;
  with freed as (
    update pgworker.permit p set job_id = null, free_at = v_now
    where p.job_id = any (p_job_ids) and (p.kind = 'concurrency') is true   -- by the job, and by no other index
    returning p.task_identifier
  )
  select array_agg(distinct f.task_identifier) into v_tasks from freed f;
  -- The caller will claim next, but perhaps not this task.
  if exists (select from unnest(v_tasks) as t(identifier) where pgworker.some_wait(t.identifier, v_now)) then
    perform pgworker.wake();
  end if;
end
$$;
comment on function pgworker.free_permits(bigint[]) is
  'Internal: these limited jobs run no more: others may. Wakes workers when something of these tasks is due.';

create function pgworker.free_places(p_names text[], p_queued bigint[], p_limited bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.free_queues(p_names, p_queued);
  perform pgworker.free_permits(p_limited);
end
$$;
comment on function pgworker.free_places(text[], bigint[], bigint[]) is
  'Internal: runs have ended or were given back: of jobs of these queues, and of jobs with limits.';

create function pgworker.refund_permits(p_job_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now constant timestamptz := pgworker.clock();
begin
  -- A permit says which job took it last, so one that was retried within the interval is named by several: the latest.
  update pgworker.permit p set job_id = null, free_at = v_now
  where p.job_id = any (p_job_ids) and (p.kind = 'rate' and p.free_at > v_now) is true
    and not exists (select from pgworker.permit o
                    where o.job_id = p.job_id and o.kind = 'rate' and o.task_identifier = p.task_identifier
                      and o.lane_key = p.lane_key and (o.free_at, o.n) > (p.free_at, p.n) offset 0);
end
$$;
comment on function pgworker.refund_permits(bigint[]) is
  'Internal: these runs were given back with their attempt: they do not count for rates either.';
