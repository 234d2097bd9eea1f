-- 57_settling.sql: what the end of a job means for the others in its tree
--
--   settle             statement trigger on job: whatever takes jobs away comes through here, and their places in queues
--                      and under limits come free
--   settle_ended       level by level upwards: what is below stops, followers start, parents are released or fail
--   cancel_pending     those that will never start
--   settle_followers   the after of siblings
--   fail_parents       the policy fail-parent
--   settle_leftovers   what had to be put off (postpone, in 56_cascading.sql); maintain() calls it
--
-- A trigger, not a call in finish(): so it does not matter who ends a job and how, a plain DELETE by an administrator
-- included, and nothing can be forgotten.
--
-- Exactly once, never early, never lost. A parent waits for a number, counter.pending of slot 0. Each child is counted in
-- one row of counter (its slot), and whoever ends the child, and nobody else, since a row is deleted once, takes it off
-- there in the same transaction, under the row lock of the counter. So pending passes zero in exactly one transaction,
-- which sees it (a session that waited for the lock goes on with what the other has committed, and with nothing of it if
-- the other rolled back), and that one releases the parent. There is no look at "are all my siblings finished?", which two
-- sessions that end the last two children at once would both answer with no. Nothing is clamped: less than nothing pending
-- breaks a check constraint and with it the transaction.
--
-- Siblings that end one by one in many sessions would all wait for each other's commits on one row. The count of a parent
-- with many children is therefore spread over slots (pgworker.slot() says which child is counted where, and why), and
-- whoever brings a slot to zero takes one off slot 0, which counts the slots.
--
-- Locks. Ending jobs lock their own rows first (by id), as everywhere; no counter is locked by then. Then, from the deepest
-- level of the trees upwards: counters of children, parts by (job, slot), then totals by job; then, for the level above,
-- those of after, likewise. Waiting is done for these only, always in this order, so no two sessions can wait for each
-- other. What follows downwards waits for nothing: a session that fails a parent holds the counter further up by then, and
-- jobs below whose end would touch a counter that somebody else holds are left for later (endable()). Rows of other jobs
-- (parents to be released or failed, phases, what is to be stopped below) are locked by lock_free(): somebody may hold
-- them for long (a producer that replaces a waiting job by its key, in an open transaction), or wait for us. What is
-- skipped is written down in unsettled, and maintain(), which runs every second, does it.

create type pgworker.ended as (
  id bigint, parent_id bigint, root_id bigint, depth int, slot smallint, owns boolean, stops boolean,
  has_followers boolean, fails boolean, vanishes boolean, title text, state text, error text, reason text, cause_id bigint
);
comment on type pgworker.ended is
  'Internal: a job that has left the live table. owns: it may have counters; stops: what is below it is not to go on; '
  'fails: its parent is to fail with it, else whoever waits for it goes on; vanishes: nothing is to be kept of it; state: '
  'null if it was deleted; error: its last error, which what is below it is told; reason: what stood at the beginning.';

create type pgworker.ended_level as (depth int, jobs pgworker.ended[]);
comment on type pgworker.ended_level is 'Internal: jobs of one level that have left the live table.';

