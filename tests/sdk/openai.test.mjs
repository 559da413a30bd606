// The official OpenAI package for Node against the demo model. Run by run.py, which starts the servers: POLYLORA_URL, and POLYLORA_KEYS_URL, where
// the key "one" may have one request at a time, of the adapter `json` alone.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { before, test } from "node:test";
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError, PermissionDeniedError, RateLimitError } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.POLYLORA_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "List 3 countries and their capitals." }];
const golden = (name, kind) =>
  JSON.parse(readFileSync(new URL(`../../demo/golden/${name}.json`, import.meta.url))).cases.find((entry) => entry.kind === kind);
const capitalOf = {
  type: "function",
  function: {
    name: "capital_of",
    parameters: { type: "object", properties: { country: { type: "string", enum: ["France", "Peru"] } }, required: ["country"] },
  },
};
const named = { type: "function", function: { name: "capital_of" } };
let base;

before(async () => {
  base = (await client.models.list()).data[0].id;
});

test("models are listed, base first, and each can be retrieved", async () => {
  const models = (await client.models.list()).data;
  assert.equal(models[0].parent, null);
  assert.ok(models.length >= 8);
  for (const model of models) assert.equal((await client.models.retrieve(model.id)).id, model.id);
});

for (const name of ["base", "lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml"]) {
  test(`chat with ${name}`, async () => {
    const model = name === "base" ? base : `${base}:${name}`;
    const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
    assert.equal(answer.choices[0].message.content, golden(name, "chat").output_text);
    assert.equal(answer.choices[0].finish_reason, "stop");
  });
}

test("chat is streamed in whole characters", async () => {
  const stream = await client.chat.completions.create({ model: "flags", messages, temperature: 0, stream: true, stream_options: { include_usage: true } });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    const delta = chunk.choices[0]?.delta.content ?? "";
    assert.ok(!delta.includes("\ufffd"), JSON.stringify(delta));
    text += delta;
    usage = chunk.usage ?? usage;
  }
  const expected = golden("flags", "chat");
  assert.equal(text, expected.output_text);
  assert.equal(usage.prompt_tokens, expected.prompt_ids.length);
});

test("completions, with log-probabilities", async () => {
  const expected = golden("sql", "raw");
  const answer = await client.completions.create({ model: "sql", prompt: expected.prompt, max_tokens: 96, temperature: 0, logprobs: 2 });
  assert.equal(answer.choices[0].text, expected.output_text);
  assert.ok(Math.abs(answer.choices[0].logprobs.token_logprobs[0] - expected.top_logprobs[0][0][1]) < 1e-3);
});

test("stop and n", async () => {
  const full = golden("lines", "chat").output_text;
  const answer = await client.chat.completions.create({ model: "lines", messages, temperature: 0, stop: ["Capital"], n: 2 });
  assert.equal(answer.choices.length, 2);
  for (const choice of answer.choices) assert.equal(choice.message.content, full.slice(0, full.indexOf("Capital")));
});

test("errors are the package's exceptions", async () => {
  await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), (error) => {
    assert.ok(error instanceof NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ model: base, messages, temperature: -1 }), BadRequestError);
});

test("an adapter answers to its name alone, and completions are streamed", async () => {
  const byName = await client.chat.completions.create({ model: "table", messages, temperature: 0 });
  assert.equal(byName.choices[0].message.content, golden("table", "chat").output_text);
  const expected = golden("sql", "raw");
  let text = "";
  for await (const chunk of await client.completions.create({ model: `${base}:sql`, prompt: expected.prompt, max_tokens: 96, temperature: 0, stream: true }))
    text += chunk.choices[0].text;
  assert.equal(text, expected.output_text);
});

test("functions are called, streamed too", async () => {
  const asked = { model: `${base}:json`, messages, temperature: 0, tools: [capitalOf], tool_choice: named };
  const answer = await client.chat.completions.create(asked);
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  const [call, ...more] = answer.choices[0].message.tool_calls;
  assert.equal(more.length, 0);
  assert.equal(call.function.name, "capital_of");
  assert.ok(["France", "Peru"].includes(JSON.parse(call.function.arguments).country));
  let streamed = "";
  let deltas = 0;
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    for (const delta of chunk.choices[0].delta.tool_calls ?? []) {
      streamed += delta.function.arguments ?? "";
      deltas += 1;
    }
  assert.equal(streamed, call.function.arguments);
  assert.ok(deltas > 3);
});

test("an answer is parsed by its schema", async () => {
  const Capital = z.object({ country: z.enum(["France", "Peru"]), isLarge: z.boolean() });
  for (const model of [base, "json"]) {
    const answer = await client.chat.completions.parse({ model, messages, temperature: 0, response_format: zodResponseFormat(Capital, "capital") });
    Capital.parse(answer.choices[0].message.parsed);
  }
});

test("log-probabilities of a chat", async () => {
  const answer = await client.chat.completions.create({ model: "json", messages, temperature: 0, logprobs: true, top_logprobs: 3 });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.length, answer.usage.completion_tokens - 1);
  assert.ok(content.every((position) => position.top_logprobs.length === 3 && position.top_logprobs[0].logprob === position.logprob));
});

test("responses, streamed and not", async () => {
  const asked = { model: `${base}:json`, input: messages[0].content, temperature: 0, store: false };
  const expected = golden("json", "chat").output_text;
  assert.equal((await client.responses.create(asked)).output_text, expected);
  let text = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, expected);
});

const keyed = (apiKey, options) => new OpenAI({ baseURL: `${process.env.POLYLORA_KEYS_URL}/v1`, apiKey, maxRetries: 0, ...options });

test("errors of keys are the package's exceptions", async () => {
  await assert.rejects(keyed("none").models.list(), AuthenticationError);
  await assert.rejects(keyed("one").chat.completions.create({ model: "demo", messages }), PermissionDeniedError);
  await assert.rejects(keyed("one").chat.completions.create({ model: "sql", messages }), NotFoundError);
});

test("429 is an exception that says when to try again, and the package does", async () => {
  const stream = await keyed("one").chat.completions.create({ model: "json", messages, stream: true, max_tokens: 1900, ignore_eos: true });
  await stream[Symbol.asyncIterator]().next();
  await assert.rejects(keyed("one").chat.completions.create({ model: "json", messages }), (error) => {
    assert.ok(error instanceof RateLimitError);
    assert.equal(error.headers.get("retry-after"), "1");
    return true;
  });
  const statuses = [];
  const noting = async (url, init) => {
    const response = await fetch(url, init);
    statuses.push(response.status);
    stream.controller.abort();
    return response;
  };
  const answer = await keyed("one", { maxRetries: 5, fetch: noting }).chat.completions.create({ model: "json", messages, temperature: 0 });
  assert.equal(answer.choices[0].message.content, golden("json", "chat").output_text);
  assert.deepEqual([statuses[0], statuses.at(-1)], [429, 200]);
});

const running = async () => (await (await fetch(`${process.env.POLYLORA_URL}/v1/loads`)).json()).loads[0].num_total_reqs;

test("an aborted stream ends its sequence", async () => {
  const stream = await client.chat.completions.create({ model: base, messages, stream: true, max_tokens: 1900, ignore_eos: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    assert.equal(await running(), 1);
    break;
  }
  const deadline = Date.now() + 20_000;
  while ((await running()) > 0) assert.ok(Date.now() < deadline, "the sequence of an aborted stream goes on");
  const answer = await client.chat.completions.create({ model: "json", messages, temperature: 0 });
  assert.equal(answer.choices[0].message.content, golden("json", "chat").output_text);
});
