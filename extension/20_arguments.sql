-- 20_arguments.sql: what may be asked for
--
--   invalid_argument   the limits of add_job's arguments, written once: names the first argument that breaks one
--   refuse_argument    the error for it
--   spec_label         where an object stands in the input
--   read_time          a text as a time
--   read_interval      a text as an interval
--   read_specs         objects whose keys are add_job's argument names, as rows
--   refuse_spec        the error for an object that is none
--   job_keys           those names
--
-- invalid_argument and read_specs have SQL-standard bodies: bound when created, inlined into whatever calls them.

create function pgworker.invalid_argument(
  p_identifier text, p_queue_name text, p_max_attempts numeric, p_job_key text, p_priority numeric, p_flags text[],
  p_job_key_mode text, p_run_at timestamptz default null, p_limit_key text default null,
  p_unique_for interval default null, p_debounce_max interval default null
) returns text
language sql stable parallel safe
return case
  when p_identifier is null or length(p_identifier) not between 1 and 128 then 'identifier'
  when length(p_queue_name) not between 1 and 128 then 'queue_name'
  when p_max_attempts not between 1 and 32767 or p_max_attempts <> trunc(p_max_attempts) then 'max_attempts'
  when length(p_job_key) not between 1 and 512 then 'job_key'
  when p_priority not between -32768 and 32767 or p_priority <> trunc(p_priority) then 'priority'
  when array_ndims(p_flags) > 1 then 'flags'
  when array_ndims(p_flags) = 1 and (array_position(p_flags, null) is not null
                                     or array_position(p_flags, '') is not null) then 'flags'
  when p_run_at not between '0001-01-02 00:00:00+00'::timestamptz and '9999-12-30 00:00:00+00'::timestamptz then 'run_at'
  when p_job_key_mode not in ('replace', 'preserve_run_at', 'unsafe_dedupe', 'debounce') then 'job_key_mode'
  when length(p_limit_key) not between 1 and 512 then 'limit_key'
  when p_unique_for is not null
       and (p_unique_for not between interval '1 microsecond' and interval '10 years' or p_job_key is null
            or p_job_key_mode = 'debounce') then 'unique_for'
  when p_debounce_max is not null
       and (p_debounce_max not between interval '1 microsecond' and interval '10 years'
            or p_job_key_mode is distinct from 'debounce') then 'debounce_max'
end;
comment on function pgworker.invalid_argument(
  text, text, numeric, text, numeric, text[], text, timestamptz, text, interval, interval) is
  'Internal: the first of add_job''s arguments that breaks its limit; null when all are good.';

create function pgworker.refuse_argument(
  p_argument text, p_identifier text, p_queue_name text, p_max_attempts numeric, p_job_key text, p_priority numeric,
  p_flags text[], p_job_key_mode text, p_run_at timestamptz default null, p_limit_key text default null,
  p_unique_for interval default null, p_debounce_max interval default null, p_where text default '',
  p_hint text default null
) returns boolean
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_code constant text := case when p_argument = 'identifier' and p_identifier is null then '22004' else '22023' end;
  v_says text;
  v_hint text;
