-- 58_families.sql: what the members of a tree know of each other
--
--   wait_for_children                                  a running job waits for the children that it has added
--   children, get_children_values, get_failed_children_values
--   job_tree, tree_progress                            the whole tree, as rows and as numbers
--   audit                                              whatever is not as it must be
--
-- Locks: wait_for_children takes the job's row, then the total of its counter; no session that holds a counter waits for
-- a job's row (57_settling.sql). The others lock nothing.

create function pgworker.wait_for_children(worker_id bigint, job_id bigint, attempt int default null) returns boolean
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_job     pgworker.job;
  v_pending int;
begin
  v_job := pgworker.lock_held(wait_for_children.worker_id, wait_for_children.job_id, wait_for_children.attempt);
  -- Whoever ends the last child holds this: then it is done, or it will find us waiting.
  select c.pending into v_pending
  from pgworker.counter c where c.job_id = v_job.id and not c.after and c.slot = 0
  for update;
  if coalesce(v_pending, 0) = 0 or v_job.ends_as is not null then
    return false;
  end if;
  update pgworker.job j
  set waiting = true, locked_by = null, locked_at = null, attempts = j.attempts - 1
  where j.id = v_job.id;
  if v_job.queue_name is not null then
    perform pgworker.free_queues(array[v_job.queue_name], array[v_job.id]);
  end if;
  if v_job.lane is not null then
    perform pgworker.free_permits(array[v_job.id]);
  end if;
  return true;
end
$$;
comment on function pgworker.wait_for_children(bigint, bigint, int) is
  'True: the job, which this worker held, now waits for its children and will be claimed again when they are done; this '
  'attempt does not count. False: there is nothing to wait for (or it was asked to stop), the worker goes on with it. '
  'Raises PW001 if the worker does not hold it.';

create function pgworker.family(p_job_id bigint) returns bigint
language sql stable parallel safe
return coalesce((select j.root_id from pgworker.job j where j.id = p_job_id),
                (select f.root_id from pgworker.finished f where f.id = p_job_id));
comment on function pgworker.family(bigint) is 'Internal: the root of the tree that a job belongs to; null if to none.';

create function pgworker.children(job_id bigint) returns setof pgworker.jobs
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_root constant bigint := pgworker.family(children.job_id);
begin
  return query
  select v.* from pgworker.jobs v where v.root_id = v_root and v.parent_id = children.job_id
  order by v.id + 0;
end
$$;
comment on function pgworker.children(bigint) is 'The children of a job, live and finished, in the order of their ids.';

create function pgworker.get_children_values(job_id bigint) returns jsonb
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_root constant bigint := pgworker.family(get_children_values.job_id);
begin
  return (select coalesce(jsonb_object_agg(f.id, f.result), '{}')
          from pgworker.finished f
          where f.root_id = v_root and f.parent_id = get_children_values.job_id and f.state = 'completed');
end
$$;
comment on function pgworker.get_children_values(bigint) is
  'The results of the completed children of a job: an object, job id to result (null where there is none).';

create function pgworker.get_failed_children_values(job_id bigint) returns jsonb
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_root constant bigint := pgworker.family(get_failed_children_values.job_id);
begin
  return (select coalesce(jsonb_object_agg(f.id, f.progress), '{}')
          from pgworker.finished f
          where f.root_id = v_root and f.parent_id = get_failed_children_values.job_id and f.state = 'failed');
end
$$;
comment on function pgworker.get_failed_children_values(bigint) is
  'The last progress of the failed children of a job: an object, job id to progress (null where there is none).';

