-- 61_cron.sql: cron expressions: what they mean, and when they tick next
--
--   cron_fields         an expression, read: a mask of each field
--   refuse_cron         the error for an expression that is none
--   cron_mask           one field as a mask
--   read_cron           an expression as cron_fields
--   check_timezone      is this the name of a zone
--   cron_local          the next time on the wall that matches
--   clock_change        when the clocks of a zone were changed
--   cron_instant        when a time on the wall is
--   cron_tick           the next tick
--   cron_next, cron_preview   the public functions
--
-- A mask is a text of zeros and ones: position('1' in substr(mask, n)) finds the next value at the speed of C. The next
-- tick is found field by field, from the month down; the worst, a 29 February, is eight years away and takes a millisecond.
--
-- Clocks that are changed. An hour field that begins with * goes by the clock as it is seen to run: a tick in every minute
-- whose local time matches, so an hour that comes twice is run twice and one that is left out is not. Any other hour
-- field means times of the calendar, each once: of two the first, and one that is left out at the moment when the clocks
-- are put forward. That is the rule of Debian's cron, except that here the minute field has no say in it.
-- Names are compared in the collation C, and digits are written as [0-9]: in a Turkish database upper('fri') is no FRI, and
-- \d knows digits of which PostgreSQL makes no numbers.
-- Nothing here reads a table or takes a lock.

create type pgworker.cron_fields as (
  minutes text, hours text, dates text, months text, weekdays text, every_hour boolean
);
comment on type pgworker.cron_fields is
  'A cron expression, read: for each field a text with 1 for a value that is meant (minutes and hours from 0, dates and '
  'months from 1, weekdays from Sunday); every_hour: its hour field begins with *.';

create function pgworker.refuse_cron(p_cron text, p_says text, p_hint text) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = '22023',
    message = format('cron %s: %s', quote_literal(left(p_cron, 200)), p_says), hint = p_hint;
end
$$;
comment on function pgworker.refuse_cron(text, text, text) is 'Internal: raises 22023 for a cron expression.';

create function pgworker.cron_mask(p_cron text, p_field text, p_text text, p_low int, p_high int, p_names text[])
returns text
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mask  text := repeat('0', p_high - p_low + 1);
  v_item  text;
  v_parts text[];
  v_end   text;
  v_ends  int[];
  v_step  int;
  v_value int;
begin
  foreach v_item in array string_to_array(p_text, ',') loop
    v_parts := regexp_match(v_item, '^(?:(\*)|(\w+)(?:-(\w+))?)(?:/([0-9]{1,4}))?$');
    if v_parts is null then
      perform pgworker.refuse_cron(p_cron, format('%s is not understood: %s', p_field, quote_literal(left(p_text, 200))),
                                   'A field is *, a value, a range a-b, a step */n or a-b/n, or a list of them.');
    end if;
    v_ends := array[]::int[];
    foreach v_end in array v_parts[2:3] loop
      continue when v_end is null;
      v_value := array_position(p_names, upper(v_end collate "C")) - 1 + p_low;
      if v_value is null and v_end ~ '^[0-9]{1,4}$' then
        v_value := v_end::int;
      end if;
      if v_value not between p_low and p_high + (p_field = 'weekday')::int or v_value is null then
        perform pgworker.refuse_cron(
          p_cron,
          format('%s must be %s to %s%s, got %s', p_field, p_low, p_high,
                 ' or ' || p_names[1] || ' to ' || p_names[cardinality(p_names)], quote_literal(left(v_end, 200))),
          case p_field when 'weekday' then 'Sunday is 0, 7 or SUN.'
                       else 'The fields are minute, hour, date, month, weekday.' end);
      end if;
      v_ends := v_ends || v_value;
    end loop;

    if v_parts[1] = '*' then
      v_ends := array[p_low, p_high];
    elsif cardinality(v_ends) = 1 then
      if v_parts[4] is not null then
        perform pgworker.refuse_cron(p_cron, format('%s has a step without a range: %s', p_field, quote_literal(v_item)),
                                     format('Write %s-%s/%s.', v_parts[2], greatest(p_high, v_ends[1]), v_parts[4]));
      end if;
      v_ends := v_ends || v_ends;
    elsif p_field = 'weekday' and v_ends[2] = 0 and v_ends[1] > 0 then
      v_ends[2] := 7;                              -- FRI-SUN
    end if;
    if v_ends[1] > v_ends[2] then
      perform pgworker.refuse_cron(p_cron,
                                   format('%s has a range that ends before it begins: %s', p_field, quote_literal(v_item)),
                                   'Write two ranges, for example 22-23,0-5.');
    end if;
    v_step := coalesce(v_parts[4]::int, 1);
    if v_step not between 1 and p_high then
      perform pgworker.refuse_cron(p_cron, format('%s must have a step of 1 to %s, got %s', p_field, p_high, v_parts[4]),
                                   'Steps are counted within the field, and anew each time it begins again.');
    end if;
    for v_nth in v_ends[1] .. v_ends[2] by v_step loop
      v_mask := overlay(v_mask placing '1' from case when p_field = 'weekday' then v_nth % 7 else v_nth - p_low end + 1);
    end loop;
  end loop;
  return v_mask;
