-- 52_history.sql: runs of jobs that did not complete them
--
--   records            whether they are recorded
--   forget_attempts    they go with their job
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

-- SECURITY DEFINER, as settle(): whoever may delete a job need not know of this.
create function pgworker.forget_attempts() returns trigger
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
  if exists (select from gone g where g.recorded) then
    delete from pgworker.attempt a
    where a.job_id = any (array(
      select g.id from gone g
      where g.recorded
        and not exists (select from pgworker.job j where j.id = g.id offset 0)
        and not exists (select from pgworker.finished f where f.id = g.id offset 0)));
  end if;
  return null;
end
$$;
comment on function pgworker.forget_attempts() is
  'Internal: trigger function of tables job and finished: a job that is in neither any more takes its attempts along.';

create trigger forget_attempts after delete on pgworker.job
referencing old table as gone for each statement execute function pgworker.forget_attempts();
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
