-- 10_schema.sql: what is stored
--
--   clock       the one place where the time comes from, so that a test can move it (fake_now)
--   job         hot: live jobs only (waiting, scheduled, ready, running); a claim is a HOT update
--   finished    cold: jobs that ended and are kept for a while, pruned by maintain()
--   compensation  what undoes nodes of trees, if it comes to that
--   attempt     runs of jobs that did not complete them
--   counter     what jobs of trees still wait for
--   dependency  which sibling comes after which
--   unsettled   what the end of a job has still to do in its tree
--   queue       serial queues that have run something: who runs now, and when the queue last came free
--   task        task settings that somebody made; no row is needed for a task to run
--   permit      limits of tasks: one row for each that they let through
--   forbidden_flag   flags that no worker takes
--   worker      registered workers and how their presence is known
--   interest    what workers ask for when they claim
--   notice      what a worker has still to be told about its jobs
--   setting     options of this installation
--   job_state   in which state a live job is
--   live        job as the public view shows it
--   jobs        the public view over job and finished
--   job_rows    rows of that view, in the order of the ids given
--   claimed_job what a worker gets
--
-- A session keeps its plans, and one that was made while the table was empty, or while statistics said so (after an analyze
-- under a long transaction, for example), must not read all of it later. So functions that look rows up pin
-- enable_seqscan = off, and where many are looked up, it is written so that the planner can only go from the ids to the
-- rows, by index: j.id = any (array[e.id]) instead of j.id = e.id (no merge join, so no scan in the order of the key), or a
-- lateral subquery with OFFSET 0 (always where only the id is needed, which the index gives by itself). EXISTS has an
-- OFFSET 0 too. No further condition may fit an index: a partial one's predicate, or a later column compared with a
-- constant, makes it look cheap to read all of it; so (...) is true, or num_nulls() = 0. What is looked up by another
-- column is ordered by id + 0, or all of it might be read in the order of the primary key. Not by ctid, unless the row is
-- locked: a ctid is not checked again after waiting for somebody who changed the row.
-- Whether an id is among many is asked with not in (select ... from unnest(...)), or (... in (...)) is true: both are looked
-- up in a hash table, which = any and <> all are not in a plan that is kept, and in alone may become a nested loop.
-- tests/plans/test_generic_plans.py looks at the plans of all that it can reach.
-- There are no foreign keys and no INSERT triggers: pg_dump restores table after table, in any order, in parallel. (Where
-- somebody wants events, 65_events.sql makes one.)
-- Row order of lock taking everywhere: job rows by id, then queue rows by name, then permits, then worker rows by id.

-- What is created here is bound now: nothing of whoever installs it may come between.
set local search_path = pg_catalog, pg_temp;

create schema pgworker;
comment on schema pgworker is 'pgworker: a job queue that lives in the database';

create function pgworker.version() returns text
language sql immutable parallel safe
return '0.1.0';
comment on function pgworker.version() is
  'Version of the installed schema, as in the control file.';

create table pgworker.setting (
  name  text primary key,
  value text not null
);
comment on table pgworker.setting is
  'Options of this installation that are not at their defaults; the view settings shows all of them.';

-- Bound when it is created, and inlined to a constant.
create function pgworker.default_setting(p_name text) returns text
language sql immutable parallel safe
return case p_name
  when 'rescue_grace' then '5 seconds'
  when 'timeout_grace' then '10 seconds'
  when 'keep_completed' then '0'
  when 'keep_results' then '1 day'
  when 'keep_failed' then '30 days'
  when 'history' then 'on'
  when 'publish_events' then 'off'
  when 'allow_fake_now' then 'off'
end;
comment on function pgworker.default_setting(text) is
  'Internal: what a setting is that nobody made; null for a name that is none.';

-- Only reached when pgworker.fake_now is set. SECURITY DEFINER: whoever may ask for the time may not read settings.
create function pgworker.moved_clock(p_real timestamptz) returns timestamptz
language plpgsql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from pgworker.setting s where s.name = 'allow_fake_now' and s.value = 'on') then
    return current_setting('pgworker.fake_now')::timestamptz;
  end if;
  return p_real;
end
$$;
comment on function pgworker.moved_clock(timestamptz) is
  'Internal: the time that pgworker.fake_now asks for where a setting allows it, else the real one.';

-- A SQL-standard body is bound when it is created and is inlined, so asking for the time costs no call.
create function pgworker.clock(p_real timestamptz default statement_timestamp()) returns timestamptz
language sql stable parallel safe
return case when coalesce(current_setting('pgworker.fake_now', true), '') = '' then p_real
            else pgworker.moved_clock(p_real) end;
