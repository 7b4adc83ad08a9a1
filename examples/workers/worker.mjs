// A worker for inferq in one file: docs/worker-protocol.md, in Node's standard library. README.md: how to run it.
//
// A loop for each shard claims jobs, and has a Router hold a call for messages meanwhile. Claims are answered at once,
// and sent one after another, so what they give cannot be confused. Each attempt reads the engine, and sends.

import { isUtf8 } from "node:buffer";
import { randomBytes } from "node:crypto";
import http from "node:http";
import https from "node:https";
import { hostname } from "node:os";
import { buffer } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";

const env = process.env;
const ROUTERS = env.ROUTER_URL.split(",").map((url) => url.trim().replace(/\/+$/, "")); // the one in use first
const ENGINE = env.ENGINE_URL.replace(/\/+$/, "").replace(/\/v1$/, "");
const NAME = env.WORKER_ID || hostname();
const SLOTS = Number(env.WORKER_SLOTS || 4);
const HEADERS = { "content-type": "application/json" };
if (env.WORKER_KEY) HEADERS.authorization = `Bearer ${env.WORKER_KEY}`;
const [ANSWER_MS, HOLD_MS, DRAIN_MS, LEAVE_MS, FULL_PAUSE_MS] = [10_000, 20_000, 30_000, 5_000, 250];
const [MAX_CLAIM, MAX_PIECE] = [32, 1 << 20]; // jobs, bytes

let draining = false; // SIGTERM, or the Manager drains this worker: no more jobs are claimed

const log = (event) => console.error(`${new Date().toISOString()} ${event}`);

/** A Router does not take a call, however often it is sent. */
class Refused extends Error {
  constructor(status, code, message) {
    super(`${status} ${code}: ${message}`);
    Object.assign(this, { status, code });
  }
}

/** An attempt ends without an answer. `kind`: of its release; "": nothing is said of it. */
class Released extends Error {
  constructor(kind, reason) {
    super(reason);
    this.kind = kind;
  }
}

/** What `read` takes from a Router's answer. Any call may be repeated, and is until it is answered: at the next Router,
 * or after a pause that grows. `failed` is called each time, and may change the message. */
async function call(method, path, message, { signal, read = (answer) => answer, failed = () => {} }) {
  for (let failures = 1; ; failures++) {
    const url = ROUTERS[0];
    let retryAfterMs = 0;
    try {
      const limit = AbortSignal.any([signal, AbortSignal.timeout(ANSWER_MS + (message?.wait_ms ?? 0))]);
      const body = message && JSON.stringify(message);
      const answer = await fetch(`${url}/worker/v1/sessions${path}`, { method, headers: HEADERS, body, signal: limit });
      const content = JSON.parse((await answer.text()) || "null");
      if (answer.ok) return read(content);
      retryAfterMs = 1_000 * Math.min(Number(answer.headers.get("retry-after")) || 0, 10);
      throw new Refused(answer.status, content.error.code, content.error.message);
    } catch (problem) {
      const isFinal = [400, 403, 410, 413, 415].includes(problem.status) || problem.code === "fenced";
      if (signal.aborted || isFinal) throw problem;
      log(`call failed: ${path} at ${url}: ${problem.cause ?? problem}`);
    }
    failed();
    if (ROUTERS[0] === url) ROUTERS.push(ROUTERS.shift());
    if (failures % ROUTERS.length) continue;
    const grownMs = Math.min(100 * 2 ** (failures / ROUTERS.length), 2_000) * (0.5 + Math.random() / 2);
    await sleep(Math.max(grownMs, retryAfterMs), undefined, { signal });
  }
}

/** Checks that an answer is one: else its call has failed. */
function list(found) {
  if (!Array.isArray(found)) throw new Error("the answer lacks a list");
  return found;
}

/** A part of the queue. `due`: jobs are to be claimed though it is parked; `lost`: the queue may have lost what it was
 * told; `look`: there is something to do. */
