-- 59_compensating.sql: what the completed jobs of a tree have done is undone when the tree fails for good
--
--   compensation_keys    what the compensate of a node may have
--   add_compensations    those of new nodes, checked
--   account              what a compensation is told of its node
--   remember             ... of one that completed, when it is about to be forgotten or undone
--   remember_success     ... of one that was to stop, and reports that it is done
--   compensate           adds the compensations of trees that have failed and come to rest; compensate_root for one
--   lock_compensated     what cannot be run again or declared completed any more
--   compensations        the public view
--
-- A tree has failed for good when its root has failed or was cancelled (settle_ended() says so) and nothing of it is live.
-- While something still runs, or somebody holds the rows, a record in unsettled has maintain() look again: whoever ends
-- the last job need not know. Compensations are children of the root: each is to come after the one before it, and
-- nothing waits for them. From then on the tree is what it is: its jobs are not retried, and cancelling the root again
-- does not reach what undoes it (live_below()).
-- Locks: rows of compensation come between those of job and those of finished. Whoever makes jobs live again or completed
-- takes all those of their trees, in the order of nodes, and waits for them; everybody else holds counters or finished jobs
-- by then and waits for none of them. Rows that were only locked would not make a transaction that sees an old snapshot
-- fail, so they are written.

create function pgworker.compensation_keys() returns text[]
language sql immutable parallel safe
return array['identifier', 'payload', 'queue_name', 'max_attempts', 'priority', 'flags', 'limit_key'];
comment on function pgworker.compensation_keys() is
  'Internal: the keys of an object that describes the compensation of a node.';

create function pgworker.add_compensations(
  p_specs jsonb[], p_base text, p_parents int[], p_places int[], p_ids bigint[], p_root_id bigint
) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_node  record;
  v_spec  record;
  v_where text;
begin
  for v_node in
    select s.n, s.spec -> 'compensate' as spec
    from unnest(p_specs) with ordinality as s(spec, n)
    where jsonb_typeof(s.spec -> 'compensate') <> 'null'
    order by s.n
  loop
    v_where := pgworker.spec_label(p_base, v_node.n, p_parents, p_places) || '.compensate';
    select r.payload into strict v_spec
    from pgworker.read_specs(array[v_node.spec], pgworker.compensation_keys(), v_where, array[0], array[null::int]) r;
    if jsonb_typeof(v_spec.payload) <> 'object' or v_spec.payload ? 'node' then
      raise exception using errcode = '22023',
        message = format('%s.payload must be an object without a key ''node'', got %s', v_where,
                         left(v_spec.payload::text, 200)),
        hint = 'The compensation finds there what it is to undo: the node''s id, payload and result.';
    end if;
    if exists (select from pgworker.compensation c where c.root_id = p_root_id and c.job_id is not null) then
      perform pgworker.refuse_tree(format('%s is below a compensation', v_where), 'What undoes is not undone: leave it out.');
    end if;
    insert into pgworker.compensation (node_id, root_id, spec) values (p_ids[v_node.n], p_root_id, v_node.spec);
  end loop;
end
$$;
comment on function pgworker.add_compensations(jsonb[], text, int[], int[], bigint[], bigint) is
  'Internal: keeps the compensations of these new nodes; raises 22023 (22004, PW003) for one that cannot be.';

create function pgworker.account(p_id bigint, p_identifier text, p_name text, p_payload jsonb, p_result jsonb) returns jsonb
language sql immutable parallel safe
return jsonb_build_object('id', p_id, 'identifier', p_identifier, 'name', p_name, 'payload', p_payload, 'result', p_result);
comment on function pgworker.account(bigint, text, text, jsonb, jsonb) is
  'Internal: what a compensation is told of the node that it undoes.';