comment on function pgworker.clock(timestamptz) is
  'The time that pgworker goes by: when the running statement arrived (or the given time), unless a test moved it.';

-- SECURITY DEFINER: whoever may use the queue may test with it, and needs no right on the settings for that. What it sets
-- can be set without it, too, and is then honoured in the same databases and no others.
create function pgworker.fake_now(at timestamptz) returns timestamptz
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pgworker.setting s where s.name = 'allow_fake_now' and s.value = 'on') then
    raise exception using errcode = '55000', message = 'the clock of this database must not be moved',
      hint = 'In a database that is for tests only, let the owner run: insert into pgworker.setting (name, value) values '
             '(''allow_fake_now'', ''on'').';
  end if;
  if at not between '0001-01-02 00:00:00+00' and '9999-12-30 00:00:00+00' then
    raise exception using errcode = '22023', message = format('at must lie between the years 1 and 9999, got %s', at),
      hint = 'Give null to have the real time again.';
  end if;
  perform set_config('pgworker.fake_now',
                     coalesce(to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), ''), false);
  return pgworker.clock();
end
$$;
comment on function pgworker.fake_now(timestamptz) is
  'For tests: it is then, for pgworker in this session, until moved again; null: the real time again. A rollback undoes it. '
  'Returns the time that it is. Raises 55000 where the setting allow_fake_now is not on.';

create sequence pgworker.job_id as bigint;
comment on sequence pgworker.job_id is 'Ids of jobs.';
create sequence pgworker.worker_id as bigint;
comment on sequence pgworker.worker_id is 'Ids of workers, never used twice.';
create sequence pgworker.turn as bigint;
comment on sequence pgworker.turn is
  'Numbers the moments at which serial queues come free, and what trees have still to settle.';
create sequence pgworker.epoch as bigint;
comment on sequence pgworker.epoch is
  'Moves on when work appears behind the cursors of sessions: the next claim of each then sweeps. A sequence, because '
  'its last_value is one unversioned tuple, read without a snapshot and never bloated.';
-- The first nextval of a sequence does not move last_value: it must not be the first that tells somebody to sweep.
select nextval('pgworker.epoch');

create table pgworker.job (
  id              bigint      not null default nextval('pgworker.job_id'),
  run_at          timestamptz not null,
  created_at      timestamptz not null,
  locked_at       timestamptz,
  locked_by       bigint,
  parent_id       bigint,
  root_id         bigint,
  gate_id         bigint,
  cause_id        bigint,
  revision        int         not null default 0,
  depth           int,
  priority        smallint    not null default 0,
  attempts        smallint    not null default 0,
  max_attempts    smallint    not null default 25,
  slot            smallint,
  waiting         boolean     not null default false,
  has_children    boolean     not null default false,
  has_followers   boolean     not null default false,
  settled         boolean     not null default false,
  task_identifier text        not null,
  payload         jsonb       not null,
  queue_name      text,
  key             text,
  flags           text[],
  last_error      text,
  progress        jsonb,
  name            text,
  on_failure      text,
  ends_as         text,
  cancel_reason   text,
  limit_key       text,
  unique_until    timestamptz,
  recorded        boolean     not null default false,
  lane            text        collate "C",
  primary key (id)
) with (
  -- Measured: a batch updates every row of a page in one transaction, so only with half of each page free are all
  -- claims HOT (100/75/60/45 gave 3/33/62/100 %).
  fillfactor = 45,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000,
  autovacuum_analyze_scale_factor = 0.1, autovacuum_analyze_threshold = 5000,
  autovacuum_vacuum_cost_delay = 0
);
comment on table pgworker.job is
  'Live jobs. locked_by says which worker runs a job; ends_as that it was asked to stop and how it will end then, '
  'cancel_reason why, cause_id because of which other job. Trees: root_id is null outside of them; slot is the part of '
  'the parent''s counter that counts this job, null if none does; gate_id the nearest job, from this one upwards, that '
  'waits for its siblings; settled: what its end means for others is dealt with already. unique_until: until then its key '
  'is taken for those who ask for unique_for. recorded: there are rows of it in attempt. lane: what a job of a task with '
  'limits stands in line in, null for others.';

