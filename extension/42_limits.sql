-- 42_limits.sql: limits of concurrency and rate, and turns among limit keys
--
--   lane_key, lane     which jobs stand in line together
--   free_by            when a permit can be taken
--   later              when an interval has passed
--   gates_of           what a job has to pass
--   rooms              how many more a gate lets through now
--   plain_heads        the first of the jobs that nothing limits
--   lane_heads         the first jobs of one lane
--   limited_heads      the limited jobs that may be claimed now, best first
--   some_wait          whether any is due and does not run
--   limited_due        when it is worth looking again
--
-- A gate is a limit of a task, or of a task and key: of concurrency, or of a rate. A gate that lets n through has n rows in
-- permit, and a claim takes one for each job at each of its gates: free_at then says when it can be taken again, never
-- while a job runs (concurrency) or an interval after the claim (rate). So no more than n can run at once, or have been
-- claimed within any interval of that length, whatever else goes on; each permit is taken and freed under its own row
-- lock, so that neither claims nor ends of one task wait for each other.
--
-- Limited jobs have a lane and are in none of the indexes that other claims walk. A lane is what stands in line together:
-- the jobs of a task, with the same limit key where keys matter, in the same serial queue. Lanes whose gates are closed
-- are passed over as a whole, by hopping from lane to lane; and where that takes more than a millisecond and finds
-- nothing, the session remembers it in pgworker.lanes and for twenty times as long looks only at what has become due or
-- free since. Like the cursor that is only a hint.
--
-- Nothing is locked here: what is found is claimed in 43_permits.sql.

create function pgworker.lane_key(p_limit_key text) returns text
language sql immutable parallel safe
return length(p_limit_key)::text || ':' || case when octet_length(p_limit_key) > 200 then md5(p_limit_key) else p_limit_key end;
comment on function pgworker.lane_key(text) is 'Internal: a limit key as gates and lanes name it; null for null.';

create function pgworker.lane(p_keyed boolean, p_limit_key text, p_queue_name text) returns text
language sql immutable parallel safe
return '-' || coalesce(case when p_keyed then pgworker.lane_key(p_limit_key) end, '') || coalesce('|' || p_queue_name, '');
comment on function pgworker.lane(boolean, text, text) is
  'Internal: the lane of a job of a limited task; keyed: whether its limit key matters.';

-- A clock that goes back must not keep a permit from being taken that came free later than now.
create function pgworker.free_by(p_kind text, p_now timestamptz) returns timestamptz
language sql immutable parallel safe
return case when p_kind = 'rate' then p_now else '9999-12-31 00:00:00+00'::timestamptz end;
comment on function pgworker.free_by(text, timestamptz) is
  'Internal: permits of that kind whose free_at is not after this can be taken.';

-- By the session's clocks a day has 23 hours where they are put forward, and each session may have others.
create function pgworker.later(p_at timestamptz, p_interval interval) returns timestamptz
language sql immutable parallel safe
return (p_at at time zone 'UTC' + p_interval) at time zone 'UTC';
comment on function pgworker.later(timestamptz, interval) is
  'Internal: a time and an interval after it, whose days have 24 hours whatever the time zone of the session.';

create function pgworker.gates_of(p_job_id bigint)
returns table (task text, kind text, lane_key text, most int, per interval)
language sql stable parallel safe
begin atomic
  select j.task_identifier, g.kind, g.lane_key, g.most, g.per
  from (select o.task_identifier, o.limit_key from pgworker.job o where o.id = p_job_id offset 0) as j
  cross join lateral (
    select t.max_concurrency, t.max_concurrency_per_key, t.rate_limit, t.rate_interval, t.rate_limit_per_key,
           t.rate_interval_per_key
    from pgworker.task t where t.identifier = j.task_identifier offset 0) as t
  cross join lateral (
    values ('concurrency', '', t.max_concurrency, null::interval),
           ('rate', '', t.rate_limit, t.rate_interval),
           ('concurrency', pgworker.lane_key(j.limit_key), t.max_concurrency_per_key, null),
           ('rate', pgworker.lane_key(j.limit_key), t.rate_limit_per_key, t.rate_interval_per_key))
    as g(kind, lane_key, most, per)
  where g.most is not null and g.lane_key is not null;
end;
comment on function pgworker.gates_of(bigint) is
  'Internal: the gates that a job has to pass: how many each lets through, and for rates in which interval.';

