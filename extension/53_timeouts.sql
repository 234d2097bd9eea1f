-- 53_timeouts.sql: runs that take longer than they may
--
--   check_timeouts   those that a worker brings along
--   note_deadlines   when claimed jobs must have ended
--   restart_timeouts for those that their worker has not begun yet
--   time_out         takes overdue ones from workers that have not stopped them
--
-- A timeout is a matter of the worker, which stops its handler and reports the failure. This is for workers that do not:
-- a hung one is as present as ever. Its deadline comes timeout_grace after the timeout, counted from the claim.
-- There is no index by which overdue jobs could be found in table job, since claims could then not be HOT; so claims of
-- jobs that have a timeout, and only these, write one row for each timeout among them. A worker that does not begin at once
-- what it has claimed says so from time to time: then another row counts, for a run is known by when it was claimed.
-- Locks: rows of deadline, which only maintain() takes, then job rows by id and queues (lock_free(), lock_free_queues(): who
-- holds one may be ending it), then what 50_finishing.sql takes.

create function pgworker.check_timeouts(p_timeouts jsonb) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_wrong text;
begin
  if jsonb_typeof(p_timeouts) <> 'object' then
    v_wrong := left(p_timeouts::text, 200);
  else
    select format('%s for %s', left(t.value::text, 200), quote_literal(t.key)) into v_wrong
    from jsonb_each(p_timeouts) as t
    where not case when jsonb_typeof(t.value) = 'number' then t.value::numeric > 0 and t.value::numeric <= 1000000000
                   else false end
    order by t.key limit 1;
  end if;
  if v_wrong is not null then
    raise exception using errcode = '22023',
      message = format('timeouts must be an object of seconds, up to 1000000000, by task identifier, got %s', v_wrong),
      hint = 'Write {"send_email": 60}; leave out tasks without a timeout.';
  end if;
end
$$;
comment on function pgworker.check_timeouts(jsonb) is 'Internal: raises 22023 for what are no timeouts of a worker.';

create function pgworker.note_deadlines(p_worker_id bigint, p_timeouts jsonb, p_tids tid[], p_now timestamptz) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_grace constant interval := pgworker.interval_setting('timeout_grace');
begin
  insert into pgworker.deadline (look_at, ends_at, locked_at, worker_id, timeout, job_ids)
  select p_now + least(l.longest + v_grace, interval '1 minute'), p_now + l.longest + v_grace, p_now, p_worker_id,
         l.longest, array_agg(l.id)
  from (select j.id,
               coalesce((p_timeouts ->> j.task_identifier)::float8 * interval '1 second',
                        (select t.timeout from pgworker.task t where t.identifier = j.task_identifier)) as longest
        from pgworker.job j
        where j.ctid = any (p_tids)) as l
  where l.longest is not null
  group by l.longest;
end
$$;
comment on function pgworker.note_deadlines(bigint, jsonb, tid[], timestamptz) is
  'Internal: writes down when those of these jobs, just claimed by this worker, that have a timeout must have ended.';

create function pgworker.restart_timeouts(worker_id bigint, job_ids bigint[], attempts int[] default null) returns void
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now  constant timestamptz := pgworker.clock();
  v_free bigint[];
  v_tids tid[];
begin
  perform pgworker.refuse_attempts(restart_timeouts.job_ids, restart_timeouts.attempts);
  v_free := pgworker.lock_free(restart_timeouts.job_ids);   -- of what somebody else has locked, at the next time
  with restarted as (
    update pgworker.job j
    set locked_at = v_now
    from unnest(restart_timeouts.job_ids, restart_timeouts.attempts) as u(id, attempt)
    where j.id = any (array[u.id]) and (u.id in (select f.id from unnest(v_free) as f(id))) is true
      and j.locked_by = restart_timeouts.worker_id and (u.attempt is null or j.attempts = u.attempt)
    returning j.ctid as tid
  )
  select array_agg(r.tid) into v_tids from restarted r;
  perform pgworker.note_deadlines(w.id, w.timeouts, v_tids, v_now)
  from pgworker.worker w where w.id = restart_timeouts.worker_id and v_tids is not null;
