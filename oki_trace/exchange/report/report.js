"use strict";
// Draws the report from the data in the page. Text from models and users is only set as
// textContent, as a title, or drawn on the canvas.
// at.step is a step of the reply; below 0 it is a token of its prompt, -1 the last one.
const trace = JSON.parse(document.getElementById("data").textContent);
const at = { reply: -1, step: 0, colour: "surprisal", layer: null };
const SHORT = { " ": "␣", "\n": "⏎", "\t": "⇥" };
const GIVEN = "Given: this token is part of the text that the model read, and the model did not choose it. " +
  "The numbers say how likely it was after the text before it.";
// The lists of tokens: {reply, steps, words, under, choice}; ``words`` has a token for each of ``steps``.
const groups = [];
const COLOURS = ["surprisal", "entropy", "settle layer"];
const byId = (id) => document.getElementById(id);

function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

function fill(node, ...children) {
  node.replaceChildren(...children);
  return node;
}

// A token by itself: spaces, line ends and invisible characters become visible signs.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zs}\p{Zl}\p{Zp}]/gu, (c) =>
    SHORT[c] ?? `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`) || "∅";
}

const tokenText = (number) => visible(trace.tokens[number][1]);
// A negative number that is rounded to zero loses its sign.
const unsigned = (text) => Number(text) === 0 ? text.replace("-", "") : text;
const figure = (value, digits, unit = "") => value === null ? "–" : unsigned(value.toFixed(digits)) + unit;
const running = (text) => text.replaceAll("\n", "⏎\n");
const rankText = (rank) => rank ? `#${rank.toLocaleString("en")}` : "–";

// ------------------------------------------------------------------ conversation

function drawTalk() {
  byId("title").textContent = trace.title || "Untitled";
  const models = [...new Set(trace.replies.map((r) => r.facts[0][1]))];
  const steps = trace.replies.reduce((sum, r) => sum + r.steps.length + r.given.length, 0);
  byId("about").textContent = [...models, trace.created, `${steps.toLocaleString("en")} tokens traced`].join(" · ");
  byId("foot").textContent = `Written by oki-trace ${trace.version}. This file contains all of its data and makes no requests. ` +
    "prob is the model's own probability, before any sampling setting; surprisal and entropy are in nats. " +
    "The Logit Lens shows what the model would predict if a layer were the last; predictions of early layers are often meaningless. Attention shows where the model looked, not why.";
  const nodes = trace.messages.map((message) => {
    if (message.reply !== undefined) return drawReply(trace.replies[message.reply], message.reply, message.place);
    const bubble = make("div", `bubble ${message.role}`);
    if (message.place) bubble.append(make("span", "who", message.place));
    if (message.role !== "user") bubble.append(make("span", "who", message.who));
    if (message.given) bubble.append(...drawGiven(...message.given));
    else bubble.append(message.content);
    if (message.note) bubble.append(make("span", "who bad", message.note));
    return bubble;
  });
  fill(byId("talk"), ...nodes);
}

function drawReply(reply, index, place) {
  const root = make("div", "reply");
  if (place) root.append(make("span", "who", place));
  if (reply.scored) root.append(...drawGiven(index, ...reply.scored));
  else root.append(...drawSteps(reply, index));
  const details = make("details");
  const facts = make("dl", "facts");
  for (const [name, value] of reply.facts) facts.append(make("dt", "", name), make("dd", "", value));
  details.append(make("summary", "", reply.scored ? "About this score" : "About this reply"), facts);
  root.append(details);
  return root;
}

function drawSteps(reply, index) {
  const words = listOf("Tokens of the reply", index);
  // The tokens before a fork are those of another reply.
  if (reply.prefix) words.append(make("span", "prefix", running(reply.prefix)));
  reply.steps.forEach((step, number) => {
    const node = drawToken(reply, step, number);
    const part = reply.parts.find(([, from, to]) => number >= from && number < to);
    if (part) node.classList.add(part[0]);
    words.append(node);
  });
  const thinking = words.querySelectorAll(".thinking").length;
  const fold = thinking && thinking < reply.steps.length ? [folding(words, thinking)] : [];
  const status = make("span", reply.bad ? "status bad" : "status", `${reply.status} · ${reply.steps.length} tokens`);
  return [...fold, words, drawUnder(reply, reply.steps, words, status, true)];
}

