-- 30_producing.sql: adding and removing jobs, in the caller's transaction
--
--   wake          tells sleeping workers that something is due
--   put_job       one job into the table, by the rules of job keys
--   add_job       the public function, in three overloads: payload as jsonb, as json, as text
--   add_jobs      many at once
--   remove_job    by key
--   trigger_job   a ready trigger function
--
-- Locks: the row with the same job key, if there is one. Nothing else is locked or written: no task row, no queue row.
-- A bulk call goes through its keys in their order, so that two of them cannot wait for each other.

-- Sleepers hold an advisory lock (1886874483, 0) shared. A producer that gets it exclusively, for the moment of this
-- call, knows that nobody sleeps and spares itself the NOTIFY, which would hold a cluster-wide lock until commit.
-- Two producers that try at the same instant disturb each other: the cost is one needless notification.
create function pgworker.wake() returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('pgworker.woken', true) = 'yes' then
    return;                                        -- once a transaction; the setting is local to it
  end if;
  -- Taken and let go in one expression, so that nothing can come between.
  if not (case when pg_try_advisory_lock(1886874483, 0) then pg_advisory_unlock(1886874483, 0) else false end) then
    perform set_config('pgworker.woken', 'yes', true);
    perform pg_notify('pgworker', '');
  end if;
end
$$;
comment on function pgworker.wake() is
  'Internal: notifies channel pgworker at commit, at most once a transaction, and only when a worker may be asleep.';

-- What a job key meets, and what then happens:
--   nothing: insert. Pending: updated in place. Running: that run loses key and retries, a new job is inserted.
-- Each statement sees what has been committed until it starts, and waits for who holds the row, so a claim, a finish
-- or another add_job that comes between two of them sends us round the loop once more.
create function pgworker.put_job(
  p_id bigint, p_identifier text, p_payload jsonb, p_queue_name text, p_run_at timestamptz, p_max_attempts int,
  p_key text, p_priority int, p_flags text[], p_mode text
) returns bigint
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now   constant timestamptz := pgworker.clock(now());
  v_run_at constant timestamptz := coalesce(p_run_at, v_now);
  v_flags constant text[] := nullif(p_flags, '{}');
  v_payload constant jsonb := coalesce(nullif(p_payload, 'null'), '{}');
  v_due   timestamptz;
  v_id    bigint;
begin
  loop
    insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority, flags,
                                   created_at)
    values (coalesce(p_id, nextval('pgworker.job_id')), p_identifier, v_payload, p_queue_name, v_run_at,
            coalesce(p_max_attempts, 25), p_key, coalesce(p_priority, 0), v_flags, v_now)
    on conflict (key) where key is not null do nothing
    returning j.id, j.run_at into v_id, v_due;
    exit when found;

    if p_mode = 'unsafe_dedupe' then
      update pgworker.job j set revision = j.revision + 1 where j.key = p_key returning j.id into v_id;
      if found then
        return v_id;                               -- nothing has become claimable
      end if;
    else
      update pgworker.job j
      set task_identifier = p_identifier,
          payload = case when jsonb_typeof(j.payload) = 'array' and jsonb_typeof(v_payload) = 'array'
                         then j.payload || v_payload else v_payload end,
          queue_name = p_queue_name,
          run_at = case when p_mode = 'preserve_run_at' and j.attempts = 0 then j.run_at else v_run_at end,
          max_attempts = coalesce(p_max_attempts, 25),
          priority = coalesce(p_priority, 0),
          flags = v_flags,
          attempts = 0, last_error = null, progress = null,
          revision = j.revision + 1
      where j.key = p_key and j.locked_by is null
      returning j.id, j.run_at into v_id, v_due;
      exit when found;

      update pgworker.job j set key = null, max_attempts = j.attempts
      where j.key = p_key and j.locked_by is not null;
    end if;
  end loop;

  if v_due <= pgworker.clock() then
    -- A time in the past puts the job behind the cursors of the sessions that claim.
    if v_due < v_now then
      perform nextval('pgworker.epoch');
    end if;
    perform pgworker.wake();
  end if;
  return v_id;
end
$$;
comment on function pgworker.put_job(bigint, text, jsonb, text, timestamptz, int, text, int, text[], text) is
  'Internal: adds one checked job, or updates the one with its key, and returns the id of the row.';

create function pgworker.add_job(
  identifier   text,
  payload      jsonb       default null,
  queue_name   text        default null,
  run_at       timestamptz default null,
  max_attempts int         default null,
  job_key      text        default null,
  priority     int         default null,
  flags        text[]      default null,
  job_key_mode text        default 'replace'
) returns pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_invalid text;
  v_id      bigint;
  v_row     pgworker.jobs;
