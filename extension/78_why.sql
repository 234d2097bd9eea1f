-- 78_why.sql: why a job is not running
--
--   asked           what live workers ask for (a view)
--   and_more        some of many, as a sentence lists them
--   named           jobs, as a sentence names them
--   flags_are       flags, as a sentence names them
--   locked_by_whom  who has locked a row
--   why_waiting     what a job of a tree waits for
--   why_limited     at which limits it stands
--   why_unclaimed   what keeps a job that waits for nothing from being claimed
--   why             the public function
--
-- What claims ask (40_claiming.sql to 45_queues.sql) is asked here for one job: when none of it holds the job back, the next
-- claim of a worker that takes such jobs gets it, as soon as the jobs before it are gone. What workers take is what they
-- last asked for (note_interest). Nothing is locked and nothing is remembered.

create view pgworker.asked as
select i.worker_id, i.tasks, i.forbidden_flags
from pgworker.interest i
join pgworker.presence p on p.id = i.worker_id
where p.present;
comment on view pgworker.asked is 'Internal: what live workers last asked for.';

create function pgworker.and_more(p_some text[], p_all bigint) returns text
language sql immutable parallel safe
return case when p_all > cardinality(p_some)
            then array_to_string(p_some, ', ') || format(' and %s more', p_all - cardinality(p_some))
            else concat_ws(' and ', nullif(array_to_string(p_some[1 : cardinality(p_some) - 1], ', '), ''),
                           p_some[cardinality(p_some)]) end;
comment on function pgworker.and_more(text[], bigint) is
  'Internal: "a", "a and b", "a, b and c", "a, b, c and 98 more": the first of so many.';

create function pgworker.named(p_one text, p_many text, p_ids bigint[], p_titles text[], p_all bigint) returns text
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_all = 1 then p_one else p_many end || ' '
         || pgworker.and_more(array(select format('%s (%s)', u.id, u.title)
                                    from unnest(p_ids, p_titles) with ordinality as u(id, title, n) order by u.n), p_all);
end
$$;
comment on function pgworker.named(text, text, bigint[], text[], bigint) is
  'Internal: "child 5 (load)" or "children 5 (load), 6 (load) and 7 (draw)": the first of so many jobs.';

create function pgworker.flags_are(p_flags text[]) returns text
language sql immutable parallel safe
return case when cardinality(p_flags) = 1 then 'flag ' || p_flags[1] || ' is'
            else 'flags ' || pgworker.and_more(p_flags, cardinality(p_flags)) || ' are' end;
comment on function pgworker.flags_are(text[]) is 'Internal: "flag slow is", "flags slow and big are".';

-- Who changes or locks a row writes his transaction's number on it, and holds the lock of that number while it goes on.
create function pgworker.locked_by_whom(p_what text, p_xmax xid) returns text
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select format('%s is locked by session %s, whose transaction has not ended: claims pass over it', p_what, l.pid)
          from pg_catalog.pg_locks l
          where l.locktype = 'transactionid' and l.transactionid = p_xmax and l.mode = 'ExclusiveLock' and l.granted
            and l.pid <> pg_backend_pid());
end
$$;
comment on function pgworker.locked_by_whom(text, xid) is
  'Internal: says who has locked a row, by its xmax; null if nobody else has.';

create function pgworker.why_waiting(p_id bigint) returns text
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_job  record;
  v_gate bigint;
  v_next bigint;
  v_for  record;
begin
  select j.root_id, j.gate_id into v_job from pgworker.job j where j.id = p_id;
  -- The gate furthest up: those below it cannot open before.
  v_next := v_job.gate_id;
  while v_next is distinct from v_gate loop
    v_gate := v_next;
    select coalesce(j.gate_id, v_gate) into v_next from pgworker.job j where j.id = v_gate;
  end loop;

  if v_gate is not null then
    select count(*) as jobs, (array_agg(a.id order by a.id))[1:3] as ids,
           (array_agg(coalesce(a.name, a.task_identifier) order by a.id))[1:3] as titles
    into v_for
    from pgworker.dependency d
    join pgworker.job a on a.id = d.after_id
    where d.job_id = v_gate;
    return case when v_gate <> p_id then format('below job %s, which is ', v_gate) else '' end
           || case when v_for.jobs = 0
                   then 'about to start: the siblings that it came after have ended, and maintain() opens it'
                   else pgworker.named('waiting for its sibling', 'waiting for its siblings', v_for.ids, v_for.titles,
                                       v_for.jobs) || ', which it comes after' end;
  end if;

  select count(*) as jobs, (array_agg(c.id order by c.id))[1:3] as ids,
         (array_agg(coalesce(c.name, c.task_identifier) order by c.id))[1:3] as titles
  into v_for
  from pgworker.job c
  where c.root_id = v_job.root_id and c.parent_id = p_id and c.slot is not null;
  return case when v_for.jobs = 0 then 'about to go on: its children have ended, and maintain() releases it'
              else pgworker.named('waiting for child', 'waiting for children', v_for.ids, v_for.titles, v_for.jobs) end;
