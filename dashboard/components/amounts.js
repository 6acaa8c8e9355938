// Parts of a whole, each with a bar and its size. data: {label, name, rows: [{what, size, share, bytes,
// tone, meaning}]}; tone: "accent", "blue" or "gray".
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const list = make("div", "list");
  list.setAttribute("role", "table");
  list.setAttribute("aria-label", data.label);
  list.append(...data.rows.map((one) => {
    const row = make("div", `row ${one.tone}`);
    row.setAttribute("role", "row");
    row.title = one.meaning;
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = `${one.share * 100}%`;
    track.append(fill);
    const texts = [["what", one.what], ["num", one.size],
      ["num dim", `${figure(one.share * 100, 1)} %`]];
    const [what, size, share] = texts.map(([name, text]) => {
      const node = make("span", name, text);
      node.setAttribute("role", "cell");
      return node;
    });
    row.append(what, track, size, share);
    return row;
  }));
  root.replaceChildren(list, csvButton(data.name, () => [
    ["what", "bytes", "share"], ...data.rows.map((r) => [r.what, r.bytes, r.share])]));
}
