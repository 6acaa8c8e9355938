// What each layer would have said, the last layer on top.
// data: {rows: [{layer, cells: [{text, label, prob, shown, chosen, pinned, title}], rank, settled,
// title}], pins: whether a token can be pinned, step}. Triggers: pin = a token's label.
const CELL = 118; // px: narrower, and a token and its number are no longer read

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const kept = data.rows[0]?.cells.length ?? 0;
  root.shows = 0;
  const lay = () => {
    const room = Math.floor((root.clientWidth - 110) / CELL) || 3;
    const width = Math.min(kept, Math.max(3, room));
    if (width === root.shows) return;
    root.shows = width;
    root.replaceChildren(heading(data, kept), table(data, width));
  };
  lay();
  root.sizes?.disconnect();
  root.sizes = new ResizeObserver(lay);
  root.sizes.observe(root);
  root.classList.toggle("pins", data.pins);
  root.onclick = (event) => {
    if (!data.pins) return;
    const cell = event.target.closest("[data-label]");
    if (cell) setTriggerValue("pin", cell.dataset.label);
  };
  root.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    const cell = event.target.closest("[data-label]");
    if (!cell) return;
    event.preventDefault();
    cell.click();
  };
  return () => root.sizes.disconnect();
}

function heading(data, kept) {
  const head = make("div", "head-row");
  const names = ["layer", "chosen_rank", "settled"];
  for (let k = 1; k <= kept; k += 1) names.push(`token_${k}`, `prob_${k}`);
  head.append(make("span", "grow",
    `darker is more probable${data.pins ? "; click a token to pin it" : ""}`),
    csvButton(`lens-step-${data.step + 1}`, () => [names, ...data.rows.map((r) => [
      r.layer, r.rank, Number(r.settled), ...r.cells.flatMap((c) => [c.text, c.prob])])]));
  return head;
}

function table(data, width) {
  const made = make("table");
  made.setAttribute("aria-label", "Logit Lens: what each layer would have said");
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
    row.append(make("td", "num dim", String(entry.layer)));
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
  const pair = make("div", "pair");
  pair.append(make("span", "name mono", cell.text), make("span", "num", cell.shown));
  node.append(pair);
  return node;
}
