// The playground: one question under several settings, side by side.

import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ask, body, models, ORIGINS } from "./api.js";
import { snippets } from "./code.js";

const MODES = ["cascade", "speculative", "expert_only", "drafter_only", "token_cascade", "sequence_cascade"];
const RULES = ["lossless", "token_v3", "token_v2", "token_v1", "chow", "diff", "opt", "lossy", "bild", "fuzzy", "ensemble", "typical"];
const BASE = { rule: "lossless", alpha: 0.9, temperature: 0, draft_tokens: "", coupling: "", seed: "", max_tokens: 64 };
const PRESETS = [
  { mode: "expert_only" },
  { mode: "speculative" },
  { mode: "cascade", rule: "token_v3", alpha: 0.9 },
  { mode: "drafter_only" },
].map((one) => ({ ...BASE, ...one }));
const TOUR = [
  { mode: "sequence_cascade", threshold: -100, title: "1. A cascade that trusts the small model",
    about: "The small model is sure enough, so its whole answer stays. Cheap, and never better than the small model." },
  { mode: "sequence_cascade", threshold: 0, title: "2. A cascade that defers",
    about: "It is not sure enough: its whole answer is thrown away, and the large model starts from scratch." },
  { mode: "speculative", draft_tokens: 5, title: "3. Speculative decoding",
    about: "The large model checks drafted words in one pass, and refuses good ones because they are not its own." },
  { mode: "cascade", rule: "token_v3", draft_tokens: 5, title: "4. A speculative cascade",
    about: "The same pass, and a rule that keeps words which are good enough." },
].map((one) => ({ ...BASE, ...one }));
const IDLE = { tokens: [], trace: [], usage: null, state: "idle", error: "", began: 0, ended: 0 };

const NAMES = {
  expert_only: "Expert alone",
  drafter_only: "Drafter alone",
  token_cascade: "Token cascade",
  sequence_cascade: "Sequence cascade",
};

function title({ mode, rule, alpha, title }) {
  if (title) return title;
  if (NAMES[mode]) return NAMES[mode];
  if (rule === "lossless") return "Speculative decoding, lossless";
  return `Speculative cascade, ${rule} ${rule === "typical" ? "" : alpha}`;
}

function App() {
  const [known, setKnown] = useState({ names: [], error: "" });
  const [key, setKey] = useState("");
  const [shared, setShared] = useState({ kind: "chat", question: "Who is Buzz Aldrin?", schema: "", tools: "" });
  const [columns, setColumns] = useState([PRESETS[0], PRESETS[2]]);
  const [answers, setAnswers] = useState([IDLE, IDLE]);
  const stopping = useRef(null);

  useEffect(() => {
    models(key).then((names) => setKnown({ names, error: "" })).catch((error) => setKnown({ names: [], error: error.message }));
  }, [key]);

  const running = answers.some((one) => one.state === "running");
  const put = (i, change) =>
    setAnswers((all) => all.map((one, j) => (i === j ? { ...one, ...(typeof change === "function" ? change(one) : change) } : one)));
  const request = (column, stream) => body({ model: known.names[0], ...shared }, column, stream);

  async function run(i) {
    put(i, { ...IDLE, state: "running", began: performance.now() });
    try {
      const pending = [];
      let frame = 0;
      const show = () => {
        frame = 0;
        const parts = pending.splice(0);
        put(i, (one) => parts.reduce(merged, one));
      };
      await ask(shared.kind, request(columns[i], true), key, stopping.current.signal, (part) => {
        pending.push(part);
        frame ||= requestAnimationFrame(show);
      });
      cancelAnimationFrame(frame);
      show();
      put(i, { state: "done", ended: performance.now() });
    } catch (error) {
      const stopped = error.name === "AbortError";
      put(i, { state: stopped ? "stopped" : "failed", error: stopped ? "" : error.message, ended: performance.now() });
    }
  }

  function start(event) {
    event?.preventDefault();
    stopping.current = new AbortController();
    columns.forEach((_, i) => run(i));
  }

  function change(i, field, value) {
    const own = field === "mode" || field === "rule" ? { title: undefined, about: undefined, threshold: undefined } : {};
    setColumns((all) => all.map((one, j) => (i === j ? { ...one, ...own, [field]: value } : one)));
  }

  function add() {
    const next = PRESETS.find((one) => !columns.some((other) => other.mode === one.mode)) ?? PRESETS[2];
    setColumns((all) => [...all, next]);
    setAnswers((all) => [...all, IDLE]);
  }

  function tour() {
    setShared((one) => ({ ...one, kind: "chat", question: "Who is Buzz Aldrin?" }));
    setColumns(TOUR);
    setAnswers(TOUR.map(() => IDLE));
  }

  function remove(i) {
    setColumns((all) => all.filter((_, j) => j !== i));
    setAnswers((all) => all.filter((_, j) => j !== i));
  }

  const share = (field) => (event) => setShared((one) => ({ ...one, [field]: event.target.value }));
  return html`
    <header>
      <h1>Speculative cascade</h1>
      <p class="quiet">A small model drafts, a large one checks, and a rule decides word by word whose wording stays.</p>
    </header>
    <main>
      <form onSubmit=${start}>
        <label for="question">Question</label>
        <textarea id="question" rows="2" value=${shared.question} onInput=${share("question")}></textarea>
        <div class="row">
          <div><label for="kind">As</label>
            <select id="kind" value=${shared.kind} onChange=${share("kind")}><option value="chat">chat</option><option value="completion">completion</option></select></div>
          <div><label for="key">API key, if the server wants one</label>
            <input id="key" type="password" autocomplete="off" value=${key} onChange=${(event) => setKey(event.target.value)} /></div>
          <button class="main" type="submit" disabled=${running || !known.names.length}>Ask</button>
          <button type="button" data-action="stop" disabled=${!running} onClick=${() => stopping.current.abort()}>Stop</button>
          <button type="button" data-action="add" disabled=${running || columns.length >= 4} onClick=${add}>Compare with another</button>
          <button type="button" data-action="tour" disabled=${running} onClick=${tour}>Four ways of answering</button>
        </div>
        <details>
          <summary>Schema and tools</summary>
          <label for="schema">JSON schema that the answer must match</label>
          <textarea id="schema" rows="3" value=${shared.schema} onInput=${share("schema")}></textarea>
          <label for="tools">Tools, a JSON list as OpenAI has it (chat only)</label>
          <textarea id="tools" rows="3" value=${shared.tools} onInput=${share("tools")}></textarea>
        </details>
      </form>
      ${known.error && html`<p class="error" role="alert">${known.error}</p>`}
      <${Legend} />
      <div class="columns">
        ${columns.map((column, i) => html`
          <${Column} key=${i} index=${i} column=${column} answer=${answers[i]} running=${running}
            change=${(field, value) => change(i, field, value)} remove=${columns.length > 1 ? () => remove(i) : null}
            code=${() => snippets(shared.kind, request(column, false), location.origin)} />`)}
      </div>
    </main>`;
}

