// The tokens that each layer promoted and suppressed, the last layer on top.
// data: {rows: [{layer, up: [{text, delta, shown, exact, chosen, title}], down: [..]}], columns, step}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const head = make("div", "head-row");
  head.append(
    make("span", "grow", "Change of probability from one layer to the next"),
    csvButton(`changes-step-${data.step}`, () => [
      ["layer", "token", "change", "exact"],
      ...data.rows.flatMap((r) => [...r.up, ...r.down].map(
        (c) => [r.layer, c.text, c.delta, Number(c.exact)]))]));
  const table = make("table");
  table.setAttribute("aria-label", "Tokens that each layer promoted and suppressed");
  const titles = make("tr");
  titles.append(make("th", "num dim layer", "layer"));
  for (const name of ["▲ promoted", "▼ suppressed"]) {
    const title = make("th", "dim", name);
    title.colSpan = data.columns;
    titles.append(title);
  }
  table.append(titles);
  for (const entry of data.rows) {
    const row = make("tr");
    row.append(make("td", "num dim", String(entry.layer)));
    for (const [name, cells] of [["up", entry.up], ["down", entry.down]]) {
      for (let k = 0; k < data.columns; k += 1) row.append(draw(cells[k], name));
    }
    table.append(row);
  }
  root.replaceChildren(head, table);
}

function draw(change, name) {
  const node = make("td", `cell ${name}`);
  if (!change) return node;
  if (change.chosen) node.classList.add("chosen");
  node.style.setProperty("--v", Math.abs(change.delta));
  node.title = change.title;
  const pair = make("div", "pair");
  pair.append(make("span", "name mono", short(change.text)), make("span", "num", change.shown));
  node.append(pair);
  return node;
}
