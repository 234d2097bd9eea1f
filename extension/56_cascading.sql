-- 56_cascading.sql: the steps that the end of a job takes through its tree; 57_settling.sql puts them together and says
-- which locks are taken in which order
--
--   postpone           what somebody's lock kept us from doing is left to maintain()
--   announce           others may be claimed now
--   count_down         counters, exactly
--   lock_free          jobs that nobody else holds
--   lock_counters      counters that nobody else holds
--   release            parents whose children are done
--   open_gates         whole phases: a job that waited for its siblings, and everything below it
--   ask_to_stop        what runs cannot be ended here
--   live_below         what there is to stop
--   endable            what of it can be ended without waiting for anybody
--   stop_below         cancels what is left of subtrees

create function pgworker.postpone(
  p_ids bigint[], p_what text, p_roots bigint[] default null, p_reasons text[] default null,
  p_causes bigint[] default null
) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgworker.unsettled (job_id, what, root_id, reason, cause_id)
  select u.id, p_what, u.root_id, u.reason, u.cause_id
  from unnest(p_ids, p_roots, p_reasons, p_causes) as u(id, root_id, reason, cause_id)
  order by u.id;
end
$$;
comment on function pgworker.postpone(bigint[], text, bigint[], text[], bigint[]) is
  'Internal: leaves to maintain() what could not be done to these jobs now, because somebody holds their rows.';

