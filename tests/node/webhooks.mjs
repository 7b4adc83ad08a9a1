// Webhooks as the unmodified `openai` package for Node takes them.
//
//   node webhooks.mjs '[{"body": "...", "headers": {...}, "secret": "whsec_..."}, ...]'
//
// Prints the type of each, or the name of the error, as one line of JSON.

import OpenAI from "openai";

const client = new OpenAI({ apiKey: "none" });
const seen = [];
for (const { body, headers, secret } of JSON.parse(process.argv[2])) {
  try {
    seen.push((await client.webhooks.unwrap(body, headers, secret)).type);
  } catch (error) {
    seen.push(error.constructor.name);
  }
}
console.log(JSON.stringify(seen));