// Tokens that the model was given, at the positions from start up to end of a reply's prompt.
function drawGiven(index, start, end) {
  const reply = trace.replies[index];
  const words = listOf("Tokens of a message", index);
  const steps = [];
  for (let position = start; position < end; position += 1) {
    const step = stepOf(reply, position - reply.promptLen);
    if (step) {
      steps.push(step);
      words.append(drawToken(reply, step, position - reply.promptLen));
    } else words.append(make("span", "", running(trace.tokens[reply.prompt[position]][1])));
  }
  const nats = steps.reduce((sum, step) => sum + (step.surprisal ?? NaN), 0);
  const perplexity = Math.exp(nats / steps.length);
  const scored = reply.scored?.[0] === start;
  const said = [`${steps.length} ${steps.length === 1 ? "token" : "tokens"} given`];
  if (scored) said.unshift(reply.status);
  if (scored && reply.score) said.push(reply.score);
  else if (Number.isFinite(perplexity)) said.push(`perplexity ${perplexity.toFixed(2)}`);
  const status = make("span", scored && reply.bad ? "status bad" : "status", said.join(" · "));
  return [words, drawUnder(reply, steps, words, status, scored)];
}

function listOf(label, index) {
  const words = make("div", "words");
  words.setAttribute("role", "listbox");
  words.setAttribute("aria-label", label);
  words.onclick = (event) => {
    const node = event.target.closest(".token");
    if (node) choose(index, Number(node.dataset.step));
  };
  return words;
}

function drawToken(reply, step, number) {
  const node = make("span", "token", step.special ? tokenText(step.token) : running(step.run) || "◌");
  if (step.special || !step.run.trim()) node.classList.add("mark");
  node.dataset.step = number;
  node.tabIndex = -1;
  node.setAttribute("role", "option");
  node.title = `${tokenText(step.token)} · prob ${figure(step.prob, 3)} · surprisal ${figure(step.surprisal, 2)} · entropy ${figure(step.entropy, 2)}`;
  (reply.nodes ??= new Map()).set(number, node);
  return node;
}

// The legend of the colours, which are a choice under a reply, and a status.
function drawUnder(reply, steps, words, status, choice) {
  const under = make("div", "under");
  const colours = make("span", "choice");
  for (const name of choice ? COLOURS : []) {
    const button = make("button", "", name);
    button.type = "button";
    button.onclick = () => { at.colour = name; paint(); };
    colours.append(button);
  }
  under.append(...(choice ? [colours] : []), make("span", "legend"), status);
  groups.push({ reply, steps, words, under, choice });
  return under;
}

// The step of a number; undefined for a token of the prompt that was not traced.
function stepOf(reply, number) {
  if (number >= 0) return reply.steps[number];
  reply.byPosition ??= new Map(reply.given.map((step) => [step.position, step]));
  return reply.byPosition.get(number + reply.promptLen);
}

// A shade from 0 to 1 for each step, and the label of the upper end.
function shades(steps, layers) {
  if (at.colour === "settle layer") {
    const top = Math.max(layers, 1);
    return [steps.map((s) => (s.settle ?? null) === null ? 0 : s.settle / top), `layer ${layers}`];
  }
  const values = steps.map((s) => s[at.colour]);
  const top = values.reduce((most, v) => Math.max(most, v ?? 0), 1);
  return [values.map((v) => (v ?? 0) / top), `${top.toFixed(1)} nats`];
}

function paint() {
  for (const { reply, steps, words, under, choice } of groups) {
    const [values, high] = shades(steps, reply.layers);
    words.parentElement.classList.toggle("depth", at.colour === "settle layer");
    words.querySelectorAll(".token").forEach((node, n) => node.style.setProperty("--v", values[n]));
    under.querySelectorAll(".choice button").forEach((button) =>
      button.setAttribute("aria-pressed", String(button.textContent === at.colour)));
    fill(under.querySelector(".legend"), ...(choice ? [] : [`${at.colour} `]), "0", make("span", "ramp"), high);
  }
}

// Folded thinking is hidden, not removed, so that the n-th token stays the n-th step.
function folding(words, count) {
  const button = make("button", "fold");
  button.type = "button";
  words.unfold = (open) => {
    words.classList.toggle("folded", !open);
    button.setAttribute("aria-expanded", String(open));
    button.textContent = `${open ? "▾" : "▸"} Thinking · ${count} tokens`;
  };
  button.onclick = () => words.unfold(words.classList.contains("folded"));
  words.unfold(false);
  return button;
}

