"use strict";
// Draws the report from the data in the page. Text from models and users is only set as
// textContent, as a title, or drawn on the canvas.
const trace = JSON.parse(document.getElementById("data").textContent);
const at = { reply: -1, step: 0, colour: "surprisal", layer: null };
const SHORT = { " ": "␣", "\n": "⏎", "\t": "⇥" };
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
  const steps = trace.replies.reduce((sum, r) => sum + r.steps.length, 0);
  byId("about").textContent = [...models, trace.created, `${steps.toLocaleString("en")} tokens traced`].join(" · ");
  byId("foot").textContent = `Written by oki-trace ${trace.version}. This file contains all of its data and makes no requests. ` +
    "prob is the model's own probability, before any sampling setting; surprisal and entropy are in nats. " +
    "The lens reads each layer as if it were the last, which the model was not trained for. Attention shows where the model looked, not why.";
  const nodes = trace.messages.map((message) => {
    if (message.reply !== undefined) return drawReply(trace.replies[message.reply], message.reply);
    const bubble = make("div", `bubble ${message.role}`);
    if (message.role !== "user") bubble.append(make("span", "who", message.who));
    bubble.append(message.content);
    if (message.note) bubble.append(make("span", "who bad", message.note));
    return bubble;
  });
  fill(byId("talk"), ...nodes);
}

function drawReply(reply, index) {
  const root = make("div", "reply");
  const words = make("div", "words");
  words.setAttribute("role", "listbox");
  words.setAttribute("aria-label", "Tokens of the reply");
  reply.steps.forEach((step, number) => {
    const text = step.special ? tokenText(step.token) : running(step.run) || "◌";
    const node = make("span", "token", text);
    if (step.special || !step.run.trim()) node.classList.add("mark");
    node.dataset.step = number;
    node.tabIndex = -1;
    node.setAttribute("role", "option");
    node.title = `${tokenText(step.token)} · prob ${figure(step.prob, 3)} · surprisal ${figure(step.surprisal, 2)} · entropy ${figure(step.entropy, 2)}`;
    const part = reply.parts.find(([, from, to]) => number >= from && number < to);
    if (part) node.classList.add(part[0]);
    words.append(node);
  });
  const thinking = words.querySelectorAll(".thinking").length;
  if (thinking && thinking < reply.steps.length) root.append(folding(words, thinking));
  words.onclick = (event) => {
    const node = event.target.closest(".token");
    if (node) choose(index, Number(node.dataset.step));
  };
  const colours = make("span", "choice");
  for (const name of COLOURS) {
    const button = make("button", "", name);
    button.type = "button";
    button.onclick = () => { at.colour = name; paint(); };
    colours.append(button);
  }
  const under = make("div", "under");
  const status = make("span", reply.bad ? "status bad" : "status", `${reply.status} · ${reply.steps.length} tokens`);
  under.append(colours, make("span", "legend"), status);
  const details = make("details");
  const facts = make("dl", "facts");
  for (const [name, value] of reply.facts) facts.append(make("dt", "", name), make("dd", "", value));
  details.append(make("summary", "", "About this reply"), facts);
  root.append(words, under, details);
  reply.root = root;
  return root;
}

// A shade from 0 to 1 for each step, and the label of the upper end.
function shades(reply) {
  if (at.colour === "settle layer") {
    const top = Math.max(reply.layers, 1);
    return [reply.steps.map((s) => (s.settle ?? null) === null ? 0 : s.settle / top), `layer ${reply.layers}`];
  }
  const values = reply.steps.map((s) => s[at.colour]);
  const top = Math.max(1, ...values.filter((v) => v !== null));
  return [values.map((v) => (v ?? 0) / top), `${top.toFixed(1)} nats`];
}

