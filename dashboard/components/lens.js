// What each layer would have said, the last layer on top.
// data: {rows: [{layer, cells: [{text, prob, chosen, title}], rank, settled, title}]}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const table = make("table");
  const columns = make("colgroup");
  const width = data.rows[0]?.cells.length ?? 0;
  columns.append(make("col", "layer"));
  for (let k = 0; k < width; k += 1) columns.append(make("col"));
  columns.append(make("col", "rank"));
  const body = make("tbody");
  for (const entry of data.rows) {
    const row = make("tr", entry.settled ? "settled" : "");
    row.title = entry.title;
    row.append(make("td", "num dim", String(entry.layer)));
    for (const cell of entry.cells) row.append(draw(cell));
    row.append(make("td", "num dim", `#${entry.rank.toLocaleString("en")}`));
    body.append(row);
  }
  table.append(columns, body);
  root.replaceChildren(table);
}

function draw(cell) {
  const node = make("td", cell.chosen ? "cell chosen" : "cell");
  node.style.setProperty("--v", cell.prob ?? 0);
  node.title = cell.title;
  const pair = make("div", "pair");
  pair.append(make("span", "name mono", cell.text), make("span", "num", figure(cell.prob, 2)));
  node.append(pair);
  return node;
}