begin
  v_invalid := pgworker.invalid_argument(add_job.identifier, add_job.queue_name, add_job.max_attempts, add_job.job_key,
                                         add_job.priority, add_job.flags, add_job.job_key_mode, add_job.run_at);
  if v_invalid is not null then
    perform pgworker.refuse_argument(v_invalid, add_job.identifier, add_job.queue_name, add_job.max_attempts,
                                     add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode,
                                     add_job.run_at);
  end if;
  v_id := pgworker.put_job(null, add_job.identifier, add_job.payload, add_job.queue_name, add_job.run_at,
                           add_job.max_attempts, add_job.job_key, add_job.priority, add_job.flags,
                           coalesce(add_job.job_key_mode, 'replace'));
  select v.* into v_row from pgworker.live v where v.id = v_id;
  return v_row;
end
$$;
comment on function pgworker.add_job(text, jsonb, text, timestamptz, int, text, int, text[], text) is
  'Adds a job in the caller''s transaction and returns it. Nulls mean: payload {} (so does JSON''s null), no serial queue, '
  'run now, 25 attempts, no key, priority 0, no flags, mode replace. Raises 22023 for a value out of its limits, 22004 '
  'for a null identifier.';

create function pgworker.add_job(
  identifier   text,
  payload      json,
  queue_name   text        default null,
  run_at       timestamptz default null,
  max_attempts int         default null,
  job_key      text        default null,
  priority     int         default null,
  flags        text[]      default null,
  job_key_mode text        default 'replace'
) returns pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgworker.add_job(add_job.identifier, add_job.payload::text, add_job.queue_name, add_job.run_at,
                          add_job.max_attempts, add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode);
end
$$;
comment on function pgworker.add_job(text, json, text, timestamptz, int, text, int, text[], text) is
  'add_job with a payload of type json, as row_to_json() and json_build_object() make it. Raises 22023 also for '
  'what jsonb cannot hold (\u0000, a number beyond numeric).';

create function pgworker.add_job(
  identifier   text,
  payload      text,
  queue_name   text        default null,
  run_at       timestamptz default null,
  max_attempts int         default null,
  job_key      text        default null,
  priority     int         default null,
  flags        text[]      default null,
  job_key_mode text        default 'replace'
) returns pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_payload jsonb;
  v_says    text;
  v_more    text;
begin
  -- Before PostgreSQL 16 there is no other way to learn that a text is no JSON. It costs a microsecond, and a payload of
  -- type jsonb does not come here.
  begin
    v_payload := add_job.payload::jsonb;
  exception when data_exception or program_limit_exceeded then
    get stacked diagnostics v_says = message_text, v_more = pg_exception_detail;
    raise exception using errcode = '22023',
      message = format('payload must be JSON that jsonb can hold, got %s', quote_literal(left(add_job.payload, 200))),
      detail = concat_ws(': ', v_says, nullif(v_more, '')),
      hint = 'Write JSON, for example ''{"to": "ada@example.com"}''; to_jsonb() makes some of any value. Leave it out, or '
             'null, for {}.';
  end;
  return pgworker.add_job(add_job.identifier, v_payload, add_job.queue_name, add_job.run_at, add_job.max_attempts,
                          add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode);
end
$$;
comment on function pgworker.add_job(text, text, text, timestamptz, int, text, int, text[], text) is
  'add_job with a payload written as text or as a plain literal. Raises 22023 also for what is not JSON.';

create function pgworker.add_jobs(specs jsonb) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_nestloop = off
set jit = off
as $$
declare
  v_now   constant timestamptz := pgworker.clock(now());
  v_specs jsonb[];
  v_ids   bigint[];
  v_keys  text[];
  v_locked bigint;
  v_folds bigint[];
  v_first bigint[];
  v_due   boolean;
  v_past  boolean;
  v_changed boolean;
  v_moved boolean;
  v_spec  record;
  v_one   pgworker.jobs;
  v_rows  pgworker.jobs[];
