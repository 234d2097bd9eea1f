-- 65_events.sql: every change of a job's state as a notification, for whoever listens
--
--   notify_event, event_tail                one notification on channel pgworker_events
--   publish_added, _changed, _ended, _corrected   trigger functions: what has become of the rows of a statement
--   arm_events       makes the triggers, or drops them, as the setting publish_events says
--   publish_events   changes the setting
--   rearm_events     the same from maintain(), for a setting that was restored or written by hand
--
-- Triggers, not calls in the functions that change a state: so nothing can be forgotten, and the states before and after
-- are those of the rows. While events are off there are no triggers, so that this costs nothing at all: even a disabled
-- trigger with transition tables has PostgreSQL gather the rows of each statement (an update of 300,000 rows took half as
-- long again). Calls in the functions would have to ask for the setting each time. (And a trigger on INSERT would fire
-- while a dump is restored; those that pg_dump knows of, where the schema is no extension, it makes after the data.) The
-- price is that triggers which are made after CREATE EXTENSION are in no dump: the setting is, and maintain() sees to it
-- that they follow it.
--
-- Locks: the tables job and finished, for the moment of a switch; nobody is kept waiting for it longer than a moment.

create function pgworker.notify_event(p_id bigint, p_task text, p_from text, p_to text, p_tail text) returns void
language sql volatile parallel unsafe
return pg_notify('pgworker_events',
                 json_build_object('id', p_id, 'task', p_task, 'from', p_from, 'to', p_to)::text || p_tail);
comment on function pgworker.notify_event(bigint, text, text, text, text) is
  'Internal: one notification, followed by white space that makes it differ from others of its transaction.';

-- PostgreSQL folds notifications of a transaction that are alike, and a job may go the same way twice in one. JSON may end
-- in white space: here, in the number of the statement, a tab for each 1 and a space for each 0.
create function pgworker.event_tail() returns text
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_nth constant int := coalesce(nullif(current_setting('pgworker.events', true), ''), '0')::int + 1;
begin
  perform set_config('pgworker.events', v_nth::text, true);
  return translate(ltrim(v_nth::bit(32)::text, '0'), '01', e' \t');
end
$$;
comment on function pgworker.event_tail() is
  'Internal: white space that is another one each time in a transaction.';

-- The trigger functions. The changes of a statement are told in the order of ids, and before settle() goes on, which comes
-- later in the order of the triggers' names: what follows from an end is told after it. They run with the settings of
-- whoever changed the rows; get_jobs, for one, allows no hash joins, without which old and new rows meet in a square.

create function pgworker.publish_added() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now  constant timestamptz := pgworker.clock();
  v_tail constant text := pgworker.event_tail();
begin
  -- What is in finished still has been there, and is live again.
  perform pgworker.notify_event(c.id, c.task_identifier, f.state,
                                pgworker.job_state(c.locked_by, c.waiting, c.run_at, v_now), v_tail)
  from came c
  left join lateral (select o.state from pgworker.finished o where o.id = c.id offset 0) as f on true
  order by c.id;
  return null;
end
$$;
comment on function pgworker.publish_added() is 'Internal: trigger function of table job: jobs were added, or live again.';

create function pgworker.publish_changed() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_hashjoin = on
set enable_nestloop = off
set jit = off
as $$
declare
  v_now  constant timestamptz := pgworker.clock();
  v_tail constant text := pgworker.event_tail();
begin
  perform pgworker.notify_event(s.id, s.task_identifier, s.old_state, s.new_state, v_tail)
  from (select b.id, b.task_identifier, pgworker.job_state(w.locked_by, w.waiting, w.run_at, v_now) as old_state,
               pgworker.job_state(b.locked_by, b.waiting, b.run_at, v_now) as new_state
        from was w join became b on b.id = w.id) as s
  where s.old_state <> s.new_state
  order by s.id;
  return null;
end
$$;
comment on function pgworker.publish_changed() is 'Internal: trigger function of table job: live jobs were changed.';

create function pgworker.publish_ended() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now  constant timestamptz := pgworker.clock();
  v_tail constant text := pgworker.event_tail();
  v_callers text;
  v_else text;