-- No index and no predicate names a column that a claim changes (locked_at, locked_by, attempts): a claim then writes
-- one heap tuple and no index entry. What a claim leaves behind in the index is jumped over by the session cursor.
create index job_claim on pgworker.job (priority, run_at, id) where queue_name is null and lane is null and not waiting;
-- The two indexes of queued jobs have predicates that hold for all of them and differ, and each statement states that of
-- the index that it means: on an empty table the planner sees no difference between them, and a session keeps its plan.
create index job_claim_queued on pgworker.job (priority, run_at, id)
  where queue_name is not null and lane is null and not waiting and id > 0;
create index job_queue on pgworker.job (queue_name, priority, run_at, id)
  where queue_name > '' and lane is null and not waiting;
-- Jobs of tasks with limits are in these instead (42_limits.sql): where they wait, nobody else passes.
create index job_lane on pgworker.job (task_identifier, lane, priority, run_at, id) where lane > '' and not waiting;
create index job_lane_due on pgworker.job (task_identifier, run_at) where lane is not null and not waiting;
-- Trees are found from their roots: the children of a job are (root_id, parent_id).
create index job_tree on pgworker.job (root_id, parent_id) where root_id is not null;
create index job_gate on pgworker.job (gate_id) where gate_id is not null;
create unique index job_key on pgworker.job (key) where key is not null;

create table pgworker.finished (
  id              bigint      not null,
  run_at          timestamptz not null,
  created_at      timestamptz not null,
  started_at      timestamptz,
  finished_at     timestamptz not null,
  keep_until      timestamptz not null,
  parent_id       bigint,
  root_id         bigint,
  cause_id        bigint,
  revision        int         not null,
  depth           int,
  priority        smallint    not null,
  attempts        smallint    not null,
  max_attempts    smallint    not null,
  has_children    boolean     not null,
  has_followers   boolean     not null,
  state           text        not null check (state in ('completed', 'failed', 'cancelled')),
  task_identifier text        not null,
  payload         jsonb       not null,
  queue_name      text,
  key             text,
  flags           text[],
  last_error      text,
  progress        jsonb,
  result          jsonb,
  name            text,
  on_failure      text,
  limit_key       text,
  unique_until    timestamptz,
  recorded        boolean     not null default false,
  worker_id       bigint,
  worker_name     text,
  primary key (id)
);
comment on table pgworker.finished is
  'Jobs that ended, until keep_until. The nodes of a tree are kept as long as its root. cause_id: because of which '
  'other job this one failed or was cancelled. unique_until as in job; a cancelled one has none. recorded as in '
  'job. worker_id, worker_name: who ran it when it ended, if it was running.';
create index finished_keep_until on pgworker.finished (keep_until) where keep_until < 'infinity';
create index finished_tree on pgworker.finished (root_id, parent_id) where root_id is not null;
create index finished_unique on pgworker.finished (key) where unique_until is not null;

create table pgworker.attempt (
  job_id      bigint      not null,
  started_at  timestamptz not null,
  ended_at    timestamptz not null,
  worker_id   bigint      not null,
  attempt     smallint    not null,
  outcome     text        not null check (outcome in ('failed', 'cancelled', 'rescued', 'released')),
  worker_name text,
  error       text
);
comment on table pgworker.attempt is
  'Runs of jobs that did not complete them. They go when their job goes. A run that completed its job is seen in the job.';
create index attempt_job on pgworker.attempt (job_id);

