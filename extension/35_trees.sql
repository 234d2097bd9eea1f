-- 35_trees.sql: adding trees of jobs, in the caller's transaction
--
--   node_keys       what a node may have
--   parts, slot     how a counter is divided
--   find_cycle      siblings that wait for each other
--   refuse_tree     the error for it
--   check_nodes     what makes a tree of jobs impossible
--   add_counters    what the jobs of a new tree wait for
--   put_nodes       checked nodes into the table
--   add_job_tree    the public function
--   add_children    a running job adds children to itself
--
-- Everything is checked before anything is written. Nodes are read flat, numbered from 1 in the order in which the tree
-- reads: a node before its children, siblings as given; ids ascend likewise, so that of jobs of the same priority and time
-- an ancestor comes before its descendants and the first child before the second.
-- Locks: none but those of the unique job keys; add_children holds the row of the running job, then its counters.

create function pgworker.node_keys() returns text[]
language sql immutable parallel safe
return pgworker.job_keys() || array['name', 'on_failure', 'children', 'after'];
comment on function pgworker.node_keys() is 'Internal: the keys of an object that describes a node of a tree.';

-- Up to 31 are counted in the total itself; more in a number of parts, dealt round, because jobs that lie side by side are
-- claimed, and so ended, at about the same time by different sessions.
create function pgworker.parts(p_count bigint) returns int
language sql immutable parallel safe
return case when p_count < 32 then 0 else least(32, p_count / 8) end::int;
comment on function pgworker.parts(bigint) is
  'Internal: in how many parts the counter of a job that waits for so many is divided; 0: it is not.';

create function pgworker.slot(p_place bigint, p_count bigint) returns smallint
language sql immutable parallel safe
return (case when pgworker.parts(p_count) = 0 then 0 else 1 + p_place % pgworker.parts(p_count) end)::smallint;
comment on function pgworker.slot(bigint, bigint) is
  'Internal: the slot of a counter in which the p_place-th (from 0) of so many is counted.';

create function pgworker.find_cycle(p_from int[], p_to int[]) returns int[]
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_most  constant int := (select max(greatest(e.f, e.t)) from unnest(p_from, p_to) as e(f, t));
  v_wait  int[] := array_fill(0, array[v_most]);   -- for how many each still waits
  v_first int[] := array_fill(0, array[v_most]);   -- where the edges from each begin
  v_prior int[] := array_fill(0, array[v_most]);   -- one that each waits for
  v_from  int[];
  v_to    int[];
  v_ready int[];
  v_top   int;
  v_node  int;
  v_edge  int;
  v_seen  boolean[] := array_fill(false, array[v_most]);
  v_cycle int[];
begin
  select array_agg(e.f order by e.f), array_agg(e.t order by e.f) into v_from, v_to from unnest(p_from, p_to) as e(f, t);
  for v_i in reverse cardinality(v_from) .. 1 loop
    v_first[v_from[v_i]] := v_i;
    v_wait[v_to[v_i]] := v_wait[v_to[v_i]] + 1;
  end loop;
  -- Take away whatever waits for nothing, until nothing can be taken any more.
  v_ready := array(select g.n from generate_series(1, v_most) as g(n) where v_wait[g.n] = 0);
  v_top := cardinality(v_ready);
  while v_top > 0 loop
    v_node := v_ready[v_top];
    v_top := v_top - 1;
    v_edge := v_first[v_node];
    while v_edge > 0 and v_from[v_edge] = v_node loop
      v_wait[v_to[v_edge]] := v_wait[v_to[v_edge]] - 1;
      if v_wait[v_to[v_edge]] = 0 then
        v_top := v_top + 1;
        v_ready[v_top] := v_to[v_edge];
      end if;
      v_edge := v_edge + 1;
    end loop;
  end loop;
  -- What is left waits for something that is left.
  for v_i in 1 .. cardinality(v_from) loop
    if v_wait[v_from[v_i]] > 0 and v_wait[v_to[v_i]] > 0 then
      v_prior[v_to[v_i]] := v_from[v_i];
      v_node := v_to[v_i];
    end if;
  end loop;
  if v_node is null or v_wait[v_node] = 0 then
    return null;
  end if;
  while not v_seen[v_node] loop
    v_seen[v_node] := true;
    v_node := v_prior[v_node];
  end loop;
  v_cycle := array[v_node];
  loop
    v_node := v_prior[v_node];
    v_cycle := v_cycle || v_node;
    exit when v_node = v_cycle[1];
  end loop;
  return v_cycle;
