-- 45_queues.sql: serial queues: one job at a time each, heads in claim order
--
--   make_queues    rows for queues that run something for the first time
--   claim_queued   claims the heads of free queues that come first
--   lock_free_queues  those of jobs that are to be given back, if nobody holds them
--   free_queues    a queue's job has ended or was given back
--
-- A queue that runs a job has its id in queue.job_id; that, under the queue's row lock, is the whole exclusion. A claim
-- looks without locks for queues that may have a head for it:
--
--   * queues that came free since this session last looked, by queue.turn (the cursor has passed what waited behind
--     their last job), and a few turns back, because commits overtake each other;
--   * queues of jobs between the cursor and now, in the index of queued jobs;
--   * on a sweep: every queue that has jobs, hopping from name to name, so that a hundred thousand jobs behind one busy
--     queue are one hop.
--
-- It then takes the heads that come before the last of the other jobs (p_ids: limited ones) that fill the batch, and
-- leaves the cursor before the first head that it did not take. Locks: queue rows, then their head jobs, both with SKIP
-- LOCKED, so that no claim waits for another, and a queue that is not taken is not touched.

-- Rows are made under an advisory try-lock: without it two claims of a new queue would wait for each other's commit. At
-- most 128 at once, since such locks live in the server's shared lock table; the rest has its turn in the next claim.
create function pgworker.make_queues(p_names text[], p_most int) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  with missing as materialized (
    select n.name from unnest(p_names) as n(name)
    where not exists (select from pgworker.queue q where q.name = n.name offset 0)
    limit 128
  ), mine as materialized (
    select m.name from missing m where pg_try_advisory_xact_lock(1886874484, hashtext(m.name)) limit p_most
  )
  insert into pgworker.queue (name) select m.name from mine m order by m.name
  on conflict (name) do nothing;
end
$$;
comment on function pgworker.make_queues(text[], int) is
  'Internal: makes the rows of up to p_most of these queues that have none yet.';

create function pgworker.claim_queued(
  p_worker_id bigint, p_now timestamptz, p_limit int, p_tasks text[], p_flags text[], p_paused text[],
  p_sweeps boolean, p_cursor bigint[], p_ids bigint[], p_priorities smallint[], p_run_ats timestamptz[],
  out tids tid[], out moved bigint[]
)
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_hashjoin = on
as $$
declare
  v_names text[];
  v_found text[];
  v_wanted int;                -- how many heads are among the first p_limit jobs
  v_taken text[] := array[]::text[];
  v_free  text[];
  v_priorities smallint[];     -- of all heads, as the two below
  v_run_ats timestamptz[];
  v_ids   bigint[];
  v_left  record;
  v_rows  bigint;
  v_at    bigint;
  v_id    bigint;
  v_turn  bigint;
  v_margin constant bigint := pgworker.cursor_at(p_now - interval '1 second');
