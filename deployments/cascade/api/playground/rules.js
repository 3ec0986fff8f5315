// The settings of a column: modes, rules and their dials, and what of a request they make.

export const MODES = ["cascade", "speculative", "expert_only", "drafter_only", "token_cascade", "sequence_cascade"];

// Bounds of each dial; `expert` where more of it is more of the expert.
export const RULES = {
  lossless: null,
  token_v3: { min: 0, max: 1 },
  token_v2: { min: -1, max: 1 },
  token_v1: { min: -1, max: 1 },
  chow: { min: 0, max: 1 },
  diff: { min: -1, max: 1 },
  opt: { min: -1, max: 1 },
  chow_log: { min: 0, max: 4 },
  diff_log: { min: -4, max: 4 },
  opt_log: { min: -4, max: 4 },
  bild: { min: 0, max: 8 },
  fuzzy: { min: 0, max: 0.7 },
  lossy: { min: 0, max: 0.99 },
  ensemble: { min: 0, max: 1, field: "weight", expert: true },
  typical: { min: 0.01, max: 1, field: "epsilon", expert: true },
};

const BASE = { rule: "lossless", alpha: 0.9, temperature: 0, draft_tokens: "", coupling: "", divergence_budget: "", seed: "", max_tokens: 64 };

export const PRESETS = [
  { mode: "expert_only" },
  { mode: "speculative" },
  { mode: "cascade", rule: "token_v3" },
  { mode: "drafter_only" },
].map((one) => ({ ...BASE, ...one }));

export const TOUR = [
  { mode: "sequence_cascade", threshold: -100, title: "1. A cascade that trusts the small model",
    about: "The small model is sure enough, so its whole answer stays. Cheap, and never better than the small model." },
  { mode: "sequence_cascade", threshold: 0, title: "2. A cascade that defers",
    about: "It is not sure enough: its whole answer is thrown away, and the large model starts from scratch." },
  { mode: "speculative", draft_tokens: 5, title: "3. Speculative decoding",
    about: "The large model checks drafted words in one pass, and refuses good ones because they are not its own." },
  { mode: "cascade", rule: "token_v3", draft_tokens: 5, title: "4. A speculative cascade",
    about: "The same pass, and a rule that keeps words which are good enough." },
].map((one) => ({ ...BASE, ...one }));

const NAMES = {
  expert_only: "Expert alone",
  drafter_only: "Drafter alone",
  token_cascade: "Token cascade",
  sequence_cascade: "Sequence cascade",
};

export const isRuled = ({ mode }) => ["cascade", "speculative", "token_cascade"].includes(mode);
// Whether an expert verifies every token, so that a divergence budget can hold.
export const isBounded = ({ mode }) => ["cascade", "speculative"].includes(mode);
export const dialOf = (column) => (isRuled(column) ? RULES[column.rule] : null);

export function titleOf(column) {
  const { mode, rule, alpha, title } = column;
  if (title) return title;
  if (NAMES[mode] && mode !== "token_cascade") return NAMES[mode];
  if (rule === "lossless") return "Speculative decoding, lossless";
  return `${NAMES[mode] ?? "Speculative cascade"}, ${rule} ${alpha}`;
}

// What a column had beside its controls, which a change of mode or rule ends.
const UNSEEN = { title: undefined, about: undefined, threshold: undefined, beta: undefined, bonus: undefined };

export function changed(column, field, value) {
  const own = field === "mode" || field === "rule" ? UNSEEN : {};
  const next = { ...column, ...own, [field]: value };
  const dial = dialOf(next);
  if (dial) next.alpha = Math.min(Math.max(Number(next.alpha), dial.min), dial.max);
  return next;
}

export function ruleOf({ rule: kind, alpha, beta }) {
  const dial = RULES[kind];
  return dial ? { kind, [dial.field ?? "alpha"]: Number(alpha), ...(beta ? { beta } : {}) } : { kind };
}

// A point of an evaluation as a column.
export function columnOf({ curve, dial, temperature, draft_tokens, bonus }) {
  const common = { ...BASE, temperature, draft_tokens: draft_tokens ?? "", bonus: bonus ?? undefined };
  if (curve === "sequence_cascade") return { ...common, mode: curve, threshold: dial, title: `Sequence cascade, ${dial}` };
  if (curve === "token_cascade") return { ...common, mode: curve, rule: "chow", alpha: dial };
  if (curve in NAMES) return { ...common, mode: curve };
  if (curve === "lossless") return { ...common, mode: "speculative" };
  if (curve.startsWith("lossy")) return { ...common, mode: "speculative", rule: "lossy", alpha: dial, beta: curve === "lossy" ? "one" : "solved" };
  return { ...common, mode: "cascade", rule: curve, alpha: dial };
}

export function cascadeOf(column) {
  const cascade = { mode: column.mode, trace: true };
  if (isRuled(column)) cascade.rule = ruleOf(column);
  if (column.draft_tokens !== "") cascade.draft_tokens = Number(column.draft_tokens);
  if (column.threshold !== undefined) cascade.patience = { threshold: column.threshold };
  if (column.coupling) cascade.coupling = column.coupling;
  if (column.bonus) cascade.bonus = column.bonus;
  if (column.divergence_budget !== "" && isBounded(column)) cascade.divergence_budget = Number(column.divergence_budget);
  return cascade;
}