end
$$;
comment on function pgworker.find_cycle(int[], int[]) is
  'Internal: a cycle in the graph with these edges, each node waiting for the next, from a node back to itself; null if '
  'there is none. Takes time in proportion to the edges.';

create function pgworker.refuse_tree(p_message text, p_hint text) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'PW003', message = p_message, hint = p_hint;
end
$$;
comment on function pgworker.refuse_tree(text, text) is 'Internal: raises PW003.';

create function pgworker.check_nodes(
  p_specs jsonb[], p_base text, p_parents int[], p_places int[], p_taken text[], out froms int[], out tos int[]
)
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
declare
  v_bad   record;
  v_cycle int[];
begin
  select s.n, s.spec ->> 'name' as name, s.spec ->> 'on_failure' as policy into v_bad
  from unnest(p_specs) with ordinality as s(spec, n)
  where length(s.spec ->> 'name') not between 1 and 128
     or s.spec ->> 'on_failure' not in ('fail-parent', 'ignore', 'remove')
  order by s.n limit 1;
  if length(v_bad.name) not between 1 and 128 then
    raise exception using errcode = '22023',
      message = format('%s.name must be 1 to 128 characters long, got %s',
                       pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), length(v_bad.name)),
      hint = 'A name is what siblings call the job in their after; leave it out where nobody does.';
  elsif found then
    perform pgworker.refuse_tree(
      format('%s.on_failure must be one of fail-parent, ignore, remove, got %s',
             pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), quote_literal(left(v_bad.policy, 200))),
      'Leave it out for fail-parent.');
  end if;

  select min(m.n) as n, m.name into v_bad
  from (select s.n, p_parents[s.n] as parent, s.spec ->> 'name' as name
        from unnest(p_specs) with ordinality as s(spec, n) where s.spec ->> 'name' is not null
        union all
        select 0, 0, t.name from unnest(p_taken) as t(name)) as m
  group by m.parent, m.name having count(*) > 1
  order by 1 limit 1;
  if found then
    select max(s.n) as n, v_bad.name as name into v_bad
    from unnest(p_specs) with ordinality as s(spec, n)
    where s.spec ->> 'name' = v_bad.name and p_parents[s.n] = coalesce(p_parents[nullif(v_bad.n, 0)], 0);
    perform pgworker.refuse_tree(
      format('%s.name %s is taken by one of its siblings', pgworker.spec_label(p_base, v_bad.n, p_parents, p_places),
             quote_literal(v_bad.name)),
      'Names are unique among siblings.');
  end if;

  if not exists (select from unnest(p_specs) as s(spec) where s.spec -> 'after' <> '[]' and s.spec -> 'after' <> 'null') then
    return;
  end if;
  with member as (
    select s.n, p_parents[s.n] as parent, s.spec ->> 'name' as name, s.spec -> 'after' as after
    from unnest(p_specs) with ordinality as s(spec, n)
  ), wish as (
    select distinct m.n, m.parent, a.name
    from member m
    cross join lateral jsonb_array_elements_text(m.after) as a(name)
    where m.after <> '[]' and m.after <> 'null'
  )
  select array_agg(coalesce(o.n, 0)::int order by w.n, o.n), array_agg(w.n::int order by w.n, o.n),
         min(w.n) filter (where o.n is null) as n, min(w.name) filter (where o.n is null) as name
  into froms, tos, v_bad.n, v_bad.name
  from wish w
  left join member o on o.parent = w.parent and o.name = w.name;
  if v_bad.n is not null then
    select v_bad.n, min(a.name) as name into v_bad
    from jsonb_array_elements_text(p_specs[v_bad.n] -> 'after') as a(name)
    where not exists (select from unnest(p_specs) with ordinality as s(spec, n)
                      where s.spec ->> 'name' = a.name and p_parents[s.n] = p_parents[v_bad.n]);
    perform pgworker.refuse_tree(
      format('%s.after names %s, which none of its siblings is called',
             pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), quote_literal(left(v_bad.name, 200))),
      coalesce((select 'Its siblings'' names: ' || string_agg(quote_literal(s.spec ->> 'name'), ', ' order by s.n) || '.'
                from unnest(p_specs) with ordinality as s(spec, n)
                where p_parents[s.n] = p_parents[v_bad.n] and s.spec ->> 'name' is not null and s.n <> v_bad.n),
               'Give the sibling that it is to wait for a name.'));
  end if;

  -- A cycle cannot do without an edge from a later sibling, or from the job itself.
  if exists (select from unnest(froms, tos) as e(f, t) where e.f >= e.t) then
    v_cycle := pgworker.find_cycle(froms, tos);
    if v_cycle is not null then
      perform pgworker.refuse_tree(
        format('%s waits for itself: %s', pgworker.spec_label(p_base, v_cycle[1], p_parents, p_places),
               (select string_agg(quote_literal(p_specs[c.n] ->> 'name'), ' after ' order by c.place)
                from unnest(v_cycle) with ordinality as c(n, place))),
        'Take one of these out of an after.');
    end if;
  end if;