end
$$;
comment on function pgworker.why_waiting(bigint) is 'Internal: what a waiting job waits for.';

create function pgworker.why_limited(p_id bigint, p_now timestamptz) returns text[]
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  if exists (select from pgworker.job j
             where j.id = p_id
               and (j.lane is null) = exists (select from pgworker.task t
                                              where t.identifier = j.task_identifier and t.limited)) then
    return array['added while the limits of its task were being changed: maintain() puts it in line'];
  end if;
  return array(
    select format('%stask %s is at its limit of %s',
                  case when g.lane_key <> '' then format('limit key %s of ', j.limit_key) end, g.task,
                  case when g.kind = 'rate'
                       then format('%s in %s, and the next may run at %s', g.most, g.per, date_trunc('second', f.free_at))
                       else g.most || ' at once' end)
    from pgworker.job j
    cross join lateral pgworker.gates_of(j.id) g
    cross join lateral pgworker.rooms(g.task, g.lane_key, case when g.kind = 'concurrency' then g.most end,
                                      case when g.kind = 'rate' then g.most end, p_now, 1) r
    left join lateral (
      select min(p.free_at) as free_at from pgworker.permit p
      where p.task_identifier = g.task and p.kind = g.kind and p.lane_key = g.lane_key and p.n > 0
        and p.free_at > pgworker.free_by(g.kind, p_now)) as f on true
    where j.id = p_id and r.room < 1
    order by g.kind, g.lane_key);
end
$$;
comment on function pgworker.why_limited(bigint, timestamptz) is
  'Internal: the limits of its task that keep a job from being claimed at this moment.';

create function pgworker.why_unclaimed(p_id bigint) returns text
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_now    constant timestamptz := pgworker.clock();
  v_paused constant text[] := array(select t.identifier from pgworker.task t where t.paused);
  v_passed constant text[] := array(select t.identifier from pgworker.task t where t.paused or t.limited);
  v_forbidden constant text[] := array(select f.name from pgworker.forbidden_flag f);
  v_job    record;
  v_queue  record;
  v_live   record;
  v_flags  text[];
  v_head   bigint;
  v_causes text[] := array[]::text[];
