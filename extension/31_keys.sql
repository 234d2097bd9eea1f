-- 31_keys.sql: job keys
--
--   unique_job    whose window is open
--   put_job       one job into the table, by the rules of job keys
--   remove_job    by key
--
-- Locks: the row with that job key, if there is one.

-- The job that stands for all that are added with this key and unique_for: live, or finished since, but not cancelled.
create function pgworker.unique_job(p_key text, p_now timestamptz) returns bigint
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  return (select v.id from pgworker.jobs v where v.key = p_key and v.unique_until > p_now order by v.id limit 1);
end
$$;
comment on function pgworker.unique_job(text, timestamptz) is
  'Internal: the first job, live or finished, whose unique_for window with this key is open; null if there is none.';

-- What a job key meets, and what then happens (jobs without one are simply inserted, see add_job):
--   nothing: insert. Pending: updated in place. Running: that run loses key and retries, a new job is inserted.
-- Each statement sees what has been committed until it starts, and waits for who holds the row, so a claim, a finish
-- or another add_job that comes between two of them sends us round the loop once more.
-- A window (unique_for) is looked for before and after: a job that was not there before, and is not in our way when we
-- insert, may have come, run and ended in between. Nor is one changed whose window has opened since.
create function pgworker.put_job(
  p_id bigint, p_identifier text, p_payload jsonb, p_queue_name text, p_run_at timestamptz, p_max_attempts int,
  p_key text, p_priority int, p_flags text[], p_mode text, p_limit_key text default null,
  p_unique_for interval default null, p_debounce_max interval default null
) returns bigint
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now   constant timestamptz := pgworker.clock(now());
  v_run_at constant timestamptz := least(coalesce(p_run_at, v_now), v_now + p_debounce_max);
  v_flags constant text[] := nullif(p_flags, '{}');
  v_payload constant jsonb := coalesce(nullif(p_payload, 'null'), '{}');
  v_most  int;
  v_lane  text;
  v_due   timestamptz;
  v_id    bigint;
begin
  loop
    if p_unique_for is not null then
      v_id := pgworker.unique_job(p_key, v_now);
      if v_id is not null then
        return v_id;                               -- as it is: nothing of it is written, so nobody waits for us
      end if;
    end if;
    insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority, flags,
                                   created_at, limit_key, unique_until, lane)
    values (coalesce(p_id, nextval('pgworker.job_id')), p_identifier, v_payload, p_queue_name, v_run_at,
            coalesce(p_max_attempts, (select t.max_attempts from pgworker.task t where t.identifier = p_identifier), 25),
            p_key, coalesce(p_priority, 0), v_flags, v_now, p_limit_key, v_now + p_unique_for,
            (select pgworker.lane(t.keyed, p_limit_key, p_queue_name) from pgworker.task t
             where t.identifier = p_identifier and t.limited))
    on conflict (key) where key is not null do nothing
    returning j.id, j.run_at into v_id, v_due;
    if found then
      exit when p_unique_for is null or pgworker.unique_job(p_key, v_now) = v_id;
      delete from pgworker.job j where j.id = v_id;
      continue;
    end if;

    if p_mode = 'unsafe_dedupe' then
      update pgworker.job j set revision = j.revision + 1
      where j.key = p_key and (p_unique_for is null or j.ends_as is not null or j.unique_until > v_now is not true)
      returning j.id into v_id;
      if found then
        return v_id;                               -- nothing has become claimable
      end if;
    else
      select t.max_attempts::int, case when t.limited then pgworker.lane(t.keyed, p_limit_key, p_queue_name) end
      into v_most, v_lane
      from pgworker.task t where t.identifier = p_identifier;
      update pgworker.job j
      set task_identifier = p_identifier,
          payload = case when jsonb_typeof(j.payload) = 'array' and jsonb_typeof(v_payload) = 'array'
                         then j.payload || v_payload else v_payload end,
          queue_name = p_queue_name,
          run_at = case when p_mode = 'preserve_run_at' and j.attempts = 0 then j.run_at
                        when j.attempts = 0 then least(v_run_at, j.created_at + p_debounce_max)
                        else v_run_at end,
          max_attempts = coalesce(p_max_attempts, v_most, 25),
          priority = coalesce(p_priority, 0),
          flags = v_flags,
          limit_key = p_limit_key,
          lane = v_lane,
          unique_until = v_now + p_unique_for,
          attempts = 0, last_error = null, progress = null,
          revision = j.revision + 1
      where j.key = p_key and j.locked_by is null
        and (p_unique_for is null or j.unique_until > v_now is not true)
      returning j.id, j.run_at into v_id, v_due;
      exit when found;

      update pgworker.job j set key = null, unique_until = null, max_attempts = j.attempts
      where j.key = p_key and j.locked_by is not null
        and (p_unique_for is null or j.ends_as is not null or j.unique_until > v_now is not true);
    end if;
  end loop;

  if v_due <= pgworker.clock() then
    perform pgworker.wake_at(v_due, v_now);
  end if;
  return v_id;
end
$$;
comment on function pgworker.put_job(
  bigint, text, jsonb, text, timestamptz, int, text, int, text[], text, text, interval, interval) is
  'Internal: adds one checked job, or updates the one with its key, and returns the id of the row; of the job whose '
  'window is open, which may be a finished one, and gone by the time that it is looked at.';

create function pgworker.remove_job(job_key text) returns pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_id  bigint;
  v_row pgworker.jobs;
begin
  -- Locked first: what is then read is what is removed, and a claim that came first has made it a running job.
  select j.id into v_id from pgworker.job j where j.key = remove_job.job_key for update;
  if not found then
    return null;
  end if;
  update pgworker.job j set key = null, unique_until = null, max_attempts = j.attempts
  where j.id = v_id and j.locked_by is not null;
  select v.* into v_row from pgworker.jobs v where v.id = v_id;
  delete from pgworker.job j where j.id = v_id and j.locked_by is null;
  return v_row;
end
$$;
comment on function pgworker.remove_job(text) is
  'Removes the pending job with this key and returns it. A running one goes on without key and retries and is returned; '
  'unknown or null: null.';
