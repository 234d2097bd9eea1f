-- 33_nodes.sql: what may be asked for as a tree
--
--   node_keys       what a node may have
--   parts, slot     how a counter is divided
--   find_cycle      siblings that wait for each other
--   refuse_tree     the error for a tree that cannot be
--   check_nodes     what makes a tree of jobs impossible
--   read_tree       nodes in a row

create function pgworker.node_keys() returns text[]
language sql immutable parallel safe
return pgworker.job_keys() || array['name', 'on_failure', 'children', 'after', 'compensate'];
comment on function pgworker.node_keys() is 'Internal: the keys of an object that describes a node of a tree.';

-- Up to 31 are counted in the total itself; more in parts. Jobs that lie side by side are claimed, and so ended, at about
-- the same time: one by one by different sessions, which must not wait for each other, so neighbours are dealt round; or
-- many by one report, which should not have to count in every part, so that is done among 16 parts, and each run of a
-- thousand has 16 of its own. Measured, one by one from 16 sessions with commits of 5 ms: dealt among 1, 8, 16, 32 parts
-- 125, 824, 1,339, 1,396 a second (1,728 unrelated jobs); each part that a report touches costs it about 10 us, and more
-- the longer an old snapshot has kept the versions of its counter.
create function pgworker.parts(p_count bigint) returns int
language sql immutable parallel safe
return case when p_count < 32 then 0 else least(16, p_count / 8) * greatest(1, least(64, p_count / 1024)) end::int;
comment on function pgworker.parts(bigint) is
  'Internal: in how many parts the counter of a job that waits for so many is divided; 0: it is not.';

create function pgworker.slot(p_place bigint, p_count bigint) returns smallint
language sql immutable parallel safe
return (case when p_count < 32 then 0
             else 1 + p_place % least(16, p_count / 8)
                  + 16 * (p_place * greatest(1, least(64, p_count / 1024)) / p_count) end)::smallint;
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
  v_sum   int;
  v_seen  boolean[] := array_fill(false, array[v_most]);
  v_cycle int[];
begin
  select array_agg(e.f order by e.f), array_agg(e.t order by e.f) into v_from, v_to from unnest(p_from, p_to) as e(f, t);
  for v_i in reverse cardinality(v_from) .. 1 loop
    v_first[v_from[v_i]] := v_i;
    v_sum := v_wait[v_to[v_i]] + 1;
    v_wait[v_to[v_i]] := v_sum;
  end loop;
  -- Take away whatever waits for nothing, until nothing can be taken any more.
  v_ready := array(select g.n from generate_series(1, v_most) as g(n) where v_wait[g.n] = 0);
  v_top := cardinality(v_ready);
  while v_top > 0 loop
    v_node := v_ready[v_top];
    v_top := v_top - 1;
    v_edge := v_first[v_node];
    while v_edge > 0 and v_from[v_edge] = v_node loop
      v_sum := v_wait[v_to[v_edge]] - 1;
      v_wait[v_to[v_edge]] := v_sum;
      if v_sum = 0 then
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

