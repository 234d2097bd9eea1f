-- 25_tasks.sql: settings of tasks
--
--   tasks                     the public view
--   read_delay             an interval within a setting, or the error for it
--   backoff_function          the function that a backoff names, if it may be called
--   check_backoff             a backoff as it is stored, or the error for it
--   retry_delay               how long a failed attempt waits
--   refuse_setting            the error for a setting out of its limits
--   configure_task            the public function
--
-- Null is "as it is" for configure_task and "the default" in the table: a task of which nothing is set needs no row, and
-- whoever adds, claims or finishes pays for a setting only where somebody made it. What limits mean for claims is in
-- 42_limits.sql.

create view pgworker.tasks as
select t.identifier, t.paused, t.max_attempts::int as max_attempts, t.backoff, t.timeout, t.max_concurrency,
       t.max_concurrency_per_key, t.rate_limit, t.rate_interval, t.rate_limit_per_key, t.rate_interval_per_key, t.fair,
       t.keep_completed, t.keep_failed
from pgworker.task t;
comment on view pgworker.tasks is
  'Tasks that have settings, one row each; null is the default. A task without a row has defaults only.';

-- The EXCEPTION block: before PostgreSQL 16 nothing else tells that a text is no interval. Only configure_task comes here.
create function pgworker.read_delay(p_value jsonb, p_name text, p_least numeric) returns interval
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_delay interval;
begin
  begin
    v_delay := case jsonb_typeof(p_value) when 'number' then (p_value #>> '{}')::numeric * interval '1 second'
                                          when 'string' then (p_value #>> '{}')::interval end;
  exception when data_exception then
    v_delay := null;
  end;
  -- The bounds are seconds: an interval of months has none of its own to compare with.
  if v_delay is null or extract(epoch from v_delay) < p_least or extract(epoch from v_delay) > 315576000 then
    raise exception using errcode = '22023',
      message = format('%s must be an interval %s and 10 years, got %s', p_name,
                       case when p_least > 0 then 'between a millisecond' else 'between 0' end,
                       left(coalesce(p_value::text, 'null'), 200)),
      hint = 'Write an interval as text, for example "90 seconds", or a number of seconds.';
  end if;
  return v_delay;
end
$$;
comment on function pgworker.read_delay(jsonb, text, numeric) is
  'Internal: JSON''s text or number of seconds as an interval of at least p_least seconds, or 22023.';

-- The EXCEPTION block: nothing else tells that a text is not even a name. On configuration and in retry_delay only.
-- It runs with the rights of the owner of pgworker, so only functions of that role or of a superuser will do: whoever
-- owns a function can replace it at any time.
create function pgworker.backoff_function(p_name text) returns regprocedure
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select p.oid::regprocedure
    from pg_catalog.pg_proc p
    join pg_catalog.pg_roles r on r.oid = p.proowner
    where p.oid = to_regprocedure(p_name || case when position('(' in p_name) > 0 then '' else '(integer)' end)
      and p.prokind = 'f' and not p.proretset and p.prorettype = 'interval'::regtype
      and p.proargtypes::text = 'integer'::regtype::oid::text
      and (r.rolsuper or p.proowner = (select n.nspowner from pg_catalog.pg_namespace n where n.nspname = 'pgworker')));
exception when syntax_error_or_access_rule_violation or data_exception then
  return null;                                     -- no name of a function at all
end
$$;
comment on function pgworker.backoff_function(text) is
  'Internal: the function of that name that takes an attempt (integer), returns an interval and belongs to the owner of '
  'pgworker or a superuser; null if there is none.';

create function pgworker.check_backoff(p_backoff jsonb) returns jsonb
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_backoff jsonb := p_backoff;
  v_kind    text;
  v_keys    text[];
  v_key     text;
  v_bad     text;
begin
  if jsonb_typeof(v_backoff) = 'array' then
    v_backoff := jsonb_build_object('kind', 'list', 'delays', v_backoff);
  end if;
  v_kind := v_backoff ->> 'kind';
  v_keys := case v_kind when 'exponential' then array['kind', 'base', 'factor', 'maximum', 'jitter']
                        when 'linear' then array['kind', 'base', 'maximum', 'jitter']
                        when 'constant' then array['kind', 'base', 'jitter']
                        when 'list' then array['kind', 'delays', 'jitter']
                        when 'function' then array['kind', 'function'] end;
  if v_keys is null then
    raise exception using errcode = '22023',
      message = format('backoff.kind must be one of exponential, linear, constant, list, function, got %s',
                       left(coalesce(v_backoff -> 'kind', v_backoff)::text, 200)),
      hint = 'Write for example {"kind": "exponential", "base": "1 second", "factor": 2, "maximum": "1 hour"}.';
  end if;
  select k.key into v_bad from jsonb_object_keys(v_backoff) as k(key) where k.key <> all (v_keys) limit 1;
  if found then
    raise exception using errcode = '22023',
      message = format('backoff has an unknown key %s for kind %s', quote_literal(left(v_bad, 200)), v_kind),
      hint = format('Known keys: %s.', array_to_string(v_keys, ', '));
  end if;

  if v_kind = 'function' then
    if pgworker.backoff_function(v_backoff ->> 'function') is null then
      raise exception using errcode = '22023',
        message = format('backoff.function must name a function (integer) returns interval of the owner of pgworker or of a '
                         'superuser, got %s', left(coalesce(v_backoff ->> 'function', 'null'), 200)),
        hint = 'It is called with the number of the failed attempt and the rights of the owner of pgworker. Name it with '
               'its schema; ALTER FUNCTION … OWNER TO hands it over.';
    end if;
    return v_backoff || jsonb_build_object('function', pgworker.backoff_function(v_backoff ->> 'function')::text);
  end if;

  if v_kind = 'list' then
    if coalesce(jsonb_typeof(v_backoff -> 'delays'), 'null') <> 'array'
       or jsonb_array_length(v_backoff -> 'delays') not between 1 and 1000 then
      raise exception using errcode = '22023',
        message = format('backoff.delays must be a list of 1 to 1000 intervals, got %s',
                         left(coalesce(v_backoff -> 'delays', 'null')::text, 200)),
        hint = 'Write for example ["1 second", "1 minute", "1 hour"]; the last one is for all further attempts.';
    end if;
    v_backoff := v_backoff || jsonb_build_object('delays', (
      select jsonb_agg(pgworker.read_delay(d.delay, format('backoff.delays[%s]', d.n - 1), 0)::text order by d.n)
      from jsonb_array_elements(v_backoff -> 'delays') with ordinality as d(delay, n)));
  else
    v_backoff := v_backoff || jsonb_build_object(
      'base', pgworker.read_delay(coalesce(v_backoff -> 'base', '"1 second"'), 'backoff.base',
                                     case v_kind when 'constant' then 0 else 0.001 end)::text);
  end if;
  if 'maximum' = any (v_keys) then
    v_backoff := v_backoff || jsonb_build_object(
      'maximum', pgworker.read_delay(coalesce(v_backoff -> 'maximum', '"1 day"'), 'backoff.maximum', 0.001)::text);
  end if;
  if v_kind = 'exponential' then
    v_backoff := '{"factor": 2}'::jsonb || v_backoff;
  end if;
  for v_key in select u.key from unnest(array['factor', 'jitter']) as u(key) where v_backoff ? u.key loop
    if jsonb_typeof(v_backoff -> v_key) <> 'number'
       or (v_backoff ->> v_key)::numeric not between (v_key = 'factor')::int
                                                     and (case v_key when 'factor' then 1000 else 1 end) then
      raise exception using errcode = '22023',
        message = format('backoff.%s must be a number from %s, got %s', v_key,
                         case v_key when 'factor' then '1 to 1000' else '0 to 1' end, left((v_backoff -> v_key)::text, 200)),
        hint = case v_key when 'factor' then 'Each delay is the one before times factor; leave it out for 2.'
                          else 'Delays are spread by that share, 0.1 for ten per cent either way; leave it out for none.' end;
    end if;
  end loop;
  return v_backoff;
end
$$;
comment on function pgworker.check_backoff(jsonb) is
  'Internal: a backoff with its intervals and defaults written out, or 22023 that says what is wrong with it.';

-- On the failing path only, and there only for tasks that have a backoff. Whatever a function does wrong must not keep a
-- failure from being recorded: hence the EXCEPTION block, and the default in its place.
create function pgworker.retry_delay(p_backoff jsonb, p_attempt int, out delay interval, out complaint text)
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_base    constant float8 := extract(epoch from (p_backoff ->> 'base')::interval)::float8;
  v_maximum constant float8 := extract(epoch from (p_backoff ->> 'maximum')::interval)::float8;
  v_jitter  constant float8 := coalesce((p_backoff ->> 'jitter')::float8, 0);
  v_delays  constant jsonb := p_backoff -> 'delays';
  v_seconds float8;
  v_call    regprocedure;
begin
  if p_backoff ->> 'kind' = 'function' then
    begin
      v_call := pgworker.backoff_function(p_backoff ->> 'function');
      if v_call is null then
        raise exception 'it does not exist any more, or belongs to another role';
      end if;
      execute format('select %s($1)', v_call::regproc) into delay using p_attempt;
      if delay is null or extract(epoch from delay) not between 0 and 315576000 then
        raise exception 'it returned %', coalesce(delay::text, 'null');
      end if;
    exception when others then
      delay := null;
      complaint := format('backoff function %s: %s; the default backoff was used', p_backoff ->> 'function', sqlerrm);
    end;
    return;
  end if;
  v_seconds := case p_backoff ->> 'kind'
    -- by logarithms: a power of a thousand attempts is no number
    when 'exponential' then exp(least(ln(v_base) + (p_attempt - 1) * ln((p_backoff ->> 'factor')::float8), ln(v_maximum)))
    when 'linear' then v_base * p_attempt
    when 'constant' then v_base
    else extract(epoch from (v_delays ->> least(p_attempt, jsonb_array_length(v_delays)) - 1)::interval)::float8 end;
  delay := least(least(v_seconds, v_maximum) * (1 + v_jitter * (2 * random() - 1)), v_maximum) * interval '1 second';
end
$$;
comment on function pgworker.retry_delay(jsonb, int) is
  'Internal: how long a job waits after that attempt by this backoff. Null, with a complaint, when its function fails.';

create function pgworker.refuse_setting(p_name text, p_value text, p_says text, p_hint text) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = '22023', message = format('%s must be %s, got %s', p_name, p_says, p_value), hint = p_hint;
end
$$;
comment on function pgworker.refuse_setting(text, text, text, text) is 'Internal: raises 22023 for a setting of a task.';

create function pgworker.configure_task(
  identifier              text,
  max_attempts            int      default null,
  backoff                 jsonb    default null,
  timeout                 interval default null,
  max_concurrency         int      default null,
  max_concurrency_per_key int      default null,
  rate_limit              int      default null,
  rate_interval           interval default null,
  rate_limit_per_key      int      default null,
  rate_interval_per_key   interval default null,
  fair                    boolean  default null,
  keep_completed          interval default null,
  keep_failed             interval default null,
  paused                  boolean  default null,
  reset                   text[]   default null
) returns pgworker.tasks
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_all   constant text[] := array['max_attempts', 'backoff', 'timeout', 'max_concurrency', 'max_concurrency_per_key',
                                   'rate_limit', 'rate_interval', 'rate_limit_per_key', 'rate_interval_per_key', 'fair',
                                   'keep_completed', 'keep_failed', 'paused'];
  v_reset text[] := coalesce(reset, '{}');
  v_bad   record;
  v_backoff jsonb;
  v_old   pgworker.task;
  v_new   pgworker.task;
  v_row   pgworker.tasks;
begin
  perform pgworker.refuse_name('identifier', configure_task.identifier);
  select r.name, g.name is not null as given into v_bad
  from unnest(v_reset) as r(name)
  left join (values ('max_attempts', max_attempts is not null), ('backoff', backoff is not null),
                    ('timeout', timeout is not null), ('max_concurrency', max_concurrency is not null),
                    ('max_concurrency_per_key', max_concurrency_per_key is not null),
                    ('rate_limit', rate_limit is not null), ('rate_interval', rate_interval is not null),
                    ('rate_limit_per_key', rate_limit_per_key is not null),
                    ('rate_interval_per_key', rate_interval_per_key is not null), ('fair', fair is not null),
                    ('keep_completed', keep_completed is not null), ('keep_failed', keep_failed is not null),
                    ('paused', paused is not null)) as g(name, given) on g.name = r.name and g.given
  where g.name is not null or r.name is null or r.name <> all (v_all || 'all'::text)
  limit 1;
  if found then
    perform pgworker.refuse_setting('reset', coalesce(quote_literal(left(v_bad.name, 200)), 'null'),
      case when v_bad.given then 'names of settings that are not given a value at the same time' else 'names of settings' end,
      format('Settings: %s; all for all of them.', array_to_string(v_all, ', ')));
  end if;
  if 'all' = any (v_reset) then
    v_reset := v_all;
  end if;
  -- A rate is a number and its interval: they go together.
  v_reset := v_reset || case when 'rate_limit' = any (v_reset) then array['rate_interval'] else '{}' end
                     || case when 'rate_limit_per_key' = any (v_reset) then array['rate_interval_per_key'] else '{}' end;

  select b.name, b.value, b.most into v_bad
  from (values ('max_attempts', max_attempts, 32767), ('max_concurrency', max_concurrency, 100000),
               ('max_concurrency_per_key', max_concurrency_per_key, 1000), ('rate_limit', rate_limit, 100000),
               ('rate_limit_per_key', rate_limit_per_key, 1000)) as b(name, value, most)
  where b.value not between 1 and b.most
  limit 1;
  if found then
    perform pgworker.refuse_setting(v_bad.name, v_bad.value::text, format('a whole number from 1 to %s', v_bad.most),
      format('Leave it out to leave it as it is; reset => ''{%s}'' brings the default back; pause_task() stops a task.',
             v_bad.name));
  end if;
  select b.name, b.value::text as value, b.least into v_bad
  from (values ('timeout', timeout, 0.001), ('rate_interval', rate_interval, 0.001),
               ('rate_interval_per_key', rate_interval_per_key, 0.001), ('keep_completed', keep_completed, 0),
               ('keep_failed', keep_failed, 0)) as b(name, value, least)
  where extract(epoch from b.value) < b.least or extract(epoch from b.value) > 31557600000
  limit 1;
  if found then
    perform pgworker.refuse_setting(v_bad.name, v_bad.value,
      format('%s and at most 1000 years', case when v_bad.least > 0 then 'a millisecond or longer' else '0 or longer' end),
      format('Leave it out to leave it as it is; reset => ''{%s}'' brings the default back.', v_bad.name));
  end if;

  if configure_task.backoff is not null then
    v_backoff := pgworker.check_backoff(configure_task.backoff);
  end if;

  insert into pgworker.task (identifier) values (configure_task.identifier) on conflict on constraint task_pkey do nothing;
  select t.* into v_old from pgworker.task t where t.identifier = configure_task.identifier for update;
  update pgworker.task t
  set max_attempts = coalesce(configure_task.max_attempts, case when 'max_attempts' <> all (v_reset) then t.max_attempts end),
      backoff = coalesce(v_backoff, case when 'backoff' <> all (v_reset) then t.backoff end),
      timeout = coalesce(configure_task.timeout, case when 'timeout' <> all (v_reset) then t.timeout end),
      max_concurrency = coalesce(configure_task.max_concurrency,
                                 case when 'max_concurrency' <> all (v_reset) then t.max_concurrency end),
      max_concurrency_per_key = coalesce(configure_task.max_concurrency_per_key,
                                         case when 'max_concurrency_per_key' <> all (v_reset) then t.max_concurrency_per_key end),
      rate_limit = coalesce(configure_task.rate_limit, case when 'rate_limit' <> all (v_reset) then t.rate_limit end),
      rate_interval = coalesce(configure_task.rate_interval,
                               case when 'rate_interval' <> all (v_reset) then t.rate_interval end),
      rate_limit_per_key = coalesce(configure_task.rate_limit_per_key,
                                    case when 'rate_limit_per_key' <> all (v_reset) then t.rate_limit_per_key end),
      rate_interval_per_key = coalesce(configure_task.rate_interval_per_key,
                                       case when 'rate_interval_per_key' <> all (v_reset) then t.rate_interval_per_key end),
      fair = coalesce(configure_task.fair, 'fair' <> all (v_reset) and t.fair),
      keep_completed = coalesce(configure_task.keep_completed,
                                case when 'keep_completed' <> all (v_reset) then t.keep_completed end),
      keep_failed = coalesce(configure_task.keep_failed, case when 'keep_failed' <> all (v_reset) then t.keep_failed end),
      paused = coalesce(configure_task.paused, 'paused' <> all (v_reset) and t.paused)
  where t.identifier = configure_task.identifier
  returning t.* into v_new;
  if (v_new.rate_limit is null) <> (v_new.rate_interval is null) then
    perform pgworker.refuse_setting('rate_interval', coalesce(v_new.rate_interval::text, 'null'),
      'given together with rate_limit', 'Write rate_limit => 100, rate_interval => ''1 minute''.');
  end if;
  if (v_new.rate_limit_per_key is null) <> (v_new.rate_interval_per_key is null) then
    perform pgworker.refuse_setting('rate_interval_per_key', coalesce(v_new.rate_interval_per_key::text, 'null'),
      'given together with rate_limit_per_key', 'Write rate_limit_per_key => 10, rate_interval_per_key => ''1 minute''.');
  end if;

  perform pgworker.apply_limits(v_old, v_new);
  if v_old.paused and not v_new.paused then
    perform pgworker.wake_to_sweep();
  end if;
  select v.* into v_row from pgworker.tasks v where v.identifier = configure_task.identifier;
  return v_row;
end
$$;
comment on function pgworker.configure_task(
  text, int, jsonb, interval, int, int, int, interval, int, interval, boolean, interval, interval, boolean, text[]) is
  'Changes settings of a task and returns all of them. Null leaves a setting as it is; reset names settings that go back to '
  'their default (all: every one). Raises 22023 for a value out of its limits, 22004 for a null identifier.';
