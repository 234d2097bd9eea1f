-- 52_history.sql: runs of jobs that did not complete them
--
--   records            whether they are recorded
--   forget_attempts    they go with their job; for finished ones, in a trigger
--   job_attempts       the public view
--
-- Whoever ends a run writes it down in the same statement: retry_later and finish (50_finishing.sql), give_back
-- (60_presence.sql). A run that completes its job costs nothing: what there is to know is in the job, as long as it is kept.
-- Locks: rows of attempt, after those of the jobs that they belong to, which nobody else can then hold.

create function pgworker.records() returns boolean
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((select s.value from pgworker.setting s where s.name = 'history'),
                  pgworker.default_setting('history')) = 'on';
end
$$;
comment on function pgworker.records() is 'Internal: whether runs that do not complete their jobs are recorded.';

create function pgworker.forget_attempts(p_ids bigint[]) returns void
language plpgsql volatile parallel unsafe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  delete from pgworker.attempt a
  where a.job_id = any (array(
    select u.id from unnest(p_ids) as u(id)
    where not exists (select from pgworker.job j where j.id = u.id offset 0)
      and not exists (select from pgworker.finished f where f.id = u.id offset 0)));
end
$$;
comment on function pgworker.forget_attempts(bigint[]) is
  'Internal: those of these jobs that are neither live nor finished any more take their attempts along.';

-- The same for live jobs is done by settle() (57_settling.sql): one trigger costs less than two. SECURITY DEFINER, as there:
-- whoever may delete a job need not know of this.
create function pgworker.forget_attempts() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgworker.forget_attempts(array_agg(g.id)) from gone g where g.recorded having count(*) > 0;
  return null;
end
$$;
comment on function pgworker.forget_attempts() is
  'Internal: trigger function of table finished.';

create trigger forget_attempts after delete on pgworker.finished
referencing old table as gone for each statement execute function pgworker.forget_attempts();

create view pgworker.job_attempts as
select a.job_id, a.attempt::int as attempt, a.started_at, a.ended_at, a.worker_id, a.worker_name, a.outcome, a.error
from pgworker.attempt a
union all
select f.id, f.attempts::int, f.started_at, f.finished_at, f.worker_id, f.worker_name, 'completed', null
from pgworker.finished f
where f.state = 'completed' and f.worker_id is not null;
comment on view pgworker.job_attempts is
  'One row per run that has ended of a job that the database still knows. outcome: completed, failed, cancelled, rescued '
  '(its worker was gone or was forced to give it up), released (given back unstarted, or when its worker stopped).';