end
$$;
comment on function pgworker.cron_mask(text, text, text, int, int, text[]) is
  'Internal: one field of a cron expression as a mask; raises 22023 that names field and value.';

create function pgworker.read_cron(p_cron text) returns pgworker.cron_fields
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_parts  text[] := regexp_split_to_array(btrim(p_cron, E' \t\r\n'), '\s+');
  v_fields pgworker.cron_fields;
begin
  if p_cron is null then
    raise exception using errcode = '22004', message = 'cron must not be null',
      hint = 'Write five fields, minute hour date month weekday, for example ''0 8 * * mon-fri''.';
  end if;
  if starts_with(v_parts[1], '@') then
    v_parts := string_to_array(case lower(array_to_string(v_parts, ' ') collate "C")
      when '@yearly' then '0 0 1 1 *' when '@annually' then '0 0 1 1 *' when '@monthly' then '0 0 1 * *'
      when '@weekly' then '0 0 * * 0' when '@daily' then '0 0 * * *' when '@midnight' then '0 0 * * *'
      when '@hourly' then '0 * * * *' end, ' ');
    if v_parts is null then
      perform pgworker.refuse_cron(p_cron, 'is no name that is known',
                                   'There are @yearly, @annually, @monthly, @weekly, @daily, @midnight and @hourly.');
    end if;
  end if;
  if cardinality(v_parts) <> 5 then
    perform pgworker.refuse_cron(p_cron, format('must have five fields, got %s', cardinality(array_remove(v_parts, ''))),
                                 'They are minute, hour, date, month, weekday; there is no field for seconds or years.');
  end if;
  v_fields.minutes := pgworker.cron_mask(p_cron, 'minute', v_parts[1], 0, 59, null);
  v_fields.hours := pgworker.cron_mask(p_cron, 'hour', v_parts[2], 0, 23, null);
  v_fields.dates := pgworker.cron_mask(p_cron, 'date', v_parts[3], 1, 31, null);
  v_fields.months := pgworker.cron_mask(p_cron, 'month', v_parts[4], 1, 12, array[
    'JAN', 'FEB', 'MAR', 'APR', 'MAY', 'JUN', 'JUL', 'AUG', 'SEP', 'OCT', 'NOV', 'DEC']);
  v_fields.weekdays := pgworker.cron_mask(p_cron, 'weekday', v_parts[5], 0, 6, array[
    'SUN', 'MON', 'TUE', 'WED', 'THU', 'FRI', 'SAT']);
  v_fields.every_hour := starts_with(v_parts[2], '*');
  -- 30 February; where a weekday will do, there is always one.
  if position('0' in v_fields.weekdays) = 0 and not exists (
       select from unnest('{31,29,31,30,31,30,31,31,30,31,30,31}'::int[]) with ordinality as m(days, n)
       where substr(v_fields.months, m.n::int, 1) = '1' and position('1' in v_fields.dates) <= m.days) then
    perform pgworker.refuse_cron(p_cron, format('date %s never comes in month %s', v_parts[3], v_parts[4]),
                                 'It would never run.');
  end if;
  return v_fields;
end
$$;
comment on function pgworker.read_cron(text) is
  'Internal: a cron expression as masks; raises 22023 that says what is wrong with it, 22004 for null.';

