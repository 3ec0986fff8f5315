// The request of a column, for a terminal and for two languages.

import { html, useState } from "./vendor/htm-preact.js";

const KEY = "CASCADE_API_KEY"; // the variable that has the key, which is not written out

export function snippets(kind, request, origin, hasKey) {
  const path = kind === "chat" ? "chat/completions" : "completions";
  const call = kind === "chat" ? "chat.completions" : "completions";
  const text = JSON.stringify(request, null, 2);
  const unknown = kind === "chat" ? ["cascade"] : ["cascade", "response_format"]; // to the client for Python
  const [extra, rest] = [true, false].map((is) => Object.entries(request).filter(([name]) => unknown.includes(name) === is));
  const said = kind === "chat" ? ".message.content" : ".text";
  return {
    curl: `curl ${origin}/v1/${path} -H 'content-type: application/json' ${hasKey ? `-H "authorization: Bearer $${KEY}" ` : ""}-d '${text.replaceAll("'", "'\\''")}'`,
    Python: `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${hasKey ? `os.environ["${KEY}"]` : '"none"'})
answer = client.${call}.create(
${rest.map(([name, value]) => `    ${name}=${python(value)},`).join("\n")}
    extra_body=${python(Object.fromEntries(extra))},
)
print(answer.choices[0]${said})`,
    Node: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${origin}/v1", apiKey: ${hasKey ? `process.env.${KEY}` : '"none"'} });
const answer = await client.${call}.create(${text});
console.log(answer.choices[0]${said});`,
  };
}

function python(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function Code({ make }) {
  const [language, pick] = useState("");
  const [copied, tell] = useState("");
  let text = "";
  try {
    text = language && make()[language];
  } catch (error) {
    text = `The schema or the tools are not JSON: ${error.message}`;
  }
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      tell("Copied");
    } catch {
      tell("This browser lets only pages over HTTPS copy: select the text and copy it.");
    }
  }
  const choose = (one) => {
    pick(one === language ? "" : one);
    tell("");
  };
  return html`<div class="row" role="group" aria-label="This request as code">
      ${["curl", "Python", "Node"].map((one) => html`<button type="button" aria-pressed=${one === language} onClick=${() => choose(one)}>${one}</button>`)}
      ${text && html`<button type="button" onClick=${copy}>Copy</button>`}
      <span role="status" class="quiet">${copied}</span>
    </div>${text && html`<pre tabindex="0" aria-label=${`${language} code`}>${text}</pre>`}`;
}
