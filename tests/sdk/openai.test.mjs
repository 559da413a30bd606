// The official OpenAI package for Node against the demo model. Run by run.py, which starts the server: POLYLORA_URL.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { before, test } from "node:test";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const client = new OpenAI({ baseURL: `${process.env.POLYLORA_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "List 3 countries and their capitals." }];
const golden = (name, kind) =>
  JSON.parse(readFileSync(new URL(`../../demo/golden/${name}.json`, import.meta.url))).cases.find((entry) => entry.kind === kind);
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

test("a stream can be aborted", async () => {
  const stream = await client.chat.completions.create({ model: base, messages, stream: true, max_tokens: 1500, ignore_eos: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    break;
  }
  const answer = await client.chat.completions.create({ model: "json", messages, temperature: 0 });
  assert.equal(answer.choices[0].message.content, golden("json", "chat").output_text);
});