begin
  case p_argument
    when 'identifier' then
      v_says := case when p_identifier is null then 'must not be null'
                     else format('must be 1 to 128 characters long, got %s', length(p_identifier)) end;
      v_hint := 'The identifier names the task that is to run, for example ''send_email''.';
    when 'queue_name' then
      v_says := format('must be 1 to 128 characters long, got %s', length(p_queue_name));
      v_hint := 'Leave it out, or null, for a job that belongs to no serial queue.';
    when 'max_attempts' then
      v_says := format('must be a whole number from 1 to 32767, got %s', p_max_attempts);
      v_hint := 'Leave it out, or null, for the default of 25.';
    when 'job_key' then
      v_says := format('must be 1 to 512 characters long, got %s', length(p_job_key));
      v_hint := 'Leave it out, or null, for a job without a key; hash a longer key.';
    when 'priority' then
      v_says := format('must be a whole number from -32768 to 32767, got %s', p_priority);
      v_hint := 'Lower numbers run sooner; leave it out, or null, for 0.';
    when 'flags' then
      v_says := format('must be a plain list without NULL or empty members, got %s', left(p_flags::text, 200));
      v_hint := 'Leave the member out, or the whole argument for a job without flags.';
    when 'run_at' then
      v_says := format('must lie between the years 1 and 9999, got %s', p_run_at);
      v_hint := 'Leave it out, or null, to run now; pause_task() and pause_queue() hold work back indefinitely.';
    when 'job_key_mode' then
      v_says := format('must be one of replace, preserve_run_at, unsafe_dedupe, debounce, got %s',
                       quote_literal(left(p_job_key_mode, 200)));
      v_hint := 'Leave it out, or null, for replace.';
    when 'limit_key' then
      v_says := format('must be 1 to 512 characters long, got %s', length(p_limit_key));
      v_hint := 'Leave it out, or null, for a job that only its task''s limits concern; hash a longer key.';
    when 'unique_for' then
      if p_unique_for not between interval '1 microsecond' and interval '10 years' then
        v_says := format('must be longer than nothing and at most 10 years, got %s', p_unique_for);
        v_hint := 'Give an interval such as 1 hour; leave it out, or null, for a key that is unique among live jobs only.';
      elsif p_job_key is null then
        v_says := format('needs a job_key, got %s without one', p_unique_for);
        v_hint := 'The key says which jobs are the same; give one, or leave unique_for out.';
      else
        v_says := format('cannot be had with job_key_mode debounce, got %s', p_unique_for);
        v_hint := 'unique_for leaves the first job as it is, debounce moves it: use one of the two.';
      end if;
    when 'debounce_max' then
      if p_debounce_max not between interval '1 microsecond' and interval '10 years' then
        v_says := format('must be longer than nothing and at most 10 years, got %s', p_debounce_max);
        v_hint := 'Give an interval such as 5 minutes; leave it out, or null, to put the job off without end.';
      else
        v_says := format('needs job_key_mode debounce, got %s with %s', p_debounce_max,
                         coalesce(p_job_key_mode, 'replace'));
        v_hint := 'It bounds how long a job can be put off: set job_key_mode to debounce, or leave debounce_max out.';
      end if;
  end case;
  raise exception using errcode = v_code, message = format('%s%s %s', p_where, p_argument, v_says),
    hint = coalesce(p_hint, v_hint);
end
$$;
comment on function pgworker.refuse_argument(
  text, text, text, numeric, text, numeric, text[], text, timestamptz, text, interval, interval, text, text) is
  'Internal: raises 22023 (22004 for a null identifier) that names the argument, what it was and the way out, which is '
  'p_hint where it is not that of adding.';

create function pgworker.refuse_spec(p_spec jsonb, p_where text, p_keys text[]) returns boolean
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key  text;
  v_near text;
  v_want text;
begin
  if jsonb_typeof(p_spec) <> 'object' then
    raise exception using errcode = '22023',
      message = format('%s must be an object, got %s', p_where, jsonb_typeof(p_spec)),
      hint = 'Each job is an object whose keys are the argument names of add_job.';
  end if;
  for v_key in select k.key from jsonb_object_keys(p_spec) as k(key) loop
    if v_key <> all (p_keys) then
      -- jobKey -> job_key, runAt -> run_at, IDENTIFIER -> identifier, maxattempts, priorty, queue, ...
      select k.key into v_near
      from unnest(p_keys) as k(key)
      where replace(k.key, '_', '') = lower(replace(replace(v_key, '_', ''), '-', ''))
         or (k.key, lower(v_key)) in (('identifier', 'task'), ('identifier', 'task_identifier'), ('queue_name', 'queue'),
                                      ('identifier', 'taskidentifier'), ('job_key', 'key'), ('job_key_mode', 'mode'),
                                      ('after', 'depends_on'), ('after', 'dependson'), ('after', 'needs'))
         or (length(v_key) > 3 and (starts_with(k.key, lower(v_key)) or starts_with(lower(v_key), k.key)))
         or (length(v_key) = length(k.key)
             and (select count(*) from generate_series(1, length(v_key)) as i(n)
                  where substr(lower(v_key), i.n, 1) <> substr(k.key, i.n, 1)) <= 2)
         or (abs(length(v_key) - length(k.key)) = 1
             and exists (select from generate_series(1, greatest(length(v_key), length(k.key))) as i(n)
                         where overlay(lower(v_key) placing '' from i.n for 1) = k.key
                            or overlay(k.key placing '' from i.n for 1) = lower(v_key)))
      limit 1;
      raise exception using errcode = '22023',
        message = format('%s has an unknown key %s', p_where, quote_literal(left(v_key, 200))),
        hint = case when v_near is null then format('Known keys: %s.', array_to_string(p_keys, ', '))
                    else format('Did you mean %s?', quote_literal(v_near)) end;
    end if;
    v_want := case when v_key in ('identifier', 'queue_name', 'run_at', 'job_key', 'job_key_mode', 'limit_key',
                                  'unique_for', 'debounce_max', 'name', 'on_failure')
                     then 'string'
                   when v_key in ('max_attempts', 'priority') then 'number'
                   when v_key in ('flags', 'children', 'after') then 'array' end;
    if jsonb_typeof(p_spec -> v_key) not in (v_want, 'null') then
      raise exception using errcode = '22023',
        message = format('%s.%s must be %s, got %s', p_where, v_key,
                         case v_want when 'array' then 'an array' else 'a ' || v_want end,
                         left((p_spec -> v_key)::text, 200)),
        hint = case v_key when 'run_at' then 'Write a time as text, for example "2030-01-31T12:00:00Z".'
                          when 'flags' then 'Write flags as an array of strings.'
                          when 'unique_for' then 'Write an interval as text, for example "1 hour".'
                          when 'debounce_max' then 'Write an interval as text, for example "5 minutes".'
                          else format('Write it as a JSON %s, or leave it out.', v_want) end;
    end if;
  end loop;
  v_key := case when jsonb_path_exists(p_spec, 'strict $.after[*] ? (@.type() != "string")', silent => true)
                then 'after' else 'flags' end;
  raise exception using errcode = '22023',
    message = format('%s.%s must be a list of strings, got %s', p_where, v_key, left((p_spec -> v_key)::text, 200)),
    hint = format('Write %s as an array of strings.', v_key);