begin
  select j.task_identifier, j.priority, j.run_at, j.queue_name, j.lane, j.flags, j.attempts, j.max_attempts, j.last_error,
         pgworker.locked_by_whom('it', j.xmax) as locked
  into v_job
  from pgworker.job j where j.id = p_id;
  if v_job.run_at > v_now then
    v_causes := v_causes || (format('due at %s', date_trunc('second', v_job.run_at))
                             || case when v_job.attempts > 0
                                     then format(' for attempt %s of %s, after: %s', v_job.attempts + 1, v_job.max_attempts,
                                                 coalesce(v_job.last_error, 'no error')) else '' end);
  end if;
  if v_job.task_identifier = any (v_paused) then
    v_causes := v_causes || format('task %s is paused', v_job.task_identifier);
  end if;
  select q.paused, q.job_id, pgworker.locked_by_whom('queue ' || q.name, q.xmax) as locked into v_queue
  from pgworker.queue q where q.name = v_job.queue_name;
  if v_queue.paused then
    v_causes := v_causes || format('queue %s is paused', v_job.queue_name);
  end if;
  if v_queue.job_id is not null then
    v_causes := v_causes || format('behind job %s, which runs in queue %s', v_queue.job_id, v_job.queue_name);
  end if;

  v_causes := v_causes || array_remove(array[v_job.locked, v_queue.locked], null);
  v_causes := v_causes || pgworker.why_limited(p_id, v_now);
  v_flags := array(select u.flag from unnest(v_job.flags) with ordinality as u(flag, n)
                   where u.flag = any (v_forbidden) order by u.n);
  if cardinality(v_flags) > 0 then
    v_causes := v_causes || (pgworker.flags_are(v_flags) || ' forbidden (forbid_flag)');
  end if;

  select count(distinct a.worker_id) as knowing,
         count(distinct a.worker_id) filter (where not coalesce(a.forbidden_flags && v_job.flags, false)) as taking
  into v_live
  from pgworker.asked a
  where a.tasks is null or v_job.task_identifier = any (a.tasks);
  if v_live.knowing = 0 then
    v_causes := v_causes || case when exists (select from pgworker.presence p where p.present)
                                 then format('no live worker knows task %s', v_job.task_identifier)
                                 else 'no worker is live' end;
  elsif v_live.taking = 0 then
    v_flags := array(select u.flag from unnest(v_job.flags) with ordinality as u(flag, n)
                     where exists (select from pgworker.asked a
                                   where (a.tasks is null or v_job.task_identifier = any (a.tasks))
                                     and u.flag = any (a.forbidden_flags))
                     order by u.n);
    v_causes := v_causes || (pgworker.flags_are(v_flags) || ' forbidden by all live workers that know the task');
  end if;
  if cardinality(v_causes) > 0 then
    return array_to_string(v_causes, '; ');
  end if;

  -- The queue is free, so each worker would take the first job in it that it may take. Which of two it is, one of a task
  -- with limits and one of another, depends on what else there is to claim: so none is behind the other.
  select case when count(h.id) = count(*) then min(h.id) end into v_head
  from pgworker.asked a
  left join lateral (
    select o.id
    from (select p.id, p.priority, p.run_at, p.task_identifier, p.flags
          from pgworker.job p
          where p.queue_name = v_job.queue_name and p.queue_name > '' and p.lane is null and not p.waiting
            and p.run_at <= v_now and p.locked_by is null
            and v_job.lane is null and p.task_identifier <> all (v_passed)
          union all
          select p.id, p.priority, p.run_at, p.task_identifier, p.flags
          from pgworker.job p
          where p.task_identifier = v_job.task_identifier and p.lane = v_job.lane and p.lane > '' and not p.waiting
            and p.run_at <= v_now and p.locked_by is null
            and v_job.queue_name is not null) as o
    where (o.priority, o.run_at, o.id) < (v_job.priority, v_job.run_at, p_id)
      and (a.tasks is null or o.task_identifier = any (a.tasks))
      and not coalesce(o.flags && (a.forbidden_flags || v_forbidden), false)
    order by o.priority, o.run_at, o.id limit 1) as h on true
  where (a.tasks is null or v_job.task_identifier = any (a.tasks))
    and not coalesce(a.forbidden_flags && v_job.flags, false);
  if v_head is not null then
    return format('behind job %s, which comes before it in queue %s', v_head, v_job.queue_name);
  end if;
  return format('ready, due since %s: nothing holds it back, and %s live %s it when its turn comes',
                date_trunc('second', v_job.run_at), v_live.taking,
                case when v_live.taking = 1 then 'worker takes' else 'workers take' end);
end
$$;
comment on function pgworker.why_unclaimed(bigint) is
  'Internal: all that keeps a job which waits for nothing from being claimed; "ready, ..." when nothing does.';

create function pgworker.why(job_id bigint) returns text
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_job    record;
  v_worker record;
begin
  if why.job_id is null then
    return null;
  end if;
  select o.state, o.locked_at, o.locked_by, o.attempts, o.last_error, o.finished_at into v_job
  from pgworker.jobs o where o.id = why.job_id;
  if not found then
    return format('no job %s: there never was one, or it has ended and is not kept', why.job_id);
  end if;
  case v_job.state
    when 'waiting' then
      return pgworker.why_waiting(why.job_id);
    when 'scheduled', 'ready' then
      return pgworker.why_unclaimed(why.job_id);
    when 'running' then
      select j.ends_as, j.cancel_reason, p.id, p.name, p.present into v_worker
      from pgworker.job j
      left join pgworker.presence p on p.id = j.locked_by
      where j.id = why.job_id;
      return format('claimed by worker %s since %s', v_job.locked_by || coalesce(' (' || v_worker.name || ')', ''),
                    date_trunc('second', v_job.locked_at))
             || case when v_worker.ends_as is not null
                     then format(', asked to stop (it will end as %s): %s', v_worker.ends_as, v_worker.cancel_reason)
                     else '' end
             || case when v_worker.id is null then ', which is not registered any more: force_unlock_workers() takes it back'
                     when not v_worker.present then ', which is gone: maintain() gives it back after the grace' else '' end;
    else
      return format('%s at %s', v_job.state, date_trunc('second', v_job.finished_at))
             || case when v_job.state <> 'failed' then '' when v_job.attempts = 1 then ' after 1 attempt'
                     else format(' after %s attempts', v_job.attempts) end
             || case when v_job.state <> 'completed' then coalesce(': ' || v_job.last_error, '') else '' end;
  end case;
end
$$;
comment on function pgworker.why(bigint) is
  'Why a job is not running, in one sentence: what it waits for, who holds it, since when it has ended. "ready, ..." when '
  'nothing holds it back. Null for null.';