function merged(answer, { tokens = [], trace, usage }) {
  return {
    ...answer,
    tokens: tokens.length ? [...answer.tokens, ...tokens] : answer.tokens,
    trace: trace ?? answer.trace,
    usage: usage ?? answer.usage,
  };
}

function Legend() {
  return html`<p class="quiet" aria-label="Legend">
    ${Object.entries(ORIGINS).map(([origin, [name, about]]) => html`<span class=${`token ${origin}`} title=${about}>${name}</span>${" "}`)}
    Hover over a word, or move to an answer with Tab and through it with the arrow keys.
  </p>`;
}

function Column({ index, column, answer, running, change, remove, code }) {
  const [chosen, choose] = useState(null);
  const token = answer.tokens[chosen];
  const name = title(column);
  return html`
    <section class="column" data-column=${index} data-state=${answer.state} aria-label=${name}>
      <header><h2>${name}</h2>
        ${remove && html`<button type="button" aria-label=${`Remove ${name}`} disabled=${running} onClick=${remove}>×</button>`}</header>
      ${column.about && html`<p class="quiet">${column.about}</p>`}
      <${Settings} index=${index} column=${column} change=${change} />
      <${Answer} answer=${answer} chosen=${chosen} choose=${choose} name=${name} />
      ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
      <${Figures} answer=${answer} />
      <${Rounds} trace=${answer.trace} />
      <div class="details" aria-live="polite">${token ? html`<${Token} token=${token} />` : html`<span class="quiet">Nothing chosen</span>`}</div>
      <${Code} code=${code} />
    </section>`;
}

