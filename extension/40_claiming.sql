-- 40_claiming.sql: which jobs a worker gets next
--
--   cursor_at, cursor_time   times as numbers, for the cursor
--   know_priorities          makes room in the cursor for priorities that the session has not met before
--   note_interest            what a worker asks for, for why() and doctor()
--   unknown_worker           the error for who is not registered
--   get_jobs, get_job        the public functions
--   next_run_at              when a sleeping worker should look again
--
-- Locks: its session's row of interest (nobody else's), then job rows with SKIP LOCKED (a claim never waits for a job),
-- then, if it got any, the worker's row FOR KEY SHARE: it cannot be forgotten between here and our commit (jobs claimed
-- by a worker that nobody knows would be given back by nobody), and whoever does that waits for nobody's jobs; who did so
-- before us has removed the row, and nothing is claimed. A claim that finds nothing writes nothing. Serial queues are in
-- 45_queues.sql, tasks with limits in 42_limits.sql: this path passes over them like over paused ones.
--
-- The cursor. A claim changes no indexed column (see 10_schema.sql), so what has been claimed stays in the index until
-- it is vacuumed, which a long transaction anywhere can put off for hours. A session therefore remembers in the setting
-- pgworker.cursor how far it has come, and starts there: the cost of a claim does not grow with what lies behind. The
-- setting is no row: not versioned, not contended, undone by rollback, gone with the session. It is a list of numbers
--
--   1 whose   2 epoch   3 time of last sweep   4 cost of last sweep   5 turn
--   then for each known priority, ascending:
--   6 priority   7 run_at   8 id   9 run_at in queues   10 id in queues
--
-- and, after a #, a hash of these, so that a garbled one is known and ignored (whose: a hash of worker, tasks and flags,
-- because another caller has passed over other jobs; times and costs in microseconds; turn and the last two are read by
-- 45_queues.sql). It is only a hint: what it misses (a transaction that
-- began before and committed after the cursor had passed, a row that was locked and rolled back, work given back) is
-- found by a sweep, a claim from the very start. Sweeps happen when the epoch moved, when a claim finds nothing, and
-- every 250 ms, but not so often that more than a twentieth of the time goes into them (a quarter when there is a reason
-- to look: a moved epoch, or nothing found; when both are so, always, unless a sweep takes more than 100 ms).
--
-- Where a sweep takes less than a millisecond every claim is one; and if there are no queued jobs, no timeouts and no
-- jobs that their limits let through it is a brief one: one statement over all priorities, which neither needs nor moves
-- the cursor. That would meet all jobs of the future, which the others leap over: so a sweep that sees more than a few of
-- them is taken to cost a millisecond at least, and so is a brief claim that took longer than that.
--
-- The planner must walk the claim indexes in their order whatever the statistics say, hence the settings of get_jobs:
-- they hold for the plans made in it and in what it calls, which are kept for the session.

create function pgworker.cursor_at(p_time timestamptz) returns bigint
language sql stable parallel safe
return case when p_time >= '2000-01-01 00:00:00+00'::timestamptz
            then (extract(epoch from p_time - '2000-01-01 00:00:00+00'::timestamptz) * 1000000)::bigint
            else 0 end;
comment on function pgworker.cursor_at(timestamptz) is
  'Internal: microseconds since 2000; 0 for anything earlier, from which a scan then starts again.';

create function pgworker.cursor_time(p_at bigint) returns timestamptz
language sql stable parallel safe
return case when p_at > 0 then '2000-01-01 00:00:00+00'::timestamptz + p_at * interval '1 microsecond'
            else '-infinity' end;
comment on function pgworker.cursor_time(bigint) is 'Internal: the time that cursor_at made a number of.';

