-- 79_doctor.sql: what is wrong, or soon will be
--
--   finding            what is found
--   doctor_database    old snapshots, dead rows, autovacuum, the queue of notifications
--   so_many            "3 jobs"
--   doctor_workers     who is gone, late, or of another version
--   doctor_jobs        what nobody runs, what fails, what was left undone
--   doctor             the public function
--
-- A finding is something to act upon, so a healthy installation has none, however busy it is. Error: jobs do not run, or the
-- database will suffer for certain. Warning: it will come to that. It is asked by people and monitors, not by workers: it
-- reads each of the two job tables once. Nothing is locked.

create type pgworker.finding as (severity text, subject text, finding text, advice text);
comment on type pgworker.finding is
  'What doctor() finds: severity (error, warning), what it is about, what is wrong, what to do about it.';

-- How long a snapshot is held tells pg_stat_activity only to those who may read it; how many transactions ago it was taken
-- it tells everybody. Walsenders and replication slots have no beginning either. A snapshot of another database holds
-- back nothing here.
create function pgworker.doctor_database(p_now timestamptz) returns setof pgworker.finding
language plpgsql stable parallel restricted
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
  with holder as (
    select format('session %s', a.pid) as subject, a.xact_start as since,
           age(coalesce(a.backend_xmin, a.backend_xid)) as behind,
           case when a.backend_type is null then 100000 else 1000000 end as too_far,
           concat_ws(', ', 'role ' || a.usename, nullif(a.application_name, ''), a.state,
                     case when a.backend_type is null
                          then format('since when is not shown to role %s', current_user) end) as who,
           format('End its transaction: select pg_terminate_backend(%s); idle_in_transaction_session_timeout prevents it.',
                  a.pid)
           || case when a.backend_type is null then format(' To see more: grant pg_read_all_stats to %s.', current_user)
                   else '' end as advice
    from pg_catalog.pg_stat_activity a
    where (a.datname = current_database() or a.backend_type = 'walsender') and a.pid <> pg_backend_pid()
      and coalesce(a.backend_xmin, a.backend_xid) is not null and a.backend_type is distinct from 'autovacuum worker'
    union all
    select format('prepared transaction %s', quote_literal(x.gid)), x.prepared, age(x.transaction), null,
           'role ' || x.owner, format('Commit prepared %s, or rollback prepared it.', quote_literal(x.gid))
    from pg_catalog.pg_prepared_xacts x
    where x.database = current_database()
    union all
    select format('replication slot %s', s.slot_name), null, greatest(age(s.xmin), age(s.catalog_xmin)), 1000000,
           case when s.active then 'active' else 'used by nobody' end,
           'Have its consumer catch up, or drop it: ' || format('select pg_drop_replication_slot(%L).', s.slot_name)
    from pg_catalog.pg_replication_slots s
    where s.xmin is not null or (s.catalog_xmin is not null and s.database = current_database())
  )
  select case when h.since < p_now - interval '1 hour' then 'error' else 'warning' end, h.subject,
         format('holds a snapshot %s (%s): rows that died since cannot be removed',
                coalesce('since ' || date_trunc('second', h.since), format('that is %s transactions old', h.behind)), h.who),
         h.advice
  from holder h
  where h.since < p_now - interval '5 minutes' or (h.since is null and h.behind >= h.too_far);

  return query
  select 'warning', 'table ' || t.relname,
         format('%s dead rows against %s live ones; last vacuum: %s', t.dead, t.live,
                coalesce(date_trunc('second', t.vacuumed)::text, 'none')),
         format('Look for what holds an old snapshot; then vacuum pgworker.%I. If it comes again, give autovacuum more '
                'workers or a shorter autovacuum_naptime.', t.relname)
  from (select c.relname, pg_stat_get_dead_tuples(c.oid) as dead, pg_stat_get_live_tuples(c.oid) as live,
               greatest(pg_stat_get_last_vacuum_time(c.oid), pg_stat_get_last_autovacuum_time(c.oid)) as vacuumed
        from pg_catalog.pg_class c
        where c.relnamespace = 'pgworker'::regnamespace and c.relkind = 'r') as t
  where t.dead >= 100000 and t.dead > t.live and coalesce(t.vacuumed < p_now - interval '10 minutes', true);

  return query
  select 'error', 'autovacuum', format('setting %s is off: nothing removes dead rows', s.name),
         format('Turn it on: alter system set %s = on; select pg_reload_conf().', s.name)
  from pg_catalog.pg_settings s
  where s.name in ('autovacuum', 'track_counts') and s.setting = 'off'
  union all
  select 'error', 'table ' || c.relname, 'autovacuum is off for this table: nothing removes its dead rows',
         format('Turn it on: alter table pgworker.%I reset (autovacuum_enabled).', c.relname)
  from pg_catalog.pg_class c
  cross join lateral pg_options_to_table(c.reloptions) o
  where c.relnamespace = 'pgworker'::regnamespace and c.relkind = 'r' and o.option_name = 'autovacuum_enabled'
    and not o.option_value::boolean;

  return query
  select case when u.usage >= 0.5 then 'error' else 'warning' end, 'notifications',
         format('their queue is %s %% full: some session listens and does not end its transaction',
                round(100 * u.usage::numeric, 1)),
         'End it: it is among the oldest in pg_stat_activity. When the queue is full, whoever notifies cannot commit.'
  from (select pg_notification_queue_usage() as usage) as u
  where u.usage >= 0.01;
