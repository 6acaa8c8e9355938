// A reply as a grid: steps across; layers (what each would have said) or positions (where each step
// looked) down. Only what is in view is drawn, onto a canvas; the axes stay in sight.
// data: see lens_shapes.lens_map and attention_shapes.attention_map; and {conversation, message,
// name, height}. Triggers: load = {conversation, message, step}, for a step that is not in here.
const HEAD = 44; // px: the surprisal bars and the tokens
const SHADES = 48;
// How much of the tone the strongest cell has: text stays readable.
const DEPTH = { light: 0.72, dark: 0.6 };
const ZOOMS = {
  lens: [[7, 7], [14, 14], [30, 17], [56, 19], [92, 22]],
  attention: [[4, 4], [8, 8], [14, 14], [30, 17], [56, 19]],
};
const VIEWS = {
  lens: {
    agreement: "agreement",
    probability: "probability",
    entropy: "entropy",
    rank: "rank of final token",
  },
  attention: { weight: "attention weight" },
};

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const signal = listening(root);
  const state = (root.state ??= { view: "agreement", zoom: {}, cursor: null });
  const model = data.kind === "lens" ? lensModel(data, state) : attentionModel(data);
  state.zoom[data.kind] ??= data.kind === "lens" || data.steps.length <= 60 ? 3 : 1;

  const frame = make("div", "frame");
  const room = make("div", "room");
  const canvas = make("canvas");
  const tip = make("div", "tip");
  const spoken = make("div", "spoken");
  spoken.setAttribute("aria-live", "polite");
  frame.tabIndex = 0;
  frame.setAttribute("role", "application");
  frame.setAttribute("aria-label",
    `${model.title}. ${model.columns} steps, ${model.rows} ${model.down}. Left and right keys ` +
    "choose the step, up and down the row.");
  room.append(canvas);
  frame.append(room);
  tip.hidden = true;

  const size = () => ZOOMS[data.kind][state.zoom[data.kind]];
  const look = theme(root);
  const draw = () => paint(canvas.getContext("2d"), {
    model, look, size: size(), x: frame.scrollLeft, y: frame.scrollTop,
    width: frame.clientWidth, height: frame.clientHeight,
    chosen: column(), cursor: state.cursor,
  });
  const column = () => place.message === data.message
    ? data.steps.findIndex((step) => step.index === place.step) : -1;
  const gutter = () => model.gutter(size());
  const lay = () => {
    const [w, h] = size();
    const wide = gutter() + model.columns * w, tall = HEAD + model.rows * h;
    room.style.width = `${wide}px`;
    room.style.height = `${tall}px`;
    frame.style.height = `${Math.min(tall + 14, data.height)}px`;
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${frame.clientWidth}px`;
    canvas.style.height = `${frame.clientHeight}px`;
    canvas.width = frame.clientWidth * ratio;
    canvas.height = frame.clientHeight * ratio;
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    draw();
  };
  const reveal = (at) => {
    const [w, h] = size();
    // Where the step itself would stand: the end of what it could look at.
    const end = (data.positions ? data.steps[at].position : 0) * h;
    const high = frame.clientHeight - HEAD;
    if (end > frame.scrollTop + high || end < frame.scrollTop) frame.scrollTop = end - high * 0.8;
    const left = at * w, seen = frame.clientWidth - gutter();
    if (left < frame.scrollLeft || left + w > frame.scrollLeft + seen) {
      frame.scrollLeft = left - seen / 2;
    }
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect(), [w, h] = size();
    const x = event.clientX - box.left - gutter(), y = event.clientY - box.top - HEAD;
    const c = Math.floor((x + frame.scrollLeft) / w);
    if (x < 0 || c < 0 || c >= model.columns) return null;
    const r = y < 0 ? -1 : Math.floor((y + frame.scrollTop) / h);
    return r >= model.rows ? null : { c, r };
  };
  const explain = (at, x, y) => {
    const lines = at && model.tell(at.c, at.r);
    tip.hidden = !lines;
    if (!lines) return;
    tip.replaceChildren(...lines.map((line, k) => make("div", k ? "" : "first", line)));
    const box = root.getBoundingClientRect();
    const left = Math.min(x - box.left + 14, box.width - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${y - box.top + 18}px`;
  };
  const go = (c) => pick(data.conversation, data.message, data.steps[c].index);

  frame.onscroll = () => requestAnimationFrame(draw);
  frame.onpointermove = (event) => explain(under(event), event.clientX, event.clientY);
  frame.onpointerleave = () => (tip.hidden = true);
  frame.onclick = (event) => {
    const at = under(event);
    if (at) go(at.c);
  };
  frame.onkeydown = (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const c = column();
    if (!by || c < 0) return;
    event.preventDefault();
    const from = state.cursor ?? (by > 0 ? -1 : model.rows);
    state.cursor = Math.max(0, Math.min(model.rows - 1, from + by));
    const [w, h] = size(), top = state.cursor * h, seen = frame.clientHeight - HEAD;
    if (top < frame.scrollTop || top + h > frame.scrollTop + seen) frame.scrollTop = top - seen / 2;
    draw();
    const box = canvas.getBoundingClientRect();
    explain({ c, r: state.cursor }, box.left + gutter() + (c + 1) * w - frame.scrollLeft,
      box.top + HEAD + top - frame.scrollTop);
    spoken.textContent = model.tell(c, state.cursor).join(". ");
  };
  const follow = (event) => {
    const c = column();
    if (c >= 0) {
      if (root.last !== `${place.message}/${place.step}`) reveal(c);
      root.last = `${place.message}/${place.step}`;
    } else if (event?.type === "shown" && place.message !== null) {
      const wanted = `${place.message}/${place.step}`;
      if (root.asked !== wanted) {
        root.asked = wanted;
        setTriggerValue("load", {
          conversation: place.conversation, message: place.message, step: place.step });
      }
    }
    draw();
  };
  place.addEventListener("pick", follow, { signal });
  place.addEventListener("shown", follow, { signal });

  const bar = make("div", "bar");
  const views = VIEWS[data.kind];
  const key = make("span", "key grow");
  const legend = () => key.replaceChildren(...model.legend(look));
  if (Object.keys(views).length > 1) {
    const choice = make("select", "tool");
    choice.setAttribute("aria-label", "Colour the cells by");
    for (const [name, title] of Object.entries(views)) {
      const option = make("option", "", title);
      option.value = name;
      option.selected = name === state.view;
      choice.append(option);
    }
    choice.onchange = () => {
      state.view = choice.value;
      legend();
      draw();
    };
    bar.append(choice);
  }
  const zoom = (by) => {
    const levels = ZOOMS[data.kind].length;
    const at = frame.scrollLeft / size()[0], down = frame.scrollTop / size()[1];
    state.zoom[data.kind] = Math.max(0, Math.min(levels - 1, state.zoom[data.kind] + by));
    lay();
    frame.scrollLeft = at * size()[0];
    frame.scrollTop = down * size()[1];
    if (column() >= 0) reveal(column());
    draw();
  };
  bar.append(key,
    button("−", "Smaller cells", () => zoom(-1)), button("+", "Larger cells", () => zoom(1)),
    csvButton(data.name, () => model.csv()),
    button("PNG", `Save ${data.name} as PNG`, () => savePng(data, model, look, size(), column())),
    button("SVG", `Save ${data.name} as SVG`, () => save(`${data.name}.svg`, "image/svg+xml",
      [asSvg(model, look, size(), column())])));
  legend();
  const before = root.querySelector(".frame");
  const [left, top] = root.of === `${data.message}/${data.kind}` && before
    ? [before.scrollLeft, before.scrollTop] : [0, 0];
  if (root.of !== `${data.message}/${data.kind}`) root.last = null;
  root.of = `${data.message}/${data.kind}`;
  root.replaceChildren(bar, frame, tip, spoken);
  root.sizes?.disconnect();
  root.sizes = new ResizeObserver(() => requestAnimationFrame(lay));
  root.sizes.observe(frame);
  lay();
  frame.scrollLeft = left;
  frame.scrollTop = top;
  follow();
  // The theme may change under us: colours are read again when it does.
  const tick = () => {
    if (!root.isConnected || signal.aborted) return;
    if (look.stale()) {
      look.read();
      legend();
      draw();
    }
    setTimeout(tick, 500);
  };
  tick();
  return () => {
    root.stop.abort();
    root.sizes.disconnect();
  };
}

