// Graphile Worker's side.
//
//   graphile.mjs install   its schema into the database of libpq's variables
//   graphile.mjs work      a worker with the preset that its own performance test uses
//   graphile.mjs produce   one connection that adds jobs as told on standard input
import { inputEnd, load, meter, obey } from './protocol.mjs';

const { run, runMigrations, makeWorkerUtils } = await load('graphile-worker');
const { default: pg } = await load('pg');

const PERFORMANCE = {
  concurrentJobs: 24,
  maxPoolSize: 25,
  localQueue: { size: 500, refetchDelay: { durationMs: 10 } },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
};
const connectionString = `postgresql:///${process.env.PGDATABASE}`;

async function work() {
  const count = meter();
  const runner = await run({
    preset: { worker: { connectionString, ...PERFORMANCE } },
    noHandleSignals: true,
    taskList: { noop: async (payload) => count(payload) },
  });
  inputEnd().then(() => runner.stop());
  await runner.promise;
}

async function produce() {
  const utils = await makeWorkerUtils({ pgPool: new pg.Pool({ max: 1 }) });
  await obey(
    (payload) => utils.addJob('noop', payload),
    (payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: 'noop', payload }))),
  );
}

const modes = { install: () => runMigrations({ connectionString }), work, produce };
await modes[process.argv[2]]();
process.exit(0);