end
$$;
comment on function pgworker.restart_timeouts(bigint, bigint[], int[]) is
  'Jobs that this worker has claimed and not begun yet: their time counts from now, as if they were claimed now. What it '
  'does not hold, or not in the attempt that attempts names (as claimed), is passed over.';

create function pgworker.time_out(p_now timestamptz) returns boolean
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_ids      bigint[];
  v_timeouts interval[];
  v_held     bigint[];
  v_retry    bigint[];
  v_messages text[];
  v_over     bigint[];
  v_states   text[];
  v_errors   text[];
begin
  with due as (
    delete from pgworker.deadline d
    where d.ctid = any (array(select o.ctid from pgworker.deadline o where o.look_at <= p_now
                              order by o.look_at limit 1000 for update skip locked))
    returning d.ends_at, d.locked_at, d.worker_id, d.timeout, d.job_ids
  ), held as materialized (
    -- The same run: an attempt that is given back does not count, so its number comes again.
    select d.ends_at, d.locked_at, d.worker_id, d.timeout, u.id
    from due d
    cross join lateral unnest(d.job_ids) as u(id)
    where exists (select from pgworker.job j
                  where j.id = u.id and j.locked_by = d.worker_id and j.locked_at = d.locked_at offset 0)
  ), later as (
    -- What is overdue is looked at once more, too: somebody may hold its row just now.
    insert into pgworker.deadline (look_at, ends_at, locked_at, worker_id, timeout, job_ids)
    select case when h.ends_at > p_now then least(h.ends_at, p_now + interval '1 minute')
                else p_now + interval '1 second' end, h.ends_at, h.locked_at, h.worker_id, h.timeout, array_agg(h.id)
    from held h
    group by h.ends_at, h.locked_at, h.worker_id, h.timeout
  )
  select array_agg(h.id), array_agg(h.timeout) into v_ids, v_timeouts
  from held h where h.ends_at <= p_now;
  if v_ids is null then
    return false;
  end if;

  v_held := pgworker.lock_free_queues(pgworker.lock_free(v_ids));
  with overdue as materialized (
    select j.id, j.ends_as, j.cancel_reason, j.attempts < j.max_attempts as again,
           format('timed out after %s s; worker %s did not stop it', trim_scale(extract(epoch from u.timeout)),
                  j.locked_by || coalesce(' (' || w.name || ')', '')) as error
    from unnest(v_ids, v_timeouts) as u(id, timeout)
    cross join lateral (select o.id, o.locked_by, o.ends_as, o.cancel_reason, o.attempts, o.max_attempts
                        from pgworker.job o
                        where o.id = u.id and o.id = any (v_held) and o.locked_at <= p_now - u.timeout offset 0) as j
    left join pgworker.worker w on w.id = j.locked_by
    where j.locked_by is not null
  )
  select array_agg(o.id) filter (where o.ends_as is null and o.again),
         array_agg(o.error) filter (where o.ends_as is null and o.again),
         array_agg(o.id) filter (where o.ends_as is not null or not o.again),
         array_agg(coalesce(o.ends_as, 'failed')) filter (where o.ends_as is not null or not o.again),
         array_agg(coalesce(o.cancel_reason, o.error)) filter (where o.ends_as is not null or not o.again)
  into v_retry, v_messages, v_over, v_states, v_errors
  from overdue o;
  perform pgworker.tell_lost(v_retry || v_over);
  -- What goes back first: if it is a sibling of what fails for good, it is then cancelled with the others.
  if v_retry is not null then
    perform pgworker.retry_later(v_retry, v_messages, null, null);
  end if;
  if v_over is not null then
    perform pgworker.finish(v_over, v_states, v_errors, null);
  end if;
  return true;
end
$$;
comment on function pgworker.time_out(timestamptz) is
  'Internal: attempts that should have ended long since fail, and their workers are told that they have lost them. True '
  'if that was done.';