end
$$;
comment on function pgworker.doctor_database(timestamptz) is 'Internal: the findings of doctor() about the database.';

create function pgworker.so_many(p_jobs bigint) returns text
language sql immutable parallel safe
return coalesce(p_jobs, 0) || case when p_jobs = 1 then ' job' else ' jobs' end;
comment on function pgworker.so_many(bigint) is 'Internal: "1 job", "3 jobs".';

create function pgworker.doctor_workers(p_now timestamptz) returns setof pgworker.finding
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  v_late constant timestamptz := p_now - interval '1 minute'
    - pgworker.interval_setting('rescue_grace');
begin
  return query
  with held as (
    select j.locked_by as worker_id, count(*) as jobs from pgworker.job j where j.locked_by is not null group by j.locked_by
  )
  select f.severity, format('worker %s', p.id || coalesce(' (' || p.name || ')', '')), f.finding, f.advice
  from pgworker.presence p
  left join held h on h.worker_id = p.id
  cross join lateral (
    select 'error' as severity,
           format('is gone since %s, and what it held (%s) was not given back',
                  date_trunc('second', coalesce(p.lease_until, p.missing_since)), pgworker.so_many(h.jobs)) as finding,
           'Workers call maintain(): see that one runs; or call it yourself.' as advice
    where not p.present and coalesce(p.lease_until, p.missing_since) < v_late
    union all
    select 'error', format('is gone, and no worker is there to give back what it held (%s)', pgworker.so_many(h.jobs)),
           'Start a worker; or call maintain() now, and again after the grace.'
    where not p.present and h.jobs > 0 and p.lease is null and p.missing_since is null
      and not exists (select from pgworker.presence o where o.present)
    union all
    select 'warning', format('has not been heard of for a while: its lease of %s is over at %s', p.lease,
                             date_trunc('second', p.lease_until)),
           'See whether its process and its connection are well; its jobs are given back then.'
    where p.present and p.lease_until - p_now < p.lease / 3
    union all
    select 'warning', format('was made for pgworker %s, this is %s', p.version, pgworker.version()),
           'Restart it with the client of this version.'
    where p.present and p.version <> pgworker.version()
  ) as f
  order by p.id;
end
$$;
comment on function pgworker.doctor_workers(timestamptz) is 'Internal: the findings of doctor() about workers.';

