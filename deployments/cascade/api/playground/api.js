// The server's API: one streamed answer, and what went wrong as a sentence.

export const ORIGINS = {
  d: ["drafted", "The drafter wrote it and the expert would have chosen it too."],
  k: ["kept", "The drafter wrote it; the rule kept it although the expert might have chosen another."],
  e: ["expert", "The expert wrote it."],
  f: ["forced", "The only token that the schema allowed; the drafter was not asked."],
};

const sentences = {
  401: "This server wants an API key: enter it above.",
  404: "This server does not serve that model.",
  503: "No expert answers right now. The server is up; ask again in a moment.",
};

export async function models(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await problem(response));
  return (await response.json()).data.map((one) => one.id);
}

export function body({ model, kind, question, schema, tools }, column, stream = true) {
  const request = { model, max_tokens: Number(column.max_tokens), temperature: Number(column.temperature) };
  if (kind === "chat") request.messages = [{ role: "user", content: question }];
  else request.prompt = question;
  if (kind === "chat") Object.assign(request, { logprobs: true, top_logprobs: 5 });
  else request.logprobs = 5;
  if (column.seed !== "") request.seed = Number(column.seed);
  if (schema) request.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  if (tools && kind === "chat") request.tools = JSON.parse(tools);
  const cascade = { mode: column.mode, trace: true };
  if (["cascade", "speculative", "token_cascade"].includes(column.mode)) cascade.rule = rule(column);
  if (column.draft_tokens !== "") cascade.draft_tokens = Number(column.draft_tokens);
  if (column.threshold !== undefined) cascade.patience = { threshold: column.threshold };
  if (column.coupling) cascade.coupling = column.coupling;
  request.cascade = cascade;
  if (stream) Object.assign(request, { stream: true, stream_options: { include_usage: true } });
  return request;
}

function rule({ rule: kind, alpha }) {
  if (kind === "lossless") return { kind };
  if (kind === "ensemble") return { kind, weight: Number(alpha) };
  return kind === "typical" ? { kind } : { kind, alpha: Number(alpha) };
}

// Calls `on` with {tokens}, {trace}, {finish} and {usage} as they come.
export async function ask(kind, request, key, signal, on) {
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok) throw new Error(await problem(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) on(read(choice));
    if (event.usage) on({ usage: event.usage });
  }
}

function read(choice) {
  const { origins = "", tokens = [], trace } = choice.cascade ?? {};
  const known = choice.logprobs?.content ?? textLogprobs(choice.logprobs);
  const said = tokens.map((text, i) => ({
    text,
    origin: origins[i],
    logprob: known[i]?.logprob,
    by: choice.cascade.logprob_origins?.[i],
    others: known[i]?.top_logprobs ?? [],
  }));
  return { tokens: said, trace, finish: choice.finish_reason };
}

function textLogprobs(found) {
  return (found?.tokens ?? []).map((_, i) => ({
    logprob: found.token_logprobs[i],
    top_logprobs: Object.entries(found.top_logprobs?.[i] ?? {}).map(([token, logprob]) => ({ token, logprob })),
  }));
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function problem(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered ${response.status}.`;
  }
  const sentence = sentences[response.status];
  return sentence ? `${sentence} (${message})` : message;
}
