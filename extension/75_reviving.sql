-- 75_reviving.sql: finished jobs that run again
--
--   consequences    what in their trees ended only because of these jobs
--   lock_below      live jobs come before finished ones in the order of locks
--   rejoin          jobs that are live again find their place in their trees
--   revive_locked   makes finished jobs live, if nothing comes in between
--   revive          until nothing does
--   retry_jobs      the public function
--
-- Every job that failed or was cancelled because of another one says so (cause_id, which is always where it began). So a
-- retry undoes what followed: the siblings that were cancelled and the ancestors that failed are live again, and wait.
-- What completed stays completed.
-- Locks: live rows below them by id; compensations of their trees (59_compensating.sql); finished rows by id; what they come
-- after (dependency); then counters, deepest first, as in 57_settling.sql. While we wait for these, others may retry and end
-- jobs of the same tree, so that a live job that is to be counted again is one that lock_below() has not locked. If
-- somebody holds it then, everything is given up and begun anew (PW000, which nobody sees): to wait for it out of order
-- might be for ever, and who is not counted where he says he is would be taken off nevertheless.

create function pgworker.consequences(p_ids bigint[]) returns bigint[]
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_roots  constant bigint[] := array(select distinct f.root_id from pgworker.finished f where f.id = any (p_ids));
  v_ids    bigint[] := p_ids;
  v_again  bigint[];
  v_caused bigint[];
begin
  loop
    with recursive below as (
      select f.id, f.root_id from pgworker.finished f where f.id = any (v_ids)
      union
      select c.id, b.root_id
      from below b
      cross join lateral (select f.id from pgworker.finished f
                          where f.root_id = b.root_id and f.parent_id = b.id and f.state in ('failed', 'cancelled')
                          offset 0) as c
    )
    select coalesce(array_agg(b.id), '{}') into v_again from below b;
    v_caused := array(select f.id from pgworker.finished f
                      where f.root_id = any (v_roots) and (f.cause_id in (select u.id from unnest(v_again) as u(id))) is true
                        and f.state in ('failed', 'cancelled'));
    -- A parent that is live again must not start while another of its children has failed: two may have, at once.
    v_ids := array(select c.id from pgworker.finished c
                   where c.root_id = any (v_roots) and (c.parent_id in (select u.id from unnest(v_caused) as u(id))) is true
                     and c.state in ('failed', 'cancelled') and coalesce(c.on_failure, 'fail-parent') = 'fail-parent'
                     and c.id not in (select u.id from unnest(v_again || v_caused) as u(id)));
    exit when cardinality(v_ids) = 0;
    v_ids := v_again || v_ids;
  end loop;
  return array(select u.id from unnest(v_again || v_caused) as u(id) except select u.id from unnest(p_ids) as u(id));
end
$$;
comment on function pgworker.consequences(bigint[]) is
  'Internal: what else is to run again when these finished jobs do: whatever failed or was cancelled below them, whatever '
  'did so anywhere in the tree because of any of these, and what else would have made the parents among these fail.';

create function pgworker.lock_below(p_pending bigint[], p_finished bigint[], out pending bigint[], out may bigint[])
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_roots  bigint[];
  v_near   bigint[];
  v_locked bigint[];
begin
  may := p_finished || pgworker.consequences(p_finished);
  v_roots := array(select distinct f.root_id from pgworker.finished f where f.id = any (may));
  v_near := array(select o.id from pgworker.job o
                  where o.root_id = any (v_roots)
                    and (o.parent_id in (select u.id from unnest(may) as u(id))
                         or o.cause_id in (select u.id from unnest(may) as u(id))
                         or o.id in (select f.parent_id from pgworker.finished f where f.id = any (may))
                         or o.id in (select d.after_id from unnest(may) as u(id)
                                     cross join lateral (select l.after_id from pgworker.dependency l
                                                         where l.job_id = u.id offset 0) as d)));
  v_locked := pgworker.lock_pending(p_pending, v_near);
  pending := array(select j.id from pgworker.job j
                   where j.id = any (v_locked) and j.locked_by is null
                     and (j.id in (select u.id from unnest(p_pending) as u(id))) is true
                   order by j.id);
end
$$;
comment on function pgworker.lock_below(bigint[], bigint[]) is
  'Internal: locks those of the first that are live and not running, and the live jobs that it will concern if the '
  'second run again (parents, children, those that come before, those that were asked to stop), in one go: whoever ends '
  'one of them now is done first, or sees what we do. pending: those of the first that it has locked; what has come to '
  'rest since would be out of order. may: what may run again; no others, for a live job below one that ended since is '
  'still counted by it.';