create function pgworker.doctor_jobs(p_now timestamptz) returns setof pgworker.finding
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  v_live constant boolean := exists (select from pgworker.presence p where p.present);
begin
  -- A minute, so that a worker that is being replaced does not matter.
  return query
  with due as materialized (
    select j.task_identifier, j.flags, count(*) as jobs, min(j.run_at) as since
    from pgworker.job j
    where not j.waiting and j.locked_by is null and j.run_at < p_now - interval '1 minute'
      and not exists (select from pgworker.task t where t.identifier = j.task_identifier and t.paused)
      and not exists (select from pgworker.queue q where q.name = j.queue_name and q.paused)
      and not exists (select from pgworker.forbidden_flag f where f.name = any (j.flags))
    group by j.task_identifier, j.flags
  ), asked as materialized (
    select a.tasks, a.forbidden_flags from pgworker.asked a
  ), left_lying as (
    select d.jobs, d.since, case when v_live then d.task_identifier end as task,
           exists (select from asked a where a.tasks is null or d.task_identifier = any (a.tasks)) as known
    from due d
    where not exists (select from asked a
                      where (a.tasks is null or d.task_identifier = any (a.tasks))
                        and not coalesce(a.forbidden_flags && d.flags, false))
  )
  select 'error', coalesce('task ' || l.task, 'workers'),
         format('%s due, since %s, and ', pgworker.so_many(sum(l.jobs)::bigint), date_trunc('second', min(l.since)))
         || case when l.task is null then 'no worker is live'
                 when l.known then 'all live workers that know the task forbid their flags'
                 else 'no live worker knows the task' end,
         case when l.task is null then 'Start a worker.' when l.known then 'Start a worker that takes these flags.'
              else 'Start a worker that has a handler for it, or cancel the jobs.' end
  from left_lying l
  group by l.task, l.known
  order by l.task, l.known;

  return query
  select 'warning', 'task ' || f.task_identifier,
         format('%s failed for good within the last hour, %s in the hour before; the last one: %s',
                pgworker.so_many(f.now), f.before, f.error),
         'Mend what they say in last_error, then retry_jobs() runs them again.'
  from (select o.task_identifier, count(*) filter (where o.finished_at > p_now - interval '1 hour') as now,
               count(*) filter (where o.finished_at <= p_now - interval '1 hour') as before,
               left((array_agg(o.last_error order by o.finished_at desc, o.id desc))[1], 200) as error
        from pgworker.finished o
        where o.state = 'failed' and o.finished_at > p_now - interval '2 hours'
        group by o.task_identifier) as f
  where f.now >= 10 and f.now > 2 * f.before
  order by f.task_identifier;

  return query
  select 'error', 'schedule ' || s.name,
         case when s.last_error is not null
              then format('its tick of %s could not be run: %s', date_trunc('second', s.next_tick), s.last_error)
              else format('is due since %s and was not run', date_trunc('second', s.due_at)) end,
         case when s.last_error is not null
              then 'Mend what it says, or pause_schedule() it: it is tried again every few seconds.'
              else 'Workers call maintain(), which does it: see that one runs.' end
  from pgworker.schedule s
  where not s.paused and (s.last_error is not null or s.due_at < p_now - interval '1 minute')
  order by s.name;

  return query
  select 'warning', 'trees',
         format('what the end of jobs means for others in their trees is left undone, %s concerned, since %s',
                pgworker.so_many(count(*)), date_trunc('second', min(u.since))),
         'Workers call maintain(), which does it: see that one runs, and that no long transaction holds jobs '
         '(pg_stat_activity).'
  from pgworker.unsettled u
  having min(u.since) < p_now - interval '1 minute';
end
$$;
comment on function pgworker.doctor_jobs(timestamptz) is 'Internal: the findings of doctor() about jobs.';

create function pgworker.doctor() returns setof pgworker.finding
language plpgsql stable parallel restricted security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now constant timestamptz := pgworker.clock();
begin
  return query
  select f.severity, f.subject, f.finding, f.advice
  from (select d.severity, d.subject, d.finding, d.advice from pgworker.doctor_database(v_now) d
        union all
        select w.severity, w.subject, w.finding, w.advice from pgworker.doctor_workers(v_now) w
        union all
        select j.severity, j.subject, j.finding, j.advice from pgworker.doctor_jobs(v_now) j) as f
  order by array_position(array['error', 'warning'], f.severity);
end
$$;
comment on function pgworker.doctor() is
  'What is wrong with this installation, or soon will be, with advice, errors first; no row when all is well. Reads each '
  'job table once. What other roles'' sessions do is seen as far as the owner of pgworker may see it.';
