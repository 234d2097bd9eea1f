-- 51_reporting.sql: what workers say of the jobs that they hold
--
--   not_held       the error for who holds a job no more
--   finish_jobs    many jobs have ended
--   lock_held      one job that a worker holds
--   complete_job, fail_job, cancel_job
--   refuse_attempts   the error for attempts that do not go with their jobs
--   release_jobs, set_progress
--
-- Fence: only the worker that holds a job (locked_by) can end it; a caller that also names the attempt (as claimed) is
-- protected against its own past.
-- Locks: job rows by id, then what 50_finishing.sql takes.

create function pgworker.not_held(p_worker_id bigint, p_job_id bigint) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'PW001',
    message = format('job %s is not held by worker %s', coalesce(p_job_id::text, 'null'),
                     coalesce(p_worker_id::text, 'null')),
    hint = 'It was finished, given back or taken over meanwhile, or this attempt is not the one that was claimed. '
           'Drop the outcome of this run.';
end
$$;
comment on function pgworker.not_held(bigint, bigint) is 'Internal: raises PW001.';

create function pgworker.finish_jobs(
  worker_id bigint, completed bigint[], results jsonb[], failed bigint[], errors text[], attempts int[] default null
) returns table (job_id bigint, outcome text)
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_completed constant bigint[] := coalesce(finish_jobs.completed, '{}');
  v_failed    constant bigint[] := coalesce(finish_jobs.failed, '{}');
  v_attempts  constant int[] := finish_jobs.attempts;
  v_trees     boolean;                             -- some are in trees
  v_locks     boolean;
  v_keeps     boolean;
  v_mixed     constant boolean := v_attempts is not null and (v_attempts[1] = all (v_attempts)) is not true;
  v_attempt   constant int := case when v_mixed then 1 else v_attempts[1] end;
  v_tids      tid[];                               -- rows of completed jobs in that attempt, by id
  v_done      bigint[] := array[]::bigint[];
  v_left      bigint[];
  v_ids       bigint[] := array[]::bigint[];
  v_states    text[];
  v_errors    text[];
  v_results   jsonb[];
  v_retry     bigint[] := array[]::bigint[];
  v_messages  text[];
  v_asked     bigint[];                            -- to stop, and completed nevertheless
  v_values    jsonb[];