-- A zone is a name of the IANA database that PostgreSQL reads as one. Without a test it would take 'Foo/Bar5' for a POSIX
-- rule, which always has a digit, and CET for the fixed offset that the abbreviation stands for, summer or not; and the
-- zones below right/ count leap seconds, so that no minute of theirs is one of PostgreSQL's (which does not list them).
create function pgworker.check_timezone(p_timezone text) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_known boolean := true;
begin
  if p_timezone = 'UTC' then
    return;
  end if;
  begin
    perform pgworker.clock() at time zone p_timezone;
  exception when invalid_parameter_value then
    v_known := false;
  end;
  if p_timezone ~* '\d|^right/' and v_known then
    v_known := exists (select from pg_catalog.pg_timezone_names n where lower(n.name) = lower(p_timezone));
  end if;
  if v_known and lower(p_timezone collate "C") not in ('utc', 'gmt', 'uct', 'zulu') then
    v_known := not exists (select from pg_catalog.pg_timezone_abbrevs a where a.abbrev = upper(p_timezone collate "C"));
  end if;
  if not v_known then
    raise exception using errcode = '22023',
      message = format('timezone %s is unknown or an abbreviation', quote_literal(left(p_timezone, 200))),
      hint = 'Name a place, for example Europe/Berlin, or UTC; pg_timezone_names has them all. Abbreviations like CET know '
             'no summer time.';
  end if;
end
$$;
comment on function pgworker.check_timezone(text) is 'Internal: raises 22023 for what is not the name of a time zone.';

create function pgworker.cron_local(p_fields pgworker.cron_fields, p_from timestamp) returns timestamp
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_from     constant timestamp := date_trunc('minute', p_from + interval '59.999999 seconds');
  v_any_date constant boolean := position('0' in p_fields.dates) = 0;
  v_any_weekday constant boolean := position('0' in p_fields.weekdays) = 0;
  v_day      date := v_from::date;
  v_hour     int := extract(hour from v_from)::int;
  v_minute   int := extract(minute from v_from)::int;
  v_year     int;
  v_month    int;
  v_dated    boolean;
  v_named    boolean;
  v_n        int;
begin
  loop
    v_month := extract(month from v_day)::int;
    if substr(p_fields.months, v_month, 1) = '0' then
      v_year := extract(year from v_day)::int;
      v_n := position('1' in substr(p_fields.months, v_month + 1));
      v_day := case when v_n > 0 then make_date(v_year, v_month + v_n, 1)
                    else make_date(v_year + 1, position('1' in p_fields.months), 1) end;
      v_hour := 0;
      v_minute := 0;
    end if;
    v_dated := substr(p_fields.dates, extract(day from v_day)::int, 1) = '1';
    v_named := substr(p_fields.weekdays, extract(dow from v_day)::int + 1, 1) = '1';
    -- Where both are restricted, either is enough.
    if v_dated and v_named or not v_any_date and not v_any_weekday and (v_dated or v_named) then
      if substr(p_fields.hours, v_hour + 1, 1) = '1' then
        v_n := position('1' in substr(p_fields.minutes, v_minute + 1));
        if v_n > 0 then
          v_minute := v_minute + v_n - 1;
          exit;
        end if;
      end if;
      v_n := position('1' in substr(p_fields.hours, v_hour + 2));
      if v_n > 0 then
        v_hour := v_hour + v_n;
        v_minute := position('1' in p_fields.minutes) - 1;
        exit;
      end if;
    end if;
    v_day := v_day + 1;
    v_hour := 0;
    v_minute := 0;
  end loop;
  return v_day + make_interval(hours => v_hour, mins => v_minute);
end
$$;
comment on function pgworker.cron_local(pgworker.cron_fields, timestamp) is
  'Internal: the first whole minute on the wall, not before p_from, that the expression means.';

create function pgworker.utc_offset(p_at timestamptz, p_timezone text) returns interval
language sql immutable parallel safe
return (p_at at time zone p_timezone) - (p_at at time zone 'UTC');
comment on function pgworker.utc_offset(timestamptz, text) is 'Internal: how much the zone''s clocks are ahead of UTC then.';

create function pgworker.clock_change(p_before timestamptz, p_after timestamptz, p_timezone text) returns timestamptz
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_low  timestamptz := date_trunc('second', p_before);
  v_high timestamptz := date_trunc('second', p_after);
  v_middle timestamptz;
  v_offset constant interval := pgworker.utc_offset(p_after, p_timezone);
begin
  while v_high - v_low > interval '1 second' loop
    v_middle := date_trunc('second', v_low + (v_high - v_low) / 2);
    if pgworker.utc_offset(v_middle, p_timezone) = v_offset then
      v_high := v_middle;
    else
      v_low := v_middle;
    end if;
  end loop;
  return v_high;
end
$$;
comment on function pgworker.clock_change(timestamptz, timestamptz, text) is
  'Internal: the moment between two, at which the zone''s clocks differ, when they were changed.';

create function pgworker.cron_instant(p_local timestamp, p_timezone text) returns timestamptz
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  -- PostgreSQL takes the second of two, and reads what does not exist with the offset that was valid before.
  v_at    constant timestamptz := p_local at time zone p_timezone;
  v_ahead constant interval := (v_at at time zone p_timezone) - p_local;
  v_first timestamptz;
