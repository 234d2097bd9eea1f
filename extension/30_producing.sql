-- 30_producing.sql: adding jobs, in the caller's transaction
--
--   wake          tells sleeping workers that something is due
--   wake_to_sweep the same for what lies behind the cursors
--   wake_at       either, by the time of the job
--   add_job       the public function, in three overloads: payload as jsonb, as json, as text
--   trigger_job   a ready trigger function
--
-- Adding locks the row with the same job key, if there is one (31_keys.sql). Nothing else is locked or written: no task
-- row, no queue row. Many at once are in 32_bulk.sql.

-- Sleepers hold an advisory lock (1886874483, 0) shared. A producer that gets it exclusively, for the moment of this
-- call, knows that nobody sleeps and spares itself the NOTIFY, which would hold a cluster-wide lock until commit.
-- Two producers that try at the same instant disturb each other: the cost is one needless notification.
create function pgworker.wake() returns boolean
language sql volatile parallel unsafe
return case
  when current_setting('pgworker.woken', true) = 'yes' then false  -- once a transaction; the setting is local to it
  -- Taken and let go in one expression, so that nothing can come between.
  when case when pg_try_advisory_lock(1886874483, 0) then pg_advisory_unlock(1886874483, 0) else false end then false
  when set_config('pgworker.woken', 'yes', true) = 'yes' then pg_notify('pgworker', '') is not null
end;
comment on function pgworker.wake() is
  'Internal: notifies channel pgworker at commit, at most once a transaction, and only when a worker may be asleep. True '
  'if it did.';

create function pgworker.wake_to_sweep() returns boolean
language sql volatile parallel unsafe
return case when nextval('pgworker.epoch') is not null then pgworker.wake() end;
comment on function pgworker.wake_to_sweep() is
  'Internal: work has appeared behind the cursors of sessions: the next claim of each looks everywhere, and sleepers wake.';

create function pgworker.wake_at(p_run_at timestamptz, p_now timestamptz) returns boolean
language sql volatile parallel unsafe
return case when p_run_at < p_now then pgworker.wake_to_sweep() else pgworker.wake() end;
comment on function pgworker.wake_at(timestamptz, timestamptz) is
  'Internal: a job has appeared that is due, perhaps since before now, and so behind the cursors.';

create function pgworker.add_job(
  identifier   text,
  payload      jsonb       default null,
  queue_name   text        default null,
  run_at       timestamptz default null,
  max_attempts int         default null,
  job_key      text        default null,
  priority     int         default null,
  flags        text[]      default null,
  job_key_mode text        default 'replace',
  limit_key    text        default null,
  unique_for   interval    default null,
  debounce_max interval    default null
) returns pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now     constant timestamptz := pgworker.clock(now());
  v_clock   constant timestamptz := pgworker.clock();
  v_invalid text;
  v_id      bigint;
  v_row     pgworker.jobs;
begin
  v_invalid := pgworker.invalid_argument(add_job.identifier, add_job.queue_name, add_job.max_attempts, add_job.job_key,
                                         add_job.priority, add_job.flags, add_job.job_key_mode, add_job.run_at,
                                         add_job.limit_key, add_job.unique_for, add_job.debounce_max);
  if v_invalid is not null then
    perform pgworker.refuse_argument(v_invalid, add_job.identifier, add_job.queue_name, add_job.max_attempts,
                                     add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode,
                                     add_job.run_at, add_job.limit_key, add_job.unique_for, add_job.debounce_max);
  end if;
  if add_job.job_key is null then
    -- By far the most frequent case, in as few statements as possible: the columns are those of the view live.
    insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, priority, flags,
                                   created_at, limit_key, lane)
    select nextval('pgworker.job_id'), add_job.identifier, coalesce(nullif(add_job.payload, 'null'), '{}'),
           add_job.queue_name, least(coalesce(add_job.run_at, v_now), v_now + add_job.debounce_max),
           coalesce(add_job.max_attempts, t.max_attempts, 25),
           coalesce(add_job.priority, 0), nullif(add_job.flags, '{}'), v_now, add_job.limit_key,
           case when t.limited then pgworker.lane(t.keyed, add_job.limit_key, add_job.queue_name) end
    from (select) as one
    left join pgworker.task t on t.identifier = add_job.identifier
    returning j.id, j.task_identifier, j.queue_name, pgworker.job_state(null, false, j.run_at, v_clock), j.payload,
              j.priority::int, j.run_at, j.attempts::int, j.max_attempts::int, j.last_error, j.key, j.revision, j.flags,
              j.parent_id, j.root_id, j.name, j.on_failure, j.progress, null::jsonb, j.locked_at, j.locked_by,
              j.created_at, null::timestamptz, j.locked_at, j.limit_key, j.unique_until
    into v_row;
    if v_row.run_at <= v_clock then
      perform pgworker.wake_at(v_row.run_at, v_now);
    end if;
    return v_row;
  end if;
  loop
    v_id := pgworker.put_job(null, add_job.identifier, add_job.payload, add_job.queue_name, add_job.run_at,
                             add_job.max_attempts, add_job.job_key, add_job.priority, add_job.flags,
                             coalesce(add_job.job_key_mode, 'replace'), add_job.limit_key, add_job.unique_for,
                             add_job.debounce_max);
    select v.* into v_row from pgworker.live v where v.id = v_id;
    exit when found;
    -- The first job of a window, which has ended, or if somebody removes it at this moment is none any more.
    select v.* into v_row from pgworker.jobs v where v.id = v_id;
    exit when found;
  end loop;
  return v_row;
end
$$;
comment on function pgworker.add_job(
  text, jsonb, text, timestamptz, int, text, int, text[], text, text, interval, interval) is
  'Adds a job in the caller''s transaction and returns it. Nulls mean: payload {} (so does JSON''s null), no serial queue, '
  'run now, 25 attempts, no key, priority 0, no flags, mode replace, no limit key, no window, no bound. With unique_for, the job '
  'that was first added with this key and unique_for less than that long ago is returned instead, as it is, finished or '
  'not. Raises 22023 for a value out of its limits, 22004 '
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
  job_key_mode text        default 'replace',
  limit_key    text        default null,
  unique_for   interval    default null,
  debounce_max interval    default null
) returns pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgworker.add_job(add_job.identifier, add_job.payload::text, add_job.queue_name, add_job.run_at,
                          add_job.max_attempts, add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode,
                          add_job.limit_key, add_job.unique_for, add_job.debounce_max);
end
$$;
comment on function pgworker.add_job(
  text, json, text, timestamptz, int, text, int, text[], text, text, interval, interval) is
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
  job_key_mode text        default 'replace',
  limit_key    text        default null,
  unique_for   interval    default null,
  debounce_max interval    default null
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
                          add_job.job_key, add_job.priority, add_job.flags, add_job.job_key_mode, add_job.limit_key,
                          add_job.unique_for, add_job.debounce_max);
end
$$;
comment on function pgworker.add_job(
  text, text, text, timestamptz, int, text, int, text[], text, text, interval, interval) is
  'add_job with a payload written as text or as a plain literal. Raises 22023 also for what is not JSON.';

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
  execute format('select case when ($1).%1$I is not null then pg_catalog.format(''%%s'', ($1).%1$I) end', v_column)
  using v_row into v_id;
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
