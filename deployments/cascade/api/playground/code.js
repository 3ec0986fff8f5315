// The request of a column, for a terminal and for two languages.

export function snippets(kind, request, origin) {
  const path = kind === "chat" ? "chat/completions" : "completions";
  const text = JSON.stringify(request, null, 2);
  const { cascade, ...rest } = request;
  const call = kind === "chat" ? "chat.completions" : "completions";
  return {
    curl: `curl ${origin}/v1/${path} -H 'content-type: application/json' -d '${text.replaceAll("'", "'\\''")}'`,
    Python: `from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key="none")
answer = client.${call}.create(
${Object.entries(rest).map(([name, value]) => `    ${name}=${python(value)},`).join("\n")}
    extra_body={"cascade": ${python(cascade)}},
)
print(answer.choices[0]${kind === "chat" ? ".message.content" : ".text"})`,
    Node: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${origin}/v1", apiKey: "none" });
const answer = await client.${call}.create(${text});
console.log(answer.choices[0]${kind === "chat" ? ".message.content" : ".text"});`,
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