// --------------------------------------------------------------------- one step

function choose(reply, step, { focus = false } = {}) {
  const old = document.querySelector(".token.chosen");
  old?.classList.remove("chosen");
  old?.removeAttribute("aria-selected");
  if (old) old.tabIndex = -1;
  const other = at.reply !== reply || (at.step < 0) !== (step < 0);
  at.reply = reply;
  at.step = step;
  // A token of the chat template belongs to no message.
  const node = trace.replies[reply].nodes?.get(step);
  if (node) {
    node.classList.add("chosen");
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    if (node.classList.contains("thinking")) node.parentElement.unfold?.(true);
    if (focus) node.focus();
  }
  history.replaceState(null, "", `#${reply + 1}.${step}`);
  drawPanel();
  layMap(other);
}

function drawPanel() {
  const reply = trace.replies[at.reply];
  const step = stepOf(reply, at.step);
  const where = make("div", "where");
  const place = at.step < 0 ? `position ${step.position} of ${reply.promptLen} in the prompt`
    : `step ${at.step + 1} of ${reply.steps.length} · position ${step.position}`;
  where.append(make("span", "", place), make("span", "", "← →"));
  const numbers = make("dl", "numbers");
  const settled = (step.settle ?? null) === null ? "–" : `layer ${step.settle}`;
  const facts = [["prob", figure(step.prob, 3)], ["rank", step.rank ? String(step.rank) : "–"], ["surprisal", figure(step.surprisal, 2, " nats")],
    ["entropy", figure(step.entropy, 2, " nats")], ["settled", settled]];
  if (step.sampled !== null) facts.splice(1, 0, ["sampled", figure(step.sampled, 3)]);
  for (const [name, value] of facts) {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    numbers.append(pair);
  }
  fill(byId("panel"), where, make("div", "what", tokenText(step.token)), numbers, make("p", "why", step.why ?? GIVEN),
    ...drawBars(step), ...drawEvidence(reply, step), ...drawLens(reply, step));
  const strongest = document.querySelector(".seen .strongest");
  const seen = document.querySelector(".seen");
  if (strongest) seen.scrollTop = strongest.offsetTop - seen.clientHeight * 0.7;
}

function drawBars(step) {
  if (!step.top.length) return [];
  const drawn = step.topSampled !== undefined;
  const bars = make("div", drawn ? "bars drawn" : "bars");
  if (drawn) {
    const head = make("div", "bar head");
    head.append(make("span"), make("span"), make("span", "num", "model"), make("span", "num", "sampled"));
    bars.append(head);
  }
  step.top.forEach((number, k) => {
    const bar = make("div", number === step.token ? "bar picked" : "bar");
    const track = make("div", "track");
    const inner = make("div", "fill");
    inner.style.width = `${(step.topProb[k] ?? 0) * 100}%`;
    track.append(inner);
    bar.append(make("span", "token-text mono", tokenText(number)), track, make("span", "num", figure(step.topProb[k], 3)));
    if (drawn) {
      const after = step.topSampled[k];
      bar.classList.toggle("gone", after === 0);
      bar.append(make("span", "num", after === 0 ? "–" : figure(after, 3)));
    }
    const id = trace.tokens[number][0];
    bar.title = `${tokenText(number)} · rank ${k + 1}${id === null ? "" : ` · id ${id}`} · prob ${step.topProb[k] ?? "unknown"}`;
    bars.append(bar);
  });
  return [make("h2", "", "Candidates"), bars];
}

