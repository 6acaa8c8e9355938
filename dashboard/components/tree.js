// A conversation as a tree: a row for each message, indented by the forks before it. A click opens its
// path. data: {rows: [{id, depth, role, text, from, fork, tokens, logprob, status, shown: on the path
// that is open}], csv}. Triggers: open = a message.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const list = make("ol", "list");
  list.setAttribute("aria-label", "Messages of the conversation");
  for (const entry of data.rows) {
    const item = make("li", entry.role);
    item.style.setProperty("--depth", entry.depth);
    if (entry.shown) item.classList.add("shown");
    const open = make("button", "line");
    open.type = "button";
    open.title = `Open the path through message ${entry.id} in Chat`;
    open.append(make("span", "number", String(entry.id)), make("span", "text", entry.text || "…"));
    open.onclick = () => setTriggerValue("open", entry.id);
    const about = make("span", "about");
    for (const part of [entry.from, entry.tokens, entry.logprob, entry.status])
      if (part) about.append(make("span", "", part));
    item.append(open, about);
    list.append(item);
  }
  const save = make("div", "save");
  save.append(csvButton("tree", () => data.csv));
  root.replaceChildren(list, save);
}