create function pgworker.rooms(p_task text, p_key text, p_concurrency int, p_rate int, p_now timestamptz, p_most int)
returns table (room int)
language sql stable parallel safe
begin atomic
  select coalesce(min(c.room), p_most)::int
  from (values ('concurrency', p_concurrency), ('rate', p_rate)) as g(kind, most)
  cross join lateral (
    -- After a limit was lowered, what runs beyond it holds back everything else; and not all rows need be there yet. Those
    -- that are free are found by free_at (hence n - most, which is in no index).
    select case
      when exists (select from pgworker.permit p
                   where p.task_identifier = p_task and p.kind = g.kind and p.lane_key = p_key and p.n > g.most
                     and p.free_at > pgworker.free_by(g.kind, p_now)) then 0
      else least(p_most, (select count(*) from (select from pgworker.permit p
                                                where p.task_identifier = p_task and p.kind = g.kind and p.lane_key = p_key
                                                  and p.free_at <= pgworker.free_by(g.kind, p_now)
                                                  and p.n - g.most <= 0 and p.n > 0
                                                order by p.free_at limit p_most) as f)
                         + g.most - coalesce((select p.n from pgworker.permit p
                                              where p.task_identifier = p_task and p.kind = g.kind and p.lane_key = p_key
                                                and p.n <= g.most
                                              order by p.n desc limit 1), 0)) end as room
    offset 0) as c                                 -- reckoned once, not once more for min()
  where g.most is not null and p_key is not null;
end;
comment on function pgworker.rooms(text, text, int, int, timestamptz, int) is
  'Internal: how many jobs, up to p_most, the gates of a task (p_key empty) or of a key let through now.';

create function pgworker.plain_heads(
  p_cursor bigint[], p_now timestamptz, p_limit int, p_tasks text[], p_flags text[], p_paused text[]
) returns table (priority smallint, run_at timestamptz, id bigint)
language sql stable parallel safe
begin atomic
  select o.priority, o.run_at, o.id
  from generate_series(6, cardinality(p_cursor), 5) as g(n)
  cross join lateral (
    select j.priority, j.run_at, j.id from pgworker.job j
    where j.queue_name is null and j.lane is null and not j.waiting
      and j.priority = p_cursor[g.n]
      and (j.run_at, j.id) > (pgworker.cursor_time(p_cursor[g.n + 1]), p_cursor[g.n + 2])
      and j.run_at <= p_now and j.locked_by is null
      and (p_tasks is null or j.task_identifier = any (p_tasks))
      and (p_paused is null or j.task_identifier <> all (p_paused))
      and (p_flags is null or j.flags is null or not j.flags && p_flags)
    order by j.run_at, j.id limit p_limit) as o;
end;
comment on function pgworker.plain_heads(bigint[], timestamptz, int, text[], text[], text[]) is
  'Internal: of each known priority, the first jobs from the cursor on that are in no queue and have no limit.';

-- From priority to priority, so that jobs of the future are not walked over.
create function pgworker.lane_heads(p_task text, p_lane text, p_now timestamptz, p_flags text[], p_most int)
returns table (priority smallint, run_at timestamptz, id bigint)
language sql stable parallel safe
begin atomic
  with recursive hop as (
    (select j.priority from pgworker.job j
     where j.task_identifier = p_task and j.lane = p_lane and j.lane > '' and not j.waiting order by j.priority limit 1)
    union all
    select (select j.priority from pgworker.job j
            where j.task_identifier = p_task and j.lane = p_lane and j.lane > '' and not j.waiting
              and j.priority > h.priority
            order by j.priority limit 1)
    from hop h where h.priority is not null
  )
  select o.priority, o.run_at, o.id
  from hop h
  cross join lateral (
    select j.priority, j.run_at, j.id from pgworker.job j
    where j.task_identifier = p_task and j.lane = p_lane and j.lane > '' and not j.waiting and j.priority = h.priority
      and j.run_at <= p_now and j.locked_by is null
      and (p_flags is null or j.flags is null or not j.flags && p_flags)
    order by j.run_at, j.id limit p_most) as o
  where h.priority is not null
  limit p_most;
end;
comment on function pgworker.lane_heads(text, text, timestamptz, text[], int) is
  'Internal: the first jobs of a lane that are due and not running.';

create function pgworker.limited_heads(
  p_now timestamptz, p_limit int, p_tasks text[], p_flags text[],
  out ids bigint[], out priorities smallint[], out run_ats timestamptz[]
)
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_text    constant text := current_setting('pgworker.lanes', true);
  v_json    constant text := substr(v_text, position('#' in v_text) + 1);
  v_state   jsonb := jsonb_build_object();
  v_was     jsonb;
  v_epoch   constant bigint := (select e.last_value from pgworker.epoch e);
  v_task    record;
  v_known   jsonb;
  v_room    int;
  v_full    boolean;
  v_from    text collate "C";
  v_since   timestamptz;
  v_started timestamptz;
  v_cost    bigint;
  v_lanes   text[];
  v_most    int;
  v_open    record;
  v_found   record;
