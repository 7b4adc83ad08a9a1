// Streams and errors as the unmodified `openai` package for Node reads them.
//
//   OPENAI_BASE_URL=http://127.0.0.1:18000/v1 OPENAI_API_KEY=any node streams.mjs KIND
//
// KIND: chat (a stream), plain (an answer) or responses (a stream of events). Prints what it saw as one line of JSON.

import OpenAI, { APIError } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const kind = process.argv[2];
const messages = [{ role: "user", content: "hi" }];
const seen = { text: "", events: 0, error: null };

try {
  if (kind === "plain") {
    await client.chat.completions.create({ model: "m", messages });
  } else if (kind === "chat") {
    for await (const chunk of await client.chat.completions.create({ model: "m", messages, stream: true })) {
      seen.events += 1;
      seen.text += chunk.choices[0]?.delta?.content ?? "";
    }
  } else {
    for await (const event of await client.responses.create({ model: "m", input: "hi", stream: true })) {
      seen.events += event.type ? 1 : 0;
    }
  }
} catch (error) {
  seen.error = [error instanceof APIError, error.status ?? null, error.message, error.code ?? null];
}
console.log(JSON.stringify(seen));
