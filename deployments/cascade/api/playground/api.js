// The server's API: one streamed answer, and what went wrong as a sentence.

import { cascadeOf } from "./rules.js";

export const ORIGINS = {
  d: ["drafted", "The drafter wrote it, and speculative decoding would have accepted it too."],
  k: ["kept", "The drafter wrote it, and the rule kept it where speculative decoding would have rejected it."],
  e: ["expert", "The expert wrote it."],
  f: ["forced", "The schema allowed nothing else."],
};

const SENTENCES = {
  401: "This server wants an API key: enter it above.",
  404: "This server does not serve that model.",
  503: "No expert answers right now. The server is up; ask again in a moment.",
};

export async function models(key) {
  return (await (await request("v1/models", key)).json()).data.map((one) => one.id);
}

// Returns the points of an evaluation, or null if the server has none.
export async function evaluation(key) {
  const response = await request("playground/evaluation", key);
  return response.status === 204 ? null : response.json();
}

export function body({ model, kind, question, schema, tools }, column, stream = true) {
  const made = { model, max_tokens: Number(column.max_tokens), temperature: Number(column.temperature) };
  if (kind === "chat") Object.assign(made, { messages: [{ role: "user", content: question }], logprobs: true, top_logprobs: 5 });
  else Object.assign(made, { prompt: question, logprobs: 5 });
  if (column.seed !== "") made.seed = Number(column.seed);
  if (schema) made.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  if (tools && kind === "chat") made.tools = JSON.parse(tools);
  made.cascade = cascadeOf(column);
  if (stream) Object.assign(made, { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } });
  return made;
}

// Calls `on` with {tokens, trace, usage} as they come.
export async function ask(kind, made, key, signal, on) {
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(made),
    signal,
  });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const [choice] = event.choices;
    if (choice?.delta?.role) continue; // it shows nothing, and a drawing for it would keep the first token waiting
    on({ ...read(choice), usage: event.usage });
  }
  if (!ended) throw new Error("The answer broke off: the server has ended the connection. Ask again.");
}

function read(choice) {
  if (!choice) return {};
  const { origins = "", tokens = [], drafts = [], logprob_origins: by = "", trace } = choice.cascade ?? {};
  const known = choice.logprobs?.content ?? textLogprobs(choice.logprobs);
  return {
    tokens: tokens.map((text, i) => ({ text, origin: origins[i], by: by[i], known: known[i], draft: drafts[i] })),
    trace,
  };
}

function textLogprobs(found) {
  return (found?.tokens ?? []).map((token, i) => ({
    token,
    logprob: found.token_logprobs[i],
    top_logprobs: Object.entries(found.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({ token: other, logprob })),
  }));
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers }).catch(lost);
  if (!response.ok) throw new Error(await problem(response));
  return response;
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new Error(`The server at ${location.host} does not answer. Is it running, and is the network there?`);
}

async function problem(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered ${response.status}.`;
  }
  const sentence = SENTENCES[response.status];
  return sentence ? `${sentence} (${message})` : message;
}