end
$$;
comment on function pgworker.refuse_spec(jsonb, text, text[]) is
  'Internal: raises 22023 that says what is wrong with one object of add_jobs, and the likely cure.';

-- Where in the input an object stands. Trees are read flat, each node with its parent and its place among its siblings:
-- the path is put together only when there is something to complain about.
create function pgworker.spec_label(p_base text, p_n bigint, p_parents int[], p_places int[]) returns text
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_n    int := p_n::int;
  v_path text := '';
begin
  if p_parents is null then
    return format('%s[%s]', p_base, p_n - 1);
  end if;
  while p_parents[v_n] > 0 loop
    v_path := format('.children[%s]', p_places[v_n]) || v_path;
    v_n := p_parents[v_n];
  end loop;
  return p_base || case when p_base = 'tree' then '' else coalesce('[' || p_places[v_n] || ']', '') end || v_path;
end
$$;
comment on function pgworker.spec_label(text, bigint, int[], int[]) is
  'Internal: what the p_n-th object is called in errors: specs[0], tree.children[2].children[0], children[1]; p_base '
  'where it has no place.';

-- The EXCEPTION block costs a subtransaction, and only jobs that name a time or an interval come here: before PostgreSQL
-- 16 there is no other way to learn that a text is none.
create function pgworker.read_time(p_time text, p_base text, p_n bigint, p_parents int[], p_places int[]) returns timestamptz
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return p_time::timestamptz;
exception when data_exception then
  raise exception using errcode = '22023',
    message = format('%s.run_at is not a time: %s', pgworker.spec_label(p_base, p_n, p_parents, p_places),
                     quote_literal(left(p_time, 200))),
    hint = 'Write a time as text, for example "2030-01-31T12:00:00Z".';
end
$$;
comment on function pgworker.read_time(text, text, bigint, int[], int[]) is
  'Internal: a text as a time, or 22023 that names run_at.';

create function pgworker.read_interval(
  p_key text, p_interval text, p_base text, p_n bigint, p_parents int[], p_places int[]
) returns interval
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return p_interval::interval;
exception when data_exception then
  raise exception using errcode = '22023',
    message = format('%s.%s is not an interval: %s', pgworker.spec_label(p_base, p_n, p_parents, p_places), p_key,
                     quote_literal(left(p_interval, 200))),
    hint = 'Write an interval as text, for example "1 hour" or "PT90S".';
end
$$;
comment on function pgworker.read_interval(text, text, text, bigint, int[], int[]) is
  'Internal: a text as an interval, or 22023 that names the key.';

create function pgworker.read_specs(p_specs jsonb[], p_keys text[], p_base text, p_parents int[], p_places int[])
returns table (n bigint, identifier text, payload jsonb, queue_name text, run_at timestamptz, max_attempts int,
               job_key text, priority int, flags text[], job_key_mode text, limit_key text, unique_for interval,
               debounce_max interval, name text, on_failure text)