begin
  if cardinality(v_attempts) <> cardinality(v_completed) + cardinality(v_failed) then
    raise exception using errcode = '22023',
      message = format('attempts must name one attempt per job: %s for %s completed and %s failed',
                       cardinality(v_attempts), cardinality(v_completed), cardinality(v_failed)),
      hint = 'Give the attempts of the completed jobs, then those of the failed ones, or null.';
  end if;

  -- What does not all go in the one delete below is locked first, in the order of ids: what failed, and what somebody has
  -- asked to stop (cancel_jobs has left a notice). Those with a key too, for add_jobs locks several of them; and jobs of
  -- trees: if nobody has asked them to stop by then, nobody will, and they go in one delete.
  select coalesce(bool_or(j.root_id is not null), false) and cardinality(v_failed) = 0,
         coalesce(bool_or(j.key is not null), false) or cardinality(v_failed) > 0
           or exists (select from pgworker.notice n where n.worker_id = finish_jobs.worker_id),
         finish_jobs.results is not null
           or exists (select from pgworker.setting s where s.name = 'keep_completed' and s.value::interval > interval '0')
           or exists (select from pgworker.task t where t.keep_completed is not null),
         array_agg(j.ctid) filter (where j.locked_by = finish_jobs.worker_id and (v_attempt is null or j.attempts = v_attempt))
  into v_trees, v_locks, v_keeps, v_tids
  from (select o.ctid, o.locked_by, o.root_id, o.attempts, o.key from pgworker.job o
        where o.id = any (v_completed) order by o.id) as j;
  if v_trees or v_locks then
    select coalesce(v_trees and not bool_or(l.asked), false) into v_trees
    from (select j.ends_as is not null as asked from pgworker.job j
          where j.id = any (v_completed || v_failed) and j.locked_by = finish_jobs.worker_id
          order by j.id for update) as l;
  end if;

  -- Most jobs end like this: completed, and nothing else. One delete, nothing kept. (No worker: nothing is held by it, but
  -- to finish() null means: whoever holds them.)
  if (v_keeps or v_trees) and finish_jobs.worker_id is not null and cardinality(v_completed) > 0 then
    v_done := pgworker.finish(v_completed, array_fill('completed'::text, array[cardinality(v_completed)]), null,
                              finish_jobs.results, p_worker_id => finish_jobs.worker_id,
                              p_attempts => v_attempts[1:cardinality(v_completed)], p_trees => v_trees);
  elsif cardinality(v_completed) > 0 then
    -- They have been looked up already. Who has changed one since has moved its row, and it is left for what follows (or
    -- goes, if he has not committed yet and it is in the same attempt then). One by one, since rows lie in another order
    -- than that of ids, in which configure_task locks them. If their attempts differ, those in their first go like this.
    if v_mixed then
      v_tids := array(select j.ctid
                      from unnest(v_completed, v_attempts[1:cardinality(v_completed)]) as u(id, attempt)
                      join pgworker.job j on j.id = any (array[u.id])
                      where u.attempt = v_attempt and j.attempts = v_attempt and j.locked_by = finish_jobs.worker_id
                      order by j.id);
    end if;
    with gone as (
      delete from pgworker.job j
      using unnest(v_tids) as e(tid)
      where j.ctid = e.tid and j.locked_by = finish_jobs.worker_id and (v_attempt is null or j.attempts = v_attempt)
        and j.ends_as is null and j.root_id is null and j.unique_until is null
      returning j.id
    )
    select coalesce(array_agg(g.id), '{}') into v_done from gone g;
  end if;

  if cardinality(v_done) < cardinality(v_completed) or cardinality(v_failed) > 0 then
    -- What is left, locked in the order of ids and sorted by what becomes of it.
    v_left := array(select u.id from unnest(v_completed) as u(id) except select d.id from unnest(v_done) as d(id));
    with ended as materialized (
      select u.id, u.attempt, u.result, true as success, null::text as error
      from unnest(v_completed, v_attempts[1:cardinality(v_completed)], finish_jobs.results) as u(id, attempt, result)
      where cardinality(v_done) = 0 or u.id in (select l.id from unnest(v_left) as l(id))
      union all
      select u.id, u.attempt, null, false, coalesce(u.error, 'failed')
      from unnest(v_failed, v_attempts[cardinality(v_completed) + 1:], finish_jobs.errors) as u(id, attempt, error)
    ), unique_ended as materialized (
      select distinct on (e.id) e.id, e.attempt, e.result, e.success, e.error from ended e
      where e.id is not null
      order by e.id, e.success desc
    ), locked as materialized (
      select l.id, e.result, e.success, e.error, l.ends_as, l.cancel_reason, l.again
      from unique_ended e
      cross join lateral (
        select j.id, j.ends_as, j.cancel_reason, j.attempts < j.max_attempts as again from pgworker.job j
        where j.id = e.id and j.locked_by = finish_jobs.worker_id and (e.attempt is null or j.attempts = e.attempt)
        for update) as l
    )
    select coalesce(array_agg(l.id) filter (where f.over), '{}'),
           array_agg(coalesce(l.ends_as, case when l.success then 'completed' else 'failed' end)) filter (where f.over),
           array_agg(coalesce(l.cancel_reason, l.error)) filter (where f.over),
           array_agg(l.result) filter (where f.over),
           coalesce(array_agg(l.id) filter (where not f.over), '{}'),
           array_agg(l.error) filter (where not f.over),
           array_agg(l.id) filter (where l.success and l.ends_as is not null),
           array_agg(l.result) filter (where l.success and l.ends_as is not null)
    into v_ids, v_states, v_errors, v_results, v_retry, v_messages, v_asked, v_values
    from locked l
    cross join lateral (select l.success or l.ends_as is not null or not l.again as over) as f;
    -- What is to be retried first: if it is a sibling of what fails for good, it is then cancelled with the others.
    if cardinality(v_retry) > 0 then
      perform pgworker.retry_later(v_retry, v_messages, null, null);
    end if;
    if v_asked is not null then
      perform pgworker.remember_success(v_asked, v_values);
    end if;
    if cardinality(v_ids) > 0 then
      perform pgworker.finish(v_ids, v_states, v_errors, v_results);
    end if;
  end if;

  if cardinality(v_done) = cardinality(v_completed) and cardinality(v_failed) = 0 then
    return query select u.id, 'completed'::text from unnest(v_completed) as u(id);
  else
    return query
    select s.id, coalesce(max(s.outcome), 'lost')
    from (select u.id, u.n, null as outcome from unnest(v_completed || v_failed) with ordinality as u(id, n)
          union all
          select d.id, null, 'completed' from unnest(v_done) as d(id)
          union all
          select f.id, null, f.state from unnest(v_ids, v_states) as f(id, state)
          union all
          select r.id, null, coalesce(f.state, 'scheduled')
          from unnest(v_retry) as r(id)
          left join lateral (select o.state from pgworker.finished o where o.id = r.id offset 0) as f on true) as s
    group by s.id
    order by min(s.n);
  end if;