const newShard = (number) => ({ number, seq: 0, turn: 0, after: "0", parked: false, due: false, lost: false, look() {} });

/** From a join until the worker ends, or is declared dead: then no attempt goes on. */
class Session {
  id = `${NAME}.${randomBytes(8).toString("hex")}`;
  engine = "starting";
  models = [];
  assignment = {};
  shards = [];
  claiming = 0; // slots for which claims are under way
  running = new Map(); // attempts by lease
  beatDue = () => {};
  over = new AbortController();
  failure = null;

  /** A call about a shard has that reconciled if it fails. */
  call(name, message, { read, shard, signal = this.over.signal } = {}) {
    const failed = () => {
      if (!shard) return;
      message.wait_ms = 0; // to know soon when the queue is back
      shard.lost = true;
      shard.look();
    };
    return call("POST", `/${this.id}/${name}`, message, { signal, read, failed });
  }

  /** Throws what ended the session, if it was not the worker. */
  async run() {
    this.start(this.serve());
    await this.until(() => draining, Infinity);
    this.look();
    await this.until(() => !this.running.size && !this.claiming, DRAIN_MS);
    if (this.failure) throw this.failure;
    // What still runs is given to others.
    await call("DELETE", `/${this.id}`, undefined, { signal: AbortSignal.timeout(LEAVE_MS) }).catch(() => {});
    this.over.abort();
  }

  /** Does something beside the rest. If it fails the session is over. */
  start(task) {
    task.catch((problem) => {
      this.failure ??= problem;
      this.over.abort();
    });
  }

  async until(holds, limitMs) {
    for (const end = Date.now() + limitMs; !holds() && Date.now() < end && !this.over.signal.aborted; ) await sleep(20);
  }

  /** Joins, follows the shards, and sends heartbeats. While the engine does not answer no jobs are claimed. */
  async serve() {
    const { signal } = this.over;
    while (!(await this.readEngine())) await sleep(1_000, undefined, { signal });
    let answer = await call("POST", "", this.status(), { signal });
    const { shards, heartbeat_interval_ms: intervalMs } = answer;
    log(`joined as ${this.id} with ${this.models.join(", ")}`);
    this.shards = Array.from({ length: shards }, (_, number) => newShard(number));
    for (const shard of this.shards) this.start(this.follow(shard));
    for (;;) {
      const { term, version } = answer.assignment;
      if (term !== this.assignment.term || version !== this.assignment.version) {
        this.assignment = answer.assignment;
        this.look(true);
      }
      if (answer.drain) drain();
      const due = new Promise((resolve) => (this.beatDue = resolve));
      await Promise.race([due, sleep(intervalMs, undefined, { signal })]);
      if (this.engine !== "ready") await this.readEngine();
      try {
        const read = (found) => list(found.assignment.pools) && found;
        answer = await this.call("heartbeat", this.status(), { read });
      } catch (problem) {
        if (problem.status !== 410) throw problem;
        log("the Manager has forgotten this worker: it joins again");
        answer = await call("POST", "", { ...this.status(), again: true }, { signal });
      }
    }
  }

  status() {
    const { id, models, engine, running } = this;
    return { worker_id: NAME, session_id: id, models, slots: SLOTS, running: running.size, engine, draining };
  }

  /** Asks the engine what it serves. */
  async readEngine() {
    try {
      const answer = await fetch(`${ENGINE}/v1/models`, { signal: AbortSignal.timeout(1_000) });
      this.models = (await answer.json()).data.map((model) => model.id);
    } catch (problem) {
      log(`waiting for the engine at ${ENGINE}: ${problem.cause ?? problem}`);
      return false;
    }
    if (this.models.length) this.engine = "ready";
    this.look(true);
    return this.models.length > 0;
  }

  /** Has the shards see whether jobs are to be claimed; `due`: even on those that are parked. */
  look(due = false) {
    for (const shard of this.shards) {
      shard.due ||= due;
      shard.look();
    }
  }