create function pgworker.announce(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  if exists (select from pgworker.job j where j.id = any (p_ids) and not j.waiting and j.run_at <= pgworker.clock()) then
    perform pgworker.wake_to_sweep();           -- they keep their place in line, which lies behind the cursors
  end if;
end
$$;
comment on function pgworker.announce(bigint[]) is
  'Internal: lets workers know that these jobs, which did not wait in line until now, may be claimed.';

create function pgworker.count_down(
  p_after boolean, p_ids bigint[], p_slots smallint[], p_held bigint[], p_counts int[] default null
) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_empty bigint[];
  v_done  bigint[];
begin
  -- What the index begins with is looked up; that the rest of it is compared with columns too, and not with constants,
  -- keeps a plan that is made for few counters from reading all of them, again for each that is counted.
  if 0 < any (p_slots) then
    with hit as materialized (
      select u.job_id, p_after as after, u.slot, sum(coalesce(u.n, 1))::int as n
      from unnest(p_ids, p_slots, p_counts) as u(job_id, slot, n)
      where u.slot > 0
      group by u.job_id, u.slot
      order by u.job_id, u.slot
    ), counted as (
      update pgworker.counter c set pending = c.pending - h.n
      from hit h
      where c.job_id = any (array[h.job_id]) and c.after = h.after and c.slot = h.slot
      returning c.job_id, c.pending
    )
    select array_agg(c.job_id) filter (where c.pending = 0) into v_empty from counted c;
  end if;
  if 0 = any (p_slots) or v_empty is not null or cardinality(p_held) > 0 then
    with hit as materialized (
      select t.job_id, p_after as after, 0::smallint as slot, sum(t.n)::int as n
      from (select u.job_id, coalesce(u.n, 1) as n from unnest(p_ids, p_slots, p_counts) as u(job_id, slot, n) where u.slot = 0
            union all
            select e.job_id, 1 from unnest(v_empty) as e(job_id)
            union all
            select h.job_id, 0 from unnest(p_held) as h(job_id)) as t
      group by t.job_id
      order by t.job_id
    ), counted as (
      update pgworker.counter c set pending = c.pending - h.n
      from hit h
      where c.job_id = any (array[h.job_id]) and c.after = h.after and c.slot = h.slot
      returning c.job_id, c.pending, h.n
    )
    select array_agg(c.job_id) filter (where c.pending = 0 and c.n > 0) into v_done from counted c;
  end if;
  return v_done;
end
$$;
comment on function pgworker.count_down(boolean, bigint[], smallint[], bigint[], int[]) is
  'Internal: takes what has ended off the counters of these jobs (p_counts: how many by each entry, null: one), and '
  'returns those that wait for nothing any more. p_held: jobs whose total is to be locked as well.';

-- SKIP LOCKED is not quite what it says. When whoever changed a row commits between our look at it and our attempt to lock
-- it, PostgreSQL goes on to the new version, and waits if somebody else has locked that one meanwhile. Who settles holds
-- counters by then, and must never wait for a job's row: a deadlock would follow. So the wait is cut short and everything
-- is looked at anew; then the row is passed over.
create function pgworker.lock_free(p_ids bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
set lock_timeout = '5ms'
as $$
declare
  v_ids bigint[];
begin
  loop
    begin
      v_ids := array(select j.id from pgworker.job j where j.id = any (p_ids) order by j.id for update skip locked);
      exit;
    exception when lock_not_available then
    end;
  end loop;
  return v_ids;
end
$$;
comment on function pgworker.lock_free(bigint[]) is
  'Internal: locks those of these jobs that nobody else has locked, and returns them; never waits.';

-- These are changed more often than any other rows, and a wait of the kind described above would be for one that comes
-- before those held.
create function pgworker.lock_counters(p_ids bigint[], p_after boolean default null) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
set lock_timeout = '5ms'
as $$
declare
  v_tids tid[];
begin
  loop
    begin
      v_tids := array(select c.ctid from pgworker.counter c
                      where c.job_id = any (p_ids) and c.after = coalesce(p_after, c.after) for update skip locked);
      exit;
    exception when lock_not_available then
    end;
  end loop;
  return array(select distinct c.job_id from pgworker.counter c
               where c.job_id = any (p_ids) and c.after = coalesce(p_after, c.after)
                 and c.ctid not in (select u.tid from unnest(v_tids) as u(tid)));
end
$$;
comment on function pgworker.lock_counters(bigint[], boolean) is
  'Internal: locks what nobody else has locked of the counters of these jobs (p_after: of siblings, of children; null: '
  'both), and returns the jobs of which it did not get all; never waits.';

create function pgworker.release(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_locked bigint[];
begin
  v_locked := pgworker.lock_free(array(select j.id from pgworker.job j where j.id = any (p_ids) and j.waiting));
  perform pgworker.postpone(array(select j.id from pgworker.job j
                                  where j.id = any (p_ids) and j.waiting
                                    and j.id not in (select u.id from unnest(v_locked) as u(id))), 'release');
  -- Behind a closed gate it goes on waiting: opening that looks at its children. Children may have come since this was
  -- left to be done later. And one that is to fail does not start.
  update pgworker.job j set waiting = false
  where j.id = any (v_locked) and j.waiting and j.gate_id is null
    and not exists (select from pgworker.counter c
                    where c.job_id = j.id and not c.after and c.slot = 0 and c.pending > 0 offset 0)
    and not exists (select from pgworker.unsettled u where u.job_id = j.id and u.what = 'fail' offset 0);
  perform pgworker.announce(v_locked);
end
$$;
comment on function pgworker.release(bigint[]) is
  'Internal: jobs whose children are done can be claimed, unless they wait for siblings too.';

create function pgworker.open_gates(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_gates bigint[] := p_ids;
  v_open  bigint[];
  v_rows  bigint[];
  v_freed bigint[];
  v_shut  bigint[];
begin
  while cardinality(v_gates) > 0 loop
    v_open := pgworker.lock_free(v_gates);
    perform pgworker.postpone(array(select j.id from pgworker.job j
                                    where j.id = any (v_gates)
                                      and j.id not in (select u.id from unnest(v_open) as u(id))), 'open');
    -- Somebody may be about to have it wait again, and holds parts of its counter while it waits for the total, ours.
    v_shut := pgworker.lock_counters(v_open, true);
    perform pgworker.postpone(v_shut, 'open');
    -- A gate behind a closed one opens with that one.
    v_open := array(select j.id from pgworker.job j
                    where j.id = any (v_open) and (j.gate_id = j.id or j.gate_id is null)
                      and j.id not in (select u.id from unnest(v_shut) as u(id))
                      and not exists (select from pgworker.counter c      -- one before it may run again since
                                      where c.job_id = j.id and c.after and c.slot = 0 and c.pending > 0 offset 0));
    delete from pgworker.counter c where c.job_id = any (v_open) and c.after;
    v_rows := pgworker.lock_free(array(select j.id from pgworker.job j where j.gate_id = any (v_open)));
    if (select count(*) from pgworker.job j where j.gate_id = any (v_open)) > cardinality(v_rows) then
      perform pgworker.postpone(v_open, 'open');
    end if;
    v_shut := pgworker.lock_counters(v_rows, true);
    perform pgworker.postpone(v_shut, 'open');
    with opened as (
      update pgworker.job j
      set gate_id = case when o.pending > 0 then j.id end,
          waiting = coalesce(o.pending > 0, false)
                    or j.has_children and (exists (select from pgworker.counter c
                                                   where c.job_id = j.id and not c.after and c.slot = 0 and c.pending > 0)
                                           or exists (select from pgworker.unsettled u
                                                      where u.job_id = j.id and u.what = 'fail'))
      from unnest(v_rows) as r(id)
      left join lateral (select case when r.id = any (v_shut) then 1 else c.pending end as pending from pgworker.counter c
                         where c.job_id = r.id and c.after and c.slot = 0 offset 0) as o on true
      where j.id = any (array[r.id]) and (j.gate_id in (select u.id from unnest(v_open) as u(id))) is true
      returning j.id, j.waiting, o.pending
    )
    select array_agg(o.id) filter (where not o.waiting), array_agg(o.id) filter (where o.pending = 0)
    into v_freed, v_gates
    from opened o;
    perform pgworker.announce(v_freed);
  end loop;
end
$$;
comment on function pgworker.open_gates(bigint[]) is
  'Internal: jobs that waited for siblings need not any more: they and everything below them may start, as far as '
  'nothing else holds it back.';

create function pgworker.ask_to_stop(p_ids bigint[], p_state text, p_reasons text[], p_causes bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
begin
  if coalesce(cardinality(p_ids), 0) = 0 then
    return;
  end if;
  with asked as (
    update pgworker.job j set ends_as = p_state, cancel_reason = u.reason, cause_id = u.cause_id
    from unnest(p_ids, p_reasons, p_causes) as u(id, reason, cause_id)
    where j.id = any (array[u.id])
    returning j.id, j.locked_by
  )
  insert into pgworker.notice (worker_id, job_id, notice)
  select a.locked_by, a.id, 'cancel' from asked a
  on conflict (worker_id, job_id) do update set notice = 'cancel';
  perform pgworker.wake();                         -- workers look for notices when they wake up
end
$$;
comment on function pgworker.ask_to_stop(bigint[], text, text[], bigint[]) is
  'Internal: jobs that run, whose rows the caller has locked, are to stop, and end as p_state whatever they report.';

create function pgworker.live_below(p_ids bigint[], p_roots bigint[], p_done bigint[])
returns table (id bigint, n bigint, parent_id bigint)
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
begin
  return query
  with recursive below as (
    select b.id, u.id as parent_id, b.live, b.has_children, u.root_id, u.n
    from unnest(p_ids, p_roots) with ordinality as u(id, root_id, n)
    cross join lateral (
      select j.id, true as live, j.has_children from pgworker.job j where j.root_id = u.root_id and j.parent_id = u.id
      union all
      select f.id, false, true from pgworker.finished f
      where f.root_id = u.root_id and f.parent_id = u.id and f.has_children
        and f.id not in (select d.id from unnest(p_done) as d(id))) as b
    where u.id <> u.root_id                         -- what is live below the root of a tree that is being undone undoes it
       or not exists (select from pgworker.compensation c where c.root_id = u.root_id and c.job_id is not null offset 0)
    union all
    select c.id, b.id, c.live, c.has_children, b.root_id, b.n
    from below b
    cross join lateral (
      select j.id, true as live, j.has_children from pgworker.job j where j.root_id = b.root_id and j.parent_id = b.id
      union all
      select f.id, false, true from pgworker.finished f
      where f.root_id = b.root_id and f.parent_id = b.id and f.has_children
        and f.id not in (select d.id from unnest(p_done) as d(id))) as c
    where b.has_children
  )
  select b.id, min(b.n), min(b.parent_id) from below b where b.live group by b.id order by b.id;
end
$$;
comment on function pgworker.live_below(bigint[], bigint[], bigint[]) is
  'Internal: what is live below these jobs (p_roots: of which trees), and below which of them, by its place in p_ids, and '
  'its parent; but for what is below p_done.';

-- Whoever stops what is below holds counters further up by then, so it must not wait for one further down: a session that
-- does so the right way round may be waiting for ours.
create function pgworker.endable(p_ids bigint[], p_running bigint[], p_above bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = on
set enable_mergejoin = off
set jit = off
set lock_timeout = '5ms'
as $$
declare
  v_ids     bigint[] := p_ids;
  v_parents bigint[];
  v_not     bigint[];
begin
  loop
    -- Parents, and siblings that wait for these, that are not going to end with them: locked by somebody else (then what
    -- its end or its release means is that one's affair), ...
    v_parents := array(select distinct j.parent_id from pgworker.job j where j.id = any (v_ids) and j.slot is not null
                       except select u.id from unnest(v_ids) as u(id));
    v_not := array(select p.id from pgworker.job p
                   where p.id = any (v_parents)
                     and (p.locked_by is null or p.id not in (select u.id from unnest(p_running || p_above) as u(id))));
    v_not := array(select j.id from pgworker.job j
                   where j.id = any (v_ids) and (j.parent_id in (select u.id from unnest(v_not) as u(id))) is true
                   union
                   select w.id
                   from (select j.id, d.job_id
                         from pgworker.job j
                         cross join lateral (select o.job_id from pgworker.dependency o
                                             where o.after_id = j.id offset 0) as d
                         where j.id = any (v_ids) and j.has_followers) as w
                   where w.job_id not in (select u.id from unnest(v_ids || p_running) as u(id))
                     and exists (select from pgworker.job f where f.id = w.job_id offset 0));
    if cardinality(v_not) = 0 then
      -- ... or running, held by us, but counted on by somebody. One that has ended counts no more, whatever is left of its
      -- counter. As in lock_counters(), but only what these are counted in: a busy parent is never held by nobody at all.
      v_parents := array(select p.id from pgworker.job p where p.id = any (v_parents));
      exit when cardinality(v_parents) = 0;
      loop
        begin
          with counted as materialized (
            select distinct j.parent_id as id, s.slot
            from pgworker.job j
            cross join lateral (values (j.slot), (0::smallint)) as s(slot)
            where j.id = any (v_ids) and (j.parent_id in (select u.id from unnest(v_parents) as u(id))) is true
          ), got as materialized (
            select n.id, n.slot, c.job_id is not null as is_ours
            from counted n
            left join lateral (select o.job_id from pgworker.counter o
                               where o.job_id = n.id and not o.after and o.slot = n.slot for update skip locked) as c on true
          )
          select array_agg(distinct g.id) into v_parents
          from got g
          where not g.is_ours
            and exists (select from pgworker.counter o where o.job_id = g.id and not o.after and o.slot = g.slot offset 0);
          exit;
        exception when lock_not_available then
        end;
      end loop;
      v_not := array(select j.id from pgworker.job j
                     where j.id = any (v_ids) and (j.parent_id in (select u.id from unnest(v_parents) as u(id))) is true);
    end if;
    exit when cardinality(v_not) = 0;
    v_ids := array(select u.id from unnest(v_ids) as u(id) except select n.id from unnest(v_not) as n(id) order by 1);
  end loop;
  return v_ids;
end
$$;
comment on function pgworker.endable(bigint[], bigint[], bigint[]) is
  'Internal: those of these pending jobs, whose rows the caller holds, whose end touches no counter that somebody else '
  'holds; p_running: what else it holds, p_above: what they are below.';

create function pgworker.stop_below(
  p_ids bigint[], p_roots bigint[], p_reasons text[], p_causes bigint[], p_done bigint[]
) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = on
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_ids     bigint[];
  v_of      bigint[];                              -- below which of p_ids, by its place there
  v_parents bigint[];
  v_held    bigint[];
  v_pending bigint[];
  v_running bigint[];                              -- and are held by us
  v_can     bigint[];
  v_told    bigint[];
begin
  select array_agg(b.id order by b.id), array_agg(b.n order by b.id), array_agg(b.parent_id order by b.id)
  into v_ids, v_of, v_parents
  from pgworker.live_below(p_ids, p_roots, p_done) as b;
  if v_ids is null then
    return array[]::bigint[];
  end if;

  v_held := pgworker.lock_free(v_ids);
  select coalesce(array_agg(j.id) filter (where j.locked_by is null), '{}'),
         coalesce(array_agg(j.id) filter (where j.locked_by is not null), '{}'),
         coalesce(array_agg(j.id) filter (where j.locked_by is not null and j.ends_as is null), '{}')
  into v_pending, v_running, v_told
  from pgworker.job j where j.id = any (v_held);
  v_can := pgworker.endable(v_pending, v_running, p_ids);
  if cardinality(v_can) + cardinality(v_running) < cardinality(v_ids) then
    -- Later, from the parents of what is left on: whatever is between may not be there any more by then.
    perform pgworker.postpone(array_agg(l.parent_id), 'stop', array_agg(p_roots[l.n]), array_agg(p_reasons[l.n]),
                              array_agg(p_causes[l.n]))
    from (with skipped as materialized (
            select u.id, u.n, u.parent_id
            from unnest(v_ids, v_of, v_parents) as u(id, n, parent_id)
            where u.id not in (select d.id from unnest(v_can || v_running) as d(id)))
          select s.parent_id, min(s.n) as n
          from skipped s
          where s.parent_id not in (select o.id from skipped o)
          group by s.parent_id) as l;
  end if;
  perform pgworker.ask_to_stop(array_agg(t.id), 'cancelled', array_agg(p_reasons[u.n]), array_agg(p_causes[u.n]))
  from unnest(v_told) as t(id)
  join unnest(v_ids, v_of) as u(id, n) on u.id = t.id;
  if cardinality(v_can) > 0 then
    perform pgworker.finish(array_agg(c.id), array_agg('cancelled'::text), array_agg(p_reasons[u.n]), null, false,
                            array_agg(p_causes[u.n]))
    from unnest(v_can) as c(id)
    join unnest(v_ids, v_of) as u(id, n) on u.id = c.id;
  end if;
  return v_can || v_told;
end
$$;
comment on function pgworker.stop_below(bigint[], bigint[], text[], bigint[], bigint[]) is
  'Internal: what is live below these jobs (p_roots: of which trees) ends as cancelled, with these reasons and causes; '
  'what runs is asked to stop; what is below p_done has been seen to. Returns the ids.';
