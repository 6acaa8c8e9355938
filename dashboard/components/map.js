// The lens over the reply: layers down, steps across.
// data: {steps: [{index, text, title}], layers: [..], cells: [[{text, prob, same, settled, title}]], chosen}
// cells[row][column] goes with layers[row] and steps[column]. Triggers: pick = step index.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const frame = make("div", "frame");
  const grid = make("div", "grid");
  grid.style.gridTemplateColumns = `2rem repeat(${data.steps.length}, minmax(3.1rem, 1fr))`;
  grid.append(make("div", "cell layer"));
  for (const step of data.steps) grid.append(cell(step.text, step.title, step.index, "head"));
  data.layers.forEach((layer, row) => {
    grid.append(make("div", "cell layer", String(layer)));
    data.cells[row].forEach((entry, column) => {
      const step = data.steps[column];
      const node = cell(entry.text, entry.title, step.index, entry.same ? "same" : "");
      if (entry.settled) node.classList.add("settled");
      node.style.setProperty("--v", entry.prob ?? 0);
      grid.append(node);
    });
  });
  grid.querySelector(`.head[data-step="${Number(data.chosen)}"]`)?.classList.add("picked");
  grid.onclick = (event) => {
    const step = event.target.closest("[data-step]")?.dataset.step;
    if (step !== undefined) setTriggerValue("pick", Number(step));
  };
  const key = make("div", "key");
  key.append(
    dot("var(--accent)"), "already the final token", dot("var(--blue)"), "another token",
    make("span", "dot"), "deeper is more certain; outlined where it settled");
  const scrolled = root.querySelector(".frame")?.scrollLeft ?? 0;
  frame.append(grid);
  root.replaceChildren(key, frame);
  frame.scrollLeft = scrolled;
  const head = grid.querySelector(".picked");
  if (head && root.chosen !== data.chosen) {
    const hidden = head.offsetLeft + head.offsetWidth > scrolled + frame.clientWidth;
    if (hidden || head.offsetLeft < scrolled) frame.scrollLeft = head.offsetLeft - frame.clientWidth / 2;
  }
  root.chosen = data.chosen;
}

function cell(text, title, step, kind) {
  const node = make("div", `cell ${kind}`, text);
  node.title = title;
  node.dataset.step = step;
  node.style.setProperty("--v", 0);
  return node;
}

function dot(color) {
  const node = make("span", "dot");
  node.style.background = color;
  return node;
}
