-- 62_schedules.sql: jobs that are added again and again
--
--   schedule, schedules   the table, and the view over it
--   put_schedule          a schedule, checked, new or changed
--   schedule_job, unschedule_job, pause_schedule, resume_schedule
--   load_crontab_line, load_crontab   schedules from a crontab
--   run_schedule          adds the jobs of one schedule's ticks
--   run_schedules         of all that are due: for maintain()
--
-- A tick is run once, because the transaction that adds its job moves the schedule on, from tick to tick and not by the
-- clock: a clock that is set back runs nothing again. What is late by five minutes at most is run in any case; older ticks
-- only as far back as the schedule's backfill. What it has not seen, before it was made or was changed in its timing, or
-- while it was paused, it never runs.
-- Locks: changes of schedules take turns (advisory lock 1886874483, 2, until commit). run_schedules comes last in
-- maintain(), takes schedules with SKIP LOCKED, and waits no more than a moment for a job with the same key.

create table pgworker.schedule (
  name         text                 not null primary key,
  created_at   timestamptz          not null,
  changed_at   timestamptz          not null,
  next_tick    timestamptz          not null,
  due_at       timestamptz          not null,
  last_tick    timestamptz,
  backfill     interval             not null,
  max_attempts smallint,
  priority     smallint,
  paused       boolean              not null default false,
  from_crontab boolean              not null,
  cron         text                 not null,
  fields       pgworker.cron_fields not null,
  timezone     text                 not null,
  identifier   text                 not null,
  payload      jsonb                not null,
  queue_name   text,
  job_key      text,
  job_key_mode text                 not null,
  flags        text[],
  last_error   text
) with (fillfactor = 50);
comment on table pgworker.schedule is
  'Schedules. fields: cron, read; due_at: when maintain() has to look at it, which is next_tick, or later if that failed or '
  'more ticks were due than are run at once; last_error: why the next tick could not be run.';
create index schedule_due on pgworker.schedule (due_at) where not paused;

create view pgworker.schedules as
select s.name, s.cron, s.timezone, s.identifier, s.payload, s.backfill, s.queue_name, s.max_attempts::int as max_attempts,
       s.job_key, s.job_key_mode, s.priority::int as priority, s.flags, s.paused, s.last_tick,
       case when not s.paused then s.next_tick end as next_tick, s.last_error, s.from_crontab, s.created_at, s.changed_at
from pgworker.schedule s;
comment on view pgworker.schedules is
  'One row per schedule: as it was set, its last tick that was run and its next, null while it is paused.';

create function pgworker.put_schedule(
  p_name text, p_cron text, p_identifier text, p_payload jsonb, p_timezone text, p_backfill interval, p_queue_name text,
  p_max_attempts int, p_job_key text, p_job_key_mode text, p_priority int, p_flags text[], p_from_crontab boolean
) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now     constant timestamptz := pgworker.clock();
  v_payload constant jsonb := coalesce(nullif(p_payload, 'null'), '{}');
  v_zone    constant text := coalesce(p_timezone, 'UTC');
  v_fields  pgworker.cron_fields;
  v_invalid text;
  v_row     pgworker.schedules;
