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

// A direction mark acts on its own token alone.
function contain(node) {
  if (/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/.test(node.textContent))
    node.style.unicodeBidi = "isolate";
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
  contain(node);
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