begin
  if add_jobs.specs is null then
    raise exception using errcode = '22004', message = 'specs must not be null',
      hint = 'Give a JSON array of objects whose keys are the argument names of add_job; it may be empty.';
  end if;
  if jsonb_typeof(add_jobs.specs) <> 'array' then
    raise exception using errcode = '22023',
      message = format('specs must be an array of objects, got %s', jsonb_typeof(add_jobs.specs)),
      hint = 'Write [{"identifier": "send_email", "payload": {"to": 1}}, ...].';
  end if;

  v_specs := array(select e.spec from jsonb_array_elements(add_jobs.specs) with ordinality as e(spec, n) order by e.n);
  -- Ids first, in the order given: they ascend with it whatever order the rows are written in.
  select array_agg(nextval('pgworker.job_id') order by g.n) into v_ids
  from generate_series(1, cardinality(v_specs)) as g(n);

  v_keys := array(select distinct e.spec ->> 'job_key' from unnest(v_specs) as e(spec)
                  where e.spec ->> 'job_key' is not null);
  loop
    begin
      -- Live jobs with these keys are locked by id, like everywhere. Then everything new goes in with one statement, keys
      -- in their order, which waits for nobody but those who are just adding one of them. So far two calls that share
      -- keys wait for each other in one direction only. A key that came up in between can then be locked at once, or
      -- everything is undone and begun again: waiting for it here could be a deadlock.
      perform from pgworker.job j where j.key = any (v_keys) order by j.id for update;

      with spec as materialized (
        select s.n, s.identifier, s.payload, s.queue_name, s.run_at, s.max_attempts, s.job_key, s.priority, s.flags,
               case when s.job_key is null then 1 else row_number() over (partition by s.job_key order by s.n) end as nth,
               case when s.job_key is null then 1 else count(*) over (partition by s.job_key) end as same_key
        from pgworker.read_specs(v_specs, pgworker.job_keys(), 'specs', null, null) s
      ), added as (
        insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority,
                                       flags, created_at)
        select v_ids[s.n], s.identifier, s.payload, s.queue_name, coalesce(s.run_at, v_now),
               coalesce(s.max_attempts, 25), s.job_key, coalesce(s.priority, 0), nullif(s.flags, '{}'), v_now
        from spec s
        where s.nth = 1
        order by s.job_key nulls first, s.n
        on conflict (key) where key is not null do nothing
        returning j.id, j.key
      )
      select array(select s.n from spec s where s.job_key is not null
                   and (s.same_key > 1 or not exists (select from added a where a.key = s.job_key))),
             array(select a.id from added a
                   where exists (select from spec s where s.job_key = a.key and s.same_key > 1)),
             bool_or(coalesce(s.run_at, v_now) <= pgworker.clock()), bool_or(s.run_at < v_now)
      into v_folds, v_first, v_due, v_past
      from spec s;

      if cardinality(v_folds) > 0 then
        perform from pgworker.job j where j.key = any (v_keys) order by j.id for update nowait;
        get diagnostics v_locked = row_count;
        if v_locked < cardinality(v_keys) then     -- one has gone since
          raise lock_not_available;
        end if;
      end if;
      exit;
    exception when lock_not_available then
      -- once more
    end;
  end loop;

  -- The rest meets a live job, or another spec with its key: folded in the order given, as single calls would (put_job). All
  -- rows are locked by us by now. What becomes of a row is reckoned here and written once: a transaction that writes one
  -- row thousands of times walks over all its versions each time.
  if cardinality(v_folds) > 0 then
    for v_spec in
      select s.n, s.identifier, s.payload, s.queue_name, s.run_at, s.max_attempts, s.job_key, s.priority, s.flags,
             coalesce(s.job_key_mode, 'replace') as mode, a.id is not null as added,
             lag(s.job_key) over w is null as first, lead(s.job_key) over w is null as last
      from pgworker.read_specs(v_specs, pgworker.job_keys(), 'specs', null, null) s
      join unnest(v_folds) as f(n) on f.n = s.n
      left join unnest(v_first) as a(id) on a.id = v_ids[s.n]
      window w as (partition by s.job_key order by s.n)
      order by s.job_key, s.n
    loop
      if v_spec.first then
        select v.* into v_one from pgworker.live v where v.key = v_spec.job_key;
        v_changed := false;
        v_moved := false;
      end if;
      if v_spec.added then
        null;                                      -- this very spec made the row
      elsif v_spec.mode = 'unsafe_dedupe' then
        v_one.revision := v_one.revision + 1;
        v_changed := true;
      elsif v_one.state = 'running' then
        update pgworker.job j set revision = v_one.revision where j.id = v_one.id and v_changed;
        v_ids[v_spec.n] := pgworker.put_job(v_ids[v_spec.n], v_spec.identifier, v_spec.payload, v_spec.queue_name,
                                            v_spec.run_at, v_spec.max_attempts, v_spec.job_key, v_spec.priority,
                                            v_spec.flags, v_spec.mode);
        select v.* into v_one from pgworker.live v where v.id = v_ids[v_spec.n];
        v_changed := false;
      else
        v_one.task_identifier := v_spec.identifier;
        v_one.payload := case when jsonb_typeof(v_one.payload) = 'array' and jsonb_typeof(v_spec.payload) = 'array'
                              then v_one.payload || v_spec.payload else v_spec.payload end;
        v_one.queue_name := v_spec.queue_name;
        if v_spec.mode <> 'preserve_run_at' or v_one.attempts > 0 then
          v_one.run_at := coalesce(v_spec.run_at, v_now);
        end if;
        v_one.max_attempts := coalesce(v_spec.max_attempts, 25);
        v_one.priority := coalesce(v_spec.priority, 0);
        v_one.flags := nullif(v_spec.flags, '{}');
        v_one.attempts := 0;
        v_one.last_error := null;
        v_one.progress := null;
        v_one.revision := v_one.revision + 1;
        v_one.state := case when v_one.state = 'waiting' then 'waiting'
                            when v_one.run_at > pgworker.clock() then 'scheduled' else 'ready' end;
        v_changed := true;
        v_moved := true;
      end if;
      v_ids[v_spec.n] := v_one.id;
      v_rows[v_spec.n] := v_one;                   -- a folded job is returned as its own call would have left it
      if v_spec.last and v_changed then
        update pgworker.job j
        set task_identifier = v_one.task_identifier, payload = v_one.payload, queue_name = v_one.queue_name,
            run_at = v_one.run_at, max_attempts = v_one.max_attempts, priority = v_one.priority, flags = v_one.flags,
            attempts = v_one.attempts, last_error = v_one.last_error, progress = v_one.progress,
            revision = v_one.revision
        where j.id = v_one.id;
        v_due := v_due or (v_moved and v_one.run_at <= pgworker.clock());
        v_past := v_past or (v_moved and v_one.run_at < v_now);
      end if;
    end loop;
  end if;

  if v_past then
    perform nextval('pgworker.epoch');
  end if;
  if v_due then
    perform pgworker.wake();
  end if;

  if v_rows is null then
    return query select r.* from pgworker.job_rows(v_ids) r;
  else
    for v_n in 1 .. cardinality(v_ids) loop
      v_one := v_rows[v_n];
      if v_one.id is null then
        select v.* into v_one from pgworker.live v where v.id = v_ids[v_n];
      end if;
      return next v_one;
    end loop;
  end if;