function Settings({ index, column, change }) {
  const field = (name) => ({ id: `${name}-${index}`, value: column[name], onChange: (event) => change(name, event.target.value) });
  const chooser = (name, label, options) => html`<div><label for=${`${name}-${index}`}>${label}</label>
    <select ...${field(name)}>${options.map((one) => html`<option value=${one}>${one || "default"}</option>`)}</select></div>`;
  const number = (name, label, more) => html`<div><label for=${`${name}-${index}`}>${label}</label><input type="number" ...${field(name)} ...${more} /></div>`;
  const ruled = ["cascade", "speculative", "token_cascade"].includes(column.mode);
  const dialled = ruled && !["lossless", "typical"].includes(column.rule);
  return html`
    <div class="row">
      ${chooser("mode", "Mode", MODES)}
      ${ruled && chooser("rule", "Rule", RULES)}
    </div>
    ${dialled && html`<div><label for=${`alpha-${index}`}>alpha ${column.alpha}: further right, more of the drafter</label>
      <input type="range" min="0" max="1" step="0.01" ...${field("alpha")} onInput=${(event) => change("alpha", event.target.value)} /></div>`}
    <details><summary class="quiet">More settings</summary>
      <div class="row">
        ${number("temperature", "Temperature", { min: 0, max: 2, step: 0.1 })}
        ${number("draft_tokens", "Draft length", { min: 0, max: 32, placeholder: "auto" })}
        ${number("max_tokens", "Most tokens", { min: 1 })}
        ${number("seed", "Seed", { placeholder: "none" })}
        ${chooser("coupling", "Coupling", ["", "maximal", "gumbel"])}
      </div></details>`;
}

function Answer({ answer, chosen, choose, name }) {
  const last = answer.tokens.length - 1;
  function move(event) {
    const to = { ArrowRight: (chosen ?? -1) + 1, ArrowLeft: (chosen ?? 1) - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), last));
  }
  return html`
    <div class="answer" tabindex="0" role="group" aria-label=${`Answer of ${name}`} aria-busy=${answer.state === "running"} onKeyDown=${move}>
      ${answer.tokens.map((token, i) => html`<span class=${`token ${token.origin}${i === chosen ? " chosen" : ""}`}
        data-origin=${token.origin} data-token=${i} onMouseEnter=${() => choose(i)}>${token.text}</span>`)}
    </div>`;
}

function Token({ token }) {
  const [name, about] = ORIGINS[token.origin] ?? ["", ""];
  const share = (logprob) => (logprob === undefined || logprob === null ? "unknown" : `${(100 * Math.exp(logprob)).toFixed(1)} %`);
  const by = token.by === "d" ? "drafter" : "expert";
  return html`
    <p><strong>${JSON.stringify(token.text)}</strong> ${name}. ${about}</p>
    <table><tbody>
      <tr><th>probability under the ${by}</th><td data-figure="probability">${share(token.logprob)}</td></tr>
      ${token.others.map((other) => html`<tr><th>${JSON.stringify(other.token)}</th><td>${share(other.logprob)}</td></tr>`)}
    </tbody></table>`;
}

function Figures({ answer }) {
  const { usage, tokens, state } = answer;
  if (state === "idle") return null;
  const seconds = ((answer.ended || performance.now()) - answer.began) / 1000;
  const cascade = usage?.cascade;
  const rows = [
    ["tokens", tokens.length],
    ["tokens a second", seconds > 0 ? (tokens.length / seconds).toFixed(1) : ""],
    ["seconds", seconds.toFixed(2)],
    ["expert passes", cascade?.expert_passes ?? ""],
    ["drafter passes", cascade?.drafter_passes ?? ""],
    ["drafted and accepted", cascade ? `${cascade.accepted} of ${cascade.drafted}` : ""],
  ];
  return html`<table class="figures"><tbody>${rows.map(([name, value]) => html`<tr><th>${name}</th><td data-figure=${name}>${value}</td></tr>`)}</tbody></table>`;
}

function Rounds({ trace }) {
  if (!trace?.length) return null;
  const label = (one) => `${one.drafted} drafted, ${one.accepted} accepted, ${one.tokens} tokens`;
  return html`<p class="quiet">Rounds: green is accepted, hatched rejected, blue the expert's</p>
    <ol class="rounds" aria-label="Rounds">${trace.map((one) => html`<li title=${label(one)} aria-label=${label(one)}>
      ${Array.from({ length: one.accepted }, () => html`<i class="a"></i>`)}
      ${Array.from({ length: Math.max(0, one.tokens - one.accepted) }, () => html`<i class="e"></i>`)}
      ${Array.from({ length: Math.max(0, one.drafted - one.accepted) }, () => html`<i class="r"></i>`)}</li>`)}</ol>`;
}

function Code({ code }) {
  const [language, pick] = useState("");
  let text = "";
  try {
    text = language && code()[language];
  } catch (error) {
    text = `The schema or the tools are not JSON: ${error.message}`;
  }
  return html`<div class="row" role="group" aria-label="This request as code">
      ${["curl", "Python", "Node"].map((one) => html`<button type="button" aria-pressed=${one === language} onClick=${() => pick(one === language ? "" : one)}>${one}</button>`)}
      ${text && html`<button type="button" onClick=${() => navigator.clipboard.writeText(text)}>Copy</button>`}
    </div>${text && html`<pre tabindex="0">${text}</pre>`}`;
}

render(html`<${App} />`, document.getElementById("app"));