create function pgworker.job_tree(job_id bigint) returns table (
  depth int, path text, id bigint, task_identifier text, queue_name text, state text, payload jsonb, priority int,
  run_at timestamptz, attempts int, max_attempts int, last_error text, key text, revision int, flags text[],
  parent_id bigint, root_id bigint, name text, on_failure text, progress jsonb, result jsonb, locked_at timestamptz,
  locked_by bigint, created_at timestamptz, finished_at timestamptz, started_at timestamptz,
  limit_key text, unique_until timestamptz
)
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_root constant bigint := pgworker.family(job_tree.job_id);
begin
  return query
  with recursive node as materialized (
    select v.* from pgworker.jobs v where v.root_id = v_root
    union all
    select v.* from pgworker.jobs v where v_root is null and v.id = job_tree.job_id
  ), placed as (
    -- Whose parent is gone, or who has none, is at the top. From there on by index: to look among all nodes for those of
    -- each level would take levels times nodes.
    select n.id, array[n.id] as place, coalesce(n.name, n.task_identifier) as path
    from node n
    where n.parent_id is null or not exists (select from node p where p.id = n.parent_id)
    union all
    select c.id, p.place || c.id, p.path || '/' || coalesce(c.name, c.task_identifier)
    from placed p
    cross join lateral (
      select j.id, j.name, j.task_identifier from pgworker.job j where j.root_id = v_root and j.parent_id = p.id
      union all
      select f.id, f.name, f.task_identifier from pgworker.finished f where f.root_id = v_root and f.parent_id = p.id
      offset 0) as c
  )
  select cardinality(p.place) - 1, p.path, n.id, n.task_identifier, n.queue_name, n.state, n.payload, n.priority, n.run_at,
         n.attempts, n.max_attempts, n.last_error, n.key, n.revision, n.flags, n.parent_id, n.root_id, n.name,
         n.on_failure, n.progress, n.result, n.locked_at, n.locked_by, n.created_at, n.finished_at,
         n.started_at, n.limit_key, n.unique_until
  from placed p
  join node n on n.id = p.id
  order by p.place;
end
$$;
comment on function pgworker.job_tree(bigint) is
  'The whole tree that a job belongs to, whichever of its jobs is named: each job before its children, siblings by id. '
  'depth counts from 0, path is made of names (of task identifiers where there is no name).';

create function pgworker.tree_progress(job_id bigint) returns table (state text, jobs bigint)
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_root constant bigint := pgworker.family(tree_progress.job_id);
begin
  return query
  select v.state, count(*)
  from pgworker.jobs v
  where v.root_id = v_root or v_root is null and v.id = tree_progress.job_id
  group by v.state
  order by array_position(array['waiting', 'scheduled', 'ready', 'running', 'completed', 'failed', 'cancelled'], v.state);
end
$$;
comment on function pgworker.tree_progress(bigint) is
  'How many jobs of the tree that a job belongs to are in each state.';

