-- 70_administration.sql: what an administrator does to jobs, queues and tasks
--
--   complete_jobs, permanently_fail_jobs, reschedule_jobs, cancel_jobs (retry_jobs is in 75_reviving.sql)
--   force_unlock_workers, pause_queue, resume_queue, pause_task, resume_task, forbid_flag, allow_flag, cleanup
--
-- Each changes what can be changed, touches nothing else and returns the jobs that it changed. Running jobs are left
-- alone, but cancel_jobs asks them to stop and force_unlock_workers takes them away.
-- Locks: live rows by id, then finished rows by id, then queues by name.

create function pgworker.lock_pending(p_ids bigint[], p_also bigint[] default null) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  return array(select j.id from pgworker.job j
               where j.id = any (p_ids || p_also)
                 and (j.locked_by is null or j.id in (select u.id from unnest(p_also) as u(id)))
               order by j.id for update);
end
$$;
comment on function pgworker.lock_pending(bigint[], bigint[]) is
  'Internal: locks those of these jobs that are live and not running, and p_also whether they run or not, and returns their '
  'ids.';

create function pgworker.complete_jobs(job_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_ids    constant bigint[] := pgworker.lock_pending(complete_jobs.job_ids);
  v_late   constant bigint[] := pgworker.lock_compensated(complete_jobs.job_ids);
  v_failed bigint[];
begin
  v_failed := array(select f.id from pgworker.finished f
                    where f.id = any (complete_jobs.job_ids) and f.state = 'failed'
                      and f.id not in (select u.id from unnest(v_late) as u(id))
                    order by f.id for update);
  perform pgworker.finish(v_ids, array_fill('completed'::text, array[cardinality(v_ids)]), null, null, true);
  update pgworker.finished f
  set state = 'completed', finished_at = pgworker.clock(), worker_id = null, worker_name = null,
      keep_until = case when f.parent_id is null
                        then greatest(f.unique_until, pgworker.clock()
                                      + coalesce((select t.keep_completed from pgworker.task t
                                                  where t.identifier = f.task_identifier),
                                                 greatest(pgworker.interval_setting('keep_completed'),
                                                          pgworker.interval_setting('keep_results'))))
                        else f.keep_until end
  where f.id = any (v_failed);
  perform pgworker.compensate(array(select f.root_id from pgworker.finished f where f.id = any (v_failed)));
  return query select r.* from pgworker.job_rows(v_ids || v_failed) r;
end
$$;
comment on function pgworker.complete_jobs(bigint[]) is
  'Finishes these jobs as completed: those that are not running, and those that have failed (but not in a tree that is '
  'being undone). Returns the changed ones.';

create function pgworker.permanently_fail_jobs(job_ids bigint[], error_message text default null)
returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids   constant bigint[] := pgworker.lock_pending(permanently_fail_jobs.job_ids);
  v_error constant text := coalesce(permanently_fail_jobs.error_message, 'Manually marked as failed');
begin
  perform pgworker.finish(v_ids, array_fill('failed'::text, array[cardinality(v_ids)]),
                          array_fill(v_error, array[cardinality(v_ids)]), null);
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.permanently_fail_jobs(bigint[], text) is
  'Finishes those of these jobs that are not running as failed, with this message (default: Manually marked as failed). '
  'Returns the changed ones.';

create function pgworker.reschedule_jobs(
  job_ids bigint[], run_at timestamptz default null, priority int default null, attempts int default null,
  max_attempts int default null
) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_invalid text;
  v_ids     bigint[];
  v_revived bigint[];
  v_job     record;
begin
  v_invalid := pgworker.invalid_argument('-', null, reschedule_jobs.max_attempts, null, reschedule_jobs.priority, null,
                                         null, reschedule_jobs.run_at);
  if v_invalid is not null then
    perform pgworker.refuse_argument(v_invalid, '-', null, reschedule_jobs.max_attempts, null, reschedule_jobs.priority,
                                     null, null, reschedule_jobs.run_at,
                                     p_hint => 'Leave it out, or null, to leave it as it is.');
  end if;
  if attempts not between 0 and 32766 then
    raise exception using errcode = '22023',
      message = format('attempts must be a whole number from 0 to 32766, got %s', attempts),
      hint = 'Give 0 for a fresh start, or null to leave it as it is.';
  end if;
  select r.pending, r.revived into v_ids, v_revived
  from pgworker.revive(reschedule_jobs.job_ids, reschedule_jobs.job_ids, array['failed'], reschedule_jobs.run_at,
                       reschedule_jobs.priority, reschedule_jobs.attempts, reschedule_jobs.max_attempts) as r;
  select j.id, coalesce(reschedule_jobs.attempts, j.attempts) as attempts,
         coalesce(reschedule_jobs.max_attempts, j.max_attempts) as max_attempts
  into v_job
  from pgworker.job j
  where j.id = any (v_ids)
    and coalesce(reschedule_jobs.attempts, j.attempts) >= coalesce(reschedule_jobs.max_attempts, j.max_attempts)
  limit 1;
  if found then
    raise exception using errcode = '22023',
      message = format('attempts %s and max_attempts %s would leave job %s no attempt', v_job.attempts,
                       v_job.max_attempts, v_job.id),
      hint = 'Use permanently_fail_jobs to end a job, or give more max_attempts.';
  end if;
  update pgworker.job j
  set run_at = coalesce(reschedule_jobs.run_at, j.run_at),
      priority = coalesce(reschedule_jobs.priority, j.priority),
      attempts = coalesce(reschedule_jobs.attempts, j.attempts),
      max_attempts = coalesce(reschedule_jobs.max_attempts, j.max_attempts)
  where j.id = any (v_ids);
  v_ids := v_ids || v_revived;
  if exists (select from pgworker.job j where j.id = any (v_ids) and j.run_at <= pgworker.clock()) then
    perform pgworker.wake_to_sweep();
  end if;
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.reschedule_jobs(bigint[], timestamptz, int, int, int) is
  'Changes jobs that are not running; null leaves a value as it is. A failed job that then has attempts left is live '
  'again (at run_at, or when it was due before). Returns the changed ones. Raises 22023 for values out of add_job''s '
  'limits, and for a live job that would be left without an attempt.';

create function pgworker.cancel_jobs(job_ids bigint[], reason text default null) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_reason  constant text := coalesce(cancel_jobs.reason, 'cancelled');
  v_ids     bigint[];
  v_running bigint[];
  v_busy    bigint[];
  v_nodes   bigint[];
  v_roots   bigint[];
  v_below   bigint[];
begin
  -- What runs is not waited for: its worker may be reporting it, in no order of ids with what it has reported already.
  v_ids := pgworker.lock_pending(cancel_jobs.job_ids);
  v_running := array(select j.id from pgworker.job j
                     where j.id = any (cancel_jobs.job_ids) and j.locked_by is not null and j.ends_as is null
                     order by j.id for update skip locked);
  v_busy := array(select j.id from pgworker.job j
                  where j.id = any (cancel_jobs.job_ids) and j.locked_by is not null and j.ends_as is null
                    and j.id not in (select u.id from unnest(v_running) as u(id)));
  perform pgworker.postpone(v_busy, 'cancel', null, array_fill(v_reason, array[cardinality(v_busy)]), null);
  select coalesce(array_agg(n.id), '{}'), coalesce(array_agg(n.root_id), '{}') into v_nodes, v_roots
  from (select j.id, j.root_id from pgworker.job j where j.id = any (cancel_jobs.job_ids) and j.has_children
        union all
        select f.id, f.root_id from pgworker.finished f where f.id = any (cancel_jobs.job_ids) and f.has_children) as n;
  v_below := array(select b.id from pgworker.live_below(v_nodes, v_roots, null) as b
                   where exists (select from pgworker.job j where j.id = b.id and j.ends_as is null offset 0)
                     and b.id not in (select u.id from unnest(cancel_jobs.job_ids) as u(id) where u.id is not null));

  perform pgworker.ask_to_stop(v_running, 'cancelled', array_fill(v_reason, array[cardinality(v_running)]), null);
  perform pgworker.finish(v_ids, array_fill('cancelled'::text, array[cardinality(v_ids)]),
                          array_fill(v_reason, array[cardinality(v_ids)]), null);
  -- What was below those has gone with them; what is below others goes now.
  perform pgworker.stop_below(v_nodes, v_roots, array_fill(v_reason, array[cardinality(v_nodes)]), v_nodes, null);
  v_below := array(select b.id from unnest(v_below) as b(id)
                   where not exists (select from pgworker.job j where j.id = b.id and j.ends_as is null offset 0));
  return query select r.* from pgworker.job_rows(v_ids || v_running || v_below) r;
end
$$;
comment on function pgworker.cancel_jobs(bigint[], text) is
  'Cancels jobs and everything below them: what is not running at once; what runs is asked to stop (heartbeats say so) '
  'and ends as cancelled whatever is reported. The reason becomes last_error. Returns the changed ones.';

create function pgworker.force_unlock_workers(worker_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_held constant bigint[] := array(
    -- What is being reported at this moment ends by itself, and must not be waited for: see cancel_jobs.
    select j.id from pgworker.job j where j.locked_by = any (force_unlock_workers.worker_ids)
    order by j.id for update skip locked);
  v_ids  bigint[];
begin
  v_ids := pgworker.give_back(force_unlock_workers.worker_ids, v_held, false, 'was forced to give this job up');
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.force_unlock_workers(bigint[]) is
  'Takes the jobs and queues of these workers away: they can be claimed again, attempts stay counted (a job on its last '
  'one fails). The workers learn it from their next heartbeat or finish. Returns the changed jobs.';

create function pgworker.refuse_name(
  p_argument text, p_value text, p_most int default 128, p_hint text default 'It is written exactly as jobs name it.'
) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_value is null or length(p_value) not between 1 and p_most then
    raise exception using errcode = case when p_value is null then '22004' else '22023' end,
      message = case when p_value is null then format('%s must not be null', p_argument)
                     else format('%s must be 1 to %s characters long, got %s', p_argument, p_most, length(p_value)) end,
      hint = p_hint;
  end if;
end
$$;
comment on function pgworker.refuse_name(text, text, int, text) is
  'Internal: raises 22023 or 22004 for what cannot be a name.';

create function pgworker.pause_queue(name text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform pgworker.refuse_name('name', pause_queue.name);
  -- As claims do before they make a queue's row (45_queues.sql): they must not come to wait for our commit.
  perform pg_advisory_xact_lock(1886874484, hashtext(pause_queue.name));
  insert into pgworker.queue as q (name, paused) values (pause_queue.name, true)
  on conflict on constraint queue_pkey do update set paused = true;
end
$$;
comment on function pgworker.pause_queue(text) is
  'No job of this serial queue is claimed until resume_queue; one that runs goes on.';

create function pgworker.resume_queue(name text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform pgworker.refuse_name('name', resume_queue.name);
  update pgworker.queue q set paused = false, turn = nextval('pgworker.turn') where q.name = resume_queue.name and q.paused;
  if found then
    perform pgworker.wake_to_sweep();
  end if;
end
$$;
comment on function pgworker.resume_queue(text) is 'Lets a paused queue go on; nothing happens if it is not paused.';

create function pgworker.pause_task(identifier text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_name('identifier', pause_task.identifier);
  insert into pgworker.task as t (identifier, paused) values (pause_task.identifier, true)
  on conflict on constraint task_pkey do update set paused = true;
end
$$;
comment on function pgworker.pause_task(text) is
  'No job of this task is claimed until resume_task; those that run go on.';

create function pgworker.resume_task(identifier text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_name('identifier', resume_task.identifier);
  update pgworker.task t set paused = false where t.identifier = resume_task.identifier and t.paused;
  if found then
    perform pgworker.wake_to_sweep();
  end if;
end
$$;
comment on function pgworker.resume_task(text) is 'Lets a paused task go on; nothing happens if it is not paused.';

create function pgworker.forbid_flag(name text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_name('name', forbid_flag.name, 512, 'Name the flag as jobs have it.');
  insert into pgworker.forbidden_flag as f (name, forbidden_at) values (forbid_flag.name, pgworker.clock())
  on conflict on constraint forbidden_flag_pkey do nothing;
end
$$;
comment on function pgworker.forbid_flag(text) is
  'No job with this flag is claimed by any worker until allow_flag; those that run go on.';

create function pgworker.allow_flag(name text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_name('name', allow_flag.name, 512, 'Name the flag as jobs have it.');
  delete from pgworker.forbidden_flag f where f.name = allow_flag.name;
  if found then
    perform pgworker.wake_to_sweep();
  end if;
end
$$;
comment on function pgworker.allow_flag(text) is
  'Jobs with this flag are claimed again; nothing happens if it is not forbidden.';

create view pgworker.forbidden_flags as
select f.name, f.forbidden_at from pgworker.forbidden_flag f;
comment on view pgworker.forbidden_flags is 'Flags that no worker takes jobs with, and since when.';

create function pgworker.cleanup(
  tasks text[] default array['delete_failed_jobs', 'gc_task_identifiers', 'gc_job_queues']
) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unknown text;
  v_gates   record;
begin
  select coalesce(t.task, 'null') into v_unknown
  from unnest(cleanup.tasks) as t(task)
  where t.task is null or t.task not in ('delete_failed_jobs', 'gc_task_identifiers', 'gc_job_queues')
  limit 1;
  if found or cleanup.tasks is null then
    raise exception using errcode = '22023',
      message = format('tasks must be cleanup tasks, got %s', coalesce(quote_literal(v_unknown), 'null')),
      hint = 'Known cleanup tasks: delete_failed_jobs, gc_task_identifiers, gc_job_queues.';
  end if;
  if 'delete_failed_jobs' = any (cleanup.tasks) then
    -- Trees go as a whole, when they have failed as a whole. What somebody has locked is being retried, or goes already.
    delete from pgworker.finished f
    where f.ctid = any (array(
      select o.ctid from pgworker.finished o
      where o.state = 'failed' and o.root_id is null and (o.unique_until is null or o.unique_until <= pgworker.clock())
      for update skip locked));
    perform pgworker.forget(array_agg(f.id), array_agg(f.id))
    from pgworker.finished f
    where f.state = 'failed' and f.root_id = f.id
      and not exists (select from pgworker.job j where j.root_id = f.id offset 0)
      and not exists (select from pgworker.unsettled u where u.job_id = f.id and u.what = 'compensate' offset 0);
  end if;
  if 'gc_task_identifiers' = any (cleanup.tasks) then
    -- A task that is paused stays, as one of which anything else is set: somebody made these settings.
    delete from pgworker.task t
    where not t.paused and not t.limited
      and num_nonnulls(t.max_attempts, t.backoff, t.timeout, t.keep_completed, t.keep_failed) = 0
      and not exists (select from pgworker.job j where j.task_identifier = t.identifier);
  end if;
  if 'gc_job_queues' = any (cleanup.tasks) then
    delete from pgworker.queue q
    where q.name in (
      select g.name from pgworker.queue g
      where g.job_id is null and not g.paused
        and not exists (select from pgworker.job j where j.queue_name = g.name)
      order by g.name
      for update skip locked);
    -- Gates of limit keys are made like queues, one for each key that ever ran something. They go as a whole: locked first,
    -- so that no claim adds to them (make_permits), then counted anew.
    select array_agg(l.task_identifier) as tasks, array_agg(l.kind) as kinds, array_agg(l.lane_key) as keys,
           array_agg(l.n) as locked
    into v_gates
    from (select f.task_identifier, f.kind, f.lane_key, count(*) as n
          from (select g.task_identifier, g.kind, g.lane_key from pgworker.permit g
                where g.lane_key <> '' and g.free_at <= pgworker.free_by(g.kind, pgworker.clock())
                  and not exists (select from pgworker.job j
                                  where j.task_identifier = g.task_identifier and j.lane = g.lane)
                for update skip locked) as f
          group by f.task_identifier, f.kind, f.lane_key) as l;
    delete from pgworker.permit p
    using unnest(v_gates.tasks, v_gates.kinds, v_gates.keys, v_gates.locked) as l(task, kind, lane_key, n)
    where p.task_identifier = l.task and p.kind = l.kind and p.lane_key = l.lane_key
      and l.n = (select count(*) from pgworker.permit o
                 where o.task_identifier = l.task and o.kind = l.kind and o.lane_key = l.lane_key);
  end if;
end
$$;
comment on function pgworker.cleanup(text[]) is
  'Housekeeping: delete_failed_jobs forgets failed jobs (a tree as a whole, if its root failed), gc_task_identifiers '
  'settings of tasks that change nothing and have no job, gc_job_queues queues that are free, not paused and have no '
  'job. Raises 22023 for any other name.';