end
$$;
comment on function pgworker.finish_jobs(bigint, bigint[], jsonb[], bigint[], text[], int[]) is
  'Ends many jobs at once: completed ones with their results (null: none has one), failed ones with their errors. One '
  'row per job, in that order: what became of it, completed, scheduled (to be retried), failed, cancelled, or lost when '
  'the worker does not hold it any more; a lost job harms no other. attempts (as claimed, completed first) fences more '
  'strictly.';

-- The single forms lock their job first, so that what is checked is what is ended.
create function pgworker.lock_held(p_worker_id bigint, p_job_id bigint, p_attempt int) returns pgworker.job
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_job pgworker.job;
begin
  select j.* into v_job
  from pgworker.job j
  where j.id = p_job_id and j.locked_by = p_worker_id and (p_attempt is null or j.attempts = p_attempt)
  for update;
  if not found then
    perform pgworker.not_held(p_worker_id, p_job_id);
  end if;
  return v_job;
end
$$;
comment on function pgworker.lock_held(bigint, bigint, int) is
  'Internal: locks and returns a job that this worker holds, or raises PW001.';

create function pgworker.complete_job(worker_id bigint, job_id bigint, result jsonb default null, attempt int default null)
returns void
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
  v_job pgworker.job;
begin
  v_job := pgworker.lock_held(complete_job.worker_id, complete_job.job_id, complete_job.attempt);
  if v_job.ends_as is not null then
    perform pgworker.remember_success(array[v_job.id], array[complete_job.result]);
  end if;
  perform pgworker.finish(array[v_job.id], array[coalesce(v_job.ends_as, 'completed')], array[v_job.cancel_reason],
                          array[complete_job.result]);
end
$$;
comment on function pgworker.complete_job(bigint, bigint, jsonb, int) is
  'Ends a job that this worker holds, as completed (as cancelled, if that was asked for meanwhile). Raises PW001 if it '
  'does not hold it, or not in this attempt.';

create function pgworker.fail_job(
  worker_id bigint, job_id bigint, error_message text, retry_at timestamptz default null,
  permanent boolean default false, payload jsonb default null, attempt int default null
) returns pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_job   pgworker.job;
  v_error constant text := coalesce(fail_job.error_message, 'failed');
  v_row   pgworker.jobs;
