// Background responses as the unmodified `openai` package for Node makes them.
//
//   OPENAI_BASE_URL=http://127.0.0.1:18000/v1 OPENAI_API_KEY=any MODEL=sim node responses.mjs
//
// Prints what it saw as one line of JSON.

import OpenAI, { BadRequestError, NotFoundError } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.env.MODEL;
const seen = {};

const collect = async (stream, most = Infinity) => {
  const events = [];
  for await (const event of stream) {
    events.push(event);
    if (events.length >= most) break; // which closes the connection
  }
  return events;
};
const refused = async (kind, call) => {
  try {
    await call;
  } catch (error) {
    return [error instanceof kind, error.status, error.param];
  }
  return null;
};

const begun = await client.responses.create({ model, input: "Tell me.", background: true, metadata: { from: "node" } });
let found = begun;
while (found.status === "queued" || found.status === "in_progress") {
  await new Promise((resolve) => setTimeout(resolve, 50));
  found = await client.responses.retrieve(begun.id);
}
seen.polled = [begun.status, found.status, found.metadata, found.output_text];

const first = await collect(
  await client.responses.create({ model, input: "Tell me more.", background: true, stream: true }), 6);
const id = first[0].response.id;
const rest = await collect(
  await client.responses.retrieve(id, { stream: true, starting_after: first.at(-1).sequence_number }));
const numbers = [...first, ...rest].map((event) => event.sequence_number);
const text = [...first, ...rest].filter((event) => event.type === "response.output_text.delta");
seen.streamed = [
  numbers.every((number, place) => number === place),
  text.map((event) => event.delta).join("") === (await client.responses.retrieve(id)).output_text,
  rest.at(-1).type,
];

const items = [];
for await (const item of client.responses.inputItems.list(id)) items.push(item.type);
seen.items = items;

const slow = await client.responses.create({
  model, input: "Long", background: true, sim: { fail: "slow", delay_ms: 1000 },
});
seen.cancelled = [(await client.responses.cancel(slow.id)).status, (await client.responses.cancel(slow.id)).status];

await client.responses.delete(id);
seen.deleted = await refused(NotFoundError, client.responses.retrieve(id));
seen.refused = await refused(
  BadRequestError, client.responses.create({ model, input: "x", background: true, previous_response_id: "resp_1" }));

console.log(JSON.stringify(seen));
