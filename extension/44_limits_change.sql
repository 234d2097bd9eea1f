-- 44_limits_change.sql: what is there already when the limits of a task change
--
--   relane             jobs into the lanes that are theirs now
--   apply_limits       what a change of settings means for jobs and permits
--   adopt_jobs         jobs that were added under older settings
--
-- Locks: jobs by id, then permits.

create function pgworker.relane(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  if cardinality(p_ids) > 0 then
    update pgworker.job j
    set lane = (select pgworker.lane(t.keyed, j.limit_key, j.queue_name) from pgworker.task t
                where t.identifier = j.task_identifier and t.limited)
    where j.id = any (p_ids);
    perform pgworker.wake_to_sweep();
  end if;
end
$$;
comment on function pgworker.relane(bigint[]) is
  'Internal: puts jobs, whose rows the caller has locked, into the lane that is theirs now.';

create function pgworker.apply_limits(p_old pgworker.task, p_new pgworker.task) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now constant timestamptz := pgworker.clock();
  v_ids bigint[];
begin
  if (p_old.fair, p_old.max_concurrency, p_old.max_concurrency_per_key, p_old.rate_limit, p_old.rate_interval,
      p_old.rate_limit_per_key, p_old.rate_interval_per_key)
     is not distinct from
     (p_new.fair, p_new.max_concurrency, p_new.max_concurrency_per_key, p_new.rate_limit, p_new.rate_interval,
      p_new.rate_limit_per_key, p_new.rate_interval_per_key) then
    return;
  end if;
  -- Nothing of the task is claimed or ends between here and our commit: then what runs is what the permits say.
  v_ids := array(select j.id from pgworker.job j where j.task_identifier = p_new.identifier order by j.id for update);
  perform pgworker.relane(v_ids);

  -- What is taken, numbered from 1 on, of gates that are still there; rates as if they had been claimed by the new
  -- interval. What is beyond a lowered limit holds back the rest until it is free.
  with gone as (
    delete from pgworker.permit p where p.task_identifier = p_new.identifier
    returning p.kind, p.lane_key, p.job_id, p.lane,
              case when p.kind = 'concurrency' then p.free_at
                   when p.lane_key = '' then pgworker.later(p.free_at, p_new.rate_interval - p_old.rate_interval)
                   else pgworker.later(p.free_at, p_new.rate_interval_per_key - p_old.rate_interval_per_key) end as free_at
  )
  insert into pgworker.permit (task_identifier, kind, lane_key, n, job_id, lane, free_at)
  select p_new.identifier, g.kind, g.lane_key, row_number() over (partition by g.kind, g.lane_key order by g.free_at desc),
         g.job_id, g.lane, g.free_at
  from gone g
  where g.free_at > pgworker.free_by(g.kind, v_now)
    and case when g.kind = 'concurrency' and g.lane_key = '' then p_new.max_concurrency
             when g.kind = 'concurrency' then p_new.max_concurrency_per_key
             when g.lane_key = '' then p_new.rate_limit
             else p_new.rate_limit_per_key end is not null;

  -- What ran before there was a limit counts from now on.
  insert into pgworker.permit (task_identifier, kind, lane_key, n, job_id, lane, free_at)
  select j.task_identifier, g.kind, g.lane_key, row_number() over (partition by g.lane_key order by j.id), j.id, j.lane,
         'infinity'
  from pgworker.job j
  cross join lateral pgworker.gates_of(j.id) g
  where j.id = any (v_ids) and j.locked_by is not null and g.kind = 'concurrency'
    and not exists (select from pgworker.permit p
                    where p.task_identifier = j.task_identifier and p.kind = g.kind and p.lane_key = g.lane_key);

  -- The permits of the whole task are made here, so that the first claims do not wait for each other to make them.
  perform pgworker.make_permits(array_agg(p_new.identifier), array_agg(g.kind), array_agg(''::text), array_agg(g.most),
                                array_agg(least(g.most, 1000)), v_now)
  from (values ('concurrency', p_new.max_concurrency), ('rate', p_new.rate_limit)) as g(kind, most)
  where g.most is not null;
end
$$;
comment on function pgworker.apply_limits(pgworker.task, pgworker.task) is
  'Internal: brings the jobs and permits of a task in line with its new settings, whose row the caller has locked.';

-- Whoever adds a job reads the settings as they are then, and may commit later than somebody who changes them. No claim
-- takes a job of a limited task that has no lane, nor one that has a lane but a task without limits.
create function pgworker.adopt_jobs(p_now timestamptz) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_tasks text[];
begin
  with recursive hop as (
    (select j.task_identifier from pgworker.job j where j.lane is not null and not j.waiting order by j.task_identifier limit 1)
    union all
    select (select j.task_identifier from pgworker.job j
            where j.lane is not null and not j.waiting and j.task_identifier > h.task_identifier
            order by j.task_identifier limit 1)
    from hop h where h.task_identifier is not null
  )
  select array_agg(h.task_identifier) into v_tasks
  from hop h
  where h.task_identifier is not null
    and not exists (select from pgworker.task t where t.identifier = h.task_identifier and t.limited);
  with looked as (
    update pgworker.task t set looked_at = p_now
    where t.identifier in (
      select o.identifier from pgworker.task o
      where o.limited and (o.looked_at is null or o.looked_at not between p_now - interval '1 minute' and p_now)
      for update skip locked)
    returning t.identifier
  )
  select v_tasks || array_agg(l.identifier) into v_tasks from looked l;
  if v_tasks is null then
    return;
  end if;
  perform pgworker.relane(array(
    select j.id from pgworker.job j
    left join pgworker.task t on t.identifier = j.task_identifier and t.limited
    where j.task_identifier = any (v_tasks) and j.locked_by is null
      and j.lane is distinct from case when t.limited then pgworker.lane(t.keyed, j.limit_key, j.queue_name) end
    order by j.id
    for update of j skip locked));
end
$$;
comment on function pgworker.adopt_jobs(timestamptz) is
  'Internal: looks now and then for jobs that were added while the limits of their task were being changed.';
