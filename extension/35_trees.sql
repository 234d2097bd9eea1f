-- 35_trees.sql: adding trees of jobs, in the caller's transaction
--
--   add_counters    what the jobs of a new tree wait for
--   put_nodes       checked nodes into the table
--   add_job_tree    the public function
--   add_children    a running job adds children to itself
--
-- Ids ascend as the tree reads: a node before its children, siblings as given; so of jobs of the same priority and time an
-- ancestor comes before its descendants, the first child before the second.
-- Locks: none but those of the unique job keys; add_children holds the row of the running job, then its counters.

create function pgworker.add_counters(p_after boolean, p_ids bigint[], p_counts bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgworker.counter (job_id, after, slot, pending)
  select u.job_id, p_after, s.slot, s.pending
  from unnest(p_ids, p_counts) as u(job_id, of)
  cross join lateral (select pgworker.parts(u.of) as parts) as k
  cross join lateral (
    select 0::smallint as slot, case when k.parts = 0 then u.of else k.parts end as pending
    union all
    select pgworker.slot(g.place, u.of), count(*)
    from generate_series(0, case when k.parts = 0 then -1 else u.of - 1 end) as g(place)
    group by 1) as s
  order by u.job_id, s.slot;
end
$$;
comment on function pgworker.add_counters(boolean, bigint[], bigint[]) is
  'Internal: makes the counters of jobs that wait for so many each.';

create function pgworker.put_nodes(p_nodes jsonb, p_base text, p_parent pgworker.job, p_slots smallint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
set work_mem = '64MB'
as $$
declare
  v_now     constant timestamptz := pgworker.clock(now());
  v_specs   jsonb[];
  v_parents int[];                                 -- by number; 0 for the topmost ones
  v_places  int[];                                 -- among siblings, from 0
  v_counts  int[];                                 -- of children
  v_depths  int[];
  v_gates   int[];                                 -- the nearest above that waits for siblings; 0: none
  v_orders  int[];                                 -- as the tree reads
  v_tree    record;
  v_edges   record;
  v_afters  int[];                                 -- how many siblings each waits for
  v_leads   boolean[];                             -- whether a sibling waits for it
  v_ids     bigint[];
  v_taken   bigint;                                -- the first whose key is
  v_bad     record;
  v_more    boolean;                               -- whether some have a key or a compensation
  v_due     boolean;
  v_past    boolean;
begin
  v_tree := pgworker.read_tree(p_nodes, p_base);
  v_specs := v_tree.specs;
  v_parents := v_tree.parents;
  v_places := v_tree.places;
  v_counts := v_tree.counts;
  v_depths := v_tree.depths;
  v_gates := v_tree.gates;

  v_edges := pgworker.check_nodes(v_specs, p_base, v_parents, v_places, case when p_parent.id is not null then array(
    select b.name from pgworker.job b where b.root_id = p_parent.root_id and b.parent_id = p_parent.id and b.name is not null
    union all
    select b.name from pgworker.finished b
    where b.root_id = p_parent.root_id and b.parent_id = p_parent.id and b.name is not null) end);
  v_more := exists (select from unnest(v_specs) as s(spec) where s.spec ?| array['job_key', 'compensate']);
  if v_more then
    select min(k.n) as n, k.key into v_bad
    from (select s.n, s.spec ->> 'job_key' as key from unnest(v_specs) with ordinality as s(spec, n)) as k
    where k.key is not null
    group by k.key having count(*) > 1
    order by 1 limit 1;
    if found then
      perform pgworker.refuse_tree(
        format('%s.job_key %s is used by another job of the tree',
               pgworker.spec_label(p_base, v_bad.n, v_parents, v_places), quote_literal(v_bad.key)),
        'A key is unique among live jobs.');
    end if;
  end if;

  v_orders := v_tree.orders;
  v_ids := array(select nextval('pgworker.job_id') from generate_series(1, cardinality(v_specs)));
  v_ids := array(select v_ids[o.place] from unnest(v_orders) with ordinality as o(place, n) order by o.n);
  if v_edges.tos is not null then
    select array_agg(coalesce(t.n, 0)::int order by g.n), array_agg(f.n is not null order by g.n) into v_afters, v_leads
    from generate_series(1, cardinality(v_specs)) as g(n)
    left join (select e.node, count(*) as n from unnest(v_edges.tos) as e(node) group by e.node) as t on t.node = g.n
    left join (select e.node, count(*) as n from unnest(v_edges.froms) as e(node) group by e.node) as f on f.node = g.n;
  end if;

  with node as materialized (
    select v_ids[s.n] as id, s.identifier, s.payload, s.queue_name, coalesce(s.run_at, v_now) as run_at,
           coalesce(s.max_attempts, t.max_attempts, 25) as max_attempts, s.job_key, coalesce(s.priority, 0) as priority,
           nullif(s.flags, '{}') as flags, coalesce(v_ids[v_parents[s.n]], p_parent.id) as parent_id,
           coalesce(p_parent.root_id, v_ids[1]) as root_id, coalesce(p_parent.depth + 1, 0) + v_depths[s.n] - 1 as depth,
           case when v_parents[s.n] > 0 then pgworker.slot(v_places[s.n], v_counts[v_parents[s.n]])
                else p_slots[v_places[s.n] + 1] end as slot,
           coalesce(v_ids[v_gates[s.n]], case when v_afters[s.n] > 0 then v_ids[s.n] end) as gate_id,
           (v_counts[s.n] > 0 or v_gates[s.n] > 0 or v_afters[s.n] > 0) is true as waiting,
           -- A root's own compensation would be its child.
           v_counts[s.n] > 0 or v_parents[s.n] = 0 and p_parent.id is null and v_specs[1] ? 'compensate' as has_children,
           coalesce(v_leads[s.n], false) as has_followers, s.name, s.on_failure,
           s.limit_key, case when t.limited then pgworker.lane(t.keyed, s.limit_key, s.queue_name) end as lane
    from pgworker.read_specs(v_specs, pgworker.node_keys(), p_base, v_parents, v_places) s
    left join pgworker.task t on t.identifier = s.identifier
  ), plain as (
    -- By themselves, as in add_jobs.
    insert into pgworker.job (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority, flags,
                              created_at, parent_id, root_id, depth, slot, gate_id, waiting, has_children, has_followers,
                              name, on_failure, limit_key, lane)
    select n.id, n.identifier, n.payload, n.queue_name, n.run_at, n.max_attempts, n.job_key, n.priority, n.flags,
           v_now, n.parent_id, n.root_id, n.depth, n.slot, n.gate_id, n.waiting, n.has_children, n.has_followers,
           n.name, n.on_failure, n.limit_key, n.lane
    from node n where n.job_key is null
  ), added as (
    insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority, flags,
                                   created_at, parent_id, root_id, depth, slot, gate_id, waiting, has_children,
                                   has_followers, name, on_failure, limit_key, lane)
    select n.id, n.identifier, n.payload, n.queue_name, n.run_at, n.max_attempts, n.job_key, n.priority, n.flags,
           v_now, n.parent_id, n.root_id, n.depth, n.slot, n.gate_id, n.waiting, n.has_children, n.has_followers,
           n.name, n.on_failure, n.limit_key, n.lane
    from node n where n.job_key is not null
    order by n.job_key
    on conflict (key) where key is not null do nothing
    returning j.id
  )
  select (select min(n.id) from node n where n.job_key is not null and n.id not in (select a.id from added a)),
         bool_or(not n.waiting and n.run_at <= pgworker.clock()), bool_or(not n.waiting and n.run_at < v_now)
  into v_taken, v_due, v_past
  from node n;
  if v_taken is not null then
    v_bad.n := array_position(v_ids, v_taken)::bigint;
    perform pgworker.refuse_tree(
      format('%s.job_key %s is taken by job %s', pgworker.spec_label(p_base, v_bad.n, v_parents, v_places),
             quote_literal(v_specs[v_bad.n] ->> 'job_key'),
             (select j.id from pgworker.job j where j.key = v_specs[v_bad.n] ->> 'job_key')),
      'A key is unique among live jobs; remove_job() removes a pending one.');
  end if;

  perform pgworker.add_counters(false, array_agg(v_ids[c.n]), array_agg(c.count))
  from unnest(v_counts) with ordinality as c(count, n) where c.count > 0;
  perform pgworker.add_counters(true, array_agg(v_ids[a.n]), array_agg(a.count))
  from unnest(v_afters) with ordinality as a(count, n) where a.count > 0;
  insert into pgworker.dependency (after_id, job_id, slot)
  select v_ids[e.f], v_ids[e.t],
         pgworker.slot(row_number() over (partition by e.t order by e.f) - 1, v_afters[e.t])
  from unnest(v_edges.froms, v_edges.tos) as e(f, t)
  order by 1, 2;

  if v_more and exists (select from unnest(v_specs) as s(spec) where s.spec ? 'compensate') then
    perform pgworker.add_compensations(v_specs, p_base, v_parents, v_places, v_ids, coalesce(p_parent.root_id, v_ids[1]));
    if p_parent.id is not null then
      perform pgworker.postpone(array[p_parent.root_id], 'compensate');    -- whoever ends the root may not see them yet
    end if;
  end if;

  if v_past then
    perform nextval('pgworker.epoch');             -- behind the cursors
  end if;
  if v_due then
    perform pgworker.wake();
  end if;
  return array(select v_ids[u.n] from unnest(v_parents) with ordinality as u(parent, n) where u.parent = 0 order by u.n);
end
$$;
comment on function pgworker.put_nodes(jsonb, text, pgworker.job, smallint[]) is
  'Internal: adds an array of nodes and everything below them, and returns the ids of these, in order. p_parent: the '
  'job whose children they are, null for a new tree; p_slots: where its counter counts them.';

create function pgworker.add_job_tree(tree jsonb) returns pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_ids bigint[];
  v_row pgworker.jobs;
begin
  if tree is null then
    raise exception using errcode = '22004', message = 'tree must not be null',
      hint = 'Give a JSON object: add_job''s arguments, and name, on_failure, after, children.';
  end if;
  v_ids := pgworker.put_nodes(jsonb_build_array(tree), 'tree', null, null);
  select v.* into v_row from pgworker.live v where v.id = v_ids[1];
  return v_row;
end
$$;
comment on function pgworker.add_job_tree(jsonb) is
  'Adds a job and the jobs that it waits for, in the caller''s transaction, and returns the root. Nodes have add_job''s '
  'arguments as keys, and name, on_failure (fail-parent, ignore, remove), children, after (names of siblings that have '
  'to finish first), compensate (identifier and payload of the job that undoes it). Raises 22023 and PW003 with the path '
  'of the node, before anything has been added.';

create function pgworker.add_children(worker_id bigint, job_id bigint, children jsonb) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_job   pgworker.job;
  v_count int;
  v_base  int;
  v_slots smallint[];
  v_ids   bigint[];
begin
  if add_children.children is null or jsonb_typeof(add_children.children) <> 'array' then
    raise exception using errcode = case when add_children.children is null then '22004' else '22023' end,
      message = format('children must be an array of objects, got %s', coalesce(jsonb_typeof(add_children.children), 'null')),
      hint = 'Write [{"identifier": "resize", "payload": {"id": 1}}, ...].';
  end if;
  v_job := pgworker.lock_held(add_children.worker_id, add_children.job_id, null);
  v_count := jsonb_array_length(add_children.children);
  if v_count = 0 then
    return;
  end if;
  v_job.root_id := coalesce(v_job.root_id, v_job.id);
  v_job.depth := coalesce(v_job.depth, 0);
  update pgworker.job j set root_id = v_job.root_id, depth = v_job.depth, has_children = true where j.id = v_job.id;

  -- Further parts of the counter for these children, as many as they are worth; once there are thousands of them, whoever
  -- adds children in so many calls counts them in the total.
  select coalesce(max(c.slot), 0) into v_base from pgworker.counter c where c.job_id = v_job.id and not c.after;
  if v_base + pgworker.parts(v_count) > 32000 then
    v_slots := array_fill(0::smallint, array[v_count]);
  else
    v_slots := array(select case when pgworker.slot(g.n, v_count) > 0 then v_base else 0 end + pgworker.slot(g.n, v_count)
                     from generate_series(0, v_count - 1) as g(n));
  end if;
  v_ids := pgworker.put_nodes(add_children.children, 'children', v_job, v_slots);
  insert into pgworker.counter as c (job_id, after, slot, pending)
  select v_job.id, false, s.slot, s.pending
  from (select u.slot, count(*) as pending from unnest(v_slots) as u(slot) where u.slot > 0 group by u.slot
        union all
        select 0, count(distinct u.slot) filter (where u.slot > 0) + count(*) filter (where u.slot = 0)
        from unnest(v_slots) as u(slot)) as s
  order by s.slot
  on conflict on constraint counter_pkey do update set pending = c.pending + excluded.pending;
  return query select r.* from pgworker.job_rows(v_ids) r;
end
$$;
comment on function pgworker.add_children(bigint, bigint, jsonb) is
  'Adds children, nodes as in add_job_tree, to a job that this worker holds, and returns them (not what is below them), '
  'in order. The job may then call wait_for_children; if it ends without, they go on by themselves. Raises PW001 if the '
  'worker does not hold it, 22023 and PW003 for nodes that cannot be.';