begin
  tids := '{}';
  moved := p_cursor;

  if p_sweeps then
    moved[5] := coalesce((select max(q.turn) from pgworker.queue q) + 4, moved[5]);   -- seen for good
    with recursive hop as (
      (select j.queue_name from pgworker.job j
       where j.queue_name > '' and j.lane is null and not j.waiting order by j.queue_name limit 1)
      union all
      select (select j.queue_name from pgworker.job j
              where j.queue_name > h.queue_name and j.queue_name > '' and j.lane is null and not j.waiting
              order by j.queue_name limit 1)
      from hop h where h.queue_name is not null
    )
    select array_agg(h.queue_name) into v_names
    from hop h
    where h.queue_name is not null
      and not exists (select from pgworker.queue q where q.name = h.queue_name and (q.job_id is not null or q.paused)
                      offset 0);
    for k in 9 .. cardinality(moved) by 5 loop
      moved[k] := v_margin;
      moved[k + 1] := 0;
    end loop;
  else
    select array_agg(q.name), coalesce(max(q.turn), moved[5]) into v_names, v_turn
    from pgworker.queue q
    where q.turn > greatest(moved[5] - 4, 0) and q.job_id is null and not q.paused;
    moved[5] := greatest(v_turn, moved[5]);
    for k in 9 .. cardinality(moved) by 5 loop
      v_found := '{}';
      loop
        select array(select distinct u.name from unnest(v_found || array_agg(s.queue_name)) as u(name)),
               count(*), coalesce((array_agg(pgworker.cursor_at(s.run_at)))[count(*)], moved[k]),
               coalesce((array_agg(s.id))[count(*)], moved[k + 1])
        into v_found, v_rows, v_at, v_id
        from (select j.queue_name, j.run_at, j.id from pgworker.job j
              where j.queue_name is not null and j.lane is null and not j.waiting and j.id > 0
                and j.priority = p_cursor[k - 3]
                and (j.run_at, j.id) > (pgworker.cursor_time(moved[k]), moved[k + 1]) and j.run_at <= p_now
                and j.locked_by is null
                and (p_tasks is null or j.task_identifier = any (p_tasks))
                and (p_paused is null or j.task_identifier <> all (p_paused))
                and (p_flags is null or j.flags is null or not j.flags && p_flags)
                and not exists (select from pgworker.queue q
                                where q.name = j.queue_name and (q.job_id is not null or q.paused) offset 0)
              order by j.run_at, j.id limit 100 + p_limit) as s;
        moved[k] := v_at;
        moved[k + 1] := v_id;
        exit when v_rows < 100 + p_limit or cardinality(v_found) >= p_limit;
      end loop;
      if v_rows < 100 + p_limit and moved[k] < v_margin then
        moved[k] := v_margin;
        moved[k + 1] := 0;
      end if;
      if cardinality(v_found) > 0 then
        v_names := v_names || v_found;
      end if;
    end loop;
  end if;

  if v_names is null then
    return;
  end if;

  -- Heads, and which of them come before the last of the unqueued jobs that would fill the batch.
  with head as materialized (
    select n.name, h.priority, h.run_at, h.id
    from (select distinct u.name from unnest(v_names) as u(name)) as n
    cross join lateral (
      -- by priority, so that jobs of the future are not walked over
      select q.priority, q.run_at, q.id
      from generate_series(6, cardinality(p_cursor), 5) as g(n)
      cross join lateral (
        select j.priority, j.run_at, j.id from pgworker.job j
        where j.queue_name = n.name and j.queue_name > '' and j.lane is null and not j.waiting
          and j.priority = p_cursor[g.n] and j.run_at <= p_now and j.locked_by is null
          and (p_tasks is null or j.task_identifier = any (p_tasks))
          and (p_paused is null or j.task_identifier <> all (p_paused))
          and (p_flags is null or j.flags is null or not j.flags && p_flags)
        order by j.run_at, j.id limit 1) as q
      limit 1) as h
    -- A limited job of the queue that comes before it goes first (43_permits.sql).
    where p_ids is null
       or not exists (select from unnest(p_ids, p_priorities, p_run_ats) as l(id, priority, run_at)
                      cross join lateral (select o.queue_name from pgworker.job o where o.id = l.id offset 0) as o
                      where o.queue_name = n.name and (l.priority, l.run_at, l.id) < (h.priority, h.run_at, h.id))
  ), other as (
    select o.priority, o.run_at, o.id
    from pgworker.plain_heads(p_cursor, p_now, p_limit, p_tasks, p_flags, p_paused) o
    where exists (select from head)
    union all
    select l.priority, l.run_at, l.id from unnest(p_ids, p_priorities, p_run_ats) as l(id, priority, run_at)
  ), first as (
    select b.name, b.priority, b.run_at, b.id
    from (select h.name, h.priority, h.run_at, h.id from head h
          union all
          select null, o.priority, o.run_at, o.id from other o) as b
    order by b.priority, b.run_at, b.id
    limit p_limit
  )
  select (select count(f.name)::int from first f),
         array_agg(h.name), array_agg(h.priority), array_agg(h.run_at), array_agg(h.id)
  into v_wanted, v_names, v_priorities, v_run_ats, v_ids
  from (select u.name, u.priority, u.run_at, u.id from head u order by u.priority, u.run_at, u.id) as h;
  if v_names is null then
    return;
  end if;

  if v_wanted > 0 then
    perform pgworker.make_queues(v_names, v_wanted);
    -- As many as we want, in the order of their heads; one that another claim holds is passed over for the next.
    -- Locked in a statement of its own: the next one then sees the queues as they are under our locks, and their heads
    -- are looked up once more, since the jobs that were seen may have run meanwhile.
    v_free := array(select q.name
                    from unnest(v_names) with ordinality as h(name, n)
                    cross join lateral (select f.name from pgworker.queue f
                                        where f.name = h.name and f.job_id is null and not f.paused
                                        for update skip locked) as q
                    order by h.n limit v_wanted);
    with head as materialized (
      select f.name, h.tid, h.id
      from unnest(v_free) as f(name)
      cross join lateral (
        select q.tid, q.id
        from generate_series(6, cardinality(p_cursor), 5) as g(n)
        cross join lateral (
          select j.ctid as tid, j.id from pgworker.job j
          where j.queue_name = f.name and j.queue_name > '' and j.lane is null and not j.waiting
            and j.priority = p_cursor[g.n] and j.run_at <= p_now and j.locked_by is null
            and (p_tasks is null or j.task_identifier = any (p_tasks))
            and (p_paused is null or j.task_identifier <> all (p_paused))
            and (p_flags is null or j.flags is null or not j.flags && p_flags)
          order by j.run_at, j.id limit 1
          for update skip locked) as q
        limit 1) as h
    ), claimed as (
      update pgworker.job j
      set locked_at = p_now, locked_by = p_worker_id, attempts = j.attempts + 1
      from head h
      where j.ctid = h.tid
      returning j.ctid as tid, j.id
    ), taken as (
      update pgworker.queue q set job_id = t.id
      from (select c.id, l.tid
            from claimed c
            join head h on h.id = c.id
            cross join lateral (select o.ctid as tid from pgworker.queue o where o.name = h.name offset 0) as l) as t
      where q.ctid = t.tid
      returning q.name
    )
    select coalesce((select array_agg(c.tid) from claimed c), '{}'), array(select t.name from taken t)
    into tids, v_taken;
  end if;

  -- Heads that were not taken must stay ahead of the cursor.
  for v_left in
    select g.n + 3 as n, m.run_at, m.id
    from (select distinct on (h.priority) h.priority, h.run_at, h.id
          from unnest(v_names, v_priorities, v_run_ats, v_ids) as h(name, priority, run_at, id)
          where h.name <> all (v_taken)
          order by h.priority, h.run_at, h.id) as m
    join generate_series(6, cardinality(p_cursor), 5) as g(n) on p_cursor[g.n] = m.priority
  loop
    if (pgworker.cursor_at(v_left.run_at), v_left.id) <= (moved[v_left.n], moved[v_left.n + 1]) then
      moved[v_left.n] := pgworker.cursor_at(v_left.run_at);
      moved[v_left.n + 1] := v_left.id - 1;
    end if;
  end loop;