create function pgworker.fail_parents(p_children pgworker.ended[]) returns pgworker.ended[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_ids     bigint[];
  v_errors  text[];
  v_causes  bigint[];
  v_reasons text[];
  v_held    bigint[];
  v_failed  pgworker.ended[];
begin
  select array_agg(c.parent_id), array_agg(c.error), array_agg(c.cause_id), array_agg(c.reason)
  into v_ids, v_errors, v_causes, v_reasons
  from (select distinct on (e.parent_id) e.parent_id, coalesce(e.cause_id, e.id) as cause_id, e.reason,
               format('child %s (%s) %s', e.id, e.title, coalesce(e.state, 'was removed'))
                 || coalesce(' because of job ' || e.cause_id, '') || coalesce(': ' || e.reason, '') as error
        from unnest(p_children) as e
        order by e.parent_id, e.id) as c;

  v_held := pgworker.lock_free(v_ids);
  perform pgworker.postpone(array_agg(u.id), 'fail', null, array_agg(u.error), array_agg(u.cause_id))
  from unnest(v_ids, v_errors, v_causes) as u(id, error, cause_id)
  where u.id not in (select h.id from unnest(v_held) as h(id))
    and exists (select from pgworker.job j where j.id = u.id offset 0);
  perform pgworker.ask_to_stop(array_agg(j.id), 'failed', array_agg(u.error), array_agg(u.cause_id))
  from unnest(v_ids, v_errors, v_causes) as u(id, error, cause_id)
  join pgworker.job j on j.id = any (array[u.id])
  where (j.id in (select h.id from unnest(v_held) as h(id))) is true and j.locked_by is not null and j.ends_as is null;

  select array_agg(row(j.id, j.parent_id, j.root_id, j.depth, j.slot, true, j.has_children, j.has_followers,
                       coalesce(j.on_failure, 'fail-parent') = 'fail-parent',
                       coalesce(j.on_failure = 'remove', false) and j.parent_id is not null,
                       coalesce(j.name, j.task_identifier), 'failed', u.error, u.reason,
                       u.cause_id)::pgworker.ended order by j.id),
         array_agg(j.id order by j.id), array_agg(u.error order by j.id), array_agg(u.cause_id order by j.id)
  into v_failed, v_ids, v_errors, v_causes
  from unnest(v_ids, v_errors, v_causes, v_reasons) as u(id, error, cause_id, reason)
  join pgworker.job j on j.id = any (array[u.id])
  where (j.id in (select h.id from unnest(v_held) as h(id))) is true and j.locked_by is null;
  if v_ids is not null then
    update pgworker.job j set settled = true where j.id = any (v_ids);
    perform pgworker.finish(v_ids, array_fill('failed'::text, array[cardinality(v_ids)]), v_errors, null, false, v_causes);
  end if;
  return v_failed;
end
$$;
comment on function pgworker.fail_parents(pgworker.ended[]) is
  'Internal: the parents of these jobs, which have not ended well, fail because of them; those that run are asked to '
  'stop. Returns the ones that have ended, marked as settled: what that means is the caller''s next step.';

create function pgworker.cancel_pending(p_ids bigint[], p_errors text[], p_causes bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_held bigint[];
begin
  v_held := pgworker.lock_free(array(select j.id from pgworker.job j where j.id = any (p_ids) and j.locked_by is null));
  v_held := array(select j.id from pgworker.job j where j.id = any (v_held) and j.locked_by is null);
  perform pgworker.postpone(array_agg(u.id), 'cancel', null, array_agg(u.error), array_agg(u.cause_id))
  from unnest(p_ids, p_errors, p_causes) as u(id, error, cause_id)
  where u.id not in (select h.id from unnest(v_held) as h(id))
    and exists (select from pgworker.job j where j.id = u.id and j.locked_by is null offset 0);
  if cardinality(v_held) > 0 then
    perform pgworker.finish(array_agg(u.id), array_agg('cancelled'::text), array_agg(u.error), null, false,
                            array_agg(u.cause_id))
    from unnest(p_ids, p_errors, p_causes) as u(id, error, cause_id)
    where (u.id in (select h.id from unnest(v_held) as h(id))) is true;
  end if;
end
$$;
comment on function pgworker.cancel_pending(bigint[], text[], bigint[]) is
  'Internal: those of these jobs that do not run end as cancelled, with these errors and causes.';

create function pgworker.settle_followers(p_ended pgworker.ended[], p_parents bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_ids     bigint[];
  v_slots   smallint[];
  v_errors  text[];
  v_causes  bigint[];
begin
  select array_agg(d.job_id), array_agg(d.slot) into v_ids, v_slots
  from unnest(p_ended) as e
  cross join lateral (select d.job_id, d.slot from pgworker.dependency d where d.after_id = e.id offset 0) as d
  where e.has_followers and not e.fails and exists (select from pgworker.job j where j.id = d.job_id offset 0);
  if v_ids is not null then
    perform pgworker.open_gates(pgworker.count_down(true, v_ids, v_slots, null));
  end if;

  -- When there is a parent it fails, and takes them with it. Without one they would wait for ever.
  with recursive behind as (
    select d.job_id, e.error, coalesce(e.cause_id, e.id) as cause_id
    from unnest(p_ended) as e
    cross join lateral (select d.job_id from pgworker.dependency d where d.after_id = e.id offset 0) as d
    where e.has_followers and e.fails
      and e.parent_id not in (select p.id from unnest(p_parents) as p(id))
    union
    select d.job_id, b.error, b.cause_id
    from behind b
    cross join lateral (select d.job_id from pgworker.dependency d where d.after_id = b.job_id offset 0) as d
  )
  select array_agg(b.job_id), array_agg(b.error), array_agg(b.cause_id) into v_ids, v_errors, v_causes
  from (select distinct on (u.job_id) u.job_id, u.error, u.cause_id from behind u order by u.job_id) as b;
  if v_ids is not null then
    perform pgworker.cancel_pending(v_ids, v_errors, v_causes);
  end if;
end
$$;
comment on function pgworker.settle_followers(pgworker.ended[], bigint[]) is
  'Internal: siblings that waited for jobs that have ended start, or, where these did not end well and no parent is '
  'there to fail (p_parents: those that are), end as cancelled.';

create function pgworker.settle_ended(p_ended pgworker.ended[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_levels  pgworker.ended_level[];                -- the deepest first
  v_next    int := 1;
  v_level   pgworker.ended[];
  v_failing pgworker.ended[];
  v_failed  pgworker.ended[];
  v_all     record;
  v_parents bigint[];                              -- those that are live
  v_held    bigint[];                              -- counters: by others
  v_ids     bigint[];
  v_done    bigint[];                              -- one level down: what was below them has been stopped
  v_slots   smallint[];
  v_roots   bigint[];
  v_errors  text[];
  v_causes  bigint[];
begin
  -- Sorted once: to look for each level among all that are left would take levels times jobs.
  v_levels := array(select row(e.depth, array_agg(e))::pgworker.ended_level
                    from unnest(p_ended) as e group by e.depth order by e.depth desc);
  loop
    -- The parents that failed are one level up from here, and whatever else has ended is there or further up.
    v_level := v_failed;
    if v_next <= cardinality(v_levels) and (v_level is null or (v_levels[v_next]).depth = (v_level[1]).depth) then
      v_level := (v_levels[v_next]).jobs || v_level;
      v_next := v_next + 1;
    end if;
    exit when v_level is null;
    v_failed := null;
    select bool_or(e.has_followers) as followed, bool_or(e.owns) as own, bool_or(e.vanishes) as vanish,
           bool_or(e.parent_id is null) as rooted, count(distinct e.parent_id) as parents
    into v_all
    from unnest(v_level) as e;

    -- Downwards. Counters of what is gone: a session that is just counting down on one holds it.
    if v_all.own then
      v_ids := array(select e.id from unnest(v_level) as e where e.owns);
      v_held := pgworker.lock_counters(v_ids);
      perform pgworker.postpone(v_held, 'forget');
      delete from pgworker.counter c
      where c.job_id = any (v_ids) and c.job_id not in (select u.id from unnest(v_held) as u(id));
      select array_agg(e.id), array_agg(e.root_id), array_agg(e.error), array_agg(coalesce(e.cause_id, e.id))
      into v_ids, v_roots, v_errors, v_causes
      from unnest(v_level) as e where e.stops;
      if v_ids is not null then
        perform pgworker.stop_below(v_ids, v_roots, v_errors, v_causes, v_done);
      end if;
      v_done := v_ids;
    end if;

    -- Sideways.
    v_parents := array(select p.id from pgworker.job p
                       where p.id = any (array(select distinct e.parent_id from unnest(v_level) as e)));
    if v_all.followed then
      perform pgworker.settle_followers(v_level, v_parents);
    end if;

    -- Upwards.
    select array_agg(e.parent_id), array_agg(e.slot), array_agg(e) filter (where e.fails)
    into v_ids, v_slots, v_failing
    from unnest(v_level) as e
    where e.slot is not null and (e.parent_id in (select p.id from unnest(v_parents) as p(id))) is true;
    if v_ids is not null then
      v_ids := pgworker.count_down(false, v_ids, v_slots, array(select f.parent_id from unnest(v_failing) as f));
      if v_ids is not null then
        perform pgworker.release(array(select u.id from unnest(v_ids) as u(id)
                                       except select f.parent_id from unnest(v_failing) as f));
      end if;
      if v_failing is not null then
        v_failed := pgworker.fail_parents(v_failing);
      end if;
    end if;

    -- What nobody is to see any more: by policy, because it was deleted, or because its parent was.
    if v_all.vanish or v_all.parents > cardinality(v_parents) then
      select array_agg(e.id), array_agg(e.root_id) into v_ids, v_roots
      from unnest(v_level) as e
      where e.vanishes
         or e.parent_id is not null
            and e.parent_id not in (select p.id from unnest(v_parents) as p(id))
            and not exists (select from pgworker.finished f where f.id = e.parent_id offset 0);
      if v_ids is not null then
        perform pgworker.forget(v_ids, v_roots);
      end if;
    end if;

    if v_all.rooted then
      perform pgworker.compensate(array(select e.id from unnest(v_level) as e
                                        where e.parent_id is null and e.state <> 'completed'));
    end if;
  end loop;
end
$$;
comment on function pgworker.settle_ended(pgworker.ended[]) is
  'Internal: does what the end of these jobs means for the others in their trees.';

-- SECURITY DEFINER: whoever may delete a job need not know of trees.
create function pgworker.settle() returns trigger
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
  v_ended   pgworker.ended[];
  v_parents bigint[];
  v_slots   smallint[];
  v_counts  int[];
  v_plain   boolean;
  v_rooted  boolean;
  v_trees   boolean;
  v_recorded boolean;
  v_placed  boolean;                               -- some ran, in a queue or under limits
begin
  select bool_or(p.of_tree), bool_or(p.recorded), array_agg(p.parent_id) filter (where p.of_tree),
         array_agg(p.slot) filter (where p.of_tree), array_agg(p.n) filter (where p.of_tree),
         bool_and(p.plain) filter (where p.of_tree)
           and max(p.depth) filter (where p.of_tree) = min(p.depth) filter (where p.of_tree),
         bool_or(p.parent_id is null) filter (where p.of_tree), bool_or(p.placed)
  into v_trees, v_recorded, v_parents, v_slots, v_counts, v_plain, v_rooted, v_placed
  from (select g.parent_id, g.slot, g.depth, g.root_id is not null and not g.settled as of_tree, count(*)::int as n,
               bool_or(g.recorded) as recorded,
               bool_or(g.locked_by is not null and (g.queue_name is not null or g.lane is not null)) as placed,
               bool_and(g.slot is not null and not (g.has_children or g.waiting or g.has_followers)) as plain
        from gone g
        group by g.parent_id, g.slot, g.depth, g.root_id is not null and not g.settled) as p;
  if v_recorded then
    perform pgworker.forget_attempts(array(select g.id from gone g where g.recorded));
  end if;
  if v_trees then
    -- Nearly always: leaves of one level that have completed, as finish() has said, and nothing follows from that but the
    -- count of their parents. Of each job no more is looked at than that needs: children then cost little more than jobs
    -- that are in no tree.
    if v_plain and current_setting('pgworker.completing', true) = pg_trigger_depth()::text
       and not exists (select from unnest(v_parents) as p(id)
                       where not exists (select from pgworker.job j where j.id = p.id offset 0)) then
      v_parents := pgworker.count_down(false, v_parents, v_slots, null, v_counts);
      if v_parents is not null then
        perform pgworker.release(v_parents);
      end if;
    else
      -- A tree that was to be undone if it fails does not vanish: a root that was removed is kept, as cancelled.
      if v_rooted then
        insert into pgworker.finished
        select r.*
        from gone g
        cross join lateral jsonb_populate_record(
          null::pgworker.finished,
          to_jsonb(g) || jsonb_build_object(
            'state', 'cancelled', 'started_at', g.locked_at, 'finished_at', pgworker.clock(), 'unique_until', null,
            'keep_until', pgworker.clock() + coalesce((select t.keep_failed from pgworker.task t
                                                       where t.identifier = g.task_identifier),
                                                      pgworker.interval_setting('keep_failed')),
            'last_error', format('job %s was removed', g.id))) as r
        where g.id = g.root_id and exists (select from pgworker.compensation c where c.root_id = g.id offset 0)
          and not exists (select from pgworker.finished f where f.id = g.id offset 0);
      end if;

      select array_agg(row(g.id, g.parent_id, g.root_id, g.depth, g.slot, g.has_children or g.waiting,
                           g.has_children and (g.locked_by is null or f.state is distinct from 'completed'),
                           g.has_followers,
                           f.state is distinct from 'completed' and coalesce(g.on_failure, 'fail-parent') = 'fail-parent',
                           f.state is null or f.state <> 'completed' and coalesce(g.on_failure = 'remove', false)
                                              and g.parent_id is not null,
                           coalesce(g.name, g.task_identifier), f.state, coalesce(f.error, format('job %s was removed', g.id)),
                           f.error, f.cause_id)::pgworker.ended)
      into v_ended
      from gone g
      left join lateral (
        select o.state, o.cause_id,
               case when o.state = 'completed' then format('job %s was completed', o.id) else o.last_error end as error
        from pgworker.finished o where o.id = g.id offset 0) as f on true
      where g.root_id is not null and not g.settled;
      perform pgworker.settle_ended(v_ended);
    end if;
  end if;

  if v_placed then
    perform pgworker.free_places(array_agg(g.queue_name) filter (where g.queue_name is not null),
                                 array_agg(g.id) filter (where g.queue_name is not null),
                                 array_agg(g.id) filter (where g.lane is not null))
    from gone g where g.locked_by is not null;
  end if;
  return null;
end
$$;
comment on function pgworker.settle() is
  'Internal: trigger function of table job: jobs have left it, and others in their trees, in their queues or under the '
  'limits of their tasks may have waited for them.';

create trigger settle after delete on pgworker.job
referencing old table as gone for each statement execute function pgworker.settle();

create function pgworker.settle_leftovers() returns boolean
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_left  record;
  v_state text;
begin
  -- One a call: each may lock counters upwards from where it is, and two in one transaction might do so out of order.
  delete from pgworker.unsettled u
  where u.ctid = any (array(select o.ctid from pgworker.unsettled o where o.due <= pgworker.clock()
                            order by o.due, o.n limit 1 for update skip locked))
  returning u.job_id, u.what, u.root_id, u.reason, u.cause_id, u.since, nextval('pgworker.turn') as n into v_left;
  if not found then
    return false;
  end if;
  case v_left.what
    when 'release' then
      perform pgworker.release(array[v_left.job_id]);
    when 'open' then
      perform pgworker.open_gates(array[v_left.job_id]);
    when 'stop' then
      perform pgworker.stop_below(array[v_left.job_id], array[v_left.root_id], array[v_left.reason], array[v_left.cause_id],
                                  null);
      if not exists (select from pgworker.jobs o where o.id = v_left.job_id) then
        perform pgworker.forget(array[v_left.job_id], array[v_left.root_id]);
      end if;
    when 'fail', 'cancel' then
      v_state := case v_left.what when 'fail' then 'failed' else 'cancelled' end;
      if exists (select from pgworker.job j where j.id = v_left.job_id for update skip locked) then
        perform pgworker.ask_to_stop(array[j.id], v_state, array[v_left.reason], array[v_left.cause_id])
        from pgworker.job j where j.id = v_left.job_id and j.locked_by is not null and j.ends_as is null;
        perform pgworker.finish(array[j.id], array[v_state], array[v_left.reason], null, false, array[v_left.cause_id])
        from pgworker.job j where j.id = v_left.job_id and j.locked_by is null;
      elsif exists (select from pgworker.job j where j.id = v_left.job_id) then
        perform pgworker.postpone(array[v_left.job_id], v_left.what, null, array[v_left.reason], array[v_left.cause_id]);
      end if;
    when 'compensate' then
      perform pgworker.compensate(array[v_left.job_id]);
    else
      delete from pgworker.counter c
      where c.job_id = v_left.job_id and not exists (select from pgworker.job j where j.id = v_left.job_id);
      if not exists (select from pgworker.jobs o where o.id = v_left.job_id) then
        perform pgworker.drop_compensations(array[v_left.job_id]);
      end if;
  end case;
  -- What is held still waits a second, so that the others have their turn. What somebody has left meanwhile may be done
  -- by another session already, which waits for a counter of ours.
  update pgworker.unsettled u set due = pgworker.clock() + interval '1 second', since = least(u.since, v_left.since)
  where u.ctid = any (array(select o.ctid from pgworker.unsettled o
                            where o.n > v_left.n and o.due <= pgworker.clock() for update skip locked));
  return true;
end
$$;
comment on function pgworker.settle_leftovers() is
  'Internal: does one of the things that postpone() has left; false if there is none.';