language sql stable parallel safe
begin atomic
  select s.n, s.identifier, s.payload, s.queue_name, s.run_at, s.max_attempts::int, s.job_key, s.priority::int, s.flags,
         s.job_key_mode, s.limit_key, s.unique_for, s.debounce_max, s.name, s.on_failure
  from (
    select e.n, e.spec ->> 'identifier' as identifier,
           coalesce(nullif(e.spec -> 'payload', 'null'), '{}') as payload,
           o.other ->> 'queue_name' as queue_name,
           case when o.other ->> 'run_at' is not null
                then pgworker.read_time(o.other ->> 'run_at', p_base, e.n, p_parents, p_places) end as run_at,
           (o.other ->> 'max_attempts')::numeric as max_attempts, o.other ->> 'job_key' as job_key,
           (o.other ->> 'priority')::numeric as priority,
           case when jsonb_typeof(o.other -> 'flags') = 'array'
                then array(select f.flag from jsonb_array_elements_text(o.other -> 'flags') as f(flag)) end as flags,
           o.other ->> 'job_key_mode' as job_key_mode, o.other ->> 'limit_key' as limit_key,
           case when o.other ->> 'unique_for' is not null
                then pgworker.read_interval('unique_for', o.other ->> 'unique_for', p_base, e.n, p_parents, p_places)
           end as unique_for,
           case when o.other ->> 'debounce_max' is not null
                then pgworker.read_interval('debounce_max', o.other ->> 'debounce_max', p_base, e.n, p_parents, p_places)
           end as debounce_max,
           o.other ->> 'name' as name, o.other ->> 'on_failure' as on_failure
    from unnest(p_specs) with ordinality as e(spec, n)
    -- Most objects have an identifier and a payload and nothing else: they pass at once.
    cross join lateral (
      select case when jsonb_typeof(e.spec) = 'object' then e.spec - array['identifier', 'payload'] end as other
      offset 0) as o
    where case
      when o.other = '{}' and jsonb_typeof(e.spec -> 'identifier') = 'string' then true
      when jsonb_typeof(e.spec) = 'object'
           and (o.other - p_keys) = '{}'
           and coalesce(jsonb_typeof(e.spec -> 'identifier') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'queue_name') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'run_at') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'max_attempts') in ('number', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'job_key') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'priority') in ('number', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'flags') in ('array', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'job_key_mode') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'limit_key') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'unique_for') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'debounce_max') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'name') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'on_failure') in ('string', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'after') in ('array', 'null'), true)
           and coalesce(jsonb_typeof(o.other -> 'children') in ('array', 'null'), true)
           and jsonb_path_exists(o.other, 'strict $.flags[*] ? (@.type() != "string" && @.type() != "null")',
                                 silent => true) is not true
           and jsonb_path_exists(o.other, 'strict $.after[*] ? (@.type() != "string")', silent => true) is not true
        then true
      else pgworker.refuse_spec(e.spec, pgworker.spec_label(p_base, e.n, p_parents, p_places), p_keys)
    end
    -- A fence: shapes are checked before anything is converted, and limits after that.
    offset 0
  ) as s
  where case
    when pgworker.invalid_argument(s.identifier, s.queue_name, s.max_attempts, s.job_key, s.priority, s.flags,
                                   s.job_key_mode, s.run_at, s.limit_key, s.unique_for, s.debounce_max) is null
      then true
    else pgworker.refuse_argument(
           pgworker.invalid_argument(s.identifier, s.queue_name, s.max_attempts, s.job_key, s.priority, s.flags,
                                     s.job_key_mode, s.run_at, s.limit_key, s.unique_for, s.debounce_max),
           s.identifier, s.queue_name, s.max_attempts, s.job_key, s.priority, s.flags, s.job_key_mode, s.run_at,
           s.limit_key, s.unique_for, s.debounce_max,
           pgworker.spec_label(p_base, s.n, p_parents, p_places) || '.')
  end;
end;
comment on function pgworker.read_specs(jsonb[], text[], text, int[], int[]) is
  'Internal: objects (p_keys: what they may have) as rows, in their order; raises for the first that is not as it must be.';

create function pgworker.job_keys() returns text[]
language sql immutable parallel safe
return array['identifier', 'payload', 'queue_name', 'run_at', 'max_attempts', 'job_key', 'priority', 'flags',
             'job_key_mode', 'limit_key', 'unique_for', 'debounce_max'];
comment on function pgworker.job_keys() is 'Internal: the keys of an object that describes a job: add_job''s arguments.';