end
$$;
comment on function pgworker.claim_queued(
  bigint, timestamptz, int, text[], text[], text[], boolean, bigint[], bigint[], smallint[], timestamptz[]) is
  'Internal: claims those heads of free queues that are among the first p_limit jobs; and moves the cursor as far as it '
  'has looked.';

create function pgworker.lock_free_queues(p_ids bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set lock_timeout = '5ms'
as $$
declare
  v_names constant text[] := array(select j.queue_name from pgworker.job j
                                   where j.id = any (p_ids) and j.queue_name is not null);
  v_free  text[];
begin
  if cardinality(v_names) = 0 then
    return p_ids;
  end if;
  -- Only what these hold: a job that was given back meanwhile frees nothing, and whoever runs there now does not wait.
  loop
    begin
      v_free := array(select q.name from pgworker.queue q
                      where q.name = any (v_names) and (q.job_id in (select u.id from unnest(p_ids) as u(id))) is true
                      order by q.name for update skip locked);
      exit;
    exception when lock_not_available then         -- as in lock_free()
    end;
  end loop;
  return array(select j.id from pgworker.job j
               where j.id = any (p_ids)
                 and not exists (select from pgworker.queue q
                                 where q.name = j.queue_name and q.job_id = j.id
                                   and q.name not in (select u.name from unnest(v_free) as u(name)) offset 0)
               order by j.id);
end
$$;
comment on function pgworker.lock_free_queues(bigint[]) is
  'Internal: locks those queues that these jobs hold and nobody else has locked, and returns the jobs that hold no other.';

create function pgworker.free_queues(p_names text[], p_job_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_turn bigint;
begin
  if p_names is null then
    return;
  end if;
  v_turn := nextval('pgworker.turn');
  update pgworker.queue q set job_id = null, turn = v_turn
  where q.name = any (p_names) and (q.job_id in (select u.id from unnest(p_job_ids) as u(id))) is true;
  -- The caller will claim next, but perhaps not this task.
  -- From priority to priority, so that jobs of the future are not walked over.
  if exists (
    select from unnest(p_names) as f(name)
    cross join lateral (
      with recursive hop as (
        (select j.priority from pgworker.job j
         where j.queue_name = f.name and j.queue_name > '' and j.lane is null and not j.waiting order by j.priority limit 1)
        union all
        select (select j.priority from pgworker.job j
                where j.queue_name = f.name and j.queue_name > '' and j.lane is null and not j.waiting and j.priority > h.priority
                order by j.priority limit 1)
        from hop h where h.priority is not null
      )
      select h.priority from hop h where h.priority is not null
    ) as p
    where exists (select from pgworker.job j
                  where j.queue_name = f.name and j.queue_name > '' and j.lane is null and not j.waiting
                    and j.priority = p.priority
                    and j.run_at <= pgworker.clock() and j.locked_by is null offset 0)
  ) then
    perform pgworker.wake();
  end if;
end
$$;
comment on function pgworker.free_queues(text[], bigint[]) is
  'Internal: frees the queues that these jobs held, and wakes workers when something waits there.';
