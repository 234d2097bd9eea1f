-- 70_administration.sql: what an administrator does to jobs, queues and tasks
--
--   complete_jobs, permanently_fail_jobs, reschedule_jobs, retry_jobs, cancel_jobs
--   force_unlock_workers, pause_queue, resume_queue, pause_task, resume_task, cleanup
--
-- Each changes what can be changed, touches nothing else and returns the jobs that it changed. Running jobs are left
-- alone, but cancel_jobs asks them to stop and force_unlock_workers takes them away.
-- Locks: live rows by id, then finished rows by id, then queues by name.

-- Locks the live ones of these jobs that do not run, and returns their ids.
create function pgworker.lock_pending(p_ids bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  return array(select j.id from pgworker.job j where j.id = any (p_ids) and j.locked_by is null order by j.id for update);
end
$$;
comment on function pgworker.lock_pending(bigint[]) is 'Internal: locks those of these jobs that are live and not running.';

create function pgworker.complete_jobs(job_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_ids    constant bigint[] := pgworker.lock_pending(complete_jobs.job_ids);
  v_failed bigint[];
begin
  perform pgworker.finish(v_ids, array_fill('completed'::text, array[cardinality(v_ids)]), null, null, true);
  v_failed := array(select f.id from pgworker.finished f
                    where f.id = any (complete_jobs.job_ids) and f.state = 'failed' order by f.id for update);
  update pgworker.finished f
  set state = 'completed', finished_at = pgworker.clock(), keep_until = pgworker.clock() + interval '1 day'
  where f.id = any (v_failed);
  return query select r.* from pgworker.job_rows(v_ids || v_failed) r;
end
$$;
comment on function pgworker.complete_jobs(bigint[]) is
  'Finishes these jobs as completed: those that are not running, and those that have failed. Returns the changed ones.';

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

-- Finished jobs of these ids and states become live again, with the attempts given, or their own. A key that a live job
-- has taken meanwhile stays with that one: the revived job runs without a key rather than not at all.
create function pgworker.revive(
  p_ids bigint[], p_states text[], p_run_at timestamptz, p_priority int, p_attempts int, p_max_attempts int
) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_ids   bigint[];
  v_keeps boolean;
begin
  v_ids := array(
    select f.id from pgworker.finished f
    where f.id = any (p_ids) and f.state = any (p_states)
      and coalesce(p_attempts, f.attempts) < coalesce(p_max_attempts, f.max_attempts)
    order by f.id
    for update);
  -- Twice: with their keys, in the order of keys, and what meets a live job once more without.
  for v_keeps in select k.keeps from unnest(array[true, false]) with ordinality as k(keeps, n) order by k.n loop
    insert into pgworker.job (id, run_at, created_at, parent_id, root_id, revision, priority, attempts, max_attempts,
                              task_identifier, payload, queue_name, key, flags, last_error, progress, name, on_failure)
    select f.id, coalesce(p_run_at, f.run_at), f.created_at, f.parent_id, f.root_id, f.revision,
           coalesce(p_priority, f.priority), coalesce(p_attempts, f.attempts), coalesce(p_max_attempts, f.max_attempts),
           f.task_identifier, f.payload, f.queue_name, case when v_keeps then f.key end, f.flags, f.last_error,
           f.progress, f.name, f.on_failure
    from pgworker.finished f
    where f.id = any (v_ids) and (v_keeps or not exists (select from pgworker.job j where j.id = f.id offset 0))
    order by f.key, f.id
    on conflict (key) where key is not null do nothing;
  end loop;
  delete from pgworker.finished f where f.id = any (v_ids);
  return v_ids;
end
$$;
comment on function pgworker.revive(bigint[], text[], timestamptz, int, int, int) is
  'Internal: makes finished jobs that have attempts left live again and returns their ids.';

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
  v_ids := pgworker.lock_pending(reschedule_jobs.job_ids);
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
  v_ids := v_ids || pgworker.revive(reschedule_jobs.job_ids, array['failed'], reschedule_jobs.run_at,
                                    reschedule_jobs.priority, reschedule_jobs.attempts, reschedule_jobs.max_attempts);
  if exists (select from pgworker.job j where j.id = any (v_ids) and j.run_at <= pgworker.clock()) then
    perform nextval('pgworker.epoch');
    perform pgworker.wake();
  end if;
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.reschedule_jobs(bigint[], timestamptz, int, int, int) is
  'Changes jobs that are not running; null leaves a value as it is. A failed job that then has attempts left is live '
  'again (at run_at, or when it was due before). Returns the changed ones. Raises 22023 for values out of add_job''s limits, and for a live '
  'job that would be left without an attempt.';

create function pgworker.retry_jobs(job_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
begin
  v_ids := pgworker.revive(retry_jobs.job_ids, array['failed', 'cancelled'], pgworker.clock(now()), null, 0, null);
  if cardinality(v_ids) > 0 then
    perform pgworker.wake();
  end if;
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.retry_jobs(bigint[]) is
  'Failed and cancelled jobs run again, now and with fresh attempts; a key that a live job has taken meanwhile stays with '
  'that one. Returns the changed ones.';

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
begin
  perform from pgworker.job j where j.id = any (cancel_jobs.job_ids) order by j.id for update;
  select coalesce(array_agg(j.id order by j.id), '{}') into v_ids
  from pgworker.job j where j.id = any (cancel_jobs.job_ids) and j.locked_by is null;
  perform pgworker.finish(v_ids, array_fill('cancelled'::text, array[cardinality(v_ids)]),
                          array_fill(v_reason, array[cardinality(v_ids)]), null);

  with asked as (
    update pgworker.job j set cancel_reason = v_reason
    where j.id = any (cancel_jobs.job_ids) and j.locked_by is not null and j.cancel_reason is null
    returning j.id, j.locked_by
  ), told as (
    insert into pgworker.notice (worker_id, job_id, notice)
    select a.locked_by, a.id, 'cancel' from asked a
    on conflict (worker_id, job_id) do update set notice = 'cancel'
  )
  select array_agg(a.id order by a.id) into v_running from asked a;
  if v_running is not null then
    perform pgworker.wake();                       -- workers look for notices when they wake up
  end if;
  return query select r.* from pgworker.job_rows(v_ids || v_running) r;
end
$$;
comment on function pgworker.cancel_jobs(bigint[], text) is
  'Cancels jobs: those that are not running at once; running ones are asked to stop (their workers'' heartbeats say so) '
  'and end as cancelled whatever they report. The reason becomes last_error. Returns the changed ones.';

create function pgworker.force_unlock_workers(worker_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_held constant bigint[] := array(
    select j.id from pgworker.job j where j.locked_by = any (force_unlock_workers.worker_ids) order by j.id for update);
  v_ids  bigint[];
begin
  insert into pgworker.notice (worker_id, job_id, notice)
  select j.locked_by, j.id, 'lost'
  from pgworker.job j
  join pgworker.worker w on w.id = j.locked_by
  where j.id = any (v_held)
  on conflict (worker_id, job_id) do update set notice = 'lost';
  v_ids := pgworker.give_back(force_unlock_workers.worker_ids, v_held, false, 'was forced to give this job up');
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.force_unlock_workers(bigint[]) is
  'Takes the jobs and queues of these workers away: they can be claimed again, attempts stay counted (a job on its last '
  'one fails). The workers learn it from their next heartbeat or finish. Returns the changed jobs.';

create function pgworker.refuse_name(p_argument text, p_value text) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_value is null or length(p_value) not between 1 and 128 then
    raise exception using errcode = case when p_value is null then '22004' else '22023' end,
      message = case when p_value is null then format('%s must not be null', p_argument)
                     else format('%s must be 1 to 128 characters long, got %s', p_argument, length(p_value)) end,
      hint = 'It is written exactly as jobs name it.';
  end if;
end
$$;
comment on function pgworker.refuse_name(text, text) is 'Internal: raises 22023 or 22004 for what cannot be a name.';

create function pgworker.pause_queue(name text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
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
as $$
begin
  perform pgworker.refuse_name('name', resume_queue.name);
  update pgworker.queue q set paused = false, turn = nextval('pgworker.turn') where q.name = resume_queue.name and q.paused;
  if found then
    perform nextval('pgworker.epoch');
    perform pgworker.wake();
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
    perform nextval('pgworker.epoch');
    perform pgworker.wake();
  end if;
end
$$;
comment on function pgworker.resume_task(text) is 'Lets a paused task go on; nothing happens if it is not paused.';

create function pgworker.cleanup(
  tasks text[] default array['delete_failed_jobs', 'gc_task_identifiers', 'gc_job_queues']
) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unknown text;
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
    delete from pgworker.finished f where f.state = 'failed';
  end if;
  if 'gc_task_identifiers' = any (cleanup.tasks) then
    -- A task that is paused stays: its pause is a setting that somebody made.
    delete from pgworker.task t
    where not t.paused and not exists (select from pgworker.job j where j.task_identifier = t.identifier);
  end if;
  if 'gc_job_queues' = any (cleanup.tasks) then
    delete from pgworker.queue q
    where q.name in (
      select g.name from pgworker.queue g
      where g.job_id is null and not g.paused
        and not exists (select from pgworker.job j where j.queue_name = g.name)
      order by g.name
      for update skip locked);
  end if;
end
$$;
comment on function pgworker.cleanup(text[]) is
  'Housekeeping: delete_failed_jobs forgets failed jobs, gc_task_identifiers settings of tasks that change nothing and '
  'have no job, gc_job_queues queues that are free, not paused and have no job. Raises 22023 for any other name.';
