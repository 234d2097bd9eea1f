-- 32_bulk.sql: adding many jobs at once
--
--   add_jobs      the public function
--
-- Locks: the live rows with the same job keys, by id. A bulk call adds new keys in their order, so that two of them
-- cannot wait for each other.

create function pgworker.add_jobs(specs jsonb) returns setof pgworker.jobs
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_nestloop = off
set jit = off
as $$
declare
  v_now   constant timestamptz := pgworker.clock(now());
  v_specs jsonb[];
  v_ids   bigint[];
  v_keys  text[];
  v_locked bigint;
  v_folds bigint[];
  v_first bigint[];
  v_due   boolean;
  v_past  boolean;
  v_changed boolean;
  v_moved boolean;
  v_held  pgworker.jobs;
  v_unique text[];
  v_answered text[];
  v_must  text[];
  v_spec  record;
  v_one   pgworker.jobs;
  v_rows  pgworker.jobs[];
begin
  if add_jobs.specs is null then
    raise exception using errcode = '22004', message = 'specs must not be null',
      hint = 'Give a JSON array of objects whose keys are the argument names of add_job; it may be empty.';
  end if;
  if jsonb_typeof(add_jobs.specs) <> 'array' then
    raise exception using errcode = '22023',
      message = format('specs must be an array of objects, got %s', jsonb_typeof(add_jobs.specs)),
      hint = 'Write [{"identifier": "send_email", "payload": {"to": 1}}, ...].';
  end if;

  v_specs := array(select e.spec from jsonb_array_elements(add_jobs.specs) with ordinality as e(spec, n) order by e.n);
  -- Ids first, in the order given: they ascend with it whatever order the rows are written in.
  v_ids := array(select nextval('pgworker.job_id') from generate_series(1, cardinality(v_specs)));

  v_keys := array(select distinct e.spec ->> 'job_key' from unnest(v_specs) as e(spec)
                  where e.spec ->> 'job_key' is not null);
  loop
    begin
      -- Live jobs with these keys are locked by id, like everywhere. Then everything new goes in with one statement, keys
      -- in their order, which waits for nobody but those who are just adding one of them. So far two calls that share
      -- keys wait for each other in one direction only. A key that came up in between can then be locked at once, or
      -- everything is undone and begun again: waiting for it here could be a deadlock.
      perform from pgworker.job j where j.key = any (v_keys) order by j.id + 0 for update;

      with spec as materialized (
        select s.n, s.job_key, s.unique_for, s.run_at as asked, s.held, v_ids[s.n] as id, s.identifier, s.payload,
               s.queue_name, least(coalesce(s.run_at, v_now), v_now + s.debounce_max) as run_at,
               coalesce(s.max_attempts, t.max_attempts, 25) as max_attempts, coalesce(s.priority, 0) as priority,
               nullif(s.flags, '{}') as flags, s.limit_key, v_now + s.unique_for as unique_until,
               case when t.limited then pgworker.lane(t.keyed, s.limit_key, s.queue_name) end as lane
        from (select r.n, r.identifier, r.payload, r.queue_name, r.run_at, r.max_attempts, r.job_key, r.priority, r.flags,
                     r.limit_key, r.unique_for, r.debounce_max, r.unique_for is not null and exists (
                       select from pgworker.finished f where f.key = r.job_key and f.unique_until > v_now offset 0) as held
              from pgworker.read_specs(v_specs, pgworker.job_keys(), 'specs', null, null) r) as s
        left join pgworker.task t on t.identifier = s.identifier
      ), keyed as materialized (
        -- Those that a window answers come after the others of their key, of which one is to be inserted.
        select s.*, row_number() over (partition by s.job_key order by s.held, s.n) as nth,
               count(*) over (partition by s.job_key) as same_key
        from spec s
        where s.job_key is not null
      ), plain as (
        -- By themselves: ON CONFLICT costs a lock and a WAL record for each row, whether it has a key or not.
        insert into pgworker.job (id, task_identifier, payload, queue_name, run_at, max_attempts, priority, flags,
                                  created_at, limit_key, lane)
        select s.id, s.identifier, s.payload, s.queue_name, s.run_at, s.max_attempts, s.priority, s.flags,
               v_now, s.limit_key, s.lane
        from spec s
        where s.job_key is null
      ), added as (
        insert into pgworker.job as j (id, task_identifier, payload, queue_name, run_at, max_attempts, priority, flags,
                                       created_at, limit_key, lane, key, unique_until)
        select s.id, s.identifier, s.payload, s.queue_name, s.run_at, s.max_attempts, s.priority, s.flags,
               v_now, s.limit_key, s.lane, s.job_key, s.unique_until
        from keyed s
        where s.nth = 1 and not s.held
        order by s.job_key
        on conflict (key) where key is not null do nothing
        returning j.id, j.key
      )
      select array(select s.n from keyed s
                   where s.same_key > 1 or not exists (select from added a where a.key = s.job_key)),
             array(select a.id from added a
                   where exists (select from keyed s where s.job_key = a.key and s.same_key > 1)),
             array(select s.job_key from keyed s where s.unique_for is not null and not s.held),
             array(select s.job_key from keyed s where s.nth = 1 and s.held),
             bool_or(coalesce(s.asked, v_now) <= pgworker.clock() and not s.held), bool_or(s.asked < v_now)
      into v_folds, v_first, v_unique, v_answered, v_due, v_past
      from spec s;

      if cardinality(v_folds) > 0 then
        v_must := array(select k.key from unnest(v_keys) as k(key)
                        where k.key not in (select a.key from unnest(v_answered) as a(key)));
        perform from pgworker.job j where j.key = any (v_answered) order by j.id + 0 for update nowait;
        perform from pgworker.job j where j.key = any (v_must) order by j.id + 0 for update nowait;
        get diagnostics v_locked = row_count;
        if v_locked < cardinality(v_must) then     -- one has gone since
          raise lock_not_available;
        end if;
      end if;
      if exists (select from unnest(v_unique) as k(key)
                 where exists (select from pgworker.finished f where f.key = k.key and f.unique_until > v_now offset 0)) then
        raise lock_not_available;                  -- one has come and ended since
      end if;
      exit;
    exception when lock_not_available then
      -- once more
    end;
  end loop;

  -- The rest meets a live job, or another spec with its key: folded in the order given, as single calls would (put_job). All
  -- rows are locked by us by now. What becomes of a row is reckoned here and written once: a transaction that writes one
  -- row thousands of times walks over all its versions each time.
  if cardinality(v_folds) > 0 then
    for v_spec in
      select s.n, s.identifier, s.payload, s.queue_name, s.run_at,
             coalesce(s.max_attempts, t.max_attempts) as max_attempts, s.job_key, s.priority, s.flags,
             s.limit_key, s.unique_for, s.debounce_max, coalesce(s.job_key_mode, 'replace') as mode,
             a.id is not null as added,
             case when s.unique_for is not null
                  then (select v from pgworker.jobs v where v.key = s.job_key and v.unique_until > v_now
                        order by v.id limit 1) end as held,
             lag(s.job_key) over w is null as first, lead(s.job_key) over w is null as last
      from pgworker.read_specs(v_specs, pgworker.job_keys(), 'specs', null, null) s
      join unnest(v_folds) as f(n) on f.n = s.n
      left join unnest(v_first) as a(id) on a.id = v_ids[s.n]
      left join pgworker.task t on t.identifier = s.identifier
      window w as (partition by s.job_key order by s.n)
      order by s.job_key, s.n
    loop
      if v_spec.first then
        select v.* into v_one from pgworker.live v where v.key = v_spec.job_key;
        v_changed := false;
        v_moved := false;
      end if;
      v_held := v_spec.held;
      if v_held.id = v_one.id then
        v_held := null;
      end if;
      if v_spec.added then
        null;                                      -- this very spec made the row
      elsif v_held.id is not null or v_spec.unique_for is not null and v_one.unique_until > v_now then
        null;                                      -- a window answers it: of a job that has finished, or of this one
      elsif v_spec.mode = 'unsafe_dedupe' then
        v_one.revision := v_one.revision + 1;
        v_changed := true;
      elsif v_one.state = 'running' then
        update pgworker.job j set revision = v_one.revision where j.id = v_one.id and v_changed;
        v_ids[v_spec.n] := pgworker.put_job(v_ids[v_spec.n], v_spec.identifier, v_spec.payload, v_spec.queue_name,
                                            v_spec.run_at, v_spec.max_attempts, v_spec.job_key, v_spec.priority,
                                            v_spec.flags, v_spec.mode, v_spec.limit_key, v_spec.unique_for,
                                            v_spec.debounce_max);
        select v.* into v_one from pgworker.live v where v.id = v_ids[v_spec.n];
        v_changed := false;
      else
        v_one.task_identifier := v_spec.identifier;
        v_one.payload := case when jsonb_typeof(v_one.payload) = 'array' and jsonb_typeof(v_spec.payload) = 'array'
                              then v_one.payload || v_spec.payload else v_spec.payload end;
        v_one.queue_name := v_spec.queue_name;
        if v_spec.mode <> 'preserve_run_at' or v_one.attempts > 0 then
          v_one.run_at := least(coalesce(v_spec.run_at, v_now), v_now + v_spec.debounce_max,
                                case when v_one.attempts = 0 then v_one.created_at + v_spec.debounce_max end);
        end if;
        v_one.limit_key := v_spec.limit_key;
        v_one.unique_until := v_now + v_spec.unique_for;
        v_one.max_attempts := coalesce(v_spec.max_attempts, 25);
        v_one.priority := coalesce(v_spec.priority, 0);
        v_one.flags := nullif(v_spec.flags, '{}');
        v_one.attempts := 0;
        v_one.last_error := null;
        v_one.progress := null;
        v_one.revision := v_one.revision + 1;
        v_one.state := case when v_one.state = 'waiting' then 'waiting'
                            when v_one.run_at > pgworker.clock() then 'scheduled' else 'ready' end;
        v_changed := true;
        v_moved := true;
      end if;
      v_ids[v_spec.n] := coalesce(v_held.id, v_one.id);
      -- A folded job is returned as its own call would have left it.
      v_rows[v_spec.n] := case when v_held.id is null then v_one else v_held end;
      if v_spec.last and v_changed then
        update pgworker.job j
        set task_identifier = v_one.task_identifier, payload = v_one.payload, queue_name = v_one.queue_name,
            run_at = v_one.run_at, max_attempts = v_one.max_attempts, priority = v_one.priority, flags = v_one.flags,
            attempts = v_one.attempts, last_error = v_one.last_error, progress = v_one.progress,
            revision = v_one.revision, limit_key = v_one.limit_key, unique_until = v_one.unique_until,
            lane = (select pgworker.lane(t.keyed, v_one.limit_key, v_one.queue_name) from pgworker.task t
                    where t.identifier = v_one.task_identifier and t.limited)
        where j.id = v_one.id;
        v_due := v_due or (v_moved and v_one.run_at <= pgworker.clock());
        v_past := v_past or (v_moved and v_one.run_at < v_now);
      end if;
    end loop;
  end if;

  if v_past then
    perform nextval('pgworker.epoch');
  end if;
  if v_due then
    perform pgworker.wake();
  end if;

  if v_rows is null then
    return query
    select v.*
    from unnest(v_ids) with ordinality as u(id, n)
    cross join lateral (select o.* from pgworker.live o where o.id = u.id offset 0) as v
    order by u.n;
  else
    for v_n in 1 .. cardinality(v_ids) loop
      v_one := v_rows[v_n];
      if v_one.id is null then
        select v.* into v_one from pgworker.live v where v.id = v_ids[v_n];
      end if;
      return next v_one;
    end loop;
  end if;
end
$$;
comment on function pgworker.add_jobs(jsonb) is
  'Adds many jobs: an array of objects whose keys are the argument names of add_job. One row per object, in its order; '
  'ids ascend with it. Raises 22023 that says which object is wrong and how; then nothing has been added.';