create function pgworker.audit() returns table (job_id bigint, problem text)
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
begin
  return query
  with recursive live as materialized (
    select j.id, j.parent_id, j.root_id, j.gate_id, j.depth, j.slot, j.waiting, j.has_children, j.has_followers, j.settled,
           j.locked_by, j.ends_as, j.cancel_reason
    from pgworker.job j
  ), known as materialized (
    select l.id, l.parent_id, l.root_id, l.depth, l.has_children, l.has_followers from live l
    union all
    select f.id, f.parent_id, f.root_id, f.depth, f.has_children, f.has_followers from pgworker.finished f
  ), counter as materialized (
    select c.job_id, c.after, c.slot, c.pending from pgworker.counter c
  ), truth as (
    -- what each part of a counter should say: children and siblings that are live
    select l.parent_id as job_id, false as after, l.slot, count(*) as pending
    from live l join live p on p.id = l.parent_id
    where l.slot is not null
    group by l.parent_id, l.slot
    union all
    select d.job_id, true, d.slot, count(*)
    from pgworker.dependency d
    join live l on l.id = d.job_id
    join live a on a.id = d.after_id
    join (select distinct c.job_id from counter c where c.after) as g on g.job_id = d.job_id
    group by d.job_id, d.slot
  ), parts as (
    select coalesce(c.job_id, t.job_id) as job_id, coalesce(c.after, t.after) as after, coalesce(c.slot, t.slot) as slot,
           c.pending, coalesce(t.pending, 0) as truth
    from counter c
    full join truth t on t.job_id = c.job_id and t.after = c.after and t.slot = c.slot
  ), wanted as (
    select p.job_id, p.after, p.slot, p.pending, p.truth + case when p.slot = 0 then coalesce(o.parts, 0) else 0 end as truth
    from parts p
    left join (select c.job_id, c.after, count(*) as parts from counter c where c.slot > 0 and c.pending > 0
               group by c.job_id, c.after) as o on o.job_id = p.job_id and o.after = p.after
  ), ending as (
    select u.job_id as id, true as written from pgworker.unsettled u where u.what <> 'compensate'
    union
    select l.id, false from live l where l.ends_as is not null
    union
    select k.id, e.written from ending e join known k on k.parent_id = e.id
  ), finding as (
    select w.job_id, format('slot %s of its counter of %s says %s, should say %s', w.slot,
                            case when w.after then 'siblings' else 'children' end, coalesce(w.pending::text, 'nothing'),
                            w.truth) as problem
    from wanted w
    where w.pending is distinct from w.truth
    union all
    select c.job_id, 'has a counter, but is not live'
    from (select distinct o.job_id from counter o) as c
    where not exists (select from live l where l.id = c.job_id)
    union all
    select l.id, 'waits, but for nothing'
    from live l
    where l.waiting and l.gate_id is null
      and not exists (select from counter c where c.job_id = l.id and c.pending > 0)
    union all
    select l.id, 'could be claimed, but has to wait'
    from live l
    left join counter c on c.job_id = l.id and c.after and c.slot = 0
    where not l.waiting and (l.gate_id is not null or c.job_id is not null)
    union all
    select l.id, format('waits behind job %s, which waits for no sibling', l.gate_id)
    from live l
    where l.gate_id is not null
      and not exists (select from counter c where c.job_id = l.gate_id and c.after and c.slot = 0 and c.pending > 0)
      and not exists (select from pgworker.unsettled u where u.job_id = l.gate_id)
      -- behind another gate itself: it opens with that one
      and not exists (select from live g where g.id = l.gate_id and g.gate_id <> g.id)
    union all
    select l.id, 'runs and waits at once' from live l where l.waiting and l.locked_by is not null
    union all
    select l.id, 'is to end, but does not run' from live l where l.ends_as is not null and l.locked_by is null
    union all
    select l.id, 'has a reason to end and no way, or the reverse'
    from live l where (l.ends_as is null) <> (l.cancel_reason is null)
    union all
    select l.id, 'is marked as settled, but live' from live l where l.settled
    union all
    select k.id, format('is in the tree of job %s, which is not known', k.root_id)
    from known k
    where k.root_id is not null and not exists (select from known r where r.id = k.root_id)
      and not exists (select from live l where l.root_id = k.root_id)  -- what runs still takes the rest along
    union all
    select k.id, 'has no place in its tree, or one without a tree'
    from known k
    where (k.root_id is null) <> (k.depth is null) or (k.parent_id is null and k.root_id <> k.id)
       or (k.parent_id is not null and k.root_id is null)
    union all
    select k.id, format('is no level below its parent %s', p.id)
    from known k join known p on p.id = k.parent_id
    where k.depth <> p.depth + 1 or k.root_id <> p.root_id or not p.has_children
    union all
    select d.job_id, format('waits for job %s, which is no sibling of it', d.after_id)
    from pgworker.dependency d
    left join known k on k.id = d.job_id
    left join known a on a.id = d.after_id
    where (k.id is null or a.id is null or k.parent_id is distinct from a.parent_id or not a.has_followers)
      and not exists (select from pgworker.unsettled u where u.job_id = d.after_id and u.what = 'stop')
    union all
    select f.id, 'is live and finished at once' from pgworker.finished f join live l on l.id = f.id
    union all
    select l.id, format('waits for ever: its parent %s is not live', l.parent_id)
    from live l
    where l.waiting and l.gate_id is not null and l.parent_id is not null
      and not exists (select from live p where p.id = l.parent_id)
      and not exists (select from counter c where c.job_id = l.gate_id and c.after and c.pending > 0)
    union all
    select c.node_id, format('is to be compensated when its tree fails, but that (of root %s) is not known', c.root_id)
    from pgworker.compensation c
    where not exists (select from known r where r.id = c.root_id)
      and not exists (select from pgworker.unsettled u where u.job_id = c.root_id and u.what = 'forget')
      and not exists (select from live l where l.root_id = c.root_id)  -- goes with the last of these
    union all
    select c.node_id, 'has completed in a tree that has failed, and is not going to be compensated'
    from pgworker.compensation c
    join pgworker.finished r on r.id = c.root_id and r.state in ('failed', 'cancelled')
    left join pgworker.finished f on f.id = c.node_id
    where c.job_id is null and (c.node is not null or f.state = 'completed')
      and not exists (select from pgworker.unsettled u where u.job_id = c.root_id and u.what = 'compensate')
    union all
    select l.id, 'is live, though its tree is being undone'
    from live l
    where l.id < (select min(c.job_id) from pgworker.compensation c where c.root_id = l.root_id)
  )
  -- What is written down to be done is not wrong yet; nor are counters where somebody is to end, and everything below
  -- with it: what made it fail has not been taken off them.
  select f.job_id, f.problem
  from finding f
  where not exists (select from ending e where e.id = f.job_id and (e.written or f.problem ~ '^(slot|waits)'))
  order by f.job_id, f.problem;
end
$$;
comment on function pgworker.audit() is
  'One row for every counter, state or link of a tree that is not what it must be; no row when all is well. Reads '
  'everything: for tests and for whoever suspects something.';