begin
  perform pgworker.refuse_name(
    'name', p_name, p_hint => 'The name is how the schedule is changed and removed later, for example ''nightly report''.');
  v_fields := pgworker.read_cron(p_cron);
  perform pgworker.check_timezone(v_zone);
  v_invalid := pgworker.invalid_argument(p_identifier, p_queue_name, p_max_attempts, p_job_key, p_priority, p_flags,
                                         p_job_key_mode);
  if v_invalid is not null then
    perform pgworker.refuse_argument(v_invalid, p_identifier, p_queue_name, p_max_attempts, p_job_key, p_priority, p_flags,
                                     p_job_key_mode);
  end if;
  if jsonb_typeof(v_payload) <> 'object' then
    raise exception using errcode = '22023',
      message = format('payload must be an object, got %s', jsonb_typeof(v_payload)),
      hint = 'Each job gets it with _cron in it, which says the tick. Put the value into an object, {"items": [1, 2]}.';
  end if;
  if p_backfill not between interval '0' and interval '10 years' then
    raise exception using errcode = '22023', message = format('backfill must be 0 to 10 years, got %s', p_backfill),
      hint = 'It says how far back missed ticks are made up for; leave it out, or null, for none.';
  end if;

  perform pg_advisory_xact_lock(1886874483, 2);
  insert into pgworker.schedule as s (
    name, created_at, changed_at, next_tick, due_at, backfill, max_attempts, priority, from_crontab, cron, fields, timezone,
    identifier, payload, queue_name, job_key, job_key_mode, flags)
  select p_name, v_now, v_now, t.tick, t.tick, coalesce(p_backfill, interval '0'), p_max_attempts, p_priority,
         p_from_crontab, p_cron, v_fields, v_zone, p_identifier, v_payload, p_queue_name, p_job_key,
         coalesce(p_job_key_mode, 'replace'), nullif(p_flags, '{}')
  from (select pgworker.cron_tick(v_fields, v_now, v_zone) as tick) as t
  on conflict (name) do update
  set changed_at = excluded.changed_at,
      -- With its timing unchanged it owes what it owed before; else it begins anew, but never with a tick that it has run.
      next_tick = case when s.fields = excluded.fields and s.timezone = excluded.timezone then s.next_tick
                       else pgworker.cron_tick(excluded.fields, greatest(v_now, s.last_tick), excluded.timezone) end,
      due_at = case when s.fields = excluded.fields and s.timezone = excluded.timezone then s.next_tick
                    else pgworker.cron_tick(excluded.fields, greatest(v_now, s.last_tick), excluded.timezone) end,
      backfill = excluded.backfill, max_attempts = excluded.max_attempts, priority = excluded.priority,
      from_crontab = excluded.from_crontab, cron = excluded.cron, fields = excluded.fields, timezone = excluded.timezone,
      identifier = excluded.identifier, payload = excluded.payload, queue_name = excluded.queue_name,
      job_key = excluded.job_key, job_key_mode = excluded.job_key_mode, flags = excluded.flags, last_error = null
  where s.from_crontab or not excluded.from_crontab;
  if not found then
    raise exception using errcode = '22023',
      message = format('schedule %s is there already, and was not made by load_crontab', quote_literal(p_name)),
      hint = 'Give the line another name with ?id=NAME, or remove the other one with unschedule_job.';
  end if;
  select v.* into v_row from pgworker.schedules v where v.name = p_name;
  return v_row;
end
$$;
comment on function pgworker.put_schedule(
  text, text, text, jsonb, text, interval, text, int, text, text, int, text[], boolean) is
  'Internal: checks a schedule, makes or changes it and returns it. A crontab''s does not replace one made by hand.';

create function pgworker.schedule_job(
  name         text,
  cron         text,
  identifier   text,
  payload      jsonb    default null,
  timezone     text     default 'UTC',
  backfill     interval default '0',
  queue_name   text     default null,
  max_attempts int      default null,
  job_key      text     default null,
  job_key_mode text     default 'replace',
  priority     int      default null,
  flags        text[]   default null
) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgworker.put_schedule(
    schedule_job.name, schedule_job.cron, schedule_job.identifier, schedule_job.payload, schedule_job.timezone,
    schedule_job.backfill, schedule_job.queue_name, schedule_job.max_attempts, schedule_job.job_key,
    schedule_job.job_key_mode, schedule_job.priority, schedule_job.flags, false);
end
$$;
comment on function pgworker.schedule_job(
  text, text, text, jsonb, text, interval, text, int, text, text, int, text[]) is
  'Adds such a job at each tick of a cron expression from now on; with a name that is there already that schedule is '
  'changed. Nulls mean the defaults. Raises 22023 for a value out of its limits, 22004 for a null name, cron or identifier.';

create function pgworker.unschedule_job(name text) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row pgworker.schedules;
begin
  perform pg_advisory_xact_lock(1886874483, 2);
  perform from pgworker.schedule s where s.name = unschedule_job.name for update;
  select v.* into v_row from pgworker.schedules v where v.name = unschedule_job.name;
  delete from pgworker.schedule s where s.name = unschedule_job.name;
  return v_row;
end
$$;
comment on function pgworker.unschedule_job(text) is
  'Removes a schedule and returns it; jobs that it has added stay. Unknown or null: null.';

create function pgworker.set_paused(p_name text, p_paused boolean) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row pgworker.schedules;
begin
  perform pg_advisory_xact_lock(1886874483, 2);
  perform from pgworker.schedule s where s.name = p_name for update;
  if not found then
    raise exception using errcode = case when p_name is null then '22004' else '22023' end,
      message = case when p_name is null then 'name must not be null'
                     else format('there is no schedule %s', quote_literal(left(p_name, 200))) end,
      hint = 'The view pgworker.schedules has them all.';
  end if;
  update pgworker.schedule s
  set paused = p_paused, next_tick = t.tick, due_at = t.tick, changed_at = pgworker.clock(), last_error = null
  from (select pgworker.cron_tick(o.fields, greatest(pgworker.clock(), o.last_tick), o.timezone) as tick
        from pgworker.schedule o where o.name = p_name) as t
  where s.name = p_name and s.paused <> p_paused;
  select v.* into v_row from pgworker.schedules v where v.name = p_name;
  return v_row;
end
$$;
comment on function pgworker.set_paused(text, boolean) is
  'Internal: pauses or resumes a schedule, which then begins anew, and returns it; raises 22023 for an unknown one.';