  /** Claims the jobs of a shard, and does what its messages say. */
  async follow(shard) {
    for (let held = null; ; ) {
      const looked = new Promise((resolve) => (shard.look = resolve));
      if (shard.lost) await this.reconcile(shard);
      await this.claim(shard);
      if (!held) {
        const asked = { shard: shard.number, after: shard.after, wait_ms: HOLD_MS };
        held = this.call("claim", asked, { shard, read: ({ messages = [] }) => list(messages) });
        this.start(held);
      }
      const messages = await Promise.race([held, looked]);
      if (!messages) continue;
      [held, shard.due] = [null, true];
      for (const message of messages) this.obey(shard, message);
    }
  }

  /** Does what a message says. Behind it, whichever it is, jobs are claimed. */
  obey(shard, { id, kind, job_id }) {
    shard.after = id;
    if (kind === "ping") this.beatDue();
    else if (kind === "drain") drain();
    for (const attempt of kind === "abort" ? this.running.values() : []) {
      if (attempt.job.job_id === job_id) attempt.stop(new Released("", "it was aborted"));
    }
  }

  /** Claims jobs for the slots that are free. A worker that is parked, and runs no more jobs, claims none, once: else the
   * queue goes on waking it instead of others. */
  async claim(shard) {
    const assigned = (this.assignment.pools ?? []).filter((one) => one.shard === shard.number);
    const pools = assigned.map(({ pool, lanes }) => ({ pool, lanes }));
    const takes = pools.length > 0 && this.engine === "ready" && !draining;
    const n = takes ? Math.min(SLOTS - this.running.size - this.claiming, MAX_CLAIM) : 0;
    if (n > 0 ? shard.parked && !shard.due : !shard.parked) return;
    Object.assign(shard, { seq: shard.seq + 1, parked: false, due: false });
    this.claiming += n;
    const asked = { shard: shard.number, claim: { seq: shard.seq, turn: shard.turn, n, pools } };
    const read = ({ claimed }) => list(claimed.jobs) && claimed;
    const claimed = await this.call("claim", asked, { shard, read });
    this.claiming -= n;
    shard.parked = claimed.parked;
    shard.turn += claimed.jobs.length;
    for (const job of claimed.jobs) this.start(new Attempt(this, shard, job).run());
    if (shard.parked || claimed.jobs.length === n) this.look(); // slots are left for other shards, or more jobs wait
  }

  /** Says what runs of a shard, and stops what the queue has lost. */
  async reconcile(shard) {
    shard.lost = false;
    const leases = [...this.running.values()].filter((one) => one.shard === shard).map((one) => one.job.lease);
    const message = { shard: shard.number, after: shard.after, seq: shard.seq, leases };
    for (const lease of await this.call("reconcile", message, { read: (found) => list(found.lost) })) {
      this.running.get(lease)?.stop(new Released("", "the queue has lost it"));
    }
  }
}

/** A job that runs here. `seq`: the number of its next piece; `signal`: it is to stop. */
class Attempt {
  seq = 0;
  stopped = new AbortController();

  constructor(of, shard, job) {
    Object.assign(this, { of, shard, job });
    const late = AbortSignal.timeout(job.remaining_ms + ANSWER_MS);
    this.signal = AbortSignal.any([of.over.signal, this.stopped.signal, late]);
    of.running.set(job.lease, this);
  }

  stop(why) {
    this.stopped.abort(why);
  }

  async run() {
    const { job, of } = this;
    const began = Date.now();
    try {
      const last = await this.askEngine();
      const outcome = this.head.status < 400 ? "done" : "failed";
      await this.send("settle", last, { outcome, run_ms: Date.now() - began });
    } catch (problem) {
      if (problem.code === "fenced") throw problem;
      if (of.over.signal.aborted) return;
      const { kind = "spent", message } = this.stopped.signal.reason ?? problem;
      log(`job ${job.job_id} ends without an answer: ${kind} ${message}`);
      if (kind === "spent") {
        of.engine = "failed"; // unless it answers
        of.beatDue();
      }
      if (kind) await of.call("release", { attempts: [{ lease: job.lease, kind, reason: message.slice(0, 500) }] });
    } finally {
      of.running.delete(job.lease);
      of.look();
    }
  }

