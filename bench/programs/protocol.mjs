// What the measuring process and a program in Node say to each other: meter.py and orders.py for Node.
import { randomBytes } from 'node:crypto';
import { createRequire } from 'node:module';
import path from 'node:path';
import readline from 'node:readline';
import { pathToFileURL } from 'node:url';

const WARMING_UP = 20;
const now = () => process.hrtime.bigint();
const say = (line) => process.stdout.write(`@ ${line}\n`);

/** The module called `name` of the npm folder BENCH_HOME. */
export function load(name) {
  const { resolve } = createRequire(path.join(process.env.BENCH_HOME, 'package.json'));
  return import(pathToFileURL(resolve(name)).href);
}

/** Tells every 10 ms what was handled. Returns the function that counts a job, called on the first line of its handler. */
export function meter() {
  let handled = 0;
  let told = 0;
  let delays = [];
  setInterval(() => {
    if (delays.length) say(`delays ${delays.join(' ')}`);
    if (handled !== told) say(`handled ${handled}`);
    told = handled;
    delays = [];
  }, 10);
  return (payload) => {
    if (payload.sent) delays.push(now() - BigInt(payload.sent));
    handled += 1;
  };
}

/** Resolves when standard input ends, upon which a worker is to end. */
export function inputEnd() {
  process.stdin.resume();
  return new Promise((resolve) => process.stdin.on('end', resolve));
}

/** Adds jobs as told on standard input, by `add(payload)` and `addMany(payloads)`, until that ends. */
export async function obey(add, addMany) {
  const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  const pause = (milliseconds) => new Promise((wake) => setTimeout(wake, milliseconds));
  const padding = (size) => (size ? { text: randomBytes(size).toString('base64').slice(0, size) } : {});
  const ways = {
    async single(count, size) {
      const more = padding(size);
      for (let id = 0; id < count; id++) await add({ id, ...more });
    },
    async bulk(count, size) {
      const more = padding(size);
      await addMany(Array.from({ length: count }, (_, id) => ({ id, ...more })));
    },
    async timed(count, gap) {
      for (let i = 0; i < count; i++) {
        await add({ sent: String(now()) });
        await pause(gap);
      }
    },
    async steady(rate, gap) {
      const begun = performance.now();
      let added = 0;
      let told = false;
      lines.next().then(() => (told = true));
      while (!told) {
        const late = Math.floor(((performance.now() - begun) * rate) / 1000) - added;
        if (late > 0) await addMany(Array.from({ length: late }, (_, i) => ({ id: added + i })));
        added += late;
        await pause(gap);
      }
      say(`added ${added}`);
    },
  };
  await ways.single(WARMING_UP, 0); // the connection is there and its statements are prepared
  say('ready');
  for await (const line of lines) {
    const [what, ...numbers] = line.split(' ');
    const begun = now();
    await ways[what](...numbers.map(Number));
    say(`took ${now() - begun}`);
  }
}