create function pgworker.pause_schedule(name text) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgworker.set_paused(pause_schedule.name, true);
end
$$;
comment on function pgworker.pause_schedule(text) is
  'Lets a schedule rest, and returns it: its ticks are not run, nor made up for later. Raises 22023 for an unknown name.';

create function pgworker.resume_schedule(name text) returns pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgworker.set_paused(resume_schedule.name, false);
end
$$;
comment on function pgworker.resume_schedule(text) is
  'A paused schedule goes on from now, and is returned; one that is not paused stays as it is. Raises 22023 for an unknown '
  'name.';

-- A line of Graphile Worker's crontab: * * * * * task ?id=x&fill=4w3d&max=3&queue=q&priority=3&jobKey=k {"n": 1}
create function pgworker.load_crontab_line(p_line text) returns text
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_parts   constant text[] := regexp_match(
    p_line, case when starts_with(p_line, '@') then '^(\S+)' else '^((?:\S+\s+){4}\S+)' end
            || '\s+([^\s?{]\S*)(?:\s+\?(\S+))?(?:\s+(\{.*))?$');
  v_name    text := v_parts[2];
  v_zone    text;
  v_fill    interval;
  v_queue   text;
  v_max     int;
  v_key     text;
  v_mode    text;
  v_priority int;
  v_pair    text;
  v_option  text;
  v_value   text;
begin
  if v_parts is null then
    raise exception using errcode = '22023', message = format('is not understood: %s', quote_literal(left(p_line, 200))),
      hint = 'A line is: minute hour date month weekday task ?option=value&option=value {payload}.';
  end if;
  foreach v_pair in array coalesce(string_to_array(v_parts[3], '&'), '{}') loop
    v_option := split_part(v_pair, '=', 1);
    -- As in a URL: + is a space, %20 too.
    select convert_from(string_agg(case when m.part[1] ~ '^%..' then decode(substr(m.part[1], 2), 'hex')
                                        else convert_to(m.part[1], 'UTF8') end, '' order by m.n), 'UTF8')
    into v_value
    from regexp_matches(replace(substr(v_pair, length(v_option) + 2), '+', ' '), '%[0-9A-Fa-f]{2}|.', 'g')
      with ordinality as m(part, n);
    if v_value is null
       or v_option in ('max', 'priority') and v_value !~ '^-?[0-9]{1,9}$'
       or v_option = 'fill' and v_value !~ '^([0-9]{1,6}[wdhms]){1,9}$' then
      raise exception using errcode = '22023',
        message = format('option %s must have a value of its kind, got %s', quote_literal(left(v_option, 200)),
                         quote_literal(left(coalesce(v_value, ''), 200))),
        hint = 'max and priority are whole numbers, fill is a time like 4w3d2h1m.';
    end if;
    case v_option
      when 'id' then v_name := v_value;
      when 'fill' then
        select sum((m.part[1] || case m.part[2] when 'w' then ' weeks' when 'd' then ' days' when 'h' then ' hours'
                                               when 'm' then ' minutes' else ' seconds' end)::interval)
        into v_fill from regexp_matches(v_value, '([0-9]+)(.)', 'g') as m(part);
      when 'max' then v_max := v_value::int;
      when 'queue' then v_queue := v_value;
      when 'priority' then v_priority := v_value::int;
      when 'jobKey' then v_key := v_value;
      when 'jobKeyMode' then v_mode := v_value;
      when 'timezone' then v_zone := v_value;
      else
        raise exception using errcode = '22023', message = format('option %s is unknown', quote_literal(left(v_option, 200))),
          hint = 'There are id, fill, max, queue, priority, jobKey, jobKeyMode and timezone.';
    end case;
  end loop;
  perform pgworker.put_schedule(v_name, v_parts[1], v_parts[2], v_parts[4]::jsonb, v_zone, v_fill, v_queue, v_max, v_key,
                                v_mode, v_priority, null, true);
  return v_name;
end
$$;
comment on function pgworker.load_crontab_line(text) is
  'Internal: makes or changes the schedule of one line of a crontab, and returns its name.';

create function pgworker.load_crontab(crontab text, prune boolean default false) returns setof pgworker.schedules
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[] := array[]::text[];
  v_line  record;
  v_name  text;
  v_state text;
  v_says  text;
  v_hint  text;