create function pgworker.rejoin(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_roots   constant bigint[] := array(select distinct j.root_id from pgworker.job j where j.id = any (p_ids));
  v_parents constant bigint[] := array(select distinct p.id
                                       from pgworker.job j
                                       cross join lateral (select p.id from pgworker.job p
                                                           where p.id = j.parent_id offset 0) as p
                                       where j.id = any (p_ids)
                                       except select u.id from unnest(p_ids) as u(id));
  v_below   bigint[];                              -- live, and locked by us
  v_spared  bigint[];                              -- who was to end because of these, and need not any more
  v_follows bigint[];                              -- siblings that wait for these still
  v_level   bigint[];
begin
  -- Locked by lock_below(); what has come since and is somebody else's goes on by itself.
  v_below := array(select j.id from pgworker.job j
                   where j.root_id = any (v_roots)
                     and (j.parent_id in (select u.id from unnest(p_ids) as u(id))
                          or j.ends_as is not null and j.cause_id in (select u.id from unnest(p_ids) as u(id)))
                   order by j.id for update skip locked);
  v_spared := array(select j.id from pgworker.job j
                    where j.id = any (v_below) and j.ends_as is not null
                      and (j.cause_id in (select u.id from unnest(p_ids) as u(id))) is true
                    union
                    select u.job_id from pgworker.unsettled u
                    where u.job_id = any (v_parents) and u.what = 'fail'
                      and (u.cause_id in (select i.id from unnest(p_ids) as i(id))) is true);
  v_follows := array(select distinct f.id
                     from pgworker.job j
                     cross join lateral (select d.job_id as id from pgworker.dependency d
                                         where d.after_id = j.id offset 0) as f
                     where j.id = any (p_ids) and j.has_followers
                       and exists (select from pgworker.job o where o.id = f.id offset 0)
                     except select u.id from unnest(p_ids) as u(id));
  -- Who forgets what these come after holds counters: he is waited for before we do.
  perform from pgworker.dependency d where d.job_id = any (p_ids) for update;
  -- All counters that are needed: those of live parents and of followers; of gates that live parents are behind, lest
  -- somebody opens one without seeing who is behind it; and what is left of these jobs' own, where somebody may be
  -- counting still.
  perform from pgworker.job j join pgworker.counter c on c.job_id = any (array[j.id])
  where j.id = any (p_ids || v_parents || v_spared || v_follows
                    || array(select p.gate_id from pgworker.job p where p.id = any (v_parents)))
    and (c.slot = 0 or j.id in (select u.id from unnest(p_ids || v_spared || v_follows) as u(id)))
  order by j.depth + (not c.after)::int desc, c.after desc, c.slot = 0, c.job_id, c.slot
  for update of c;
  -- From here on nobody is counted by them any more but by us.
  if exists (select from pgworker.job j
             where j.root_id = any (v_roots) and (j.parent_id in (select u.id from unnest(p_ids) as u(id))) is true
               and j.slot is not null
               and j.id not in (select u.id from unnest(v_below) as u(id))) then
    raise exception using errcode = 'PW000', message = 'a child of a job that is retried is held by somebody';
  end if;

  -- What their last end has left to be done is not to be done any more.
  delete from pgworker.counter c where c.job_id = any (p_ids);
  perform pgworker.drop_leftovers(p_ids, v_spared);
  delete from pgworker.notice n
  using pgworker.job j
  where n.job_id = j.id and n.notice = 'cancel' and j.id = any (v_spared) and j.locked_by = n.worker_id;
  -- Not a parent that is live again only since lock_below() looked: it is somebody else's, and was not asked to stop.
  update pgworker.job j set ends_as = null, cancel_reason = null, cause_id = null
  where j.id = any (v_below) and j.ends_as is not null
    and (j.cause_id in (select u.id from unnest(p_ids) as u(id))) is true;

  -- They are counted again: by live parents that have counters (others have ended, or never waited for anybody), ...
  with hit as materialized (
    select j.parent_id as id, count(*) as n from pgworker.job j
    where j.id = any (p_ids) and (j.parent_id in (select u.id from unnest(v_parents) as u(id))) is true
    group by j.parent_id
  ), counted as (
    update pgworker.counter c set pending = c.pending + h.n
    from hit h
    where c.job_id = any (array[h.id]) and not c.after and c.slot = 0
    returning c.job_id
  )
  update pgworker.job j set slot = 0
  where j.id = any (p_ids) and (j.parent_id in (select c.job_id from counted c)) is true;
  -- ... and by parents that are live again themselves, with whatever of theirs is live.
  with child as (
    update pgworker.job j set slot = 0
    where j.id = any (v_below) and (j.parent_id in (select u.id from unnest(p_ids) as u(id))) is true
    returning j.parent_id
  )
  insert into pgworker.counter (job_id, after, slot, pending)
  select c.parent_id, false, 0, count(*) from child c group by c.parent_id order by c.parent_id;
  -- Counted anew where nobody knows whether they have been taken off: what ended badly is not taken off by those that are
  -- to end because of it.
  update pgworker.counter c
  set pending = case when c.after then (select count(*) from pgworker.dependency d
                                        where d.job_id = c.job_id and d.slot = c.slot
                                          and exists (select from pgworker.job a where a.id = d.after_id offset 0))
                     else (select count(*) from pgworker.job j
                           where j.root_id = any (v_roots) and j.parent_id = c.job_id and j.slot = c.slot) end
  where c.job_id = any (v_spared || v_follows) and (c.after or c.job_id in (select u.id from unnest(v_spared) as u(id)));
  update pgworker.counter c
  set pending = c.pending + (select count(*) from pgworker.counter o
                             where o.job_id = c.job_id and o.after = c.after and o.slot > 0 and o.pending > 0)
  where c.job_id = any (v_spared || v_follows) and (c.after or c.job_id in (select u.id from unnest(v_spared) as u(id)))
    and c.slot = 0;

  -- Siblings that have to finish first.
  with waits as (
    select d.job_id, count(*) as n
    from pgworker.dependency d
    where d.job_id = any (p_ids) and exists (select from pgworker.job a where a.id = d.after_id offset 0)
    group by d.job_id
  ), counted as (
    insert into pgworker.counter (job_id, after, slot, pending)
    select w.job_id, true, 0, w.n from waits w order by w.job_id
    returning job_id
  )
  update pgworker.dependency d set slot = 0 from counted c where d.job_id = c.job_id;

  -- The nearest closed gate, from above downwards, since it may be the parent's.
  for v_level in
    select array_agg(j.id) from pgworker.job j where j.id = any (p_ids) group by j.depth order by j.depth
  loop
    update pgworker.job j
    set gate_id = coalesce(
          (select case when exists (select from pgworker.counter o where o.job_id = p.id and o.after and o.slot = 0)
                       then p.id else p.gate_id end
           from pgworker.job p where p.id = j.parent_id),
          (select c.job_id from pgworker.counter c where c.job_id = j.id and c.after and c.slot = 0))
    where j.id = any (v_level);
  end loop;
  update pgworker.job j set waiting = false
  where j.id = any (p_ids) and j.gate_id is null
    and not exists (select from pgworker.counter c
                    where c.job_id = j.id and not c.after and c.slot = 0 and c.pending > 0 offset 0);
end
$$;
comment on function pgworker.rejoin(bigint[]) is
  'Internal: jobs of trees that are live again, marked as waiting, are counted by their parents, wait for siblings and '
  'children as far as these are live, and are free to start if nothing holds them back.';

-- A key that a live job has taken meanwhile stays with that one: the revived job runs without a key rather than not at all.
create function pgworker.revive_locked(
  p_ids bigint[], p_may bigint[], p_states text[], p_run_at timestamptz, p_priority int, p_attempts int, p_max_attempts int
) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_late  constant bigint[] := pgworker.lock_compensated(p_ids);
  v_asked bigint[];
  v_again bigint[];
  v_ids   bigint[];
  v_nodes bigint[];
  v_keeps boolean;
begin
  if cardinality(v_late) > 0 then
    raise notice using message = format('passed over, for their trees are being undone: jobs %s', array_to_string(v_late, ', ')),
      hint = 'Add the tree anew.';
  end if;
  v_asked := array(
    select f.id from pgworker.finished f
    where f.id = any (p_ids) and f.state = any (p_states) and f.id not in (select u.id from unnest(v_late) as u(id))
      and coalesce(p_attempts, f.attempts) < coalesce(p_max_attempts, f.max_attempts)
    order by f.id);
  v_again := v_asked || pgworker.consequences(v_asked);
  v_ids := array(
    select f.id from pgworker.finished f
    where f.id = any (v_again) and (f.id in (select u.id from unnest(p_may) as u(id))) is true
      and f.state in ('failed', 'cancelled')
    order by f.id
    for update);
  -- Twice: with their keys, in the order of keys, and what meets a live job once more without.
  for v_keeps in select k.keeps from unnest(array[true, false]) with ordinality as k(keeps, n) order by k.n loop
    insert into pgworker.job (id, run_at, created_at, parent_id, root_id, depth, revision, priority, attempts,
                              max_attempts, waiting, has_children, has_followers, task_identifier, payload, queue_name,
                              key, flags, last_error, progress, name, on_failure, limit_key, unique_until,
                              recorded, lane)
    select f.id, case when a.asked then coalesce(p_run_at, f.run_at) else f.run_at end, f.created_at, f.parent_id,
           f.root_id, f.depth, f.revision, case when a.asked then coalesce(p_priority, f.priority) else f.priority end,
           case when a.asked then coalesce(p_attempts, f.attempts) else 0 end,
           case when a.asked then coalesce(p_max_attempts, f.max_attempts) else f.max_attempts end,
           f.root_id is not null, f.has_children, f.has_followers, f.task_identifier, f.payload, f.queue_name,
           case when v_keeps then f.key end, f.flags, case when f.cause_id is null then f.last_error end, f.progress,
           f.name, f.on_failure, f.limit_key, case when v_keeps then f.unique_until end, f.recorded,
           (select pgworker.lane(t.keyed, f.limit_key, f.queue_name) from pgworker.task t
            where t.identifier = f.task_identifier and t.limited)
    from pgworker.finished f
    cross join lateral (select (f.id in (select u.id from unnest(v_asked) as u(id))) is true as asked offset 0) as a
    where f.id = any (v_ids) and (v_keeps or not exists (select from pgworker.job j where j.id = f.id offset 0))
    order by f.key, f.id
    on conflict (key) where key is not null do nothing;
  end loop;
  delete from pgworker.finished f where f.id = any (v_ids);
  update pgworker.compensation c set node = null, finished_at = null where c.node_id = any (v_ids) and c.node is not null;
  v_nodes := array(select j.id from pgworker.job j where j.id = any (v_ids) and num_nulls(j.root_id) = 0);
  if cardinality(v_nodes) > 0 then
    perform pgworker.rejoin(v_nodes);
    -- Of a tree that stays failed: what completes now is undone too.
    perform pgworker.compensate(array(select distinct j.root_id from pgworker.job j where j.id = any (v_nodes)));
  end if;
  return v_ids;
end
$$;
comment on function pgworker.revive_locked(bigint[], bigint[], text[], timestamptz, int, int, int) is
  'Internal: makes finished jobs that have attempts left live again, in trees with what followed from their end, and '
  'returns the ids of all. p_may: what lock_below() returned. Raises PW000 if that has to look again.';

create function pgworker.revive(
  p_ids bigint[], p_pending bigint[], p_states text[], p_run_at timestamptz, p_priority int, p_attempts int,
  p_max_attempts int, out pending bigint[], out revived bigint[]
)
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_may bigint[];
begin
  loop
    begin
      select b.pending, b.may into pending, v_may from pgworker.lock_below(p_pending, p_ids) as b;
      revived := pgworker.revive_locked(p_ids, v_may, p_states, p_run_at, p_priority, p_attempts, p_max_attempts);
      exit;
    exception when sqlstate 'PW000' then
    end;
  end loop;
end
$$;
comment on function pgworker.revive(bigint[], bigint[], text[], timestamptz, int, int, int) is
  'Internal: makes finished jobs that have attempts left live again, in trees with what followed from their end. revived: '
  'the ids of all; pending: those of p_pending that were live and not running, locked.';

create function pgworker.retry_jobs(job_ids bigint[]) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
begin
  select r.revived into v_ids
  from pgworker.revive(retry_jobs.job_ids, null, array['failed', 'cancelled'], pgworker.clock(now()), null, 0, null) as r;
  perform pgworker.announce(v_ids);
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.retry_jobs(bigint[]) is
  'Failed and cancelled jobs run again, now and with fresh attempts; a key that a live job has taken meanwhile stays with '
  'that one. In a tree, so does what failed or was cancelled below them; ancestors that failed because of them, siblings '
  'that were cancelled with these, and other children that made those ancestors fail, are live again; what completed '
  'stays completed. Jobs of a tree whose compensations have begun are passed over. Returns all of these.';
