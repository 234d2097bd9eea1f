-- 80_access.sql: who may do what
--
-- Nothing is open to PUBLIC. Roles get functions and views, never tables: what they call runs with the rights of the
-- installing role (SECURITY DEFINER, pinned search_path) where it has to touch a table. Administration stays with the
-- owner.

create function pgworker.refuse_role(p_role regrole) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pg_catalog.pg_roles r where r.oid = p_role) then
    raise exception using errcode = case when p_role is null then '22004' else '42704' end,
      message = case when p_role is null then 'role must not be null' else format('role %s does not exist', p_role) end,
      hint = 'Name one that exists, for example ''shop_app''; CREATE ROLE makes one.';
  end if;
end
$$;
comment on function pgworker.refuse_role(regrole) is 'Internal: raises 22004 or 42704 for what is no role.';

create function pgworker.grant_producer(role regrole) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_role(role);
  execute format('grant usage on schema pgworker to %s', role);
  execute format(
    'grant execute on function pgworker.version(), pgworker.fake_now(timestamptz), '
    'pgworker.add_job(text, jsonb, text, timestamptz, int, text, int, text[], text, text, interval, interval), '
    'pgworker.add_job(text, json, text, timestamptz, int, text, int, text[], text, text, interval, interval), '
    'pgworker.add_job(text, text, text, timestamptz, int, text, int, text[], text, text, interval, interval), '
    'pgworker.add_jobs(jsonb), pgworker.add_job_tree(jsonb), pgworker.trigger_job() to %s', role);
end
$$;
comment on function pgworker.grant_producer(regrole) is 'Lets a role add jobs, and do nothing else.';

create function pgworker.grant_worker(role regrole) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.grant_producer(role);
  execute format(
    'grant execute on function pgworker.check_client(int), pgworker.register_worker(text, interval, text, jsonb), '
    'pgworker.get_jobs(bigint, int, text[], text[]), pgworker.get_job(bigint, text[], text[]), '
    'pgworker.complete_job(bigint, bigint, jsonb, int), '
    'pgworker.fail_job(bigint, bigint, text, timestamptz, boolean, jsonb, int), '
    'pgworker.cancel_job(bigint, bigint, text, int), '
    'pgworker.finish_jobs(bigint, bigint[], jsonb[], bigint[], text[], int[]), '
    'pgworker.release_jobs(bigint, bigint[], int[]), pgworker.set_progress(bigint, bigint, jsonb), '
    'pgworker.add_children(bigint, bigint, jsonb), pgworker.wait_for_children(bigint, bigint, int), '
    'pgworker.children(bigint), pgworker.get_children_values(bigint), pgworker.get_failed_children_values(bigint), '
    'pgworker.restart_timeouts(bigint, bigint[], int[]), '
    'pgworker.heartbeat(bigint), pgworker.held_jobs(bigint), '
    'pgworker.unregister_worker(bigint), '
    'pgworker.maintain(), pgworker.next_run_at(text[]) to %s', role);
end
$$;
comment on function pgworker.grant_worker(regrole) is
  'Lets a role speak the worker protocol, and add jobs as handlers do.';

create function pgworker.grant_observer(role regrole) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.refuse_role(role);
  execute format('grant usage on schema pgworker to %s', role);
  execute format('grant select on pgworker.jobs, pgworker.tasks, pgworker.compensations, pgworker.job_attempts, '
                 'pgworker.schedules, pgworker.forbidden_flags, pgworker.settings to %s', role);
  -- clock, moved_clock and the like: a view's functions run with the rights of who reads it
  execute format('grant execute on function pgworker.version(), pgworker.clock(timestamptz), '
                 'pgworker.job_state(bigint, boolean, timestamptz, timestamptz), pgworker.default_setting(text), '
                 'pgworker.known_settings(), '
                 'pgworker.moved_clock(timestamptz), pgworker.fake_now(timestamptz), '
                 'pgworker.cron_next(text, timestamptz, text), pgworker.cron_preview(text, int, timestamptz, text), '
                 'pgworker.next_run_at(text[]), pgworker.children(bigint), '
                 'pgworker.get_children_values(bigint), pgworker.get_failed_children_values(bigint), '
                 'pgworker.job_tree(bigint), pgworker.tree_progress(bigint), pgworker.audit(), '
                 'pgworker.why(bigint), pgworker.doctor() to %s', role);
end
$$;
comment on function pgworker.grant_observer(regrole) is
  'Lets a role look at every job and every schedule, and change nothing.';

revoke execute on all functions in schema pgworker from public;