create table pgworker.counter (
  job_id  bigint   not null,
  after   boolean  not null,
  slot    smallint not null,
  pending int      not null check (pending >= 0),
  primary key (job_id, after, slot)
) with (fillfactor = 25, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
comment on table pgworker.counter is
  'How many jobs a job of a tree still waits for: its children, or those named in its after. Slot 0 is the total; what '
  'waits for many has further slots, each for a part of them, and slot 0 then counts the slots that are not zero yet.';

create table pgworker.dependency (
  after_id bigint   not null,
  job_id   bigint   not null,
  slot     smallint not null,
  primary key (after_id, job_id)
);
comment on table pgworker.dependency is
  'job_id starts after its sibling after_id has finished; slot: which part of its counter counts that.';
create index dependency_job on pgworker.dependency (job_id);

create table pgworker.compensation (
  node_id     bigint not null primary key,
  root_id     bigint not null,
  job_id      bigint,
  finished_at timestamptz,
  spec        jsonb  not null,
  node        jsonb
);
comment on table pgworker.compensation is
  'The compensate (spec) of nodes of trees. node and finished_at: what its compensation is told of the node and '
  'when that ended, once it has completed and is about to be forgotten or undone, or was to stop and completed all the '
  'same; job_id: the job that undoes it. Kept as long as the tree.';
create index compensation_root on pgworker.compensation (root_id, job_id);

create table pgworker.unsettled (
  n        bigint      not null default nextval('pgworker.turn') primary key,
  job_id   bigint      not null,
  what     text        not null check (what in ('release', 'open', 'fail', 'cancel', 'stop', 'forget', 'compensate')),
  root_id  bigint,
  reason   text,
  cause_id bigint,
  due      timestamptz not null default pgworker.clock(),
  since    timestamptz not null default pgworker.clock()
);
comment on table pgworker.unsettled is
  'What the end of a job has still to do to others in its tree, because somebody held their rows at that moment, or, '
  'before compensations (of the tree of root job_id), because some of them ran: maintain() does it when it is due, in the '
  'order of n, and puts it off when that is so still; since: when it was left for the first time. Nothing but n is unique: '
  'whoever writes here holds locks, and must not wait for somebody who writes or does the same.';
create index unsettled_due on pgworker.unsettled (due, n);
create index unsettled_job on pgworker.unsettled (job_id);

create table pgworker.queue (
  name   text    not null primary key,
  job_id bigint,
  turn   bigint  not null default 0,
  paused boolean not null default false
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
comment on table pgworker.queue is
  'Serial queues. job_id: the job that runs now, null when the queue is free. turn: numbers the moment when it last '
  'came free. Rows are made by claims, never by producers, who would hold their locks until they commit.';
-- job_id is not indexed: taking a queue is a HOT update too.
create index queue_turn on pgworker.queue (turn);

create table pgworker.task (
  identifier              text     not null primary key,
  paused                  boolean  not null default false,
  max_attempts            smallint,
  backoff                 jsonb,
  timeout                 interval,
  max_concurrency         int,
  max_concurrency_per_key int,
  rate_limit              int,
  rate_interval           interval,
  rate_limit_per_key      int,
  rate_interval_per_key   interval,
  fair                    boolean  not null default false,
  keep_completed          interval,
  keep_failed             interval,
  looked_at               timestamptz,
  keyed   boolean not null generated always as (
    fair or max_concurrency_per_key is not null or rate_limit_per_key is not null) stored,
  limited boolean not null generated always as (
    fair or max_concurrency is not null or max_concurrency_per_key is not null
    or rate_limit is not null or rate_limit_per_key is not null) stored
);
create index task_rules on pgworker.task (identifier) where paused or limited or timeout is not null;
create index task_keep_completed on pgworker.task (identifier) where keep_completed is not null;
comment on table pgworker.task is
  'Settings of tasks; null is the default, and a task without settings has no row. looked_at: when maintain() last looked '
  'for jobs that were added before the limits and are to be counted by them.';

create table pgworker.permit (
  task_identifier text        not null,
  kind            text        not null check (kind in ('concurrency', 'rate')),
  lane_key        text        collate "C" not null,
  n               int         not null,
  job_id          bigint,
  lane            text        collate "C",
  free_at         timestamptz not null default '-infinity',
  primary key (task_identifier, kind, lane_key, n)
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
comment on table pgworker.permit is
  'Limits of tasks: as many rows as a gate lets through, each taken by a claim until free_at. lane_key: the limit key, '
  'empty for the limit of the whole task. job_id, lane: who took it last. Rows are made by claims, as those of queues.';
-- Which of the three a statement means it says with their predicates, which hold for all rows or all that were ever taken:
-- see the indexes of queued jobs.
create index permit_free on pgworker.permit (task_identifier, kind, lane_key, free_at) where n > 0;
create index permit_freed on pgworker.permit (task_identifier, free_at) where lane is not null;
create index permit_job on pgworker.permit (job_id) where job_id is not null;

create table pgworker.forbidden_flag (
  name         text        not null primary key,
  forbidden_at timestamptz not null
);
comment on table pgworker.forbidden_flag is 'Flags that no worker takes jobs with.';

create table pgworker.worker (
  id            bigint      not null default nextval('pgworker.worker_id') primary key,
  name          text,
  lease         interval,
  lease_until   timestamptz,
  missing_since timestamptz,
  registered_at timestamptz not null,
  version       text,
  timeouts      jsonb
) with (fillfactor = 50);
comment on table pgworker.worker is
  'Registered workers. Without a lease presence is a session-level advisory lock (class 1886874482, the id''s low 31 '
  'bits); missing_since is when maintain() first found it gone; version the one of pgworker that it was made for; '
  'timeouts: its own, by task, in seconds.';

create table pgworker.interest (
  worker_id       bigint not null,
  pid             int    not null,
  tasks           text[],
  forbidden_flags text[],
  primary key (worker_id, pid)
);
comment on table pgworker.interest is
  'What a worker asked for when it last claimed in a session (pid), for those who want to know why nobody takes a job. '
  'Written by the first claim of a session and by one that asks for something else, never by the others.';

create table pgworker.deadline (
  look_at   timestamptz not null,
  ends_at   timestamptz not null,
  locked_at timestamptz not null,
  worker_id bigint      not null,
  timeout   interval    not null,
  job_ids   bigint[]    not null
);
comment on table pgworker.deadline is
  'Runs with a timeout, as they were claimed (at locked_at): one row per claim and timeout. maintain() looks at look_at, '
  'at the latest after a minute, which of them still run, and takes those away whose time is over (ends_at).';
create index deadline_look_at on pgworker.deadline (look_at);

create table pgworker.notice (
  worker_id bigint not null,
  job_id    bigint not null,
  notice    text   not null check (notice in ('cancel', 'lost')),
  primary key (worker_id, job_id)
);
comment on table pgworker.notice is 'What heartbeat() will tell workers: jobs to stop, jobs taken from them.';

-- Inlined, like clock().
create function pgworker.job_state(p_locked_by bigint, p_waiting boolean, p_run_at timestamptz, p_now timestamptz)
returns text
language sql immutable parallel safe
return case when p_locked_by is not null then 'running'
            when p_waiting then 'waiting'
            when p_run_at > p_now then 'scheduled'
            else 'ready' end;
comment on function pgworker.job_state(bigint, boolean, timestamptz, timestamptz) is
  'Internal: the state of a live job.';

create view pgworker.live as
select j.id, j.task_identifier, j.queue_name,
       pgworker.job_state(j.locked_by, j.waiting, j.run_at, (select pgworker.clock())) as state,
       j.payload, j.priority::int as priority, j.run_at, j.attempts::int as attempts,
       j.max_attempts::int as max_attempts, j.last_error, j.key, j.revision, j.flags, j.parent_id, j.root_id, j.name,
       j.on_failure, j.progress, null::jsonb as result, j.locked_at, j.locked_by, j.created_at,
       null::timestamptz as finished_at, j.locked_at as started_at, j.limit_key,
       case when j.ends_as is null then j.unique_until end as unique_until
from pgworker.job j;
comment on view pgworker.live is
  'Internal: live jobs as the view jobs shows them.';

create view pgworker.jobs as
select l.id, l.task_identifier, l.queue_name, l.state, l.payload, l.priority, l.run_at, l.attempts, l.max_attempts,
       l.last_error, l.key, l.revision, l.flags, l.parent_id, l.root_id, l.name, l.on_failure, l.progress, l.result,
       l.locked_at, l.locked_by, l.created_at, l.finished_at, l.started_at, l.limit_key, l.unique_until
from pgworker.live l
union all
select f.id, f.task_identifier, f.queue_name, f.state,
       f.payload, f.priority::int, f.run_at, f.attempts::int,
       f.max_attempts::int, f.last_error, f.key, f.revision, f.flags, f.parent_id, f.root_id, f.name,
       f.on_failure, f.progress, f.result, null, null, f.created_at,
       f.finished_at, f.started_at, f.limit_key, f.unique_until
from pgworker.finished f;
comment on view pgworker.jobs is
  'One row per job that the database still knows, live or finished. state: waiting, scheduled, ready, running, '
  'completed, failed or cancelled.';

create type pgworker.claimed_job as (
  id bigint, task_identifier text, payload jsonb, attempts int, max_attempts int, queue_name text, priority int,
  run_at timestamptz, key text, flags text[], parent_id bigint, root_id bigint, progress jsonb, created_at timestamptz,
  timeout interval
);
comment on type pgworker.claimed_job is 'What a worker gets to know of a job that it claimed.';

create function pgworker.job_rows(p_ids bigint[]) returns setof pgworker.jobs
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_nestloop = on
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
begin
  return query
  select v.*
  from unnest(p_ids) with ordinality as u(id, n)
  cross join lateral (select o.* from pgworker.jobs o where o.id = u.id offset 0) as v
  order by u.n;
end
$$;
comment on function pgworker.job_rows(bigint[]) is 'Internal: the public rows of these jobs, in the order given.';
