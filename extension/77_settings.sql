-- 77_settings.sql: options of this installation
--
--   interval_setting   one of them, for whom it is no matter of microseconds
--   known_settings     what there is
--   settings           the public view
--   configure          the public function
--
-- Defaults are in default_setting (10_schema.sql); table setting has only what is not at its default.

create function pgworker.interval_setting(p_name text) returns interval
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((select s.value from pgworker.setting s where s.name = p_name), pgworker.default_setting(p_name))::interval;
end
$$;
comment on function pgworker.interval_setting(text) is 'Internal: a setting that is an interval.';

create function pgworker.known_settings() returns table (name text, is_interval boolean, meaning text)
language sql immutable parallel safe
begin atomic
  select v.name, v.is_interval, v.meaning
  from (values
    ('rescue_grace', true, 'how long a worker may be gone before its jobs are given back'),
    ('timeout_grace', true, 'how long after its timeout a run may still be ended by its worker before maintain() does it'),
    ('keep_completed', true, 'how long completed jobs are kept'),
    ('keep_results', true,
     'how long those are kept at least that have a result, are the root of a tree or were completed by hand'),
    ('keep_failed', true, 'how long failed and cancelled jobs are kept'),
    ('history', false, 'whether runs that do not complete their job are recorded for job_attempts'),
    ('publish_events', false, 'whether changes of jobs'' states are notified'),
    ('allow_fake_now', false, 'whether sessions may move the clock with pgworker.fake_now (tests only)')
  ) as v(name, is_interval, meaning);
end;
comment on function pgworker.known_settings() is 'Internal: the settings that there are, in the order in which they are shown.';

create view pgworker.settings as
select k.name, coalesce(s.value, pgworker.default_setting(k.name)) as value,
       pgworker.default_setting(k.name) as default_value, k.meaning
from pgworker.known_settings() k
left join pgworker.setting s on s.name = k.name;
comment on view pgworker.settings is 'Options of this installation: configure() changes them.';

create function pgworker.configure(name text, value text) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_interval boolean;
  v_good     boolean := false;
begin
  select k.is_interval into v_interval from pgworker.known_settings() k where k.name = configure.name;
  if not found then
    raise exception using errcode = case when name is null then '22004' else '22023' end,
      message = case when name is null then 'name must not be null'
                     else format('there is no setting %s', quote_literal(left(name, 200))) end,
      hint = format('Settings: %s.', (select string_agg(k.name, ', ') from pgworker.known_settings() k));
  end if;
  if value is null then
    if name = 'publish_events' then
      perform pgworker.publish_events(false);
    end if;
    delete from pgworker.setting s where s.name = configure.name;
    return;
  end if;
  if v_interval then
    begin
      v_good := value::interval between interval '0' and interval '1000 years';
    exception when data_exception then
      -- no interval at all
    end;
  else
    v_good := value in ('on', 'off');
  end if;
  if not v_good then
    raise exception using errcode = '22023',
      message = format('value of %s must be %s, got %s', name,
                       case when v_interval then 'an interval from 0 to 1000 years' else 'on or off' end,
                       quote_literal(left(value, 200))),
      hint = format('The default is %s; null goes back to it.', pgworker.default_setting(name));
  end if;
  if name = 'publish_events' then
    perform pgworker.publish_events(value = 'on');
    return;
  end if;
  insert into pgworker.setting as s (name, value) values (configure.name, configure.value)
  on conflict on constraint setting_pkey do update set value = excluded.value;
end
$$;
comment on function pgworker.configure(text, text) is
  'Sets an option of this installation (those of the view settings); null makes it its default again. Raises 22023 for an '
  'unknown name and for a value that it cannot have.';
