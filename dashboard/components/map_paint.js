// Painting a map: the colours of the theme, its shapes, and drawing them on a canvas.
const HEAD = 44; // px: the surprisal bars and the tokens
const SHADES = 48;
// The share of the tone in the strongest cell, so that text stays readable.
const DEPTH = { lens: { light: 0.72, dark: 0.6 }, attention: { light: 0.95, dark: 0.9 } };

function theme(root, kind) {
  const names = { accent: "--st-primary-color", blue: "--st-blue-color", gray: "--st-gray-color",
    text: "--st-text-color", back: "--st-background-color", line: "--st-border-color" };
  const look = {
    read() {
      const style = getComputedStyle(root);
      for (const [name, css] of Object.entries(names)) look[name] = style.getPropertyValue(css).trim();
      look.code = style.getPropertyValue("--st-code-font").trim() || "monospace";
      look.font = style.getPropertyValue("--st-font").trim() || "sans-serif";
      const back = rgb(look.back), text = rgb(look.text);
      const depth = DEPTH[kind][light(back) < 0.2 ? "dark" : "light"];
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

// The boxes and texts of a map, for a canvas and for an SVG.
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
  if (model.reply !== null && model.reply >= c0 && model.reply <= c1) {
    yield { box: [gutter + model.reply * w - x - gap / 2 - 1, HEAD, 2, height - HEAD], fill: look.gray };
  }
  if (chosen >= c0 && chosen < c1) {
    yield { box: [gutter + chosen * w - x - 0.5, HEAD - 18, w - gap + 1, height - HEAD + 18],
      stroke: look.text, wide: 1.25 };
  }
  // The axes come last, on top of what scrolls.
  yield { box: [0, 0, width, HEAD], fill: look.back };
  const most = Math.max(1, ...model.steps.map((step) => step.surprisal ?? 0));
  const every = w >= 30 ? 1 : Math.ceil(44 / w);
  for (let c = c0; c < c1; c += 1) {
    const left = gutter + c * w - x, step = model.steps[c];
    const tall = ((step.surprisal ?? 0) / most) * 20;
    if (tall) yield { box: [left, 22 - tall, Math.max(1, w - gap), tall], fill: look.ramp.accent[Math.round(SHADES * 0.6)] };
    if (w >= 30) {
      yield { text: step.text, at: [left + (w - gap) / 2, HEAD - 9], room: w - 4,
        font: 11.5, bold: step.index >= 0, ink: step.index < 0 ? look.gray : look.text, code: true, align: "center" };
    } else if (step.label % every === 0) {
      yield { text: String(step.label), at: [left, HEAD - 9], font: 10.5, ink: look.gray, align: "left" };
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
  yield { text: model.down === "layers" ? "layer ↓" : "position ↓", at: [gutter - 6, HEAD - 9],
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

// As much of the text as fits; the tooltip has all of it.
function fit(pen, text, room) {
  if (room === undefined || pen.measureText(text).width <= room) return text;
  text = short(text);
  if (pen.measureText(text).width <= room) return text;
  // In very narrow cells the letters take the room of the ellipsis.
  const dots = room < 40 ? "" : "…";
  const letters = [...(dots ? text : text.replace(/^␣(?=.)/, ""))];
  let kept = Math.min(letters.length, Math.max(1, Math.floor(room / 4)));
  while (kept > 1 && pen.measureText(letters.slice(0, kept).join("") + dots).width > room) kept -= 1;
  return letters.slice(0, kept).join("") + (kept < letters.length ? dots : "");
}
