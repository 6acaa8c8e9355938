// The reply map: a column a step, a row a layer.
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
  const layers = steps.reduce((most, s) => Math.max(most, s.lens ? layerOf(s, s.lens.length - 1) + 1 : 0), 0);
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
    for (let row = 0; row < (step.lens?.length ?? 0); row += 1) {
      const layer = layerOf(step, row);
      const y = HEAD + (reply.rows - 1 - layer) * ROW;
      const number = step.lens[row][0];
      pen.globalAlpha = ((step.lensProb[row][0] ?? 0) / 1000) * 0.66;
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
  const place = step?.lensLayers ? step.lensLayers.indexOf(layer) : layer;
  const row = step?.lens?.[place];
  const where = number < 0 ? `position ${step.position}` : `step ${number}`;
  canvas.title = row ? `layer ${layer}, ${where}: ${tokenText(row[0])} ${((step.lensProb[place][0] ?? 0) / 1000).toFixed(3)}\n` +
    `this token, ${tokenText(step.token)}: rank ${rankText(step.lensRank[place])}` : step ? tokenText(step.token) : "";
};
frame.onscroll = drawMap;
