// A batch from upload to answers with the unmodified `openai` package for Node.
//
//   OPENAI_BASE_URL=http://127.0.0.1:18000/v1 OPENAI_API_KEY=any MODEL=sim node batches.mjs
//
// Prints one line of JSON that says what was seen; ends with a stack trace if a call fails that must not.

import { File } from "node:buffer";

import OpenAI, { toFile } from "openai";

globalThis.File ??= File; // Node 18, as Debian 12 has it, keeps it to itself

const client = new OpenAI({ maxRetries: 0, timeout: 30_000 });
const endpoint = "/v1/chat/completions";
const line = (id) => ({
  custom_id: id,
  method: "POST",
  url: endpoint,
  body: { model: process.env.MODEL, messages: [{ role: "user", content: `text of ${id}` }] },
});

async function submit(lines, fields = {}) {
  const text = lines.map((one) => (typeof one === "string" ? one : JSON.stringify(one)) + "\n").join("");
  const file = await client.files.create({ file: await toFile(Buffer.from(text), "in.jsonl"), purpose: "batch" });
  return client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h", ...fields });
}

async function ended(id) {
  for (const limit = Date.now() + 30_000; Date.now() < limit; ) {
    const batch = await client.batches.retrieve(id);
    if (["completed", "failed", "expired", "cancelled"].includes(batch.status)) return batch;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`${id} did not end`);
}

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status, error.param ?? null];
  }
  return ["no error", 0, null];
}

const ids = Array.from({ length: 10 }, (_, n) => `line-${n}`);
const created = await submit(ids.map(line), { metadata: { from: "node" } });
const batch = await ended(created.id);
const output = await (await client.files.content(batch.output_file_id)).text();
const answers = Object.fromEntries(
  output
    .trim()
    .split("\n")
    .map((text) => JSON.parse(text))
    .map((one) => [one.custom_id, one.response.body.choices[0].message.content]),
);
const wrong = await ended((await submit(["{no json", line("a")])).id);
const listed = [];
for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);

console.log(
  JSON.stringify({
    first_status: created.status,
    status: batch.status,
    counts: batch.request_counts,
    metadata: batch.metadata,
    answers,
    failed: [wrong.status, wrong.errors.data.map((error) => error.line)],
    listed: [listed.includes(batch.id), listed.includes(wrong.id), listed.length],
    unknown: await refusal(() => client.batches.retrieve("batch_none")),
    ended: await refusal(() => client.batches.cancel(batch.id)),
    bad: await refusal(() => submit([line("a")], { completion_window: "1h" })),
    deleted: (await client.files.delete(batch.input_file_id)).deleted,
  }),
);
