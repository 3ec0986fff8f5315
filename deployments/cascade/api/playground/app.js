// The playground: one question under several settings, side by side.

import { html, render, useCallback, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { Answer, Figures, IDLE, memo, merged, Rounds, Token } from "./answer.js";
import { ask, body, evaluation, models, ORIGINS } from "./api.js";
import { Code, snippets } from "./code.js";
import { Curve } from "./curve.js";
import { changed, columnOf, dialOf, isBounded, isRuled, MODES, PRESETS, RULES, titleOf, TOUR } from "./rules.js";

const MOST = 4; // columns
const REST_MS = 20; // from a drawing to the request for a frame of the next: two frames of most screens
const TYPED_MS = 300; // without a key press, after which an API key counts as typed

// The answers of all columns. What streams add is drawn for all together, with a rest after each drawing:
// if every frame brought something new, a browser that is late once would stay so.
function useAnswers(count) {
  const [answers, show] = useState(() => Array.from({ length: count }, () => IDLE));
  const latest = useRef(answers);
  const waiting = useRef([]);
  const scheduled = useRef(false);
  const set = useCallback((next) => show((latest.current = next)), []);
  const draw = useCallback(() => {
    const next = [...latest.current];
    for (const [at, made] of waiting.current.splice(0)) if (next[at]) next[at] = made(next[at]);
    set(next);
    setTimeout(() => {
      scheduled.current = waiting.current.length > 0;
      if (scheduled.current) requestAnimationFrame(draw);
    }, REST_MS);
  }, []);
  const put = useCallback((i, change) => {
    waiting.current.push([i, change]);
    if (scheduled.current) return;
    scheduled.current = true;
    requestAnimationFrame(draw);
  }, []);
  return [answers, set, put];
}

function App() {
  const [known, setKnown] = useState({ names: [], error: "" });
  const [found, setFound] = useState(null);
  const [key, setKey] = useState("");
  const [shared, setShared] = useState({ kind: "chat", question: "Who is Buzz Aldrin?", schema: "", tools: "" });
  const [columns, setColumns] = useState([PRESETS[0], PRESETS[2]]);
  const [answers, setAnswers, put] = useAnswers(columns.length);
  const stopping = useRef(null);

  useEffect(() => {
    const timer = setTimeout(() => {
      models(key).then((names) => setKnown({ names, error: "" })).catch((error) => setKnown({ names: [], error: error.message }));
      evaluation(key).then(setFound).catch(() => setFound(null)); // the models' error says it already
    }, key && TYPED_MS);
    return () => clearTimeout(timer);
  }, [key]);

  const running = answers.some((one) => one.state === "running");
  const request = (column, stream) => body({ model: known.names[0], ...shared }, column, stream);
  const make = useRef(null); // what the code of a column is made of, as it is now
  make.current = (column) => snippets(shared.kind, request(column, false), location.origin, key !== "");

  async function run(column, i) {
    const end = (change) => put(i, (one) => ({ ...one, ...change, ended: performance.now() }));
    try {
      await ask(shared.kind, request(column, true), key, stopping.current.signal, (part) => put(i, (one) => merged(one, part)));
      end({ state: "done" });
    } catch (error) {
      end(error.name === "AbortError" ? { state: "stopped" } : { state: "failed", error: error.message });
    }
  }

  function start(event) {
    event.preventDefault();
    stopping.current = new AbortController();
    const began = performance.now();
    setAnswers(columns.map(() => ({ ...IDLE, tokens: [], starts: [0], state: "running", began })));
    columns.forEach(run);
  }

  const change = useCallback((i, field, value) => setColumns((all) => all.map((one, j) => (i === j ? changed(one, field, value) : one))), []);
  const remove = (i) => {
    setColumns(columns.filter((_, j) => j !== i));
    setAnswers(answers.filter((_, j) => j !== i));
  };
  const removed = useRef(null);
  removed.current = remove;
  const drop = useCallback((i) => removed.current(i), []);

  function add() {
    setColumns([...columns, PRESETS.find((one) => !columns.some((other) => other.mode === one.mode)) ?? PRESETS[2]]);
    setAnswers([...answers, IDLE]);
  }

  function tour() {
    setShared((one) => ({ ...one, kind: "chat", question: "Who is Buzz Aldrin?" }));
    setColumns(TOUR);
    setAnswers(TOUR.map(() => IDLE));
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
            <input id="key" type="password" autocomplete="off" value=${key} onInput=${(event) => setKey(event.target.value)} /></div>
          <button class="main" type="submit" disabled=${running || !known.names.length}>Ask</button>
          <button type="button" data-action="stop" disabled=${!running} onClick=${() => stopping.current.abort()}>Stop</button>
          <button type="button" data-action="add" disabled=${running || columns.length >= MOST} onClick=${add}>Compare with another</button>
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
            change=${change} drop=${columns.length > 1 ? drop : null} make=${make} shared=${shared} hasKey=${key !== ""} />`)}
      </div>
      ${found && html`<${Evaluated} found=${found} columns=${columns.length} setColumns=${setColumns} />`}
    </main>`;
}

const Legend = memo(() => html`<p class="quiet" aria-label="Legend">
  ${Object.entries(ORIGINS).map(([origin, [name, about]]) => html`<span class=${`token ${origin}`} title=${about}>${name}</span>${" "}`)}
  Hover over a word, or move to an answer with Tab and through it with the arrow keys.
</p>`);

const Evaluated = memo(({ found, columns, setColumns }) => html`<${Curve} found=${found} columns=${columns}
  set=${(i, point) => setColumns((all) => all.map((one, j) => (i === j ? { ...columnOf(point), seed: one.seed, max_tokens: one.max_tokens } : one)))} />`);

const Column = memo(({ index, column, answer, running, change, drop, make }) => {
  const [chosen, choose] = useState(null);
  useEffect(() => choose(null), [answer.began]);
  const token = chosen < answer.count ? answer.tokens[chosen] : null;
  const name = titleOf(column);
  return html`
    <section class="column" data-column=${index} data-state=${answer.state} aria-label=${name}>
      <header><h2>${name}</h2>
        ${drop && html`<button type="button" aria-label=${`Remove ${name}`} disabled=${running} onClick=${() => drop(index)}>×</button>`}</header>
      ${column.about && html`<p class="quiet">${column.about}</p>`}
      <${Settings} index=${index} column=${column} change=${change} />
      <${Figures} answer=${answer} />
      <${Answer} answer=${answer} chosen=${chosen} choose=${choose} name=${name} />
      ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
      <div class="details" aria-live="polite">${token ? html`<${Token} token=${token} />` : html`<span class="quiet">No word is chosen</span>`}</div>
      <${Rounds} trace=${answer.trace} />
      <${Code} make=${() => make.current(column)} />
    </section>`;
});

const Settings = memo(({ index, column, change }) => {
  const field = (name) => ({ id: `${name}-${index}`, value: column[name], onChange: (event) => change(index, name, event.target.value) });
  const chooser = (name, label, options) => html`<div><label for=${`${name}-${index}`}>${label}</label>
    <select ...${field(name)}>${options.map((one) => html`<option value=${one}>${one || "default"}</option>`)}</select></div>`;
  const number = (name, label, more) => html`<div><label for=${`${name}-${index}`}>${label}</label><input type="number" ...${field(name)} ...${more} /></div>`;
  const dial = dialOf(column);
  return html`
    <div class="row">
      ${chooser("mode", "Mode", MODES)}
      ${isRuled(column) && chooser("rule", "Rule", Object.keys(RULES))}
    </div>
    ${dial && html`<div><label for=${`alpha-${index}`}>${dial.field ?? "alpha"} ${column.alpha}: further right, more of the ${dial.expert ? "expert" : "drafter"}</label>
      <input type="range" min=${dial.min} max=${dial.max} step="0.01" ...${field("alpha")} onInput=${(event) => change(index, "alpha", event.target.value)} /></div>`}
    <details><summary class="quiet">More settings</summary>
      <div class="row">
        ${number("temperature", "Temperature", { min: 0, max: 2, step: 0.1 })}
        ${number("draft_tokens", "Draft length", { min: 0, max: 32, placeholder: "auto" })}
        ${number("max_tokens", "Most tokens", { min: 1 })}
        ${number("seed", "Seed", { placeholder: "none" })}
        ${chooser("coupling", "Coupling", ["", "maximal", "gumbel"])}
        ${isBounded(column) && number("divergence_budget", "Divergence budget", { min: 0, step: "any", placeholder: "any" })}
      </div></details>`;
});

render(html`<${App} />`, document.getElementById("app"));
