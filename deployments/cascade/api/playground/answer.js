// One answer: its tokens, what it cost, its rounds, and one token looked at closely.

import { Component, html, useLayoutEffect, useRef } from "./vendor/htm-preact.js";
import { ORIGINS } from "./api.js";

const BLOCK = 48; // about so many tokens are laid out and painted together
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufefc]/;
const FIGURES_MS = 100; // between two drawings of the figures while an answer comes
const DRAWN_ROUNDS = 400; // the last ones, if there are more

export const IDLE = { tokens: [], starts: [0], count: 0, trace: [], usage: null, state: "idle", error: "", began: 0, ended: 0 };

// Draws again only if one of the properties is another than before.
export const memo = (Drawn) =>
  class extends Component {
    shouldComponentUpdate(next) {
      return Object.keys({ ...this.props, ...next }).some((name) => this.props[name] !== next[name]);
    }
    render(props) {
      return html`<${Drawn} ...${props} />`;
    }
  };

// The lists of tokens and of blocks' starts grow in place: `count` says how far an answer goes.
export function merged(answer, { tokens = [], trace, usage }) {
  for (const token of tokens) {
    if (opensBlock(answer, token)) answer.starts.push(answer.tokens.length);
    answer.tokens.push(token);
  }
  return { ...answer, count: answer.tokens.length, trace: trace ?? answer.trace, usage: usage ?? answer.usage };
}

// Blocks change no line: one opens after a newline, or before a word, which then goes on in the line before.
function opensBlock({ tokens, starts }, { text }) {
  if (tokens.length - starts.at(-1) < BLOCK) return false;
  const before = tokens.at(-1).text;
  return before.endsWith("\n") || (before !== "" && /^\s/.test(text) && !RIGHT_TO_LEFT.test(before + text));
}

// Moves each block's first line to where the block before it ends.
function join(blocks, from) {
  for (let i = from; i < blocks.length; i++) {
    const last = blocks[i - 1].lastElementChild;
    const goesOn = !last.textContent.endsWith("\n");
    const indent = goesOn ? [...last.getClientRects()].at(-1).right - blocks[i].getBoundingClientRect().left : 0;
    blocks[i].classList.toggle("joined", goesOn);
    blocks[i].style.textIndent = `${indent}px`;
  }
}

// Copies text as it is, without a line break between blocks.
function copy(event) {
  event.clipboardData.setData("text/plain", getSelection().getRangeAt(0).cloneContents().textContent);
  event.preventDefault();
}

const Block = memo(({ tokens, from, to, chosen }) =>
  html`<div>${tokens.slice(from, to).map((token, i) => html`<span class=${`token ${token.origin}${from + i === chosen ? " chosen" : ""}`}
    data-origin=${token.origin} data-token=${from + i}>${token.text}</span>`)}</div>`);

export function Answer({ answer, chosen, choose, name }) {
  const { tokens, starts, count, state } = answer;
  const node = useRef(null);
  const opened = starts.filter((from) => from < count || !from);
  useLayoutEffect(() => join(node.current.children, Math.max(1, opened.length - 1)), [answer.began, opened.length]);
  useLayoutEffect(() => {
    const watcher = new ResizeObserver(() => join(node.current.children, 1));
    watcher.observe(node.current);
    return () => watcher.disconnect();
  }, []);
  function move(event) {
    const to = { ArrowRight: (chosen ?? -1) + 1, ArrowLeft: (chosen ?? 1) - 1, Home: 0, End: count - 1 }[event.key];
    if (to === undefined || !count) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), count - 1));
  }
  const point = (event) => event.target.dataset.token && choose(Number(event.target.dataset.token));
  const blocks = opened.map((from, i) => {
    const to = opened[i + 1] ?? count;
    return html`<${Block} key=${from} tokens=${tokens} from=${from} to=${to} chosen=${chosen >= from && chosen < to ? chosen : null} />`;
  });
  return html`<div class="answer" ref=${node} onCopy=${copy} tabindex="0" role="group" aria-label=${`Answer of ${name}`} aria-busy=${state === "running"}
    onKeyDown=${move} onMouseOver=${point} onClick=${point}>${blocks}</div>`;
}

// Both models' probabilities by token; null if a model said nothing here.
function views({ by, known, draft, text }) {
  const all = (one) => one && new Map([...one.top_logprobs, one].map((other) => [other.token, other.logprob]));
  const own = known && known.logprob !== null ? all({ ...known, token: text }) : null;
  return by === "d" ? { expert: null, drafter: own } : { expert: own, drafter: all(draft) };
}

function share(view, token) {
  if (!view) return "not asked";
  const percent = (logprob) => {
    const value = 100 * Math.exp(logprob);
    return `${value < 1 ? Number(value.toPrecision(2)) : value.toFixed(1)} %`;
  };
  return view.has(token) ? percent(view.get(token)) : `below ${percent(Math.min(...view.values()))}`;
}