begin
  if pgworker.invalid_argument('-', null, null, null, null, null, null, fail_job.retry_at) is not null then
    raise exception using errcode = '22023',
      message = format('retry_at must lie between the years 1 and 9999, got %s', fail_job.retry_at),
      hint = 'Leave it out, or null, for the usual backoff; set permanent for no further attempt.';
  end if;
  v_job := pgworker.lock_held(fail_job.worker_id, fail_job.job_id, fail_job.attempt);
  if v_job.ends_as is not null or v_job.attempts >= v_job.max_attempts or coalesce(permanent, false) then
    if fail_job.payload is not null then
      update pgworker.job j set payload = fail_job.payload where j.id = v_job.id;
    end if;
    perform pgworker.finish(array[v_job.id], array[coalesce(v_job.ends_as, 'failed')],
                            array[coalesce(v_job.cancel_reason, v_error)], null);
  else
    perform pgworker.retry_later(array[v_job.id], array[v_error], fail_job.retry_at, fail_job.payload);
  end if;
  select v.* into v_row from pgworker.jobs v where v.id = v_job.id;
  return v_row;
end
$$;
comment on function pgworker.fail_job(bigint, bigint, text, timestamptz, boolean, jsonb, int) is
  'Reports a failed attempt of a job that this worker holds and returns the job: scheduled again (at retry_at, or after '
  'exp(least(attempts, 10)) seconds), or failed when that was the last attempt or permanent is set. payload replaces the '
  'job''s: what is left of a batch. Raises PW001 if the worker does not hold it.';

create function pgworker.cancel_job(worker_id bigint, job_id bigint, reason text default null, attempt int default null)
returns pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_job pgworker.job;
  v_row pgworker.jobs;
begin
  v_job := pgworker.lock_held(cancel_job.worker_id, cancel_job.job_id, cancel_job.attempt);
  perform pgworker.finish(array[v_job.id], array[coalesce(v_job.ends_as, 'cancelled')],
                          array[coalesce(v_job.cancel_reason, cancel_job.reason, 'cancelled by its handler')], null);
  select v.* into v_row from pgworker.jobs v where v.id = v_job.id;
  return v_row;
end
$$;
comment on function pgworker.cancel_job(bigint, bigint, text, int) is
  'Ends a job that this worker holds as cancelled: its handler decided that it is not to be run. Raises PW001 if the '
  'worker does not hold it.';

create function pgworker.refuse_attempts(p_job_ids bigint[], p_attempts int[]) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(p_attempts) <> cardinality(p_job_ids) then
    raise exception using errcode = '22023',
      message = format('attempts must name one attempt per job: %s for %s jobs', cardinality(p_attempts),
                       cardinality(p_job_ids)),
      hint = 'Give the attempts as claimed, in the order of job_ids, or null.';
  end if;
end
$$;
comment on function pgworker.refuse_attempts(bigint[], int[]) is
  'Internal: raises 22023 where there are attempts, but not one for each job.';

create function pgworker.release_jobs(worker_id bigint, job_ids bigint[], attempts int[] default null) returns void
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  perform pgworker.refuse_attempts(release_jobs.job_ids, release_jobs.attempts);
  perform pgworker.give_back(
    array[release_jobs.worker_id],
    array(select l.id
          from (select u.id, u.attempt from unnest(release_jobs.job_ids, release_jobs.attempts) as u(id, attempt)
                order by u.id offset 0) as r
          cross join lateral (
            select j.id from pgworker.job j
            where j.id = r.id and j.locked_by = release_jobs.worker_id and (r.attempt is null or j.attempts = r.attempt)
            for update) as l),
    true, null);
end
$$;
comment on function pgworker.release_jobs(bigint, bigint[], int[]) is
  'Gives jobs that were claimed and not started back, with their attempt; what this worker does not hold, or not in the '
  'attempt that attempts names (as claimed), is passed over.';

create function pgworker.set_progress(worker_id bigint, job_id bigint, value jsonb) returns void
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  update pgworker.job j set progress = set_progress.value
  where j.id = set_progress.job_id and j.locked_by = set_progress.worker_id;
  if not found then
    perform pgworker.not_held(set_progress.worker_id, set_progress.job_id);
  end if;
end
$$;
comment on function pgworker.set_progress(bigint, bigint, jsonb) is
  'Keeps an intermediate result of a job that this worker holds: seen from outside at once, and by the next attempt. '
  'Raises PW001 if the worker does not hold it.';