end
$$;
comment on function pgworker.add_jobs(jsonb) is
  'Adds many jobs: an array of objects whose keys are the argument names of add_job. One row per object, in its order; '
  'ids ascend with it. Raises 22023 that says which object is wrong and how; then nothing has been added.';

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
  update pgworker.job j set key = null, max_attempts = j.attempts where j.id = v_id and j.locked_by is not null;
  select v.* into v_row from pgworker.jobs v where v.id = v_id;
  delete from pgworker.job j where j.id = v_id and j.locked_by is null;
  return v_row;
end
$$;
comment on function pgworker.remove_job(text) is
  'Removes the pending job with this key and returns it. A running one goes on without key and retries and is returned; '
  'unknown or null: null.';

-- SECURITY DEFINER: who changes the table needs no right on the queue. Nothing of the row is run with these rights: no
-- cast is applied, only the type's output function (by format), which no ordinary role can define.
create function pgworker.trigger_job() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column text := 'id';
  v_row    record;
  v_type   regtype;
  v_id     text;
begin
  if tg_nargs not between 1 and 2 then
    raise exception using errcode = '22023',
      message = format('trigger_job takes a task identifier and optionally a key column, got %s arguments', tg_nargs),
      hint = 'Write: execute function pgworker.trigger_job(''send_email'') or (''send_email'', ''email_id'').';
  end if;
  if tg_level <> 'ROW' then
    raise exception using errcode = '22023', message = 'trigger_job needs a row to take the id from',
      hint = 'Declare the trigger FOR EACH ROW.';
  end if;
  if tg_nargs = 2 then
    v_column := tg_argv[1];
  end if;
  select a.atttypid into v_type
  from pg_catalog.pg_attribute a
  where a.attrelid = tg_relid and a.attname = v_column and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception using errcode = '22023',
      message = format('table %I.%I has no column %I', tg_table_schema, tg_table_name, v_column),
      hint = 'Name the key column as the second argument of trigger_job.';
  end if;
  if tg_op = 'DELETE' then
    v_row := old;
  else
    v_row := new;
  end if;
  execute format('select case when ($1).%1$I is not null then pg_catalog.format(''%%s'', ($1).%1$I) end', v_column) using v_row into v_id;
  perform pgworker.add_job(
    tg_argv[0],
    jsonb_build_object(
      'schema', tg_table_schema, 'table', tg_table_name, 'op', tg_op,
      'id', case when v_type in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype)
                 then to_jsonb(nullif(v_id, '')::numeric) else to_jsonb(v_id) end));
  return v_row;
end
$$;
comment on function pgworker.trigger_job() is
  'Trigger function, for each row: trigger_job(''task'' [, ''key column'']) adds that task with the payload '
  '{"schema", "table", "op", "id"}.';
