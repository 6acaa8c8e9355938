// A small table of texts. data: {label, name, head: [{text, num, title}], rows: [[text]], marked: [row]}
// With a name it has a CSV button; without a head the first column is the heading of each row.
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const made = make("table");
  made.setAttribute("aria-label", data.label);
  const titled = data.head.some((column) => column.text);
  if (titled) {
    const titles = make("tr");
    for (const column of data.head) {
      const title = make("th", column.num ? "num" : "", column.text);
      title.scope = "col";
      if (column.title) title.title = column.title;
      titles.append(title);
    }
    made.append(titles);
  }
  data.rows.forEach((texts, number) => {
    const row = make("tr", data.marked?.includes(number) ? "marked" : "");
    texts.forEach((text, at) => {
      const node = make(at ? "td" : "th", data.head[at].num ? "num" : "", text);
      if (!at) node.scope = "row";
      row.append(node);
    });
    made.append(row);
  });
  const csv = data.name ? [csvButton(data.name, () => [
    ...(titled ? [data.head.map((column) => column.text)] : []), ...data.rows])] : [];
  root.replaceChildren(made, ...csv);
}
