// Quality against cost of an evaluation: each point sets a column's controls.

import { html, useState } from "./vendor/htm-preact.js";

const COSTS = { expert_passes: "expert passes of an answer", latency: "latency, modelled, of the expert's alone" };
const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 320, 48, 36];
const [TOP, RIGHT] = [28, WIDTH - 16];
const SHAPES = [
  "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "M-5-5H5V5H-5Z", "M0-6 6 5H-6Z", "M0-7 6 0 0 7-6 0Z", "M0 6 6-5H-6Z",
  "M-6-2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z",
];

const shapeOf = (number) => SHAPES[number % SHAPES.length];
const hueOf = (number) => `hue${(number + Math.floor(number / SHAPES.length)) % SHAPES.length}`;
const rounded = (value, digits) => Number(value).toFixed(digits);

export function Curve({ found, columns, set }) {
  const [cost, measure] = useState("expert_passes");
  const [temperature, warm] = useState(found.points[0].temperature);
  const [target, aim] = useState(columns - 1);
  const [at, move] = useState(0);
  const [told, tell] = useState("");
  const points = found.points
    .filter((one) => one.temperature === temperature && one[cost] && one.quality)
    .sort((a, b) => a.curve.localeCompare(b.curve) || a[cost].value - b[cost].value);
  const column = Math.min(target, columns - 1);
  const focus = Math.min(at, points.length - 1);
  const curves = [...new Set(points.map((one) => one.curve))];
  const [x, y] = [scale(points.map((one) => one[cost].value), LEFT, RIGHT, true), scale(points.map((one) => one.quality.value), HEIGHT - BOTTOM, TOP)];
  const place = (one) => [x.of(one[cost].value), y.of(one.quality.value)];
  const label = (one) => `${one.name}: quality ${rounded(one.quality.value, 1)} [${rounded(one.quality.low, 1)}, ${rounded(one.quality.high, 1)}], ${rounded(one[cost].value, 2)} ${COSTS[cost]}`;
  function choose(one) {
    set(column, one);
    tell(`${one.name} is in column ${column + 1}.`);
  }
  function keys(event) {
    const to = { ArrowRight: focus + 1, ArrowLeft: focus - 1, ArrowDown: focus + 1, ArrowUp: focus - 1, Home: 0, End: points.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(points[focus]);
    else if (to === undefined) return;
    event.preventDefault();
    if (to === undefined) return;
    const next = Math.min(Math.max(to, 0), points.length - 1);
    move(next);
    event.currentTarget.querySelectorAll("[data-point]")[next].focus();
  }
  const options = (values, shown = String) => values.map((one) => html`<option value=${one}>${shown(one)}</option>`);
  const temperatures = [...new Set(found.points.map((one) => one.temperature))];
  return html`<section class="curve" aria-label="Quality against cost">
    <h2>Quality against cost</h2>
    <p class="quiet">An evaluation of ${found.items} items${found.workload ? ` of ${found.workload}` : ""}. A point, chosen by click or with the arrow keys and Enter, sets a column.</p>
    <div class="row">
      <div><label for="cost">Cost</label><select id="cost" value=${cost} onChange=${(event) => measure(event.target.value)}>${options(Object.keys(COSTS), (one) => COSTS[one])}</select></div>
      ${temperatures.length > 1 && html`<div><label for="measured">Temperature</label><select id="measured" value=${temperature} onChange=${(event) => warm(Number(event.target.value))}>${options(temperatures)}</select></div>`}
      <div><label for="target">Sets column</label><select id="target" value=${column} onChange=${(event) => aim(Number(event.target.value))}>${options([...Array(columns).keys()], (one) => one + 1)}</select></div>
    </div>
    <div class="plot"><svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="group" aria-label=${`Quality by ${COSTS[cost]}`} onKeyDown=${keys}>
      ${x.ticks.map((one) => html`<g class="tick"><path d=${`M${x.of(one)} ${TOP}V${HEIGHT - BOTTOM}`} /><text x=${x.of(one)} y=${HEIGHT - BOTTOM + 16} text-anchor="middle">${one}</text></g>`)}
      ${y.ticks.map((one) => html`<g class="tick"><path d=${`M${LEFT} ${y.of(one)}H${RIGHT}`} /><text x=${LEFT - 6} y=${y.of(one) + 4} text-anchor="end">${one}</text></g>`)}
      <text class="axis" x=${(LEFT + RIGHT) / 2} y=${HEIGHT - 4} text-anchor="middle">${COSTS[cost]}</text>
      <text class="axis" x=${LEFT - 40} y="10">quality</text>
      ${curves.map((curve, number) => html`<path class=${`line ${hueOf(number)}`}
        d=${points.filter((one) => one.curve === curve).map((one, i) => `${i ? "L" : "M"}${place(one).join(" ")}`).join("")} />`)}
      ${points.map((one, i) => html`<path class=${`point ${hueOf(curves.indexOf(one.curve))}`} d=${shapeOf(curves.indexOf(one.curve))}
        transform=${`translate(${place(one).join(" ")})`} data-point=${one.name} role="button" aria-label=${label(one)} tabindex=${i === focus ? 0 : -1}
        onFocus=${() => move(i)} onMouseOver=${() => move(i)} onClick=${() => choose(one)} />`)}
      ${points[focus] && html`<text class="name" aria-hidden="true" x=${place(points[focus])[0]} y=${place(points[focus])[1] - 10}
        text-anchor=${place(points[focus])[0] > WIDTH / 2 ? "end" : "start"}>${points[focus].name}</text>`}
    </svg></div>
    <ul class="legend" aria-label="Curves">${curves.map((curve, number) => html`<li class=${hueOf(number)}>
      <svg viewBox="-8 -8 16 16" aria-hidden="true"><path d=${shapeOf(number)} /></svg> <span>${curve}</span></li>`)}</ul>
    <p data-figure="point">${points[focus] ? label(points[focus]) : "No point has this cost."}</p>
    <p role="status" class="quiet">${told}</p>
  </section>`;
}

// Maps values to places, from the first to the second, with round ticks.
function scale(values, from, to, zero = false) {
  const [least, most] = [zero ? 0 : Math.min(...values), Math.max(...values)];
  const span = most - least || 1;
  const power = 10 ** Math.floor(Math.log10(span / 4));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= span / 5);
  const [low, high] = [Math.floor(least / step) * step, Math.ceil((least + span) / step) * step];
  const ticks = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, i) => Number((low + i * step).toPrecision(6)));
  return { ticks, of: (value) => Number((from + ((value - low) / (high - low)) * (to - from)).toFixed(1)) };
}