begin
  if load_crontab.crontab is null then
    raise exception using errcode = '22004', message = 'crontab must not be null',
      hint = 'Give the text of the file; it may be empty.';
  end if;
  for v_line in
    select btrim(l.line, E' \t') as line, l.n
    from regexp_split_to_table(load_crontab.crontab, '\r?\n') with ordinality as l(line, n)
    where l.line !~ '^\s*(#|$)'
  loop
    begin
      v_name := pgworker.load_crontab_line(v_line.line);
      if v_name = any (v_names) then
        raise exception using errcode = '22023', message = format('schedule %s is there twice', quote_literal(v_name)),
          hint = 'Give one of them another name with ?id=NAME; without it a schedule is called like its task.';
      end if;
    exception when data_exception or program_limit_exceeded then
      get stacked diagnostics v_state = returned_sqlstate, v_says = message_text, v_hint = pg_exception_hint;
      raise exception using errcode = '22023', message = format('crontab line %s: %s', v_line.n, v_says),
        hint = case v_state when '22023' then v_hint when '22021' then 'Values of options are UTF-8, as in a URL.'
                            else 'The payload is JSON, with names and texts in double quotes.' end;
    end;
    v_names := v_names || v_name;
  end loop;
  if load_crontab.prune then
    perform pg_advisory_xact_lock(1886874483, 2);
    delete from pgworker.schedule s
    where s.from_crontab and s.name not in (select u.name from unnest(v_names) as u(name));
  end if;
  return query
  select v.* from unnest(v_names) with ordinality as u(name, n) join pgworker.schedules v on v.name = u.name order by u.n;
end
$$;
comment on function pgworker.load_crontab(text, boolean) is
  'Makes the schedules of a crontab as Graphile Worker reads it, changes those that it made before, and returns them; '
  'prune: removes those that it made and that are not in it any more. Raises 22023 that names the line; then nothing has '
  'changed.';

create function pgworker.run_schedule(p_name text, p_now timestamptz) returns int
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
set enable_seqscan = off
set jit = off
as $$
declare
  v_late     constant timestamptz := p_now - interval '5 minutes';
  v_schedule pgworker.schedule;
  v_bound    timestamptz;
  v_tick     timestamptz;
  v_last     timestamptz;
  v_added    int := 0;
begin
  select s.* into v_schedule from pgworker.schedule s where s.name = p_name;
  v_tick := v_schedule.next_tick;
  v_bound := p_now - greatest(interval '5 minutes', make_interval(secs => extract(epoch from v_schedule.backfill)));
  if v_tick < v_bound then
    v_tick := pgworker.cron_tick(v_schedule.fields, v_bound - interval '1 microsecond', v_schedule.timezone);
  end if;
  while v_tick <= p_now and v_added < 100 loop
    perform pgworker.add_job(
      v_schedule.identifier,
      v_schedule.payload || jsonb_build_object('_cron', jsonb_build_object(
        'ts', to_char(v_tick at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), 'backfilled', v_tick < v_late)),
      queue_name => v_schedule.queue_name, run_at => v_tick, max_attempts => v_schedule.max_attempts,
      job_key => v_schedule.job_key, priority => v_schedule.priority, flags => v_schedule.flags,
      job_key_mode => v_schedule.job_key_mode);
    v_added := v_added + 1;
    v_last := v_tick;
    v_tick := pgworker.cron_tick(v_schedule.fields, v_tick, v_schedule.timezone);
  end loop;
  update pgworker.schedule s
  set last_tick = coalesce(v_last, s.last_tick), next_tick = v_tick, due_at = greatest(v_tick, p_now), last_error = null
  where s.name = p_name;
  return v_added;
end
$$;
comment on function pgworker.run_schedule(text, timestamptz) is
  'Internal: adds the jobs of the ticks of a schedule that are due, a hundred at most, and returns how many. Raises what '
  'add_job raises, and 55P03 when somebody holds the job with its key.';

create function pgworker.run_schedules(p_now timestamptz) returns interval
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_name   text;
  v_added  int;
  v_all    int := 0;
  v_failed int := 0;
  v_more   boolean := false;
  v_says   text;
begin
  for v_name in
    select s.name from pgworker.schedule s
    where s.due_at <= p_now and not s.paused
    -- What is behind with its ticks is due again at once: after those that are due at that moment for the first time.
    order by s.due_at, s.next_tick desc limit 1000 for update skip locked
  loop
    -- In a block of its own, so that one that cannot be run does not keep the others from it.
    begin
      v_added := pgworker.run_schedule(v_name, p_now);
      v_all := v_all + v_added;
      v_more := v_more or v_added = 100;
    exception when others then
      get stacked diagnostics v_says = message_text;
      update pgworker.schedule s set due_at = p_now + interval '5 seconds', last_error = v_says where s.name = v_name;
      v_failed := v_failed + 1;
    end;
    if v_all >= 1000 or v_failed >= 10 then
      v_more := true;
      exit;
    end if;
  end loop;
  -- What is due and was not taken here is held by somebody else: no reason to come back at once.
  return least(case when v_more then interval '0' end,
               (select min(s.due_at) from pgworker.schedule s where s.due_at > p_now and not s.paused) - p_now);
end
$$;
comment on function pgworker.run_schedules(timestamptz) is
  'Internal: runs the schedules that are due, and returns how long until the next one is; null if there is none.';
