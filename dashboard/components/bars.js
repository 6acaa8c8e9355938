// What was considered. data: {rows: [{text, prob, sampled, chosen, title}], sampled: bool}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  root.classList.toggle("sampled", data.sampled);
  const rows = data.rows.map((entry) => {
    const row = make("div", "row");
    if (entry.chosen) row.classList.add("chosen");
    if (data.sampled && entry.sampled === 0) row.classList.add("gone");
    row.title = entry.title;
    const name = make("span", "name mono", entry.text);
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = `${(entry.prob ?? 0) * 100}%`;
    track.append(fill);
    row.append(name, track, make("span", "num", figure(entry.prob, 3)));
    if (data.sampled) {
      row.append(make("span", "num", entry.sampled === 0 ? "–" : figure(entry.sampled, 3)));
    }
    return row;
  });
  if (data.sampled) {
    const head = make("div", "row head");
    head.append(
      make("span"), make("span"), make("span", "num", "model"), make("span", "num", "sampled"));
    rows.unshift(head);
  }
  root.replaceChildren(...rows);
}
