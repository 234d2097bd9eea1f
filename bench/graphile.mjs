// Graphile Worker's side of the measurements; the same modes and lines as work.py and produce.py.
//
//   graphile.mjs install   its schema into the database of libpq's variables
//   graphile.mjs work      a worker with the preset that its own performance test uses
//   graphile.mjs produce   one connection that adds jobs as told on standard input
//
// The packages come from the npm folder BENCH_GRAPHILE_HOME.
import { createRequire } from 'node:module';
import path from 'node:path';
import readline from 'node:readline';
import { pathToFileURL } from 'node:url';

const { resolve } = createRequire(path.join(process.env.BENCH_GRAPHILE_HOME, 'package.json'));
const load = (name) => import(pathToFileURL(resolve(name)).href);
const { run, runMigrations, makeWorkerUtils } = await load('graphile-worker');
const { default: pg } = await load('pg');

const PERFORMANCE = {
  concurrentJobs: 24,
  maxPoolSize: 25,
  localQueue: { size: 500, refetchDelay: { durationMs: 10 } },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
};
const now = () => process.hrtime.bigint();
const say = (line) => process.stdout.write(`@ ${line}\n`);

async function work() {
  let handled = 0;
  let told = 0;
  let delays = [];
  setInterval(() => {
    if (delays.length) say(`delays ${delays.join(' ')}`);
    if (handled !== told) say(`handled ${handled}`);
    told = handled;
    delays = [];
  }, 10);
  const runner = await run({
    preset: { worker: { connectionString: `postgresql:///${process.env.PGDATABASE}`, ...PERFORMANCE } },
    noHandleSignals: true,
    taskList: {
      noop: async (payload) => {
        if (payload.sent) delays.push(now() - BigInt(payload.sent));
        handled += 1;
      },
    },
  });
  process.stdin.resume();
  process.stdin.on('end', () => runner.stop());
  await runner.promise;
}

async function produce() {
  const utils = await makeWorkerUtils({ pgPool: new pg.Pool({ max: 1 }) });
  const add = {
    async single(count) {
      for (let i = 0; i < count; i++) await utils.addJob('noop', { id: i });
    },
    async bulk(count) {
      await utils.addJobs(Array.from({ length: count }, (_, i) => ({ identifier: 'noop', payload: { id: i } })));
    },
    async timed(count, pause) {
      for (let i = 0; i < count; i++) {
        await utils.addJob('noop', { sent: String(now()) });
        await new Promise((wake) => setTimeout(wake, pause));
      }
    },
  };
  await add.single(20); // the connection is there and its statements are prepared
  say('ready');
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [what, ...numbers] = line.split(' ');
    const begun = now();
    await add[what](...numbers.map(Number));
    say(`took ${now() - begun}`);
  }
}

const modes = { install: () => runMigrations({ connectionString: `postgresql:///${process.env.PGDATABASE}` }), work, produce };
await modes[process.argv[2]]();
process.exit(0);