function drawEvidence(reply, step) {
  if (!step.attention.length) return [make("h2", "", "Evidence"), make("p", "note", reply.provenance)];
  const final = step.attention.at(-1);
  const entry = step.attention.find(([layer]) => layer === at.layer) ?? final;
  const head = make("div", "row");
  const title = make("h2", "", "Evidence");
  head.append(title);
  const named = (layer) => (layer === final[0] ? `final layer (${layer})` : `layer ${layer}`);
  if (step.attention.length > 1) {
    title.append(make("span", "paper", `: ${named(entry[0])}`));
    const pick = make("select");
    pick.setAttribute("aria-label", "Layer of the evidence");
    for (const [layer] of [...step.attention].reverse()) {
      const option = make("option", "", named(layer));
      option.value = layer;
      option.selected = layer === entry[0];
      pick.append(option);
    }
    pick.onchange = () => { at.layer = Number(pick.value) === final[0] ? null : Number(pick.value); drawPanel(); };
    head.append(pick);
  }
  const weights = new Map(entry[1].map((position, n) => [position, entry[2][n] ?? 0]));
  // The first token is an attention sink: the note states its share, the shading omits it.
  const sink = weights.size > 1 ? weights.get(0) ?? 0 : 0;
  const top = Math.max(1, ...[...weights].filter(([p]) => p || weights.size === 1).map(([, w]) => w));
  const seen = make("div", "seen");
  const shown = [...reply.prompt.map((number, n) => [running(trace.tokens[number][1]), reply.segments[n]]),
    ...reply.steps.slice(0, Math.max(at.step, 0)).map((s) => [s.special ? tokenText(s.token) : running(s.run), s.special ? "template" : "reply"])];
  if (at.step < 0) shown.length = step.position;
  let marked = false;
  shown.forEach(([text, kind], position) => {
    if (position === reply.promptLen) seen.append(make("span", "seam"));
    const weight = weights.get(position) ?? 0;
    const value = sink && position === 0 ? 0 : weight / top;
    const piece = make("span", `piece ${kind}`, text || (weight ? "◌" : ""));
    if (value) piece.style.setProperty("--v", value);
    if (value === 1 && !marked) { piece.classList.add("strongest"); marked = true; }
    piece.title = `position ${position} · ${kind} · weight ${(weight / 1000).toFixed(3)}`;
    seen.append(piece);
  });
  const left = sink ? `The first token, which has ${(sink / 10).toFixed(0)} % of the attention, is not shaded. ` : "";
  const most = weights.size === 1 ? "The most attended position is" : `The ${weights.size} most attended positions are`;
  return [head, seen, make("p", "note", `${most} shaded. ${left}Attention shows where the model looked, not why.`)];
}

function drawLens(reply, step) {
  if (!step.lens) return [make("h2", "", "Logit Lens"), make("p", "note", reply.lens ?? "Not computed for this step.")];
  const width = Math.min(3, step.lens[0].length);
  const table = make("table");
  const columns = make("colgroup");
  columns.append(make("col", "layer"), ...Array.from({ length: width }, (_, k) => make("col", k === 2 ? "third" : "")), make("col", "rank"));
  const body = make("tbody");
  for (let layer = step.lens.length - 1; layer >= 0; layer -= 1) {
    const row = make("tr", step.settle === layer ? "settled" : "");
    row.append(make("td", "num dim", String(layer)));
    for (let k = 0; k < width; k += 1) {
      const number = step.lens[layer][k];
      const share = step.lensProb[layer][k];
      const cell = make("td", number === step.token ? "cell picked" : "cell");
      cell.classList.toggle("third", k === 2);
      cell.style.setProperty("--v", (share ?? 0) / 1000);
      cell.title = `layer ${layer}, rank ${k + 1}: ${tokenText(number)}`;
      const pair = make("div", "pair");
      pair.append(make("span", "token-text mono", tokenText(number)), make("span", "num", share === null ? "–" : (share / 1000).toFixed(2)));
      cell.append(pair);
      row.append(cell);
    }
    row.append(make("td", "num dim", rankText(step.lensRank[layer])));
    body.append(row);
  }
  table.append(columns, body);
  return [make("h2", "", "Logit Lens"), table, make("p", "note", "#n is the rank of this token at that layer. The line marks the layer from which it stays on top."),
    ...drawRanks(step)];
}

