// Compiled and called by run.py with the types that openapi-typescript generated (schema.d.ts): node client.js URL
import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const baseUrl = process.argv[2];
assert.ok(baseUrl);
const client = createClient<paths>({ baseUrl });

const models = await client.GET("/v1/models");
assert.ok(models.data);
const [base, ...adapters] = models.data.data;
assert.ok(base && base.parent == null);
assert.deepEqual([...new Set(adapters.map((card) => card.parent))], [base.id]);

const card = await client.GET("/v1/models/{id}", { params: { path: { id: "json" } } });
assert.ok((card.data?.adapter?.lora_rank ?? 0) > 0);

const request: components["schemas"]["ChatRequest"] = {
  model: `${base.id}:json`,
  messages: [{ role: "user", content: "List 3 countries." }],
  temperature: 0,
  max_tokens: 8,
};
const answer = await client.POST("/v1/chat/completions", { body: request });
assert.ok(answer.data);
// The document gives one status two forms: an answer, or events. Without `stream` it is the answer.
const choice = (answer.data as components["schemas"]["ChatResponse"]).choices[0];
assert.ok(choice?.message.content);
assert.equal(choice.finish_reason, "length");

const refused = await client.POST("/v1/chat/completions", { body: { ...request, model: "nobody" } });
assert.equal(refused.response.status, 404);
assert.equal(refused.error?.error.code, "model_not_found");

const loaded = await client.POST("/load_lora_adapter", { body: { lora_name: "typed", lora_path: "demo:sql" } });
assert.ok(loaded.data?.success && "typed" in loaded.data.loaded_adapters);
const unloaded = await client.DELETE("/v1/loras/{name}", { params: { path: { name: "typed" } } });
assert.equal(unloaded.data?.lora_name, "typed");
console.log("generated TypeScript client: 6 calls ok");