  /** Sends the engine's answer but for its last piece, which is returned. What earlier attempts said (`prefix`) is left
   * alone: the job runs from its start, and the Router compares and goes on from there. */
  async askEngine() {
    const { job, signal } = this;
    const body = Buffer.from(job.body, job.encoding === "base64" ? "base64" : "utf8");
    const headers = { ...job.headers, "content-length": body.length, "content-type": job.content_type };
    if (job.traceparent) headers.traceparent = job.traceparent;
    const { request } = ENGINE.startsWith("https:") ? https : http; // fetch gives up after five minutes
    const answer = await new Promise((resolve, reject) => {
      const how = { method: "POST", headers, signal, agent: false };
      request(ENGINE + job.path, how, resolve).on("error", reject).end(body);
    });
    const contentType = (answer.headers["content-type"] ?? "").slice(0, 1000);
    this.head = { status: answer.statusCode, content_type: contentType };
    if (answer.statusCode >= 500 && job.attempt < job.max_attempts) {
      answer.destroy();
      throw new Error(`the engine answers ${answer.statusCode}`);
    }
    if (job.stream && answer.statusCode < 400 && contentType.startsWith("text/event-stream")) return this.relay(answer);
    let content = await buffer(answer);
    if (contentType.startsWith("application/json")) JSON.parse(content); // else it is broken
    for (; content.length > MAX_PIECE; content = content.subarray(MAX_PIECE)) {
      await this.send("output", content.subarray(0, MAX_PIECE));
    }
    return content;
  }

  /** Sends whole events as they come; those that come during a call go with the next one, and no more is read. */
  async relay(answer) {
    let rest = ""; // a character is a byte
    for await (const data of answer) {
      const events = (rest + data.toString("latin1")).replaceAll("\r\n", "\n");
      const end = events.lastIndexOf("\n\n");
      const piece = end < 0 ? "" : events.slice(0, end + 2);
      rest = events.slice(piece.length);
      if (/^data: *\[DONE\]/m.test(piece)) return Buffer.from(piece, "latin1");
      if (piece) await this.send("output", Buffer.from(piece, "latin1"));
    }
    if (!this.job.path.endsWith("/completions")) return Buffer.from(rest, "latin1");
    throw new Error("the engine ended the stream before its end");
  }

  /** Sends a piece until it is taken. Throws `Released` if nobody takes it. */
  async send(name, data, end = {}) {
    const { job, seq, head, of, signal } = this;
    const piece = { lease: job.lease, seq, ...(seq === 0 && { head }), ...end };
    if (isUtf8(data)) piece.data = [data.toString()];
    else Object.assign(piece, { data: [data.toString("base64")], encoding: "base64" });
    for (;;) {
      const [answer] = await of.call(name, { attempts: [piece] }, { signal, read: (found) => list(found.answers) });
      if (answer === "gone") throw new Released("handed_back", "nobody waits for it");
      if (answer === "fenced") throw new Released("", "it was given to another worker");
      if (answer !== "full") break;
      await sleep(FULL_PAUSE_MS, undefined, { signal });
    }
    this.seq++;
  }
}

function drain() {
  if (!draining) log("draining");
  draining = true;
}

process.on("SIGTERM", drain).on("SIGINT", drain);
while (!draining) {
  try {
    await new Session().run();
  } catch (problem) {
    if (!(problem instanceof Refused)) throw problem;
    log(`the session is over: ${problem.message}`);
    if (problem.code !== "fenced") process.exit(1);
  }
}
process.exit(0);