create function pgworker.know_priorities(p_cursor bigint[], p_new int[]) returns bigint[]
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_known bigint[];
begin
  select array_agg(e.value order by k.priority, e.n) into v_known
  from (select p_cursor[g.n] as priority, p_cursor[g.n : g.n + 4] as entry
        from generate_series(6, cardinality(p_cursor), 5) as g(n)
        union all
        select distinct u.priority, array[u.priority, 0, 0, 0, 0]::bigint[] from unnest(p_new) as u(priority)) as k
  cross join lateral unnest(k.entry) with ordinality as e(value, n);
  return p_cursor[1:5] || v_known;
end
$$;
comment on function pgworker.know_priorities(bigint[], int[]) is
  'Internal: the cursor with entries for these priorities too.';

-- Called when the cursor is somebody else's: so a session that goes on asking for the same pays nothing. A row belongs to
-- one session, so that sessions of one worker, which may claim in long transactions, do not wait for each other here.
create function pgworker.note_interest(p_worker_id bigint, p_tasks text[], p_flags text[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from pgworker.interest i
             where i.worker_id = p_worker_id and i.pid = pg_backend_pid()
               and i.tasks is not distinct from p_tasks and i.forbidden_flags is not distinct from p_flags) then
    return;
  end if;
  -- What was asked for in sessions that have ended is over.
  delete from pgworker.interest i
  where i.ctid = any (array(
    select o.ctid from pgworker.interest o
    where o.worker_id = p_worker_id
      and (o.pid = pg_backend_pid() or o.pid not in (select a.pid from pg_stat_get_activity(null) a))
    for update skip locked));
  insert into pgworker.interest (worker_id, pid, tasks, forbidden_flags)
  values (p_worker_id, pg_backend_pid(), p_tasks, p_flags);
end
$$;
comment on function pgworker.note_interest(bigint, text[], text[]) is
  'Internal: writes down which tasks and flags a worker asks for in this session, if that is not known yet.';

create function pgworker.unknown_worker(
  p_worker_id bigint,
  p_hint text default 'Call register_worker() first; a worker that was gone for too long has to register anew.'
) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'PW002', message = format('worker %s is unknown', coalesce(p_worker_id::text, 'null')),
    hint = p_hint;
end
$$;
comment on function pgworker.unknown_worker(bigint, text) is 'Internal: raises PW002.';

create function pgworker.get_jobs(
  worker_id bigint, max_jobs int default 1, tasks text[] default null, forbidden_flags text[] default null
) returns setof pgworker.claimed_job
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_now     constant timestamptz := pgworker.clock();
  v_most    constant int := least(max_jobs, 1000000);
  v_whose   constant bigint := (hashtext(concat_ws(' ', worker_id, tasks::text, '/', forbidden_flags::text))
                               & 2147483647)::bigint;
  v_flags   text[] := nullif(get_jobs.forbidden_flags, '{}');
  v_text    text := current_setting('pgworker.cursor', true);
  v_asleep  boolean := coalesce(current_setting('pgworker.asleep', true), '') = 'yes';
  v_cursor  bigint[];
  v_worker  record;
  v_paused  text[];            -- these, and limited ones, are passed over
  v_limits  boolean := false;
  v_timeouts boolean := false;
  v_forbidden text[];
  v_sweeps  boolean;
  v_brief   boolean := false;
  v_dear    boolean;
  v_epoch   bigint;
  v_margin  bigint;
  v_priority int;
  v_from    timestamptz;
  v_behind  bigint;
  v_started timestamptz;
  v_ended   timestamptz;
  v_elapsed bigint;
  v_new     int[];
  v_queues  boolean;
  v_range   record;
  v_queued  record;
  v_limited bigint[];          -- those that come first, and their places among others, as the two below
  v_priorities smallint[];
  v_run_ats timestamptz[];
  v_tids    tid[];
  v_left    int;
begin
  if max_jobs is null or max_jobs < 1 then
    raise exception using errcode = '22023',
      message = format('max_jobs must be at least 1, got %s', coalesce(max_jobs::text, 'null')),
      hint = 'Ask for as many jobs as the worker has room for.';
  end if;

  if hashtext(split_part(v_text, '#', 1))::text = split_part(v_text, '#', 2) then
    v_cursor := string_to_array(split_part(v_text, '#', 1), ' ')::bigint[];
    v_started := clock_timestamp();                -- a variable, so that cursor_at is inlined
    v_brief := (v_cursor[1] = v_whose and v_cursor[4] between 0 and 999) is true;
  end if;

  select w.lease, w.timeouts,
         exists (select from pgworker.task t where t.paused or t.limited or t.timeout is not null)
         or exists (select from pgworker.forbidden_flag f) as rules,
         v_brief and exists (select from pgworker.job j
                             where j.queue_name > '' and j.lane is null and not j.waiting) as queued
  into v_worker
  from pgworker.worker w
  where w.id = worker_id;
  if not found then
    perform pgworker.unknown_worker(worker_id);
  end if;
  if v_worker.rules then
    select array_agg(t.identifier) filter (where t.paused or t.limited),
           coalesce(bool_or(t.limited and not t.paused), false), coalesce(bool_or(t.timeout is not null), false),
           (select array_agg(f.name) from pgworker.forbidden_flag f)
    into v_paused, v_limits, v_timeouts, v_forbidden
    from pgworker.task t;
    v_flags := v_flags || v_forbidden;
  end if;
  if v_limits then
    select h.ids, h.priorities, h.run_ats into v_limited, v_priorities, v_run_ats
    from pgworker.limited_heads(v_now, v_most, tasks, v_flags) h;
  end if;
  v_brief := v_brief and not (v_worker.queued or v_limited is not null or v_timeouts) and v_worker.timeouts is null;

  if v_brief then
    -- Nothing can be had but a few jobs in no queue and without limits: all that matters is how few statements it takes.
    return query
    with picked as materialized (
      select j.ctid as tid
      from pgworker.job j
      where j.queue_name is null and j.lane is null and not j.waiting
        and j.run_at <= v_now and j.locked_by is null
        and (get_jobs.tasks is null or j.task_identifier = any (get_jobs.tasks))
        and (v_paused is null or j.task_identifier <> all (v_paused))
        and (v_flags is null or j.flags is null or not j.flags && v_flags)
      order by j.priority, j.run_at, j.id
      limit v_most
      for update skip locked
    ), known as materialized (
      select from pgworker.worker w where w.id = get_jobs.worker_id and exists (select from picked) for key share
    ), claimed as (
      update pgworker.job j
      set locked_at = v_now, locked_by = get_jobs.worker_id, attempts = j.attempts + 1
      where j.ctid = any (array(select p.tid from picked p)) and exists (select from known)
      returning j.id, j.task_identifier, j.payload, j.attempts::int, j.max_attempts::int, j.queue_name, j.priority::int,
                j.run_at, j.key, j.flags, j.parent_id, j.root_id, j.progress, j.created_at, null::interval
    )
    select c.* from claimed c order by c.priority, c.run_at, c.id;
    get diagnostics v_left = row_count;
    v_left := v_most - v_left;
    v_ended := clock_timestamp();
    v_dear := v_ended > v_started + interval '1 millisecond';
    if v_dear then
      v_cursor[3] := pgworker.cursor_at(v_ended);
      v_cursor[4] := 1000;
    end if;
  else
    select e.last_value into v_epoch from pgworker.epoch e;
    if v_cursor[1] is distinct from v_whose then
      perform pgworker.note_interest(worker_id, tasks, forbidden_flags);
      v_cursor := array[v_whose, v_epoch, 0, -1, 0];
      v_sweeps := true;
    else
      v_elapsed := pgworker.cursor_at(v_started) - v_cursor[3];
      v_sweeps := v_elapsed < 0 or v_elapsed > greatest(250000, 20 * v_cursor[4]) or v_cursor[4] < 1000
                  or (v_cursor[2] <> v_epoch and (v_cursor[4] < 20000 or v_elapsed > 3 * v_cursor[4]));
    end if;
    v_margin := pgworker.cursor_at(v_now - greatest(1000000, least(v_cursor[4], 60000000)) * interval '1 microsecond');

    loop
      v_started := clock_timestamp();
      v_left := v_most;
      v_tids := '{}';

      -- Two questions. Are there priorities in the gaps between those that this session knows? (Dead index entries of
      -- priorities that only others serve can make that dear: then it waits for sweeps, whose cost it counts in.) And is
      -- there anything for serial queues: jobs between cursor and now, or a queue that came free since?
      loop
        select case when v_sweeps or v_cursor[4] < 20000 or cardinality(v_cursor) >= 1005 then array(
                 select f.priority::int
                 from generate_series(1, cardinality(v_cursor), 5) as g(n)
                 cross join lateral (
                   (select j.priority from pgworker.job j
                    where j.queue_name is null and j.lane is null and not j.waiting
                      and j.priority > case when g.n = 1 then -32769 else v_cursor[g.n] end
                      and j.priority < coalesce(v_cursor[g.n + 5], 32768)
                    order by j.priority limit 1)
                   union all
                   (select j.priority from pgworker.job j
                    where j.queue_name is not null and j.lane is null and not j.waiting and j.id > 0
                      and j.priority > case when g.n = 1 then -32769 else v_cursor[g.n] end
                      and j.priority < coalesce(v_cursor[g.n + 5], 32768)
                    order by j.priority limit 1)) as f) end,
               case when v_sweeps then exists (select from pgworker.job j
                                               where j.queue_name > '' and j.lane is null and not j.waiting)
                    else exists (select from pgworker.queue q
                                 where q.turn > greatest(v_cursor[5] - 4, 0) and q.job_id is null and not q.paused)
                         or exists (select from generate_series(6, cardinality(v_cursor), 5) as g(n)
                                    cross join lateral (
                                      select from pgworker.job j
                                      where j.queue_name is not null and j.lane is null and not j.waiting and j.id > 0
                                        and j.priority = v_cursor[g.n]
                                        and (j.run_at, j.id) > (pgworker.cursor_time(v_cursor[g.n + 3]), v_cursor[g.n + 4])
                                        and j.run_at <= v_now
                                      limit 1) as f) end
        into v_new, v_queues;
        exit when coalesce(cardinality(v_new), 0) = 0;
        v_cursor := pgworker.know_priorities(v_cursor, v_new);
      end loop;

      if v_sweeps then
        -- A sweep that fills its batch has not looked at the priorities after it: they begin anew next time.
        for k in 7 .. cardinality(v_cursor) by 5 loop
          v_cursor[k] := 0;
          v_cursor[k + 1] := 0;
          if not v_queues then
            v_cursor[k + 2] := v_margin;
            v_cursor[k + 3] := 0;
          end if;
        end loop;
      end if;
      if v_queues then
        v_queued := pgworker.claim_queued(worker_id, v_now, v_most, tasks, v_flags, v_paused, v_sweeps, v_cursor,
                                          v_limited, v_priorities, v_run_ats);
        v_cursor := v_queued.moved;
        v_tids := v_queued.tids;
        v_left := v_left - cardinality(v_tids);
      end if;
      if v_limited is not null and v_left > 0 then
        v_tids := v_tids || pgworker.claim_limited(worker_id, v_now, v_left, v_limited, v_priorities, v_run_ats, tasks,
                                                   v_flags, v_paused, v_cursor);
        v_left := v_most - cardinality(v_tids);
      end if;

      -- Priority after priority, each from its place in the cursor.
      for k in 6 .. cardinality(v_cursor) by 5 loop
        exit when v_left = 0;
        v_priority := v_cursor[k]::int;
        v_from := pgworker.cursor_time(v_cursor[k + 1]);
        v_behind := v_cursor[k + 2];
        with picked as materialized (
          select j.ctid as tid
          from pgworker.job j
          where j.queue_name is null and j.lane is null and not j.waiting
            -- As a row, (priority, run_at) <= ..., it would not end the scan: before PostgreSQL 18 that goes on to the last.
            and j.priority = v_priority and (j.run_at, j.id) > (v_from, v_behind) and j.run_at <= v_now
            and j.locked_by is null
            and (get_jobs.tasks is null or j.task_identifier = any (get_jobs.tasks))
            and (v_paused is null or j.task_identifier <> all (v_paused))
            and (v_flags is null or j.flags is null or not j.flags && v_flags)
          order by j.priority, j.run_at, j.id
          limit v_left
          for update skip locked
        ), claimed as (
          update pgworker.job j
          set locked_at = v_now, locked_by = get_jobs.worker_id, attempts = j.attempts + 1
          where j.ctid = any (array(select p.tid from picked p))
          returning j.ctid as tid, j.run_at, j.id
        )
        select array_agg(c.tid) as tids, max(c.run_at) as run_at, (array_agg(c.id))[count(*)] as id
        into v_range
        from (select c.tid, c.run_at, c.id from claimed c order by c.run_at, c.id) as c;
        if v_range.tids is not null then
          v_tids := v_tids || v_range.tids;
          v_left := v_left - cardinality(v_range.tids);
          v_cursor[k + 1] := pgworker.cursor_at(v_range.run_at);
          v_cursor[k + 2] := v_range.id;
        end if;
        if v_left > 0 and v_cursor[k + 1] < v_margin then
          -- All that is due has been passed. Not up to now: transactions take a moment to commit. The dearer it is to
          -- find by a sweep what took longer, the longer it may take.
          v_cursor[k + 1] := v_margin;
          v_cursor[k + 2] := 0;
        end if;
      end loop;

      if v_sweeps then
        -- To look for jobs of the future costs something, too, where there are remains of them.
        v_dear := (v_cursor[4] < 0 or clock_timestamp() < v_started + interval '1 millisecond')
                  and exists (select from generate_series(6, cardinality(v_cursor), 5) as g(n)
                              where (select count(*)
                                     from (select from pgworker.job j
                                           where j.queue_name is null and j.lane is null and not j.waiting
                                             and j.priority = v_cursor[g.n] and j.run_at > v_now
                                           order by j.run_at, j.id limit 100) as f) = 100);
        -- The very first sweep of a session pays for making plans: its cost says nothing, unless that cannot be all.
        v_ended := clock_timestamp();
        v_cursor[4] := greatest(case when v_dear then 1000 else 0 end,
                                case when v_cursor[4] < 0 and v_ended < v_started + interval '100 milliseconds' then 0
                                     else (extract(epoch from v_ended - v_started) * 1000000)::bigint end);
        v_cursor[3] := pgworker.cursor_at(v_ended);
        v_cursor[2] := v_epoch;
      end if;
      exit when v_sweeps or v_left < v_most
                or not (v_cursor[4] < case when v_cursor[2] <> v_epoch then 100000 else 5000 end
                        or v_elapsed > 3 * v_cursor[4]);
      v_sweeps := true;                              -- nothing from the cursor on: look whether something lies behind it
    end loop;
  end if;

  if not v_brief or v_dear then
    -- Two hundred priorities are remembered; whoever uses more pays with more probes.
    v_text := array_to_string(v_cursor[1:1005], ' ');
    v_text := set_config('pgworker.cursor', v_text || '#' || hashtext(v_text), false);
  end if;

  -- Whoever found nothing is taken to lie down until its next claim finds something, and shows it with an advisory lock
  -- that wake() sees. pgworker.asleep only remembers that this session holds it, and unlike the lock a rollback undoes
  -- that: a session that rolls claims back may seem asleep when it is not (needless notifications) or not when it is (it
  -- finds work at its next poll).
  if v_worker.lease is null then
    if v_left < v_most then
      if v_asleep then
        v_asleep := pg_advisory_unlock_shared(1886874483, 0);
        v_text := set_config('pgworker.asleep', '', false);
      end if;
    elsif not v_asleep and pg_try_advisory_lock_shared(1886874483, 0) then
      -- Tried, not waited for: a producer may be testing at this moment, and whoever found nothing looks again soon.
      v_text := set_config('pgworker.asleep', 'yes', false);
    end if;
  end if;

  if v_brief or v_left = v_most then
    return;
  end if;
  if v_timeouts or v_worker.timeouts is not null then
    perform pgworker.note_deadlines(worker_id, v_worker.timeouts, v_tids, v_now);
  end if;
  return query
  select j.id, j.task_identifier, j.payload, j.attempts::int, j.max_attempts::int, j.queue_name, j.priority::int,
         j.run_at, j.key, j.flags, j.parent_id, j.root_id, j.progress, j.created_at,
         case when v_timeouts then (select t.timeout from pgworker.task t where t.identifier = j.task_identifier) end
  from (select from pgworker.worker w where w.id = get_jobs.worker_id for key share) as known
  cross join pgworker.job j
  where j.ctid = any (v_tids)
  order by j.priority, j.run_at, j.id;
  if not found then
    perform pgworker.unknown_worker(worker_id);
  end if;
end
$$;
comment on function pgworker.get_jobs(bigint, int, text[], text[]) is
  'Claims up to max_jobs due jobs for a worker and returns them in claim order: priority, run_at, id. tasks null means '
  'every task, an empty array none; a job with any flag forbidden here or by forbid_flag is passed over. Attempts go up '
  'by one. Raises PW002 for an unknown worker, 22023 for max_jobs below 1.';

create function pgworker.get_job(worker_id bigint, tasks text[] default null, forbidden_flags text[] default null)
returns setof pgworker.claimed_job
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select c.* from pgworker.get_jobs(get_job.worker_id, 1, get_job.tasks, get_job.forbidden_flags) c;
end
$$;
comment on function pgworker.get_job(bigint, text[], text[]) is 'get_jobs for one: at most one row.';

create function pgworker.next_run_at(tasks text[] default null) returns timestamptz
language plpgsql stable parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
begin
  -- The first that matches in each priority; after a thousand that do not, the time reached by then: waking up too early
  -- does no harm, walking over a million foreign jobs would.
  return least(case when exists (select from pgworker.task t where t.limited and not t.paused)
                    then pgworker.limited_due(pgworker.clock(), next_run_at.tasks) end, (
    with recursive known as (
      select -32769 as priority
      union all
      select (select f.priority::int
              from ((select j.priority from pgworker.job j
                     where j.queue_name is null and j.lane is null and not j.waiting and j.priority > k.priority
                     order by j.priority limit 1)
                    union all
                    (select j.priority from pgworker.job j
                     where j.queue_name is not null and j.lane is null and not j.waiting and j.id > 0 and j.priority > k.priority
                     order by j.priority limit 1)) as f
              order by f.priority limit 1)
      from known k where k.priority is not null
    )
    select min(coalesce(n.found, n.reached))
    from known k
    cross join lateral (
      select min(s.run_at) filter (where next_run_at.tasks is null or s.task_identifier = any (next_run_at.tasks)) as found,
             case when count(*) = 1000 then max(s.run_at) end as reached
      from (select j.run_at, j.task_identifier from pgworker.job j
            where j.queue_name is null and j.lane is null and not j.waiting and j.priority = k.priority
              and j.run_at > pgworker.clock()
            order by j.run_at, j.id limit 1000) as s
      union all
      select min(s.run_at) filter (where next_run_at.tasks is null or s.task_identifier = any (next_run_at.tasks)),
             case when count(*) = 1000 then max(s.run_at) end
      from (select j.run_at, j.task_identifier from pgworker.job j
            where j.queue_name is not null and j.lane is null and not j.waiting and j.id > 0 and j.priority = k.priority
              and j.run_at > pgworker.clock()
            order by j.run_at, j.id limit 1000) as s
    ) as n
    where k.priority is not null));
end
$$;
comment on function pgworker.next_run_at(text[]) is
  'When the next scheduled job of these tasks (null: of any) becomes due, or one that waits for a rate may run, or a '
  'moment before that; null when there is none. A sleeping worker looks again then.';