-- Shapes are checked later, by read_specs: here whatever is not of its type is passed over.
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
  -- Most trees have none of what is checked here, and looking once costs less than looking for each.
  if not exists (select from unnest(p_specs) as s(spec)
                 where s.spec ?| array['name', 'on_failure', 'after', 'unique_for', 'debounce_max', 'job_key_mode']) then
    return;
  end if;
  select s.n, s.spec ->> 'name' as name, s.spec ->> 'on_failure' as policy into v_bad
  from unnest(p_specs) with ordinality as s(spec, n)
  where length(s.spec ->> 'name') not between 1 and 128
     or jsonb_typeof(s.spec -> 'on_failure') = 'string'
        and s.spec ->> 'on_failure' not in ('fail-parent', 'ignore', 'remove')
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

  -- Who would wait for a job that is another tree's, or has long been finished?
  select s.n, k.key into v_bad
  from unnest(p_specs) with ordinality as s(spec, n)
  cross join unnest(array['unique_for', 'debounce_max', 'job_key_mode']) with ordinality as k(key, place)
  where s.spec ?| array['unique_for', 'debounce_max', 'job_key_mode']
    and case when k.key = 'job_key_mode' then s.spec ->> k.key = 'debounce' else s.spec ->> k.key is not null end
  order by s.n, k.place limit 1;
  if found then
    perform pgworker.refuse_tree(
      format('%s.%s cannot be had in a tree, got %s', pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), v_bad.key,
             quote_literal(left(p_specs[v_bad.n] ->> v_bad.key, 200))),
      'A node is a job of its own: leave it out, and let the job that adds the tree be the unique or debounced one.');
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

  if not exists (select from unnest(p_specs) as s(spec)
                 where jsonb_typeof(s.spec -> 'after') = 'array' and s.spec -> 'after' <> '[]') then
    return;
  end if;
  with member as (
    select s.n, p_parents[s.n] as parent, s.spec ->> 'name' as name, s.spec -> 'after' as after
    from unnest(p_specs) with ordinality as s(spec, n)
  ), wish as (
    select distinct m.n, m.parent, a.name #>> '{}' as name
    from member m
    cross join lateral jsonb_array_elements(case when jsonb_typeof(m.after) = 'array' then m.after end) as a(name)
    where jsonb_typeof(a.name) = 'string'
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
    if p_parents[v_bad.n] = 0 and v_bad.name = any (p_taken) then
      perform pgworker.refuse_tree(
        format('%s.after names %s, which was added by an earlier call',
               pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), quote_literal(v_bad.name)),
        'Add the two in one call, or let the job wait_for_children() before it adds this one.');
    end if;
    perform pgworker.refuse_tree(
      format('%s.after names %s, which none of its siblings is called',
             pgworker.spec_label(p_base, v_bad.n, p_parents, p_places), quote_literal(left(v_bad.name, 200))),
      coalesce((select 'Its siblings'' names: '
                       || string_agg(quote_literal(o.name), ', ' order by o.place) filter (where o.place <= 20)
                       || case when count(*) > 20 then format(' and %s more', count(*) - 20) else '' end || '.'
                from (select s.spec ->> 'name' as name, row_number() over (order by s.n) as place
                      from unnest(p_specs) with ordinality as s(spec, n)
                      where p_parents[s.n] = p_parents[v_bad.n] and s.spec ->> 'name' is not null and s.n <> v_bad.n) as o),
               'Give the sibling that it is to wait for a name.'));
  end if;

  -- A cycle cannot do without an edge from a later sibling, or from the job itself.
  if exists (select from unnest(froms, tos) as e(f, t) where e.f >= e.t) then
    v_cycle := pgworker.find_cycle(froms, tos);
    if v_cycle is not null then
      perform pgworker.refuse_tree(
        format('%s waits for itself: %s', pgworker.spec_label(p_base, v_cycle[1], p_parents, p_places),
               (select string_agg(case when c.place = 20 and c.place < cardinality(v_cycle) - 1
                                       then format('%s more', cardinality(v_cycle) - 20)
                                       else quote_literal(p_specs[c.n] ->> 'name') end, ' after ' order by c.place)
                from unnest(v_cycle) with ordinality as c(n, place)
                where c.place <= 20 or c.place = cardinality(v_cycle))),
        'Take one of these out of an after.');
    end if;
  end if;
end
$$;
comment on function pgworker.check_nodes(jsonb[], text, int[], int[], text[]) is
  'Internal: raises PW003 (22023 for a name out of its limits) for nodes that cannot be a tree; returns which waits for '
  'which of its siblings. p_taken: names that siblings of the topmost ones have already.';