begin
  if hashtext(v_json)::text = split_part(v_text, '#', 1) then
    v_state := v_json::jsonb;
  end if;
  v_was := v_state;

  for v_task in
    select t.identifier, t.max_concurrency, t.max_concurrency_per_key, t.rate_limit, t.rate_limit_per_key, t.fair
    from pgworker.task t
    where t.limited and not t.paused and (p_tasks is null or t.identifier = any (p_tasks))
    order by t.identifier
  loop
    continue when not exists (select from pgworker.job j
                              where j.task_identifier = v_task.identifier and j.lane is not null and not j.waiting
                                and j.run_at <= p_now);
    select r.room into v_room
    from pgworker.rooms(v_task.identifier, '', v_task.max_concurrency, v_task.rate_limit, p_now, p_limit) r;
    continue when v_room < 1;

    v_started := clock_timestamp();
    v_known := v_state -> v_task.identifier;
    v_from := coalesce(v_known ->> 'lane', '');
    v_cost := coalesce((v_known ->> 'cost')::bigint, 0);
    v_full := v_cost = 0 or (v_known ->> 'epoch')::bigint <> v_epoch
              or pgworker.cursor_at(v_started) - (v_known ->> 'at')::bigint not between 0 and 20 * v_cost;
    v_lanes := null;
    if not v_full then
      v_since := pgworker.cursor_time((v_known ->> 'seen')::bigint - 1000000);
      v_lanes := array(
        select d.lane from (select j.lane from pgworker.job j
                            where j.task_identifier = v_task.identifier and j.lane is not null and not j.waiting
                              and j.run_at > v_since and j.run_at <= p_now and j.locked_by is null
                            order by j.run_at desc limit 1000) as d
        union
        select f.lane from (select p.lane from pgworker.permit p
                            where p.task_identifier = v_task.identifier and p.free_at > v_since and p.free_at <= p_now
                              and p.lane is not null
                            order by p.free_at desc limit 1000) as f);
    end if;

    -- Lanes that are open and have something to run, from the last one that had its turn on. In turns, no more than can be
    -- taken; else 250, and where there are more, the next ones at the next claim.
    v_most := case when v_task.fair then v_room else 250 end;
    with recursive hop as (
      select v_from as lane, null::text as limit_key, null::text as queue_name, v_from = '' as wrapped where v_full
      union all
      select n.lane, n.limit_key, n.queue_name, h.wrapped or n.wraps
      from hop h
      cross join lateral (
        select f.lane, f.limit_key, f.queue_name, f.wraps
        from ((select j.lane, j.limit_key, j.queue_name, false as wraps from pgworker.job j
               where j.task_identifier = v_task.identifier and j.lane > h.lane and j.lane > '' and not j.waiting
               order by j.lane limit 1)
              union all
              (select j.lane, j.limit_key, j.queue_name, true from pgworker.job j
               where not h.wrapped and j.task_identifier = v_task.identifier and j.lane > '' and not j.waiting
               order by j.lane limit 1)) as f
        order by f.wraps limit 1) as n
      where v_from = '' or not (h.wrapped or n.wraps) or n.lane <= v_from
    ), seen as (
      select h.lane, h.limit_key, h.queue_name from hop h where h.lane <> v_from or h.wrapped
      union all
      select o.lane, o.limit_key, o.queue_name
      from unnest(v_lanes) as u(lane)
      cross join lateral (select j.lane, j.limit_key, j.queue_name from pgworker.job j
                          where j.task_identifier = v_task.identifier and j.lane = u.lane and j.lane > '' and not j.waiting
                          limit 1) as o
    ), opened as (
      select s.lane, least(v_room, r.room, case when s.queue_name is null then v_room else 1 end) as room,
             f.id, f.priority, f.run_at
      from seen s
      cross join lateral pgworker.rooms(v_task.identifier, pgworker.lane_key(s.limit_key), v_task.max_concurrency_per_key,
                                        v_task.rate_limit_per_key, p_now, v_room) r
      cross join lateral pgworker.lane_heads(v_task.identifier, s.lane, p_now, p_flags, 1) f
      where r.room > 0
        and not exists (select from pgworker.queue q
                        where q.name = s.queue_name and (q.job_id is not null or q.paused) offset 0)
      limit v_most
    )
    select array_agg(o.lane) as lanes, array_agg(o.room) as rooms, array_agg(o.id) as ids,
           array_agg(o.priority) as priorities, array_agg(o.run_at) as run_ats, min(o.run_at) as oldest
    into v_open
    from opened o;

    if v_open.lanes is null then
      v_cost := case when v_full then (extract(epoch from clock_timestamp() - v_started) * 1000000)::bigint else v_cost end;
      if v_cost > 1000 then
        v_state := v_state || jsonb_build_object(v_task.identifier, coalesce(v_known, '{}') || jsonb_build_object(
          'seen', pgworker.cursor_at(p_now), 'cost', v_cost, 'epoch', v_epoch,
          'at', case when v_full then pgworker.cursor_at(v_started) else (v_known ->> 'at')::bigint end));
      end if;
      continue;
    end if;
    if v_full and v_cost > 0 then
      v_state := jsonb_set(v_state, array[v_task.identifier, 'cost'], '0');
    end if;
    if not v_task.fair then
      v_from := case when cardinality(v_open.lanes) = v_most then v_open.lanes[v_most] else '' end;
      if v_from <> coalesce(v_known ->> 'lane', '') then
        v_state := v_state || jsonb_build_object(v_task.identifier, coalesce(v_known, '{}')
                                                                    || jsonb_build_object('lane', v_from, 'cost', 0));
      end if;
    end if;

    -- And of these lanes as many jobs as can be taken. In turns: one of each, then a second of each; such jobs are placed
    -- among others as the oldest of them, so that fairness changes whose turn it is, not the task's share.
    with head as (
      select u.place, 1 as round, u.id, u.priority, u.run_at
      from unnest(v_open.ids, v_open.priorities, v_open.run_ats) with ordinality as u(id, priority, run_at, place)
      where cardinality(v_open.lanes) >= v_room and (v_room = 1 or v_task.fair)
      union all
      select u.place, f.round, f.id, f.priority, f.run_at
      from unnest(v_open.lanes, v_open.rooms) with ordinality as u(lane, room, place)
      cross join lateral (
        select l.id, l.priority, l.run_at, row_number() over (order by l.priority, l.run_at, l.id) as round
        from pgworker.lane_heads(v_task.identifier, u.lane, p_now, p_flags, u.room) l) as f
      where not (cardinality(v_open.lanes) >= v_room and (v_room = 1 or v_task.fair))
    ), best as (
      select h.id, h.priority, h.run_at,
             row_number() over (order by case when v_task.fair then h.round end, case when v_task.fair then h.place end,
                                         h.priority, h.run_at, h.id) as n
      from head h
      order by n limit v_room
    )
    select ids || array_agg(b.id order by b.n) as ids,
           priorities || array_agg(b.priority order by case when v_task.fair then b.priority end, b.n) as priorities,
           run_ats || array_agg(case when v_task.fair then v_open.oldest + b.n * interval '1 microsecond' else b.run_at end
                                order by b.n) as run_ats
    into v_found
    from best b;
    ids := v_found.ids;
    priorities := v_found.priorities;
    run_ats := v_found.run_ats;
  end loop;

  if v_state <> v_was then
    perform set_config('pgworker.lanes', hashtext(v_state::text) || '#' || v_state::text, false);
  end if;