begin
  -- What finish() and finish_jobs() take away and do not keep has completed: whatever ends otherwise is in finished. Anything
  -- else that deletes a job removes it. Who calls is asked here, and not said there, so that it costs nothing without events.
  get diagnostics v_callers = pg_context;
  v_else := case when v_callers ~ ' pgworker\.finish(_jobs)?\(' then 'completed' end;
  perform pgworker.notify_event(g.id, g.task_identifier,
                                pgworker.job_state(g.locked_by, g.waiting, g.run_at, v_now), coalesce(f.state, v_else), v_tail)
  from gone g
  left join lateral (select o.state from pgworker.finished o where o.id = g.id offset 0) as f on true
  order by g.id;
  return null;
end
$$;
comment on function pgworker.publish_ended() is
  'Internal: trigger function of table job: jobs have ended, or were removed (their new state is null).';

create function pgworker.publish_corrected() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_hashjoin = on
set enable_nestloop = off
set jit = off
as $$
declare
  v_tail constant text := pgworker.event_tail();
begin
  perform pgworker.notify_event(b.id, b.task_identifier, w.state, b.state, v_tail)
  from was w join became b on b.id = w.id
  where w.state <> b.state
  order by b.id;
  return null;
end
$$;
comment on function pgworker.publish_corrected() is
  'Internal: trigger function of table finished: what has failed was declared completed.';

create function pgworker.arm_events() returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from pgworker.setting s where s.name = 'publish_events' and s.value = 'on') then
    lock table pgworker.job, pgworker.finished in share row exclusive mode;
    create or replace trigger publish_added after insert on pgworker.job
    referencing new table as came for each statement execute function pgworker.publish_added();
    create or replace trigger publish_changed after update on pgworker.job
    referencing old table as was new table as became for each statement execute function pgworker.publish_changed();
    create or replace trigger publish_ended after delete on pgworker.job
    referencing old table as gone for each statement execute function pgworker.publish_ended();
    create or replace trigger publish_corrected after update on pgworker.finished
    referencing old table as was new table as became for each statement execute function pgworker.publish_corrected();
  else
    lock table pgworker.job, pgworker.finished in access exclusive mode;
    drop trigger if exists publish_added on pgworker.job;
    drop trigger if exists publish_changed on pgworker.job;
    drop trigger if exists publish_ended on pgworker.job;
    drop trigger if exists publish_corrected on pgworker.finished;
  end if;
end
$$;
comment on function pgworker.arm_events() is
  'Internal: makes or drops the triggers that publish events, as the setting says. Waits for the tables as long as '
  'lock_timeout allows.';

create function pgworker.publish_events(enabled boolean) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
begin
  if enabled is null then
    raise exception using errcode = '22004', message = 'enabled must not be null',
      hint = 'Say true to have every change of a job''s state notified on channel pgworker_events, false for none.';
  end if;
  insert into pgworker.setting (name, value)
  values ('publish_events', case when publish_events.enabled then 'on' else 'off' end)
  on conflict (name) do update set value = excluded.value;
  perform pgworker.arm_events();
exception when lock_not_available then
  raise exception using errcode = '55P03', message = 'events could not be switched: the jobs are locked',
    hint = 'A transaction that has added or changed jobs is still open. Let it end (pg_stat_activity shows it), and try '
           'again.';
end
$$;
comment on function pgworker.publish_events(boolean) is
  'Switches events on or off: with them every change of a job''s state is notified on channel pgworker_events, as '
  '{"id", "task", "from", "to"}. Raises 55P03 when a transaction that has written jobs is open for longer than two '
  'seconds, 22004 for null.';

-- Nobody waits behind this for longer than its lock_timeout, however long it does not get the lock: it comes again.
create function pgworker.rearm_events() returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
begin
  if exists (select from pgworker.setting s where s.name = 'publish_events' and s.value = 'on')
     <> exists (select from pg_catalog.pg_trigger t
                where t.tgrelid = 'pgworker.job'::regclass and t.tgname = 'publish_added') then
    begin
      perform pgworker.arm_events();
    exception when lock_not_available then
      null;
    end;
  end if;
end
$$;
comment on function pgworker.rearm_events() is
  'Internal: has the triggers follow the setting publish_events when they do not, as after a restore; later, if '
  'somebody holds the tables.';