-- Level by level, so that what lies below a node is copied once a level and not kept. Elements of arrays are set from
-- variables: an assignment that reads its own array copies it.
create function pgworker.read_tree(
  p_nodes jsonb, p_base text, out specs jsonb[], out parents int[], out places int[], out counts int[],
  out depths int[], out gates int[], out orders int[]
)
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set jit = off
set work_mem = '64MB'
as $$
declare
  v_depth   int := 0;
  v_before  int := 0;                              -- nodes above this level
  v_level   jsonb[];
  v_specs   jsonb[];
  v_counts  int[];
  v_parents int[];
  v_places  int[];
  v_gates   int[];
  v_size    int[];
  v_next    int[];
  v_top     int := 1;
  v_sum     int;
begin
  select array_agg(e.spec order by e.n), array_agg(0 order by e.n), array_agg((e.n - 1)::int order by e.n),
         array_agg(0 order by e.n)
  into v_level, v_parents, v_places, v_gates
  from jsonb_array_elements(p_nodes) with ordinality as e(spec, n);
  while v_level is not null loop
    v_depth := v_depth + 1;
    if v_depth > 2000 then
      perform pgworker.refuse_tree(format('%s has more than 2000 levels', p_base),
                                   'Jobs can add further levels below themselves when they run, with add_children().');
    end if;
    select array_agg(case when c.children is null then c.spec else c.spec - 'children' end order by c.n),
           array_agg(coalesce(c.children, 0) order by c.n)
    into v_specs, v_counts
    from (select u.n, u.spec,
                 case when jsonb_typeof(u.spec -> 'children') = 'array'
                      then jsonb_array_length(u.spec -> 'children') end as children
          from unnest(v_level) with ordinality as u(spec, n)) as c;
    specs := specs || v_specs;
    counts := counts || v_counts;
    parents := parents || v_parents;
    places := places || v_places;
    gates := gates || v_gates;
    depths := depths || array_fill(v_depth, array[cardinality(v_specs)]);
    select array_agg(e.spec order by u.n, e.n), array_agg((v_before + u.n)::int order by u.n, e.n),
           array_agg((e.n - 1)::int order by u.n, e.n),
           array_agg(case when jsonb_typeof(v.spec -> 'after') = 'array' and v.spec -> 'after' <> '[]'
                          then (v_before + u.n)::int else v_gates[u.n] end order by u.n, e.n)
    into v_level, v_parents, v_places, v_gates
    from unnest(v_level, v_counts) with ordinality as u(spec, count, n)
    join unnest(v_specs) with ordinality as v(spec, n) on v.n = u.n
    cross join lateral jsonb_array_elements(u.spec -> 'children') with ordinality as e(spec, n)
    where u.count > 0;
    v_before := v_before + cardinality(v_specs);
  end loop;

  -- The order in which the tree reads: a node's place is one behind its parent, or behind all that is below the sibling
  -- before it. Nodes are numbered level by level here, parents before children, which is the same for a job and its
  -- children.
  if v_depth = 1 or v_depth = 2 and parents[2] = 1 then
    orders := array(select g.n from generate_series(1, v_before) as g(n));
    return;
  end if;
  v_size := array_fill(1, array[v_before]);
  for v_n in reverse v_before .. 1 loop
    if parents[v_n] > 0 then
      v_sum := v_size[parents[v_n]] + v_size[v_n];
      v_size[parents[v_n]] := v_sum;
    end if;
  end loop;
  orders := array_fill(0, array[v_before]);
  v_next := orders;
  for v_n in 1 .. v_before loop
    if parents[v_n] = 0 then
      orders[v_n] := v_top;
      v_top := v_top + v_size[v_n];
    else
      orders[v_n] := v_next[parents[v_n]];
      v_next[parents[v_n]] := orders[v_n] + v_size[v_n];
    end if;
    v_next[v_n] := orders[v_n] + 1;
  end loop;
end
$$;
comment on function pgworker.read_tree(jsonb, text) is
  'Internal: an array of nodes and everything below them, numbered from 1 level by level: without their children, their '
  'parents (0: none), places among siblings (from 0), numbers of children, depths (from 1), nearest node above that '
  'waits for siblings (0: none), and places in the order in which the tree reads.';