// The rank of the chosen token through the layers, on a logarithmic scale.
function drawRanks(step) {
  const ranks = step.lensRank;
  if (ranks.length < 2 || ranks.some((rank) => !rank)) return [];
  const top = Math.log(Math.max(10, ...ranks));
  const points = ranks.map((rank, n) => `${(n / (ranks.length - 1)) * 100},${(Math.log(rank) / top) * 100}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const ends = make("div", "ends");
  ends.append(make("span", "", "layer 0"), make("span", "", `log scale: rank 1 at the top, ${Math.max(...ranks).toLocaleString("en")} at the bottom`), make("span", "", `layer ${ranks.length - 1}`));
  return [make("h2", "", "Rank of this token by layer"), svg, ends];
}

// ------------------------------------------------------------------ reply map

const GUTTER = 30, HEAD = 20, ROW = 18, NARROW = 50;
const frame = byId("frame"), canvas = byId("cells");
let columnWidth = NARROW;

// The steps on the map, those of the prompt if one of its tokens is selected, and the index of the
// selected one.
function mapped() {
  const reply = trace.replies[at.reply];
  const steps = at.step < 0 ? reply.given : reply.steps;
  return { reply, steps, selected: at.step < 0 ? steps.indexOf(stepOf(reply, at.step)) : at.step };
}

// The number of the n-th step on the map.
function numberOf(n) {
  const { reply, steps } = mapped();
  return at.step < 0 ? steps[n].position - reply.promptLen : n;
}

function layMap(scroll) {
  const { reply, steps, selected } = mapped();
  const layers = steps.reduce((most, s) => Math.max(most, s.lens?.length ?? 0), 0);
  byId("map").hidden = !layers;
  reply.rows = layers;
  if (!layers) return;
  byId("map-title").textContent = `${at.step < 0 ? "Prompt" : "Reply"} map: the prediction of each layer`;
  const room = frame.clientWidth - GUTTER;
  const paper = matchMedia("print").matches;
  // On a screen the map scrolls; on paper it ends with a whole column.
  const columns = paper ? Math.min(steps.length, Math.floor(room / NARROW)) : steps.length;
  columnWidth = Math.max(NARROW, Math.min(90, room / columns));
  byId("spacer").style.width = `${GUTTER + columnWidth * steps.length}px`;
  const left = selected * columnWidth;
  if (paper) frame.scrollLeft = Math.min(selected - Math.floor(columns / 2), steps.length - columns) * columnWidth;
  else if (scroll || left < frame.scrollLeft || left + columnWidth > frame.scrollLeft + room) frame.scrollLeft = left - room / 2;
  canvas.setAttribute("aria-label", `The most likely token of ${layers} layers at ${steps.length} steps; the Logit Lens table has those of the selected step.`);
  drawMap();
}

// Draws only the visible columns, so a long reply takes no longer than a short one.
function drawMap() {
  if (!trace.replies[at.reply]?.rows) return;
  const { reply, steps, selected } = mapped();
  const width = Math.min(frame.clientWidth, GUTTER + columnWidth * steps.length), height = HEAD + ROW * reply.rows;
  // Printers have a higher resolution than screens.
  const scale = Math.max(window.devicePixelRatio || 1, matchMedia("print").matches ? 4 : 1);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const inks = { text: color("text"), gray: color("gray"), same: color("accent"), other: color("blue") };
  const mono = color("mono");
  pen.textBaseline = "middle";
  const first = Math.max(0, Math.floor(frame.scrollLeft / columnWidth));
  const last = Math.min(steps.length, Math.ceil((frame.scrollLeft + width) / columnWidth));
  // The columns that are fully visible.
  const from = Math.ceil(frame.scrollLeft / columnWidth - 0.05) + 1, to = Math.floor((frame.scrollLeft + width - GUTTER) / columnWidth + 0.05);
  byId("range").textContent = to - from + 1 < steps.length ? `steps ${from} to ${to} of ${steps.length}` : "";
  for (let n = first; n < last; n += 1) {
    const step = steps[n];
    const x = GUTTER + n * columnWidth - frame.scrollLeft;
    write(pen, tokenText(step.token), x, HEAD / 2, inks.text, `600 11px ${mono}`);
    for (let layer = 0; layer < (step.lens?.length ?? 0); layer += 1) {
      const y = HEAD + (reply.rows - 1 - layer) * ROW;
      const number = step.lens[layer][0];
      pen.globalAlpha = ((step.lensProb[layer][0] ?? 0) / 1000) * 0.66;
      pen.fillStyle = number === step.token ? inks.same : inks.other;
      pen.fillRect(x + 0.5, y + 0.5, columnWidth - 1, ROW - 1);
      pen.globalAlpha = 1;
      write(pen, tokenText(number), x, y + ROW / 2, inks.text, `10.5px ${mono}`);
      if (step.settle === layer) outline(pen, x, y, ROW, inks.same);
    }
    if (n === selected) outline(pen, x, 0, height, inks.text);
  }
  pen.clearRect(0, 0, GUTTER, height);
  pen.font = "10.5px system-ui, sans-serif";
  pen.fillStyle = inks.gray;
  pen.textAlign = "right";
  for (let layer = 0; layer < reply.rows; layer += 1) pen.fillText(String(layer), GUTTER - 7, HEAD + (reply.rows - 1 - layer) * ROW + ROW / 2);
}

function write(pen, text, x, y, ink, font) {
  pen.save();
  pen.beginPath();
  pen.rect(x + 2, y - ROW / 2, columnWidth - 4, ROW);
  pen.clip();
  pen.font = font;
  pen.fillStyle = ink;
  const short = text.slice(0, 40);
  const room = columnWidth - 6;
  const wide = pen.measureText(short).width > room;
  pen.textAlign = wide ? "left" : "center";
  pen.fillText(short, wide ? x + 3 : x + columnWidth / 2, y + 0.5);
  pen.restore();
}

function outline(pen, x, y, height, ink) {
  pen.strokeStyle = ink;
  pen.lineWidth = 1.5;
  pen.strokeRect(x + 1, y + 1, columnWidth - 2, height - 2);
}

// The step below the pointer, its number, and the layer, which is null in the head.
function cellAt(event) {
  const { reply, steps } = mapped();
  const box = canvas.getBoundingClientRect();
  const n = Math.floor((event.clientX - box.left - GUTTER + frame.scrollLeft) / columnWidth);
  const row = Math.floor((event.clientY - box.top - HEAD) / ROW);
  if (event.clientX - box.left < GUTTER || !(n in steps)) return null;
  return { step: steps[n], number: numberOf(n), layer: row < 0 ? null : reply.rows - 1 - row };
}

canvas.onclick = (event) => {
  const cell = cellAt(event);
  if (cell) choose(at.reply, cell.number);
};
canvas.onmousemove = (event) => {
  const { step, number, layer } = cellAt(event) ?? {};
  const row = step?.lens?.[layer];
  const where = number < 0 ? `position ${step.position}` : `step ${number}`;
  canvas.title = row ? `layer ${layer}, ${where}: ${tokenText(row[0])} ${((step.lensProb[layer][0] ?? 0) / 1000).toFixed(3)}\n` +
    `this token, ${tokenText(step.token)}: rank ${rankText(step.lensRank[layer])}` : step ? tokenText(step.token) : "";
};
frame.onscroll = drawMap;

// ----------------------------------------------------------------------- begin

document.addEventListener("keydown", (event) => {
  if (at.reply < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target instanceof Element && event.target.closest("select, input")) return;
  const { reply, steps } = mapped();
  const next = { ArrowLeft: at.step - 1, ArrowRight: at.step + 1, Home: numberOf(0), End: numberOf(steps.length - 1) }[event.key];
  if (next === undefined || !stepOf(reply, next)) return;
  event.preventDefault();
  choose(at.reply, next, { focus: true });
});

function open() {
  const [, reply, step] = /^#(\d+)\.(-?\d+)$/.exec(location.hash) ?? [];
  if (trace.replies[reply - 1] && stepOf(trace.replies[reply - 1], Number(step))) return choose(reply - 1, Number(step));
  let first = trace.replies.findIndex((r) => r.steps.length);
  if (first < 0) first = trace.replies.findIndex((r) => r.given.length);
  if (first < 0) return fill(byId("panel"), make("p", "dim", "No reply of this conversation has traced tokens."));
  // Select the least likely token outside of thinking.
  const { steps, given, parts, promptLen } = trace.replies[first];
  const hidden = (n) => parts.some(([kind, from, to]) => kind === "thinking" && n >= from && n < to);
  const shown = steps.length ? steps : given;
  const rated = shown.map((s, n) => (steps.length && hidden(n) ? -2 : s.surprisal ?? -1));
  const best = rated.indexOf(rated.reduce((a, b) => Math.max(a, b), -2));
  return choose(first, steps.length ? best : given[best].position - promptLen);
}

drawTalk();
paint();
open();
new ResizeObserver(() => at.reply >= 0 && layMap(false)).observe(frame);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
matchMedia("print").addEventListener("change", () => at.reply >= 0 && layMap(false));
window.addEventListener("hashchange", open);
// Print includes the details of each reply, which cannot be opened on paper.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
