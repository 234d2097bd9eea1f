-- 99_dump.sql: pg_dump keeps the data of these; only an extension script may say so

select pg_catalog.pg_extension_config_dump('pgworker.setting', '');
select pg_catalog.pg_extension_config_dump('pgworker.job', '');
select pg_catalog.pg_extension_config_dump('pgworker.finished', '');
select pg_catalog.pg_extension_config_dump('pgworker.compensation', '');
select pg_catalog.pg_extension_config_dump('pgworker.attempt', '');
select pg_catalog.pg_extension_config_dump('pgworker.counter', '');
select pg_catalog.pg_extension_config_dump('pgworker.dependency', '');
select pg_catalog.pg_extension_config_dump('pgworker.unsettled', '');
select pg_catalog.pg_extension_config_dump('pgworker.queue', '');
select pg_catalog.pg_extension_config_dump('pgworker.task', '');
select pg_catalog.pg_extension_config_dump('pgworker.permit', '');
select pg_catalog.pg_extension_config_dump('pgworker.forbidden_flag', '');
select pg_catalog.pg_extension_config_dump('pgworker.schedule', '');
select pg_catalog.pg_extension_config_dump('pgworker.worker', '');
select pg_catalog.pg_extension_config_dump('pgworker.interest', '');
select pg_catalog.pg_extension_config_dump('pgworker.deadline', '');
select pg_catalog.pg_extension_config_dump('pgworker.notice', '');
select pg_catalog.pg_extension_config_dump('pgworker.job_id', '');
select pg_catalog.pg_extension_config_dump('pgworker.worker_id', '');
select pg_catalog.pg_extension_config_dump('pgworker.turn', '');
select pg_catalog.pg_extension_config_dump('pgworker.epoch', '');