create function pgworker.remember(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  update pgworker.compensation c
  set finished_at = f.finished_at, node = pgworker.account(f.id, f.task_identifier, f.name, f.payload, f.result)
  from pgworker.finished f
  where c.ctid = any (array(select o.ctid from pgworker.compensation o
                            where o.node_id = any (p_ids) and o.node is null for update skip locked))
    and f.id = any (array[c.node_id]) and f.state = 'completed';
end
$$;
comment on function pgworker.remember(bigint[]) is
  'Internal: keeps with their compensations what those of these jobs did that have completed. Rows that somebody holds '
  'are passed over.';

-- It ends as cancelled, or as failed, but what it has done is done.
create function pgworker.remember_success(p_ids bigint[], p_results jsonb[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  perform from pgworker.compensation c where c.node_id = any (p_ids) order by c.node_id for update;
  update pgworker.compensation c
  set finished_at = pgworker.clock(), node = pgworker.account(j.id, j.task_identifier, j.name, j.payload, u.result)
  from unnest(p_ids, p_results) as u(id, result)
  join pgworker.job j on j.id = u.id
  where c.node_id = any (array[u.id]);
end
$$;
comment on function pgworker.remember_success(bigint[], jsonb[]) is
  'Internal: these jobs, whose rows the caller has locked, were asked to stop, and have been reported as completed: they '
  'are to be undone like any that completed.';

create function pgworker.compensate_root(p_root_id bigint) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_held  bigint[];
  v_done  bigint[];
  v_specs jsonb;
  v_salt  text;
  v_job   pgworker.job;
  v_ids   bigint[];
begin
  v_held := array(select c.node_id from pgworker.compensation c where c.root_id = p_root_id for update skip locked);
  if exists (select from pgworker.compensation c where c.root_id = p_root_id and c.job_id is not null) then
    return;
  end if;
  if not exists (select from pgworker.finished f where f.id = p_root_id and f.state in ('failed', 'cancelled')) then
    -- Live, or completed. Somebody may be ending it who did not see all of its compensations.
    if exists (select from pgworker.job j where j.id = p_root_id)
       and not exists (select from pgworker.job j where j.id = p_root_id for key share skip locked) then
      perform pgworker.postpone(array[p_root_id], 'compensate');
    end if;
    return;
  end if;
  if cardinality(v_held) < (select count(*) from pgworker.compensation c where c.root_id = p_root_id)
     or exists (select from pgworker.job j where j.root_id = p_root_id) then
    perform pgworker.postpone(array[p_root_id], 'compensate');
    return;
  end if;

  perform pgworker.remember(v_held);
  v_salt := gen_random_uuid()::text;               -- names that no sibling has
  select array_agg(d.node_id order by d.n),
         jsonb_agg(d.spec || jsonb_build_object(
           'payload', coalesce(nullif(d.spec -> 'payload', 'null'), '{}') || jsonb_build_object('node', d.node),
           'name', v_salt || d.n, 'after', case when d.n > 1 then jsonb_build_array(v_salt || d.n - 1) end,
           'on_failure', 'ignore') order by d.n)
  into v_done, v_specs
  from (select c.node_id, c.spec, c.node, row_number() over (order by c.finished_at desc, c.node_id desc) as n
        from pgworker.compensation c
        where c.root_id = p_root_id and c.node is not null) as d;
  if v_done is null then
    return;                                        -- nothing was done that could be undone
  end if;
  v_job.id := p_root_id;
  v_job.root_id := p_root_id;
  v_job.depth := 0;
  v_ids := pgworker.put_nodes(v_specs, 'compensations', v_job, null);
  update pgworker.job j set name = format('compensation of job %s', u.node_id)
  from unnest(v_ids, v_done) as u(id, node_id)
  where j.id = any (array[u.id]);
  update pgworker.compensation c set job_id = u.id
  from unnest(v_ids, v_done) as u(id, node_id)
  where c.node_id = any (array[u.node_id]);
end
$$;
comment on function pgworker.compensate_root(bigint) is
  'Internal: compensate() for one tree.';

create function pgworker.compensate(p_roots bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set lock_timeout = '5ms'
as $$
declare
  v_root_id bigint;
begin
  for v_root_id in
    select c.root_id from pgworker.compensation c where c.root_id = any (p_roots) group by c.root_id order by c.root_id
  loop
    loop
      begin
        perform pgworker.compensate_root(v_root_id);
        exit;
      exception when lock_not_available then       -- as in lock_free(): held by somebody who may wait for a counter of ours
      end;
    end loop;
  end loop;
end
$$;
comment on function pgworker.compensate(bigint[]) is
  'Internal: if the trees of these roots have failed and nothing of them is live any more, the compensations of their '
  'completed jobs are added, the last one to complete first; what cannot be done yet is left to maintain().';

create function pgworker.lock_compensated(p_ids bigint[]) returns bigint[]
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_roots constant bigint[] := array(select distinct f.root_id from pgworker.finished f where f.id = any (p_ids));
begin
  update pgworker.compensation c set root_id = c.root_id
  where c.node_id = any (array(select o.node_id from pgworker.compensation o where o.root_id = any (v_roots)
                               order by o.node_id + 0 for update));
  -- Compensations, and whatever they have added, came after all jobs of the tree.
  return array(select f.id from pgworker.finished f
               where f.id = any (p_ids)
                 and f.id < (select min(c.job_id) from pgworker.compensation c where c.root_id = f.root_id));
end
$$;
comment on function pgworker.lock_compensated(bigint[]) is
  'Internal: keeps the compensations of the trees of these finished jobs from beginning until the transaction ends, and '
  'returns those of the jobs for which it is too late.';

create view pgworker.compensations as
select c.node_id, c.root_id, c.spec as compensate, c.job_id, v.state, v.last_error
from pgworker.compensation c
left join pgworker.jobs v on v.id = c.job_id;
comment on view pgworker.compensations is
  'One row per job of a tree that was added with a compensation. job_id, state, last_error: of the job that undoes it, null '
  'as long as it is not to be undone.';