end
$$;
comment on function pgworker.limited_heads(timestamptz, int, text[], text[]) is
  'Internal: limited jobs that could be claimed now, as far as that can be seen without locks, and their places among '
  'other jobs.';

-- Those that run are passed one by one: beyond a thousand it is not worth finding out.
create function pgworker.some_wait(p_task text, p_now timestamptz) returns boolean
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  return (select count(*) = 1000 or bool_or(d.locked_by is null)
          from (select j.locked_by from pgworker.job j
                where j.task_identifier = p_task and j.lane is not null and not j.waiting and j.run_at <= p_now
                order by j.run_at limit 1000) as d);
end
$$;
comment on function pgworker.some_wait(text, timestamptz) is
  'Internal: whether limited jobs of this task are due and do not run; true also when that would take long to find out.';

create function pgworker.limited_due(p_now timestamptz, p_tasks text[]) returns timestamptz
language plpgsql stable parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(n.at)
    from pgworker.task t
    cross join lateral (
      (select j.run_at as at from pgworker.job j
       where j.task_identifier = t.identifier and j.lane is not null and not j.waiting and j.run_at > p_now
       order by j.run_at limit 1)
      union all
      -- the next permit of a rate for which something waits
      (select p.free_at from pgworker.permit p
       where p.task_identifier = t.identifier and p.free_at > p_now and p.free_at < 'infinity'
         and p.lane is not null
         and case when p.lane_key = '' then pgworker.some_wait(t.identifier, p_now)
                  else exists (select from pgworker.job j
                               where j.task_identifier = t.identifier and j.lane = p.lane and j.lane > ''
                                 and not j.waiting and j.run_at <= p_now and j.locked_by is null) end
       order by p.free_at limit 1)) as n
    where t.limited and not t.paused and (p_tasks is null or t.identifier = any (p_tasks)));
end
$$;
comment on function pgworker.limited_due(timestamptz, text[]) is
  'Internal: when the next limited job is due, or the next may pass a rate for which some wait.';
