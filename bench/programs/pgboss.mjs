// pg-boss's side. With BENCH_NOTIFY=1 workers are woken by notifications, without they look twice a second.
//
//   pgboss.mjs install   its schema into the database of libpq's variables
//   pgboss.mjs work      a worker that fetches 1,000 jobs at a time, four times over
//   pgboss.mjs produce   one connection that adds jobs as told on standard input
import { inputEnd, load, meter, obey } from './protocol.mjs';

const { PgBoss } = await load('pg-boss');

const notify = process.env.BENCH_NOTIFY === '1';
const FAST = { batchSize: 1000, localConcurrency: 4, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };
const CHUNK = 10_000;

async function start(options) {
  const boss = new PgBoss({
    host: process.env.PGHOST,
    port: Number(process.env.PGPORT),
    user: process.env.PGUSER,
    database: process.env.PGDATABASE,
    application_name: process.env.PGAPPNAME,
    useListenNotify: notify,
    ...options,
  });
  boss.on('error', (error) => console.error(error));
  await boss.start();
  return boss;
}

async function install() {
  const boss = await start({});
  await boss.createQueue('noop', { notify });
}

async function work() {
  const count = meter();
  const boss = await start({});
  await boss.work('noop', FAST, async (jobs) => jobs.forEach((job) => count(job.data)));
  await inputEnd();
  await boss.stop();
}

async function produce() {
  const boss = await start({ max: 1, supervise: false, schedule: false });
  await obey(
    (payload) => boss.send('noop', payload),
    async (payloads) => {
      for (let begin = 0; begin < payloads.length; begin += CHUNK) {
        await boss.insert('noop', payloads.slice(begin, begin + CHUNK).map((data) => ({ data })));
      }
    },
  );
}

const modes = { install, work, produce };
await modes[process.argv[2]]();
process.exit(0);
