-- 55_forgetting.sql: what is stored of trees and is not needed any more
--
--   forget               finished jobs, with everything below them
--   drop_compensations   how trees that are forgotten were to be undone
--   drop_leftovers       what was put off, and is not to be done any more
--
-- Who comes here holds counters, and others hold what is to be removed: finished jobs and compensations that they are about
-- to make live again or to declare completed, for which they then wait for a counter. So nobody is waited for, also not as
-- SKIP LOCKED does at times (lock_free(), in 56_cascading.sql): then everything is looked at anew.

create function pgworker.forget(p_ids bigint[], p_roots bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
set lock_timeout = '5ms'
as $$
declare
  v_ids  bigint[];
  v_in   bigint[];                                 -- of which trees
  v_gone bigint[];
begin
  loop
    begin
      with recursive below as (
        select u.id, u.root_id from unnest(p_ids, p_roots) as u(id, root_id)
        union all
        select c.id, b.root_id
        from below b
        cross join lateral (select f.id from pgworker.finished f where f.root_id = b.root_id and f.parent_id = b.id
                            offset 0) as c
      )
      select array_agg(b.id), array_agg(b.root_id) into v_ids, v_in from below b;
      if exists (select from pgworker.compensation c where c.root_id = any (p_roots)) then
        perform pgworker.remember(v_ids);
      end if;
      -- Whoever holds one changes it, or makes it live again: that is looked at later.
      delete from pgworker.finished f
      where f.ctid = any (array(select o.ctid from pgworker.finished o where o.id = any (v_ids) for update skip locked))
        and not exists (select from pgworker.compensation c
                        where c.node_id = f.id and c.node is null and f.state = 'completed' offset 0);
      v_gone := array(select u.id from unnest(v_ids) as u(id)
                      where not exists (select from pgworker.finished f where f.id = u.id offset 0)
                        and not exists (select from pgworker.job j where j.id = u.id offset 0));
      -- Somebody may be forgetting the job at the other end of a link, and wait for a counter of ours next. If he does not
      -- commit, we have to come back.
      delete from pgworker.dependency d
      where d.ctid = any (array(select o.ctid from pgworker.dependency o
                                where o.after_id = any (v_gone) for update skip locked));
      delete from pgworker.dependency d
      where d.ctid = any (array(select o.ctid from pgworker.dependency o
                                where o.job_id = any (v_gone) for update skip locked));
      perform pgworker.postpone(array_agg(u.id), 'stop', array_agg(u.root_id), array_agg(format('job %s was removed', u.id)),
                                array_agg(u.id))
      from unnest(v_ids, v_in) as u(id, root_id)
      where (u.id in (select g.id from unnest(v_gone) as g(id))) is true
        and (exists (select from pgworker.dependency d where d.after_id = u.id offset 0)
             or exists (select from pgworker.dependency d where d.job_id = u.id offset 0));
      -- Of whole trees: also when the root went before, while somebody was adding children with compensations below it.
      perform pgworker.drop_compensations(array(select distinct r.id from unnest(p_roots) as r(id)
                                                where not exists (select from pgworker.finished f where f.id = r.id offset 0)
                                                  and not exists (select from pgworker.job j where j.id = r.id offset 0)));
      perform pgworker.postpone(array_agg(f.parent_id), 'stop', array_agg(f.root_id),
                                array_agg(format('job %s was removed', f.parent_id)), array_agg(f.parent_id))
      from pgworker.finished f
      where f.id = any (v_ids) and f.id not in (select u.id from unnest(p_ids) as u(id));
      exit;
    exception when lock_not_available then
    end;
  end loop;
end
$$;
comment on function pgworker.forget(bigint[], bigint[]) is
  'Internal: removes what is stored of these jobs and of everything below them. What still runs there goes when it ends.';

create function pgworker.drop_compensations(p_roots bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set lock_timeout = '5ms'
as $$
begin
  loop
    begin
      delete from pgworker.compensation c
      where c.ctid = any (array(select o.ctid from pgworker.compensation o
                                where o.root_id = any (p_roots) for update skip locked));
      exit;
    exception when lock_not_available then
    end;
  end loop;
  perform pgworker.postpone(array(select distinct c.root_id from pgworker.compensation c where c.root_id = any (p_roots)),
                            'forget');
end
$$;
comment on function pgworker.drop_compensations(bigint[]) is
  'Internal: removes the compensations of trees that are forgotten; what somebody holds is left to maintain().';

create function pgworker.drop_leftovers(p_ids bigint[], p_spared bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set lock_timeout = '5ms'
as $$
begin
  loop
    begin
      delete from pgworker.unsettled u
      where u.ctid = any (array(select o.ctid from pgworker.unsettled o
                                where o.job_id in (select i.id from unnest(p_ids || p_spared) as i(id))
                                   or o.cause_id in (select i.id from unnest(p_ids) as i(id))
                                for update skip locked));
      exit;
    exception when lock_not_available then
    end;
  end loop;
end
$$;
comment on function pgworker.drop_leftovers(bigint[], bigint[]) is
  'Internal: what the end of these jobs has left to be done is not to be done any more, nor what was to be done to the '
  'second because of it. What maintain() is just doing is passed over.';