function paint() {
  for (const reply of trace.replies) {
    const [values, high] = shades(reply);
    reply.root.classList.toggle("depth", at.colour === "settle layer");
    reply.root.querySelectorAll(".token").forEach((node, n) => node.style.setProperty("--v", values[n]));
    reply.root.querySelectorAll(".choice button").forEach((button) =>
      button.setAttribute("aria-pressed", String(button.textContent === at.colour)));
    fill(reply.root.querySelector(".legend"), "0", make("span", "ramp"), high);
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
  const other = at.reply !== reply;
  at.reply = reply;
  at.step = step;
  const node = trace.replies[reply].root.querySelectorAll(".token")[step];
  node.classList.add("chosen");
  node.setAttribute("aria-selected", "true");
  node.tabIndex = 0;
  if (node.classList.contains("thinking")) node.parentElement.unfold?.(true);
  if (focus) node.focus();
  history.replaceState(null, "", `#${reply + 1}.${step}`);
  drawPanel();
  layMap(other);
}

function drawPanel() {
  const reply = trace.replies[at.reply];
  const step = reply.steps[at.step];
  const where = make("div", "where");
  where.append(make("span", "", `step ${at.step + 1} of ${reply.steps.length} · position ${step.position}`), make("span", "", "← →"));
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
  fill(byId("panel"), where, make("div", "what", tokenText(step.token)), numbers, make("p", "why", step.why),
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
  return [make("h2", "", "Considered"), bars];
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
    ...reply.steps.slice(0, at.step).map((s) => [s.special ? tokenText(s.token) : running(s.run), s.special ? "template" : "reply"])];
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
  const left = sink ? `The first token, with ${(sink / 10).toFixed(0)} % of the attention, is not shown. ` : "";
  return [head, seen, make("p", "note", `${left}Shows the ${weights.size} most attended positions. Attention shows where the model looked, not why.`)];
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
  return [make("h2", "", "Logit Lens"), table, make("p", "note", "#n is the rank of the chosen token at that layer. The line marks the layer where it settled."),
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
  return [make("h2", "", "Rank of the chosen token through the layers"), svg, ends];
}

// ------------------------------------------------------------------ reply map

const GUTTER = 30, HEAD = 20, ROW = 18, NARROW = 50;
const frame = byId("frame"), canvas = byId("cells");
let columnWidth = NARROW;

function layMap(scroll) {
  const reply = trace.replies[at.reply];
  const layers = Math.max(0, ...reply.steps.map((s) => s.lens?.length ?? 0));
  byId("map").hidden = !layers;
  if (!layers) return;
  const room = frame.clientWidth - GUTTER;
  const paper = matchMedia("print").matches;
  // On a screen the map scrolls; on paper it ends with a whole column.
  const columns = paper ? Math.min(reply.steps.length, Math.floor(room / NARROW)) : reply.steps.length;
  columnWidth = Math.max(NARROW, Math.min(90, room / columns));
  byId("spacer").style.width = `${GUTTER + columnWidth * reply.steps.length}px`;
  reply.rows = layers;
  const left = at.step * columnWidth;
  if (paper) frame.scrollLeft = Math.min(at.step - Math.floor(columns / 2), reply.steps.length - columns) * columnWidth;
  else if (scroll || left < frame.scrollLeft || left + columnWidth > frame.scrollLeft + room) frame.scrollLeft = left - room / 2;
  canvas.setAttribute("aria-label", `The most likely token of ${layers} layers at ${reply.steps.length} steps; the Logit Lens table has those of the selected step.`);
  drawMap();
}

// Draws only the visible columns, so a long reply takes no longer than a short one.
function drawMap() {
  const reply = trace.replies[at.reply];
  if (!reply?.rows) return;
  const width = Math.min(frame.clientWidth, GUTTER + columnWidth * reply.steps.length), height = HEAD + ROW * reply.rows;
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
  const last = Math.min(reply.steps.length, Math.ceil((frame.scrollLeft + width) / columnWidth));
  // The columns that are fully visible.
  const from = Math.ceil(frame.scrollLeft / columnWidth - 0.05) + 1, to = Math.floor((frame.scrollLeft + width - GUTTER) / columnWidth + 0.05);
  byId("range").textContent = to - from + 1 < reply.steps.length ? `steps ${from} to ${to} of ${reply.steps.length}` : "";
  for (let n = first; n < last; n += 1) {
    const step = reply.steps[n];
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
    if (n === at.step) outline(pen, x, 0, height, inks.text);
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

// [step, layer] below the pointer; the layer is null in the head.
function cellAt(event) {
  const reply = trace.replies[at.reply];
  const box = canvas.getBoundingClientRect();
  const step = Math.floor((event.clientX - box.left - GUTTER + frame.scrollLeft) / columnWidth);
  const row = Math.floor((event.clientY - box.top - HEAD) / ROW);
  if (event.clientX - box.left < GUTTER || !(step in reply.steps)) return null;
  return [step, row < 0 ? null : reply.rows - 1 - row];
}

canvas.onclick = (event) => {
  const cell = cellAt(event);
  if (cell) choose(at.reply, cell[0]);
};
canvas.onmousemove = (event) => {
  const [number, layer] = cellAt(event) ?? [];
  const step = trace.replies[at.reply].steps[number];
  const row = step?.lens?.[layer];
  canvas.title = row ? `layer ${layer}, step ${number}: ${tokenText(row[0])} ${((step.lensProb[layer][0] ?? 0) / 1000).toFixed(3)}\n` +
    `chosen ${tokenText(step.token)}: rank ${rankText(step.lensRank[layer])}` : step ? tokenText(step.token) : "";
};
frame.onscroll = drawMap;

// ----------------------------------------------------------------------- begin

document.addEventListener("keydown", (event) => {
  if (at.reply < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target instanceof Element && event.target.closest("select, input")) return;
  const count = trace.replies[at.reply].steps.length;
  const next = { ArrowLeft: at.step - 1, ArrowRight: at.step + 1, Home: 0, End: count - 1 }[event.key];
  if (next === undefined || next < 0 || next >= count) return;
  event.preventDefault();
  choose(at.reply, next, { focus: true });
});

function open() {
  const [, reply, step] = /^#(\d+)\.(\d+)$/.exec(location.hash) ?? [];
  if (trace.replies[reply - 1]?.steps[step]) return choose(reply - 1, Number(step));
  const first = trace.replies.findIndex((r) => r.steps.length);
  if (first < 0) return fill(byId("panel"), make("p", "dim", "No reply of this conversation has traced tokens."));
  // Select the least likely token outside of thinking.
  const { steps, parts } = trace.replies[first];
  const hidden = (n) => parts.some(([kind, from, to]) => kind === "thinking" && n >= from && n < to);
  const rated = steps.map((s, n) => (hidden(n) ? -2 : s.surprisal ?? -1));
  return choose(first, rated.indexOf(Math.max(...rated)));
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