// ------------------------------------------------------------------ what is in the cells

function numbers(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

function lensModel(data, state) {
  const L = data.layers, columns = data.steps.length;
  const top = numbers(data.top, Uint32Array), same = numbers(data.same, Uint8Array);
  const prob = numbers(data.prob, Float32Array), entropy = numbers(data.entropy, Float32Array);
  const rank = numbers(data.rank, Uint32Array), kl = numbers(data.kl, Float32Array);
  const mine = numbers(data.chosen_prob, Float32Array);
  const most = entropy.reduce((a, b) => (b > a ? b : a), 1);
  const worst = Math.log(Math.max(10, rank.reduce((a, b) => Math.max(a, b), 1)));
  const at = (c, r) => c * L + (L - 1 - r);
  const shade = {
    agreement: (i) => [prob[i], same[i] ? "accent" : "blue"],
    probability: (i) => [prob[i], "blue"],
    entropy: (i) => [entropy[i] / most, "blue"],
    // Rank 1 is the strongest: the closer the layer is to what was said.
    rank: (i) => [1 - Math.log(rank[i]) / worst, "accent"],
  };
  return {
    title: "Reply map: what each layer would have said", down: "layers", columns, rows: L,
    steps: data.steps,
    gutter: () => 48,
    rowName: (r) => String(L - 1 - r),
    cell(c, r) {
      const i = at(c, r), [value, tone] = shade[state.view](i);
      const text = state.view === "rank" && rank[i] > 1
        ? `#${rank[i].toLocaleString("en")}` : data.words[top[i]];
      return { value: Number.isNaN(value) ? 0 : value, tone, text,
        outlined: data.settled[c] === L - 1 - r };
    },
    tell(c, r) {
      const step = data.steps[c];
      if (r < 0) return [`step ${step.index + 1}: ${step.text}`,
        `surprisal ${figure(step.surprisal, 2)} nats`];
      const i = at(c, r);
      return [
        `layer ${L - 1 - r}, step ${step.index + 1}: ${data.words[top[i]]}  ${figure(prob[i], 3)}`,
        `final token ${step.text}: rank ${rank[i].toLocaleString("en")}, ${figure(mine[i], 3)}`,
        `entropy ${figure(entropy[i], 2)} nats · KL to the final layer ${figure(kl[i], 2)} nats`,
        ...(data.settled[c] === L - 1 - r ? ["settled here: on top from this layer on"] : []),
      ];
    },
    legend(look) {
      const ramp = (tone, low, high) => [
        low, look.bar(tone), high];
      const outlined = make("span", "box");
      return {
        agreement: () => [...ramp("accent", "the final token", "  "),
          ...ramp("blue", "another, prob 0 to 1", "  "), outlined, "settled"],
        probability: () => [...ramp("blue", "probability 0", "1  "), outlined, "settled"],
        entropy: () => [...ramp("blue", "0", `${most.toFixed(1)} nats  `), outlined, "settled"],
        rank: () => [...ramp("accent",
          `rank ${Math.round(Math.exp(worst)).toLocaleString("en")}`, "1 (log)  "), outlined, "settled"],
      }[state.view]();
    },
    csv: () => [
      ["step", "chosen_token", "layer", "top_token", "top_prob", "is_final_token", "chosen_rank",
        "chosen_prob", "entropy_nats", "kl_nats", "settled_here"],
      ...data.steps.flatMap((step, c) => Array.from({ length: L }, (_, layer) => {
        const i = c * L + layer;
        return [step.index, step.text, layer, data.words[top[i]], prob[i], same[i], rank[i],
          mine[i], entropy[i], kl[i], Number(data.settled[c] === layer)];
      }))],
  };
}

function attentionModel(data) {
  const column = numbers(data.points.column, Int32Array);
  const position = numbers(data.points.position, Int32Array);
  const weight = numbers(data.points.weight, Float32Array);
  const without = new Set(data.without);
  const cells = data.steps.map(() => new Map());
  let most = 0;
  weight.forEach((w, k) => {
    cells[column[k]]?.set(position[k], w);
    if (!without.has(position[k]) && w > most) most = w;
  });
  most ||= 1;
  return {
    title: "Attention map: where each step looked", down: "positions",
    columns: data.steps.length, rows: data.positions.length, steps: data.steps, seam: data.seam,
    gutter: ([, h]) => (h >= 14 ? 128 : 48),
    rowName: (r, [, h]) => (h >= 14 ? `${data.positions[r]}  ${r}` : String(r)),
    cell(c, r) {
      if (r >= data.steps[c].position) return null; // not yet written
      const w = cells[c].get(r);
      if (w === undefined || Number.isNaN(w)) return { value: 0, tone: "blue", text: "" };
      if (without.has(r)) return { value: 0, tone: "blue", text: "", crossed: true };
      return { value: Math.sqrt(w / most), tone: "blue", text: figure(w, 2) };
    },
    tell(c, r) {
      const step = data.steps[c];
      const from = `step ${step.index + 1} ${step.text}`;
      if (r < 0) return [from, `position ${step.position}`];
      const to = `position ${r}  ${data.positions[r]}`;
      if (r >= step.position) return [from, `${to}: not yet written`];
      const w = cells[c].get(r);
      const part = r < data.seam ? "prompt" : "reply";
      return [`${from} looked at`, `${to} (${part})`,
        w === undefined ? "not kept, or 0" : `weight ${figure(w, 4)}` +
          (without.has(r) ? ", left out of the picture" : "")];
    },
    legend: (look) => ["weight 0", look.bar("blue"), `${figure(most, 2)} (square root)`],
    csv: () => [["step", "token", "position", "attended_token", "weight", "left_out"],
      ...Array.from(weight, (w, k) => {
        const step = data.steps[column[k]];
        return [step?.index, step?.text, position[k], data.positions[position[k]], w,
          Number(without.has(position[k]))];
      })],
  };
}

// ---------------------------------------------------------------------------- drawing

function theme(root) {
  const names = { accent: "--st-primary-color", blue: "--st-blue-color", gray: "--st-gray-color",
    text: "--st-text-color", back: "--st-background-color", line: "--st-border-color" };
  const look = {
    read() {
      const style = getComputedStyle(root);
      for (const [name, css] of Object.entries(names)) look[name] = style.getPropertyValue(css).trim();
      look.code = style.getPropertyValue("--st-code-font").trim() || "monospace";
      look.font = style.getPropertyValue("--st-font").trim() || "sans-serif";
      const back = rgb(look.back), text = rgb(look.text);
      const depth = DEPTH[light(back) < 0.2 ? "dark" : "light"];
      look.ramp = {};
      look.ink = {};
      for (const tone of ["accent", "blue"]) {
        const full = rgb(look[tone]);
        const steps = Array.from({ length: SHADES + 1 }, (_, k) =>
          full.map((v, j) => Math.round(back[j] + (v - back[j]) * depth * (k / SHADES))));
        look.ramp[tone] = steps.map((c) => `rgb(${c.join(" ")})`);
        look.ink[tone] = steps.map((c) => contrast(c, text) >= contrast(c, back) ? look.text : look.back);
      }
    },
    stale: () => getComputedStyle(root).getPropertyValue(names.back).trim() !== look.back,
    bar(tone) {
      const node = make("span", "ramp");
      node.style.background =
        `linear-gradient(90deg, ${look.ramp[tone][0]}, ${look.ramp[tone][SHADES]})`;
      return node;
    },
  };
  look.read();
  return look;
}

function rgb(color) {
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  pen.fillStyle = color;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

// Relative luminance and contrast as WCAG 2 has them.
function light(color) {
  return color.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
}

function contrast(a, b) {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}

// What one cell, or one name on an axis, is drawn as; a canvas and an SVG both take it.
function* shapes({ model, look, size: [w, h], x, y, width, height, chosen, cursor }) {
  const gutter = model.gutter([w, h]);
  const c0 = Math.max(0, Math.floor(x / w));
  const c1 = Math.min(model.columns, Math.ceil((x + width - gutter) / w));
  const r0 = Math.max(0, Math.floor(y / h));
  const r1 = Math.min(model.rows, Math.ceil((y + height - HEAD) / h));
  height = Math.min(height, HEAD + model.rows * h - y + 1);
  const gap = w >= 14 && h >= 14 ? 1 : 0;
  const font = Math.min(12, h - 6);
  const texts = w >= 30 && h >= 14;
  for (let c = c0; c < c1; c += 1) {
    for (let r = r0; r < r1; r += 1) {
      const cell = model.cell(c, r);
      if (!cell) continue;
      const level = Math.round(Math.max(0, Math.min(1, cell.value)) * SHADES);
      const left = gutter + c * w - x, up = HEAD + r * h - y;
      if (level || model.down === "layers") {
        yield { box: [left, up, w - gap, h - gap], fill: look.ramp[cell.tone][level] };
      }
      if (cell.crossed && w >= 8) {
        yield { text: "·", at: [left + w / 2, up + h / 2], font, ink: look.gray, code: true, align: "center" };
      }
      if (cell.outlined) {
        yield { box: [left + 0.75, up + 0.75, w - gap - 1.5, h - gap - 1.5], stroke: look.accent };
      }
      if (r === cursor && c === chosen) {
        yield { box: [left + 0.75, up + 0.75, w - gap - 1.5, h - gap - 1.5], stroke: look.text };
      }
      if (texts && cell.text) {
        yield { text: cell.text, at: [left + (w - gap) / 2, up + h / 2], room: w - gap - 4, font,
          ink: look.ink[cell.tone][level], code: true, align: "center" };
      }
    }
  }
  if (model.seam > r0 && model.seam < r1) {
    yield { box: [gutter, HEAD + model.seam * h - y - 0.5, width - gutter, 1], fill: look.gray };
  }
  if (chosen >= c0 && chosen < c1) {
    yield { box: [gutter + chosen * w - x - 0.5, HEAD - 18, w - gap + 1, height - HEAD + 18],
      stroke: look.text, wide: 1.25 };
  }
  // The axes come last: what scrolls goes below them.
  yield { box: [0, 0, width, HEAD], fill: look.back };
  const most = Math.max(1, ...model.steps.map((step) => step.surprisal ?? 0));
  const every = w >= 30 ? 1 : Math.ceil(44 / w);
  for (let c = c0; c < c1; c += 1) {
    const left = gutter + c * w - x, step = model.steps[c];
    const tall = ((step.surprisal ?? 0) / most) * 20;
    if (tall) yield { box: [left, 22 - tall, Math.max(1, w - gap), tall], fill: look.ramp.accent[Math.round(SHADES * 0.6)] };
    if (w >= 30) {
      yield { text: step.text, at: [left + (w - gap) / 2, HEAD - 9], room: w - 4,
        font: 11.5, bold: true, ink: look.text, code: true, align: "center" };
    } else if (step.index % every === 0) {
      yield { text: String(step.index + 1), at: [left, HEAD - 9], font: 10.5, ink: look.gray, align: "left" };
    }
    if (c === chosen) {
      yield { box: [left + 0.5, HEAD - 18, Math.max(2, w - gap - 1), 17], stroke: look.text, wide: 1.5 };
    }
  }
  yield { box: [0, HEAD, gutter, height - HEAD], fill: look.back };
  const skip = Math.max(1, Math.ceil(12 / h));
  for (let r = r0; r < r1; r += 1) {
    if (r % skip) continue;
    yield { text: model.rowName(r, [w, h]), at: [gutter - 6, HEAD + r * h - y + h / 2],
      room: gutter - 8, font: 10.5, ink: look.gray, align: "right", code: model.down !== "layers" && h >= 14 };
  }
  yield { box: [0, 0, gutter, HEAD], fill: look.back };
  yield { text: "surprisal", at: [gutter - 6, 14], room: gutter - 2, font: 9.5, ink: look.gray, align: "right" };
  yield { text: model.down === "layers" ? "layer" : "position", at: [gutter - 6, HEAD - 9],
    room: gutter - 2, font: 9.5, ink: look.gray, align: "right" };
}

function paint(pen, view) {
  pen.clearRect(0, 0, view.width, view.height);
  pen.textBaseline = "middle";
  pen.direction = "ltr";
  for (const one of shapes(view)) {
    if (one.box) {
      if (one.fill) {
        pen.fillStyle = one.fill;
        pen.fillRect(...one.box);
      } else {
        pen.strokeStyle = one.stroke;
        pen.lineWidth = one.wide ?? 1.5;
        pen.strokeRect(...one.box);
      }
      continue;
    }
    pen.font = `${one.bold ? 600 : 400} ${one.font}px ${one.code ? view.look.code : view.look.font}`;
    pen.fillStyle = one.ink;
    pen.textAlign = one.align;
    pen.fillText(fit(pen, one.text, one.room), ...one.at);
  }
}

// As much of the text as there is room for; the hover has all of it.
function fit(pen, text, room) {
  if (room === undefined || pen.measureText(text).width <= room) return text;
  // Where there is hardly room for a letter, none is given to marks.
  const dots = room < 40 ? "" : "…";
  const letters = [...(dots ? text : text.replace(/^␣(?=.)/, ""))];
  let kept = Math.min(letters.length, Math.max(1, Math.floor(room / 4)));
  while (kept > 1 && pen.measureText(letters.slice(0, kept).join("") + dots).width > room) kept -= 1;
  return letters.slice(0, kept).join("") + (kept < letters.length ? dots : "");
}

function whole(model, [w, h]) {
  return { x: 0, y: 0, width: model.gutter([w, h]) + model.columns * w, height: HEAD + model.rows * h };
}

function savePng(data, model, look, size, chosen) {
  const view = whole(model, size);
  // Browsers refuse canvases beyond some sixty million points.
  const scale = Math.min(2, Math.sqrt(4e7 / (view.width * view.height)), 16_000 / view.width,
    16_000 / view.height);
  const canvas = make("canvas");
  canvas.width = view.width * scale;
  canvas.height = view.height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = look.back;
  pen.fillRect(0, 0, view.width, view.height);
  const inked = { model, look, size, chosen, cursor: null, ...view };
  pen.clearRect = () => {};
  paint(pen, inked);
  canvas.toBlob((blob) => save(`${data.name}.png`, "image/png", [blob]));
}

function asSvg(model, look, size, chosen) {
  const view = whole(model, size);
  const pen = make("canvas").getContext("2d");
  const safe = (text) => text.replace(/[^\t\n\r\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "�")
    .replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const anchors = { left: "start", center: "middle", right: "end" };
  const parts = [`<svg xmlns="http://www.w3.org/2000/svg" width="${view.width}" height="${view.height}">`,
    `<rect width="100%" height="100%" fill="${look.back}"/>`];
  for (const one of shapes({ model, look, size, chosen, cursor: null, ...view })) {
    if (one.box) {
      const [x, y, w, h] = one.box.map((v) => +v.toFixed(2));
      parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" ` + (one.fill
        ? `fill="${one.fill}"/>` : `fill="none" stroke="${one.stroke}" stroke-width="${one.wide ?? 1.5}"/>`));
      continue;
    }
    const family = one.code ? "monospace" : "sans-serif";
    pen.font = `${one.bold ? 600 : 400} ${one.font}px ${family}`;
    parts.push(`<text x="${one.at[0].toFixed(1)}" y="${one.at[1].toFixed(1)}" fill="${one.ink}" ` +
      `font-family="${family}" font-size="${one.font}" font-weight="${one.bold ? 600 : 400}" ` +
      `text-anchor="${anchors[one.align]}" dominant-baseline="central" xml:space="preserve">` +
      `${safe(fit(pen, one.text, one.room))}</text>`);
  }
  parts.push("</svg>");
  return parts.join("\n");
}