end
$$;
comment on function pgworker.check_nodes(jsonb[], text, int[], int[], text[]) is
  'Internal: raises PW003 (22023 for a name out of its limits) for nodes that cannot be a tree; returns which waits for '
  'which of its siblings. p_taken: names that siblings of the topmost ones have already.';

create function pgworker.add_counters(p_after boolean, p_ids bigint[], p_counts bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgworker.counter (job_id, after, slot, pending)
  select u.job_id, p_after, g.slot,
         case when g.slot > 0 then (u.of + k.parts - g.slot) / k.parts when k.parts > 0 then k.parts else u.of end
  from unnest(p_ids, p_counts) as u(job_id, of)
  cross join lateral (select pgworker.parts(u.of) as parts) as k
  cross join lateral generate_series(0, k.parts) as g(slot)
  order by u.job_id, g.slot;
end
$$;
comment on function pgworker.add_counters(boolean, bigint[], bigint[]) is
  'Internal: makes the counters of jobs that wait for so many each.';

create function pgworker.put_nodes(p_nodes jsonb, p_base text, p_parent pgworker.job, p_slots smallint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
declare
  v_now     constant timestamptz := pgworker.clock(now());
  v_specs   jsonb[];
  v_parents int[];                                 -- by number; 0 for the topmost ones
  v_places  int[];                                 -- among siblings, from 0
  v_counts  int[];                                 -- of children
  v_depths  int[];
  v_gates   int[];                                 -- the nearest above that waits for siblings; 0: none
  v_edges   record;
  v_afters  int[];                                 -- how many siblings each waits for
  v_leads   boolean[];                             -- whether a sibling waits for it
  v_ids     bigint[];
  v_added   bigint[];
  v_bad     record;
  v_due     boolean;
  v_past    boolean;
begin
  with recursive flat as (
    select array[e.n::int] as path, e.spec, 1 as depth, null::int[] as gate
    from jsonb_array_elements(p_nodes) with ordinality as e(spec, n)
    union all
    select f.path || e.n::int, e.spec, f.depth + 1,
           case when jsonb_typeof(f.spec -> 'after') = 'array' and f.spec -> 'after' <> '[]' then f.path else f.gate end
    from flat f
    cross join lateral jsonb_array_elements(case when jsonb_typeof(f.spec -> 'children') = 'array'
                                                 then f.spec -> 'children' end) with ordinality as e(spec, n)
    where f.depth <= 2000
  ), numbered as materialized (
    select f.path, f.depth, f.gate, row_number() over (order by f.path)::int as n,
           case when jsonb_typeof(f.spec -> 'children') = 'array' then f.spec - 'children' else f.spec end as spec,
           case when jsonb_typeof(f.spec -> 'children') = 'array' then jsonb_array_length(f.spec -> 'children')
                else 0 end as children
    from flat f
  )
  select array_agg(c.spec order by c.n), array_agg(coalesce(p.n, 0) order by c.n),
         array_agg(c.path[c.depth] - 1 order by c.n), array_agg(c.children order by c.n),
         array_agg(c.depth order by c.n), array_agg(coalesce(g.n, 0) order by c.n)
  into v_specs, v_parents, v_places, v_counts, v_depths, v_gates
  from numbered c
  left join numbered p on p.path = c.path[1 : c.depth - 1]
  left join numbered g on g.path = c.gate;
  if v_specs is null then
    return array[]::bigint[];
  end if;
  if (select max(d.depth) from unnest(v_depths) as d(depth)) > 2000 then
    perform pgworker.refuse_tree(format('%s has more than 2000 levels', p_base),
                                 'Jobs can add further levels below themselves when they run, with add_children().');
  end if;

  -- Shapes and limits first, since the rest relies on them.
  perform count(s.n) from pgworker.read_specs(v_specs, pgworker.node_keys(), p_base, v_parents, v_places) s;
  v_edges := pgworker.check_nodes(v_specs, p_base, v_parents, v_places, case when p_parent.id is not null then array(
    select b.name from pgworker.job b where b.root_id = p_parent.root_id and b.parent_id = p_parent.id and b.name is not null
    union all
    select b.name from pgworker.finished b
    where b.root_id = p_parent.root_id and b.parent_id = p_parent.id and b.name is not null) end);
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

  select array_agg(nextval('pgworker.job_id') order by g.n) into v_ids from generate_series(1, cardinality(v_specs)) as g(n);
  select array_agg(coalesce(t.n, 0)::int order by g.n), array_agg(f.n is not null order by g.n) into v_afters, v_leads
  from generate_series(1, cardinality(v_specs)) as g(n)
  left join (select e.node, count(*) as n from unnest(v_edges.tos) as e(node) group by e.node) as t on t.node = g.n
  left join (select e.node, count(*) as n from unnest(v_edges.froms) as e(node) group by e.node) as f on f.node = g.n;

  with added as (
    insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, key, priority, flags,
                                   created_at, parent_id, root_id, depth, slot, gate_id, waiting, has_children,
                                   has_followers, name, on_failure)
    select v_ids[s.n], s.identifier, s.payload, s.queue_name, coalesce(s.run_at, v_now), coalesce(s.max_attempts, 25),
           s.job_key, coalesce(s.priority, 0), nullif(s.flags, '{}'), v_now,
           coalesce(v_ids[v_parents[s.n]], p_parent.id), coalesce(p_parent.root_id, v_ids[1]),
           coalesce(p_parent.depth + 1, 0) + v_depths[s.n] - 1,
           case when v_parents[s.n] > 0 then pgworker.slot(v_places[s.n], v_counts[v_parents[s.n]])
                else p_slots[v_places[s.n] + 1] end,
           coalesce(v_ids[v_gates[s.n]], case when v_afters[s.n] > 0 then v_ids[s.n] end),
           v_counts[s.n] > 0 or v_gates[s.n] > 0 or v_afters[s.n] > 0, v_counts[s.n] > 0, v_leads[s.n],
           s.name, s.on_failure                    -- not v_specs[s.n]: each look into that may walk through it
    from pgworker.read_specs(v_specs, pgworker.node_keys(), p_base, v_parents, v_places) s
    order by s.job_key nulls first, s.n
    on conflict (key) where key is not null do nothing
    returning j.id, j.waiting, j.run_at
  )
  select array_agg(a.id), bool_or(not a.waiting and a.run_at <= pgworker.clock()),
         bool_or(not a.waiting and a.run_at < v_now)
  into v_added, v_due, v_past
  from added a;
  if coalesce(cardinality(v_added), 0) < cardinality(v_ids) then
    select min(u.n) as n into v_bad
    from unnest(v_ids) with ordinality as u(id, n)
    where u.id in (select i.id from unnest(v_ids) as i(id) except select a.id from unnest(v_added) as a(id));
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
  'to finish first). Raises 22023 and PW003 with the path of the node, before anything has been added.';

create function pgworker.add_children(worker_id bigint, job_id bigint, children jsonb) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
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
