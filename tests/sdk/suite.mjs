// Cases for the openai package of npm: `suite.mjs BASE_URL CASE...`. A case that fails ends it.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(process.env.RBEE_SDK_NODE + "/");
const OpenAI = require("openai").default;

const [base, ...cases] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base + "/v1", apiKey: "unused", maxRetries: 0 });
const HI = [{ role: "user", content: "What do bees make?" }];
const SURE = { model: "tinybee", messages: HI, temperature: 0, max_tokens: 20 };

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

const suite = {
  async chat() {
    const answer = await client.chat.completions.create(SURE);
    assert.equal(answer.choices[0].message.content, "Bees make honey.");
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
  },
  async stream() {
    const chunks = await all(client.chat.completions.create({ ...SURE, stream: true, stream_options: { include_usage: true } }));
    const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
    assert.equal(text, "Bees make honey.");
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.ok(chunks.at(-1).usage.completion_tokens > 2);
    assert.equal(chunks.filter((chunk) => chunk.choices[0]?.finish_reason).length, 1);
    // The helper that puts chunks together itself.
    const runner = client.chat.completions.stream({ ...SURE, n: 2 });
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices.length, 2);
    assert.equal(final.choices[1].message.content, "Bees make honey.");
  },
  async completions() {
    const asked = { model: "tinybee", prompt: ["Once upon a time", "Once"], temperature: 0, max_tokens: 8 };
    const answer = await client.completions.create(asked);
    assert.equal(answer.choices.length, 2);
    const texts = ["", ""];
    for (const chunk of await all(client.completions.create({ ...asked, stream: true }))) {
      texts[chunk.choices[0].index] += chunk.choices[0].text;
    }
    assert.deepEqual(texts, answer.choices.map((choice) => choice.text));
    const ids = await client.completions.create({ ...asked, prompt: [[5, 6, 7], [5, 6]] });
    assert.deepEqual([ids.choices.length, ids.usage.prompt_tokens], [2, 5]);
  },
  async tools(model) {
    const weather = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const tools = [
      { type: "function", function: { name: "get_weather", parameters: weather } },
      { type: "function", function: { name: "get_time", parameters: { type: "object", properties: {} } } },
    ];
    const asked = { model, messages: HI, tools };
    const check = ({ message, finish_reason }) => {
      assert.equal(finish_reason, "tool_calls");
      assert.equal(message.content, "Let me look.");
      assert.deepEqual(message.tool_calls.map((call) => call.function.name), ["get_weather", "get_time"]);
      assert.deepEqual(message.tool_calls.map((call) => JSON.parse(call.function.arguments)), [{ city: "Paris" }, {}]);
    };
    check((await client.chat.completions.create(asked)).choices[0]);
    // The helper that puts chunks together itself.
    const streamed = (await client.chat.completions.stream(asked).finalChatCompletion()).choices[0];
    check(streamed);
    // The helper that calls the functions itself and goes on until there is an answer.
    const said = [];
    const runner = client.chat.completions.runTools({
      model,
      messages: HI,
      tools: tools.map((tool) => ({
        type: "function",
        function: { ...tool.function, function: (given) => (said.push(given), "21 degrees"), parse: JSON.parse },
      })),
    });
    assert.equal(await runner.finalContent(), "Warm.");
    assert.deepEqual(said, [{ city: "Paris" }, {}]);
    // What must be called is, though the model would rather do something else first.
    const forced = { type: "function", function: { name: "get_time" } };
    const offered = { tools: [tools[0], forced], tool_choice: forced, parallel_tool_calls: false };
    const must = (await client.chat.completions.create({ ...asked, ...offered })).choices[0];
    assert.equal(must.finish_reason, "tool_calls");
    assert.deepEqual(must.message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]), [["get_time", {}]]);
    await assert.rejects(
      client.chat.completions.create({ ...asked, tool_choice: { type: "function", function: { name: "get_none" } } }),
      (error) => error.status === 400 && error.param === "tool_choice",
    );
  },
  async forms() {
    const schema = {
      type: "object",
      properties: { kind: { enum: ["worker", "queen"] }, legs: { type: "integer", minimum: 0, maximum: 20 } },
      required: ["kind", "legs"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "bee", schema, strict: true } };
    const asked = { model: "tinybee", messages: HI, max_tokens: 200, response_format };
    const check = ({ kind, legs, ...more }) => {
      assert.ok(["worker", "queen"].includes(kind) && Number.isInteger(legs) && legs >= 0 && legs <= 20);
      assert.deepEqual(more, {});
    };
    for (let seed = 0; seed < 5; seed++) {
      check(JSON.parse((await client.chat.completions.create({ ...asked, seed })).choices[0].message.content));
    }
    // The helpers that read the answer themselves, whole and as a stream.
    const { makeParseableResponseFormat } = require("openai/lib/parser");
    const parseable = makeParseableResponseFormat(response_format, (text) => JSON.parse(text));
    const parsed = await client.chat.completions.parse({ ...asked, response_format: parseable, seed: 1 });
    check(parsed.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream({ ...asked, seed: 1 }).finalChatCompletion();
    check(JSON.parse(streamed.choices[0].message.content));
    const broken = { type: "json_schema", json_schema: { name: "x", schema: { type: "thing" } } };
    await assert.rejects(
      client.chat.completions.create({ ...asked, response_format: broken }),
      (error) => error.status === 400 && error.param === "response_format",
    );
  },
  async errors() {
    const status = (code, name) => (error) => error.status === code && error.code === name;
    await assert.rejects(client.chat.completions.create({ ...SURE, model: "none" }), status(404, "model_not_found"));
    await assert.rejects(all(client.chat.completions.create({ ...SURE, model: "none", stream: true })), status(404, "model_not_found"));
    await assert.rejects(client.chat.completions.create({ ...SURE, top_p: 3 }), (error) => error.status === 400 && error.param === "top_p");
    for (const [name, value] of [["response_format", { type: "xml" }], ["tool_choice", "required"]]) {
      await assert.rejects(client.chat.completions.create({ ...SURE, [name]: value }), (error) => error.status === 400 && error.param === name);
    }
  },
  async embeddings() {
    // Asked for as base64 by the SDK itself.
    const { data, usage } = await client.embeddings.create({ model: "tinybee", input: ["Bees make honey.", "A fox ran."] });
    const length = (vector) => Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
    assert.ok(Math.abs(length(data[0].embedding) - 1) < 1e-4 && usage.prompt_tokens > 4);
    const asked = { model: "tinybee", input: "Bees make honey.", encoding_format: "float" };
    const floats = (await client.embeddings.create(asked)).data[0].embedding;
    assert.deepEqual(Array.from(data[0].embedding), Array.from(Float32Array.from(floats)));
    assert.notDeepEqual(data[1].embedding, data[0].embedding);
  },
  async ignored() {
    const { response } = await client.chat.completions.create({ ...SURE, user: "me", zzz: 1 }).withResponse();
    assert.equal(response.headers.get("x-rbee-ignored"), "user, zzz");
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes("tinybee"));
    assert.equal((await client.models.retrieve("tinybee")).owned_by, "rbee");
    await assert.rejects(client.models.retrieve("org/none"), (error) => error.status === 404);
  },
  async waits() {
    const patient = new OpenAI({ baseURL: base + "/v1", apiKey: "unused" });
    const chunks = await all(patient.chat.completions.create({ model: "tinybee", messages: HI, max_tokens: 4, stream: true }));
    assert.equal(chunks.filter((chunk) => chunk.choices[0]?.delta.content).length, 4);
  },
  async dies() {
    const asked = { model: "tinybee", messages: HI, max_tokens: 4000, stream: true };
    await assert.rejects(all(client.chat.completions.create(asked)), (error) => {
      assert.ok(error instanceof OpenAI.APIError, String(error));
      assert.equal(error.code, "worker_lost");
      return true;
    });
  },
  async leaves() {
    const stream = await client.chat.completions.create({ model: "tinybee", messages: HI, max_tokens: 60000, stream: true });
    for await (const _ of stream) break;
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 300);
    const asked = { model: "tinybee", messages: HI, max_tokens: 60000 };
    await assert.rejects(client.chat.completions.create(asked, { signal: controller.signal }), OpenAI.APIUserAbortError);
  },
};

for (const asked of cases) {
  const [name, argument] = asked.split("=");
  await suite[name](argument);
  console.log("ok", name);
}