function decision({ text, origin, draft }) {
  const [name, about] = ORIGINS[origin] ?? ["", ""];
  if (origin !== "e") return [name, about];
  if (!draft) return [name, "The expert wrote it; nothing was drafted here."];
  if (draft.token === text) return [name, "The expert wrote it, where the drafter had proposed the same."];
  return [name, `The drafter proposed ${JSON.stringify(draft.token)}; the rule rejected that, and the expert wrote this.`];
}

export function Token({ token }) {
  const { expert, drafter } = views(token);
  const rank = (view, name) => view?.get(name) ?? -Infinity;
  const proposed = token.draft && token.draft.token !== token.text ? [token.draft.token] : [];
  const others = [...new Set([...(expert?.keys() ?? []), ...(drafter?.keys() ?? [])])]
    .filter((name) => name !== token.text && name !== proposed[0])
    .sort((a, b) => rank(expert, b) - rank(expert, a) || rank(drafter, b) - rank(drafter, a))
    .slice(0, 5);
  const [name, about] = decision(token);
  return html`
    <p><strong>${JSON.stringify(token.text)}</strong> <span data-figure="decision">${name}</span>. ${about}</p>
    <table><thead><tr><th scope="col">probability</th><th scope="col">expert</th><th scope="col">drafter</th></tr></thead>
      <tbody>${[token.text, ...proposed, ...others].map((other) => html`
        <tr data-token=${other}><th scope="row">${JSON.stringify(other)}${other === proposed[0] ? " (proposed)" : ""}</th>
          <td data-figure="expert">${share(expert, other)}</td><td data-figure="drafter">${share(drafter, other)}</td></tr>`)}
      </tbody></table>`;
}

// What an answer has cost so far.
export class Figures extends Component {
  shouldComponentUpdate({ answer }) {
    return answer.state !== "running" || performance.now() - this.drawn >= FIGURES_MS;
  }
  render({ answer }) {
    this.drawn = performance.now();
    return figures(answer);
  }
}

function figures(answer) {
  const { usage, count, state } = answer;
  if (state === "idle") return null;
  const seconds = ((answer.ended || performance.now()) - answer.began) / 1000;
  const cascade = usage?.cascade;
  const cost = cascade?.cost;
  const rows = [
    ["tokens", count],
    ["tokens a second", seconds > 0 ? (count / seconds).toFixed(1) : ""],
    ["seconds", seconds.toFixed(2)],
    ["expert passes", cascade?.expert_passes ?? ""],
    ["drafter passes", cascade?.drafter_passes ?? ""],
    ["drafted and accepted", cascade ? `${cascade.accepted} of ${cascade.drafted}` : ""],
    ["expert seconds", cost ? cost.expert.seconds.toFixed(3) : ""],
    ["drafter seconds", cost ? cost.drafter.seconds.toFixed(3) : ""],
    ...(cost?.price != null ? [["price", cost.price.toPrecision(3)]] : []),
    ["divergence from the expert", cascade ? (cascade.divergence?.toFixed(2) ?? "not known") : ""],
  ];
  return html`<table class="figures"><tbody>${rows.map(([name, value]) => html`<tr><th scope="row">${name}</th><td data-figure=${name}>${value}</td></tr>`)}</tbody></table>`;
}

const label = (one) =>
  `${one.drafted} drafted, ${one.accepted} accepted, ${one.tokens} tokens; ${one.draft_ms.toFixed(1)} ms for the draft, ${one.judge_ms.toFixed(1)} ms for the verdict` +
  (one.undrafted ? `; no draft: ${one.undrafted}` : "");

export const Rounds = memo(({ trace }) => {
  if (!trace.length) return null;
  const shown = trace.slice(-DRAWN_ROUNDS);
  const sum = (name) => shown.reduce((all, one) => all + one[name], 0);
  const [draft, judge] = [sum("draft_ms"), sum("judge_ms")];
  let at = 0;
  const lanes = shown.map((one) => {
    const from = at;
    at += one.draft_ms + one.judge_ms;
    return html`<g data-round><title>${label(one)}</title>
      <rect class="d" x=${from} y="0" width=${one.draft_ms} height="10" /><rect class="e" x=${from + one.draft_ms} y="12" width=${one.judge_ms} height="10" /></g>`;
  });
  const said = `${shown.length} ${shown.length === 1 ? "round" : "rounds"}: ${draft.toFixed(0)} ms of waiting for drafts, ${judge.toFixed(0)} ms for verdicts`;
  return html`<p class="quiet">Rounds: filled is accepted, hatched rejected, hollow the expert's</p>
    <ol class="rounds" aria-label="Rounds">${shown.map((one) => html`<li title=${label(one)} aria-label=${label(one)}>
      ${Array.from({ length: one.accepted }, () => html`<i class="a"></i>`)}
      ${Array.from({ length: Math.max(0, one.tokens - one.accepted) }, () => html`<i class="e"></i>`)}
      ${Array.from({ length: Math.max(0, one.drafted - one.accepted) }, () => html`<i class="r"></i>`)}</li>`)}</ol>
    <p class="quiet">${said} (above: the draft, below: the verdict)</p>
    <svg class="timeline" role="img" aria-label=${said} viewBox=${`0 0 ${at} 22`} preserveAspectRatio="none">${lanes}</svg>`;
});
