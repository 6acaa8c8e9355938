// The Logit Lens: the likeliest tokens at each layer, the last layer on top.
// data: {rows: [{layer, cells: [{text, label, prob, shown, chosen, pinned, title}], rank, settled,
// title}], pins: whether a token can be pinned, step}. Triggers: pin = a token's label.
// The cells are one tab stop; the arrows, Home and End move between them.
const CELL = 118; // px: in narrower cells a token and its number are illegible

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const kept = data.rows[0]?.cells.length ?? 0;
  root.shows = 0;
  const lay = () => {
    const room = Math.floor((root.clientWidth - 110) / CELL) || 3;
    const width = Math.min(kept, Math.max(3, room));
    if (width === root.shows) return;
    root.shows = width;
    // The focused cell stays focused when the table is redrawn.
    const held = root.getRootNode().activeElement?.closest?.("[data-label]");
    root.replaceChildren(heading(data, kept), table(data, width));
    enter(root, root.at ?? [0, 0], Boolean(held && root.isConnected));
  };
  lay();
  root.sizes?.disconnect();
  root.sizes = new ResizeObserver(lay);
  root.sizes.observe(root);
  root.classList.toggle("pins", data.pins);
  root.onclick = (event) => {
    const cell = event.target.closest("[data-label]");
    if (!cell) return;
    enter(root, spot(cell), false);
    if (data.pins) setTriggerValue("pin", cell.dataset.label);
  };
  root.onkeydown = (event) => {
    const cell = event.target.closest("[data-label]");
    if (!cell || event.altKey || event.ctrlKey || event.metaKey) return;
    const [row, column] = spot(cell);
    const last = [data.rows.length - 1, root.shows - 1];
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: event.shiftKey ? [0, 0] : [row, 0], End: event.shiftKey ? last : [row, last[1]],
    }[event.key];
    if (to) enter(root, to.map((at, k) => Math.max(0, Math.min(last[k], at))), true);
    else if (event.key === "Enter" || event.key === " ") cell.click();
    else return;
    event.preventDefault();
    event.stopPropagation(); // left and right do not move through the reply here
  };
  return () => root.sizes.disconnect();
}

// The row and the column of a cell; and making a cell the tab stop.
function spot(cell) {
  return [cell.parentElement.sectionRowIndex, cell.cellIndex - 1];
}

function enter(root, [row, column], focus) {
  const cells = root.querySelector("tbody")?.rows[row]?.querySelectorAll("[data-label]");
  const cell = cells?.[Math.min(column, cells.length - 1)] ?? root.querySelector("[data-label]");
  if (!cell) return;
  for (const other of root.querySelectorAll('[data-label][tabindex="0"]')) other.tabIndex = -1;
  cell.tabIndex = 0;
  root.at = spot(cell);
  if (focus) cell.focus();
}

function heading(data, kept) {
  const head = make("div", "head-row");
  const names = ["layer", "chosen_rank", "settled"];
  for (let k = 1; k <= kept; k += 1) names.push(`token_${k}`, `prob_${k}`);
  head.append(make("span", "grow",
    `The stronger the colour, the more probable${data.pins ? ". Click a token to pin it" : ""}`),
    csvButton(`lens-step-${data.step}`, () => [names, ...data.rows.map((r) => [
      r.layer, r.rank, Number(r.settled), ...r.cells.flatMap((c) => [c.text, c.prob])])]));
  return head;
}

function table(data, width) {
  const made = make("table");
  made.setAttribute("role", "grid");
  made.setAttribute("aria-label", "Logit Lens: the prediction of each layer. Arrow keys move " +
    `between tokens${data.pins ? ", Enter pins one" : ""}.`);
  const columns = make("colgroup");
  columns.append(make("col", "layer"));
  for (let k = 0; k < width; k += 1) columns.append(make("col"));
  columns.append(make("col", "rank"));
  const top = make("thead");
  const titles = make("tr");
  titles.append(make("th", "num dim", "layer"));
  for (let k = 1; k <= width; k += 1) titles.append(make("th", "dim", String(k)));
  const rank = make("th", "num dim", "rank");
  rank.title = "Rank of the chosen token at that layer";
  titles.append(rank);
  top.append(titles);
  const body = make("tbody");
  for (const entry of data.rows) {
    const row = make("tr", entry.settled ? "settled" : "");
    row.title = entry.title;
    const layer = make("td", "num dim", String(entry.layer));
    layer.setAttribute("role", "rowheader");
    row.append(layer);
    for (const cell of entry.cells.slice(0, width)) row.append(draw(cell));
    row.append(make("td", "num dim", `#${entry.rank.toLocaleString("en")}`));
    body.append(row);
  }
  made.append(columns, top, body);
  return made;
}

function draw(cell) {
  const node = make("td", cell.chosen ? "cell chosen" : "cell");
  if (cell.pinned) node.classList.add("pinned");
  node.style.setProperty("--v", cell.prob ?? 0);
  node.title = cell.title;
  node.dataset.label = cell.label;
  node.tabIndex = -1;
  node.setAttribute("role", "gridcell");
  node.setAttribute("aria-label", [cell.title.split("\n")[0], cell.chosen && "the chosen token",
    cell.pinned && "pinned"].filter(Boolean).join(", "));
  const pair = make("div", "pair");
  pair.append(make("span", "name mono", short(cell.text)), make("span", "num", cell.shown));
  node.append(pair);
  return node;
}
