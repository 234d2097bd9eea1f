-- 60_presence.sql: workers that come, stay, go and die
--
--   check_client        is this client made for this schema
--   presence            who is there (a view)
--   register_worker     a worker comes
--   heartbeat           it is still there, and learns what it must stop
--   unregister_worker   it goes
--   held_jobs           what it holds, if it has lost count
--   tell_lost           what it will hear that it holds no more
--   give_back           its jobs go back, whatever the reason
--   forget_workers      workers that hold nothing any more
--   prune               finished jobs whose time is over
--   maintain            notices who has died or hangs, does what was left to be done in trees, prunes, and runs schedules
--
-- A worker without a lease is present while some session holds the advisory lock (1886874482, low 31 bits of its id): it
-- vanishes the moment the session dies, with nothing written while it lives. maintain() gives its jobs back when the lock
-- has been gone for the grace, which also covers a restart of the server, when all locks vanish and all workers return.
-- A worker with a lease is present until lease_until.
-- Locks: worker rows with SKIP LOCKED (a claim in progress holds its worker's), then job rows by id, then queues by name.

create function pgworker.check_client(protocol int) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if protocol is distinct from 1 then
    raise exception using errcode = 'PW004',
      message = format('the client speaks protocol %s, pgworker %s in this database speaks 1',
                       coalesce(protocol::text, 'null'), pgworker.version()),
      hint = case when protocol < 1 then 'Upgrade the client.'
                  else 'Upgrade the extension (ALTER EXTENSION pgworker UPDATE, or pgworker upgrade).' end;
  end if;
end
$$;
comment on function pgworker.check_client(int) is
  'Raises PW004 when a client that speaks this protocol number is too old or too new for the schema.';

create function pgworker.presence_key(p_worker_id bigint) returns int
language sql immutable parallel safe
return (p_worker_id & 2147483647)::int;
comment on function pgworker.presence_key(bigint) is 'Internal: second half of a worker''s advisory lock.';

create view pgworker.presence as
select w.id, w.name, w.lease, w.lease_until, w.missing_since, w.version,
       case when w.lease is not null then w.lease_until > (select pgworker.clock())
            else pgworker.presence_key(w.id)::oid in (
                   select l.objid from pg_catalog.pg_locks l
                   where l.locktype = 'advisory' and l.classid = 1886874482 and l.objsubid = 2 and l.granted
                     and l.database = (select d.oid from pg_catalog.pg_database d
                                       where d.datname = current_database())) end as present
from pgworker.worker w;
comment on view pgworker.presence is 'Internal: registered workers, and whether they are present.';

create function pgworker.register_worker(
  name text default null, lease interval default null, version text default null, timeouts jsonb default null
) returns bigint
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now constant timestamptz := pgworker.clock();
  v_id  bigint;
begin
  if lease not between interval '1 microsecond' and interval '10 years' then
    raise exception using errcode = '22023',
      message = format('lease must be longer than nothing and at most 10 years, got %s', lease),
      hint = 'Give an interval such as 30 seconds and call heartbeat() well within it, or null for presence by session.';
  end if;
  perform pgworker.check_timeouts(timeouts);
  insert into pgworker.worker as w (name, lease, lease_until, registered_at, version, timeouts)
  values (register_worker.name, register_worker.lease, v_now + register_worker.lease, v_now,
          coalesce(register_worker.version, pgworker.version()), nullif(register_worker.timeouts, '{}'))
  returning w.id into v_id;
  if lease is null then
    perform pg_advisory_lock_shared(1886874482, pgworker.presence_key(v_id));
  end if;
  return v_id;
end
$$;
comment on function pgworker.register_worker(text, interval, text, jsonb) is
  'Registers a worker and returns its id. Without a lease it is present as long as this database session lives; with one '
  'it must call heartbeat() before the lease is over (for transaction poolers). version: the one of pgworker that it was '
  'made for, null for the one that is installed; doctor() compares. timeouts: seconds by task, where its own are not those '
  'of configure_task; what it has not stopped by then, maintain() takes away. Raises 22023 for what are no timeouts.';

create function pgworker.heartbeat(worker_id bigint) returns table (job_id bigint, notice text)
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_lease interval;
begin
  select w.lease into v_lease from pgworker.worker w where w.id = heartbeat.worker_id;
  if not found then
    perform pgworker.unknown_worker(
      heartbeat.worker_id, 'It was gone for too long and its jobs were given back: register anew.');
  end if;
  if v_lease is not null then
    update pgworker.worker w set lease_until = pgworker.clock() + w.lease where w.id = heartbeat.worker_id;
  elsif not exists (select from pg_catalog.pg_locks l
                    where l.locktype = 'advisory' and l.classid = 1886874482 and l.objsubid = 2 and l.granted
                      and l.objid = pgworker.presence_key(heartbeat.worker_id)::oid and l.pid = pg_backend_pid()) then
    -- A new session of the same worker: it is present here from now on. Shared, because the server may not have noticed
    -- yet that the old one is gone.
    perform pg_advisory_lock_shared(1886874482, pgworker.presence_key(heartbeat.worker_id));
    -- The next absence has a grace of its own, though no maintain() came while it was back.
    update pgworker.worker w set missing_since = null
    where w.ctid = any (array(select o.ctid from pgworker.worker o
                              where o.id = heartbeat.worker_id and o.missing_since is not null
                              for no key update skip locked));
  end if;

  if not exists (select from pgworker.notice n where n.worker_id = heartbeat.worker_id) then
    return;
  end if;
  -- Said no more: to stop a job that it has ended, and that it lost one which it has claimed anew since.
  delete from pgworker.notice n
  where n.worker_id = heartbeat.worker_id
    and (n.notice = 'lost') = exists (select from pgworker.job j
                                      where j.id = n.job_id and j.locked_by = heartbeat.worker_id offset 0);
  return query
  select n.job_id, n.notice from pgworker.notice n where n.worker_id = heartbeat.worker_id order by n.job_id;
  delete from pgworker.notice n where n.worker_id = heartbeat.worker_id and n.notice = 'lost';
end
$$;
comment on function pgworker.heartbeat(bigint) is
  'Renews the presence of a worker (its lease, or from a new session its session lock) and says which of its jobs are to '
  'be stopped (cancel, until it has ended them) or are no longer its own (lost, once). Raises PW002 for an unknown worker.';

create function pgworker.tell_lost(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  insert into pgworker.notice (worker_id, job_id, notice)
  select j.locked_by, j.id, 'lost' from pgworker.job j
  where j.id = any (p_ids) and exists (select from pgworker.worker w where w.id = j.locked_by offset 0)
  on conflict (worker_id, job_id) do update set notice = 'lost';
end
$$;
comment on function pgworker.tell_lost(bigint[]) is
  'Internal: the workers that hold these jobs, whose rows the caller has locked, will hear from heartbeat() that they have '
  'lost them.';

-- Gives jobs of workers back: those named, or all that they hold. p_refund: the attempt does not count, it was never
-- started or was stopped in good order. Otherwise a job whose attempts are used up fails with what happened to its worker
-- (p_reason). Returns the ids.
-- There is no index on locked_by (claims could not be HOT), so giving all back reads the live table once: it happens when
-- a worker has died or says goodbye. All rows are locked in one go, by id, whichever worker they belong to; jobs whose row,
-- or whose queue's, somebody else holds at this moment are left, and with them the worker, for the next maintain(): nobody's
-- rescue waits for another transaction.
create function pgworker.give_back(p_worker_ids bigint[], p_job_ids bigint[], p_refund boolean, p_reason text)
returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_ids    bigint[];
  v_over   bigint[];
  v_states text[];
  v_errors text[];
  v_names  text[];
  v_queued bigint[];
  v_limited bigint[];
  v_records constant boolean := pgworker.records();
begin
  if p_job_ids is null then
    v_ids := pgworker.lock_free(array(select j.id from pgworker.job j where j.locked_by = any (p_worker_ids)));
    v_ids := pgworker.lock_free_queues(array(select j.id from pgworker.job j
                                             where j.id = any (v_ids) and j.locked_by = any (p_worker_ids)));
  else
    v_ids := array(select j.id from pgworker.job j where j.id = any (p_job_ids) and j.locked_by = any (p_worker_ids)
                   order by j.id for update);
  end if;
  if cardinality(v_ids) = 0 then
    return v_ids;
  end if;

  -- Noted first, while the rows still say who held them. Whoever lives, or cannot be forgotten yet because somebody has a
  -- row of its locked, and comes back, learns what it has lost.
  if not p_refund then
    perform pgworker.tell_lost(v_ids);
  end if;
  update pgworker.job j
  set last_error = format('worker %s %s',
                          coalesce((select w.id || ' (' || w.name || ')' from pgworker.worker w where w.id = j.locked_by),
                                   j.locked_by::text), p_reason)
  where j.id = any (v_ids) and p_reason is not null;

  select array_agg(j.id), array_agg(coalesce(j.ends_as, 'failed')),
         array_agg(coalesce(j.cancel_reason, j.last_error))
  into v_over, v_states, v_errors
  from pgworker.job j
  where j.id = any (v_ids) and (j.ends_as is not null or (not p_refund and j.attempts >= j.max_attempts));
  -- What goes back first: if it is a sibling of what fails for good, it is then cancelled with the others.
  with noted as (
    insert into pgworker.attempt (job_id, started_at, ended_at, worker_id, attempt, outcome, worker_name, error)
    select j.id, j.locked_at, pgworker.clock(), j.locked_by, j.attempts,
           case when p_refund then 'released' else 'rescued' end,
           (select w.name from pgworker.worker w where w.id = j.locked_by), case when not p_refund then j.last_error end
    from pgworker.job j
    where v_records and j.id = any (v_ids) and j.ends_as is null and (p_refund or j.attempts < j.max_attempts)
  ), back as (
    update pgworker.job j
    set locked_at = null, locked_by = null, attempts = j.attempts - p_refund::int, recorded = j.recorded or v_records
    where j.id = any (v_ids) and j.ends_as is null and (p_refund or j.attempts < j.max_attempts)
    returning j.id, j.queue_name, j.lane
  )
  select array_agg(b.queue_name) filter (where b.queue_name is not null),
         array_agg(b.id) filter (where b.queue_name is not null), array_agg(b.id) filter (where b.lane is not null)
  into v_names, v_queued, v_limited
  from back b;
  perform pgworker.free_places(v_names, v_queued, v_limited);
  if p_refund then
    perform pgworker.refund_permits(v_limited);
  end if;
  if v_over is not null then
    perform pgworker.finish(v_over, v_states, v_errors, null, p_lost => not p_refund);
  end if;
  perform pgworker.wake_to_sweep();           -- they lie behind the cursors
  return v_ids;
end
$$;
comment on function pgworker.give_back(bigint[], bigint[], boolean, text) is
  'Internal: makes jobs of workers claimable again, or ends those that may not run again, and returns the ids of all.';

-- When the connection breaks under a claim, the claim may have been committed and its rows lost on the way. The worker
-- lives on, so nobody would rescue them: it asks what it holds, and releases what it does not know.
create function pgworker.held_jobs(worker_id bigint) returns table (job_id bigint, attempts int)
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
  select j.id, j.attempts::int from pgworker.job j where j.locked_by = held_jobs.worker_id order by j.id;
end
$$;
comment on function pgworker.held_jobs(bigint) is
  'The jobs that a worker holds, with their attempts: for a worker whose connection broke under a claim. Reads the whole '
  'live table.';

create function pgworker.forget_workers(p_worker_ids bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  v_ids constant bigint[] := array(select u.id from unnest(p_worker_ids) as u(id)
                                   except select j.locked_by from pgworker.job j where j.locked_by = any (p_worker_ids));
  v_gone bigint[];
begin
  -- Whoever claims in its name at this moment holds its row; the lock keeps others from it, and then it is looked at anew.
  v_gone := array(select w.id from pgworker.worker w where w.id = any (v_ids) order by w.id for update skip locked);
  -- A claim that found nothing may not have been committed yet.
  delete from pgworker.interest i
  where i.ctid = any (array(
    select o.ctid from pgworker.interest o where o.worker_id = any (v_gone) for update skip locked));
  v_gone := array(select u.id from unnest(v_gone) as u(id)
                  except select j.locked_by from pgworker.job j where j.locked_by = any (v_gone)
                  except select i.worker_id from pgworker.interest i where i.worker_id = any (v_gone));
  delete from pgworker.notice n where n.worker_id = any (v_gone);
  delete from pgworker.worker w where w.id = any (v_gone);
  return v_gone;
end
$$;
comment on function pgworker.forget_workers(bigint[]) is
  'Internal: removes those of these workers that hold nothing any more and claim nothing, and returns them.';

create function pgworker.unregister_worker(worker_id bigint) returns void
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_lease interval;
begin
  select w.lease into v_lease from pgworker.worker w where w.id = unregister_worker.worker_id for update;
  if not found then
    perform pgworker.unknown_worker(
      unregister_worker.worker_id, 'It was unregistered before, or was gone for too long; nothing is left to be done.');
  end if;
  perform pgworker.give_back(array[unregister_worker.worker_id], null, true, null);
  if cardinality(pgworker.forget_workers(array[unregister_worker.worker_id])) = 0 then
    update pgworker.worker w set lease_until = pgworker.clock() where w.id = unregister_worker.worker_id;
  end if;
  if v_lease is null and exists (
       select from pg_catalog.pg_locks l
       where l.locktype = 'advisory' and l.classid = 1886874482 and l.objsubid = 2 and l.granted
         and l.objid = pgworker.presence_key(unregister_worker.worker_id)::oid and l.pid = pg_backend_pid()) then
    perform pg_advisory_unlock_shared(1886874482, pgworker.presence_key(unregister_worker.worker_id));
  end if;
end
$$;
comment on function pgworker.unregister_worker(bigint) is
  'A worker says goodbye: what it still holds goes back with its attempt. Raises PW002 for an unknown worker.';

create function pgworker.prune(p_now timestamptz) returns boolean
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_old   bigint[];
  v_roots bigint[];
  v_nodes bigint[];
begin
  v_old := array(select f.id from pgworker.finished f
                 where f.keep_until < p_now and f.keep_until < 'infinity'
                 order by f.keep_until limit 1000 for update skip locked);
  if cardinality(v_old) = 0 then
    return false;
  end if;
  -- A tree goes with its root and not before; where something of it is live after all, or is still to be
  -- undone, the root waits for that.
  update pgworker.finished f set keep_until = p_now + interval '1 hour'
  where f.id = any (v_old) and f.root_id is not null
    and (exists (select from pgworker.job j where j.root_id = f.id offset 0)
         or exists (select from pgworker.unsettled u where u.job_id = f.id and u.what = 'compensate' offset 0));
  v_roots := array(select f.id from pgworker.finished f
                   where f.id = any (v_old) and f.root_id is not null and f.keep_until < p_now);
  v_nodes := array(select f.id from pgworker.finished f
                   where f.root_id = any (v_roots) and f.parent_id is not null limit 1000 for update skip locked);
  delete from pgworker.finished f where f.id = any (v_nodes);
  delete from pgworker.dependency d where d.job_id = any (v_nodes);
  with gone as (
    delete from pgworker.finished f
    where f.id = any (v_old) and f.keep_until < p_now
      and not exists (select from pgworker.finished o where o.root_id = f.id and o.parent_id is not null offset 0)
    returning f.id, f.root_id
  )
  select array_agg(g.id) filter (where g.root_id is not null) into v_roots from gone g;
  perform pgworker.drop_compensations(v_roots);
  return cardinality(v_old) = 1000 or cardinality(v_nodes) > 0;
end
$$;
comment on function pgworker.prune(timestamptz) is
  'Internal: forgets finished jobs whose time is over, a thousand at most; true if there may be more.';

create function pgworker.maintain() returns interval
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  v_now    constant timestamptz := pgworker.clock();
  v_grace  interval;
  v_worker record;
  v_dead   bigint[] := array[]::bigint[];
  v_rescued boolean := false;
  v_next   interval := interval '1 second';
begin
  -- One at a time is enough; the others have nothing to add.
  if not pg_try_advisory_xact_lock(1886874483, 1) then
    return v_next;
  end if;
  perform pgworker.rearm_events();
  select coalesce(max(s.value), pgworker.default_setting('rescue_grace'))::interval into v_grace
  from pgworker.setting s where s.name = 'rescue_grace';

  for v_worker in
    select w.id, w.lease, w.missing_since, w.present from pgworker.presence w
    order by w.id
  loop
    if v_worker.lease is not null then
      continue when v_worker.present;
    elsif v_worker.present = (v_worker.missing_since is not null) then
      -- One that somebody else holds is looked at again the next time.
      update pgworker.worker w set missing_since = case when not v_worker.present then v_now end
      where w.ctid = any (array(select o.ctid from pgworker.worker o where o.id = v_worker.id for no key update skip locked));
      v_next := least(v_next, v_grace);
      continue;
    elsif v_worker.present then
      continue;
    elsif v_worker.missing_since + v_grace > v_now then
      v_next := least(v_next, v_worker.missing_since + v_grace - v_now);
      continue;
    end if;
    -- Locked only now: whoever renews its lease at this moment is not dead. Claims may hold its row, too; what they have
    -- not committed yet is given back when they have.
    perform from pgworker.worker w
    where w.id = v_worker.id and (w.lease is null or w.lease_until <= v_now)
    for no key update skip locked;
    continue when not found;
    v_dead := v_dead || v_worker.id;
  end loop;

  perform pgworker.adopt_jobs(v_now);
  if cardinality(v_dead) > 0 then
    v_rescued := cardinality(pgworker.give_back(v_dead, null, false, 'vanished while it ran this job')) > 0;
    v_rescued := cardinality(pgworker.forget_workers(v_dead)) > 0 or v_rescued;
  end if;

  -- One or the other: each may hold counters by then, and wait for nothing else. What others hold of dead workers is left,
  -- perhaps for hours: it keeps nothing else from being done.
  if v_rescued or pgworker.time_out(v_now) or pgworker.settle_leftovers() or pgworker.prune(v_now) then
    v_next := interval '0';                        -- there may be more; each in a transaction of its own
  end if;
  -- Last, because it waits for nothing but, a moment, jobs with the same key; and not while we hold the rows of workers, for
  -- which a claim of theirs may wait that has just taken such a job.
  if not v_rescued then
    v_next := least(v_next, pgworker.run_schedules(v_now));
  end if;
  return greatest(v_next, interval '10 milliseconds');
end
$$;
comment on function pgworker.maintain() is
  'Gives back the jobs of workers that have vanished, fails runs that are long overdue, does what was left to be done in '
  'trees, prunes finished jobs, and adds the jobs of schedules that are due. Any session may call it, any number at once; '
  'returns how long until the next call is useful.';