begin
  if v_ahead <> interval '0' then
    return pgworker.clock_change(v_at - v_ahead, v_at, p_timezone);
  end if;
  v_first := (p_local - pgworker.utc_offset(v_at - interval '24 hours', p_timezone)) at time zone 'UTC';
  return case when v_first < v_at and v_first at time zone p_timezone = p_local then v_first else v_at end;
end
$$;
comment on function pgworker.cron_instant(timestamp, text) is
  'Internal: when a local time is: the first time if it comes twice, when the clocks are put forward if it never comes.';

create function pgworker.cron_tick(p_fields pgworker.cron_fields, p_after timestamptz, p_timezone text) returns timestamptz
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_from  timestamptz := p_after;
  v_local timestamp := pgworker.cron_local(p_fields, (p_after at time zone p_timezone) + interval '1 microsecond');
  v_shift interval;
  v_at    timestamptz;
  v_look  timestamptz;
begin
  loop
    if not p_fields.every_hour then
      v_at := pgworker.cron_instant(v_local, p_timezone);
      exit when v_at > p_after;
      v_local := pgworker.cron_local(p_fields, v_local + interval '1 minute');
      continue;
    end if;
    -- By the clock as it runs. It is changed back by a day at most, so only a change within a day can bring a matching time
    -- that comes before v_local: we look no further than that, and are there, or at the change, or come near in one leap.
    v_shift := pgworker.utc_offset(v_from, p_timezone);
    v_at := (v_local - v_shift) at time zone 'UTC';
    v_look := least(v_at, v_from + interval '24 hours');
    if pgworker.utc_offset(v_look, p_timezone) <> v_shift then
      v_from := pgworker.clock_change(v_from, v_look, p_timezone);
      v_local := pgworker.cron_local(p_fields, v_from at time zone p_timezone);
    elsif v_look = v_at then
      exit;
    else
      v_from := greatest(v_look, (v_local at time zone p_timezone) - interval '12 hours');
      v_local := pgworker.cron_local(p_fields, (v_from at time zone p_timezone) + interval '1 microsecond');
    end if;
  end loop;
  return v_at;
end
$$;
comment on function pgworker.cron_tick(pgworker.cron_fields, timestamptz, text) is
  'Internal: the first tick of a cron expression, read, after a moment.';

-- SECURITY DEFINER, because what they call is internal.
create function pgworker.cron_next(cron text, after timestamptz default null, timezone text default 'UTC')
returns timestamptz
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fields constant pgworker.cron_fields := pgworker.read_cron(cron_next.cron);
begin
  if cron_next.after not between '0001-01-02 00:00:00+00' and '9999-12-30 00:00:00+00' then
    raise exception using errcode = '22023',
      message = format('after must lie between the years 1 and 9999, got %s', cron_next.after),
      hint = 'Leave it out, or null, for now.';
  end if;
  perform pgworker.check_timezone(cron_next.timezone);
  return pgworker.cron_tick(v_fields, coalesce(cron_next.after, pgworker.clock()), coalesce(cron_next.timezone, 'UTC'));
end
$$;
comment on function pgworker.cron_next(text, timestamptz, text) is
  'The first tick of a cron expression after a moment (null: now) in a time zone (null: UTC). Raises 22023 for what is no '
  'expression or no zone, 22004 for a null expression.';

create function pgworker.cron_preview(
  cron text, ticks int default 10, after timestamptz default null, timezone text default 'UTC'
) returns setof timestamptz
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fields constant pgworker.cron_fields := pgworker.read_cron(cron_preview.cron);
  v_tick   timestamptz := pgworker.cron_next(cron_preview.cron, cron_preview.after, cron_preview.timezone);
begin
  if cron_preview.ticks not between 0 and 10000 then
    raise exception using errcode = '22023',
      message = format('ticks must be a whole number from 0 to 10000, got %s', cron_preview.ticks),
      hint = 'Leave it out, or null, for 10; the last one is a good after for more.';
  end if;
  for v_n in 1 .. coalesce(cron_preview.ticks, 10) loop
    return next v_tick;
    v_tick := pgworker.cron_tick(v_fields, v_tick, coalesce(cron_preview.timezone, 'UTC'));
  end loop;
end
$$;
comment on function pgworker.cron_preview(text, int, timestamptz, text) is
  'The next ticks of a cron expression, as cron_next finds them one after the other; null ticks: 10.';
