// Two replies side by side. A click on a token selects its pair; opened in a new tab, the token is a
// link to its step. In each reply one token is a tab stop, the selected or the first one; the left and
// right keys move from it.
// data: {sides: [{tokens: [{text, mark, pair, same, first, step or position, title, heat: 0 to 1 or
// none}], conversation, message, kept, empty}], chosen: pair or null, rows: of the CSV}.
// Triggers: pick = a pair.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  // The focused token stays focused when the element is redrawn.
  const held = root.getRootNode().activeElement;
  const at = held && root.contains(held) ? [...root.querySelectorAll(".token")].indexOf(held) : -1;
  root.replaceChildren(...data.sides.map((side, number) => {
    const node = make("div", "side");
    const text = make("div", "text", side.empty);
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", number ? "The right reply" : "The left reply");
    if (side.kept) {
      const kept = write(make("span", "kept"), side.kept);
      kept.title = "The beginning of a branch; its steps are those of the reply it departs from";
      text.append(kept);
    }
    text.append(...side.tokens.map((token) => draw(token, side)));
    text.tabIndex = -1;
    node.append(text);
    return node;
  }));
  const save = make("div", "save");
  save.append(csvButton("replies", () => data.rows));
  root.append(save);
  const beside = (event) => {
    for (const node of root.querySelectorAll(".beside")) node.classList.remove("beside");
    const token = event.type === "mouseleave" ? null : event.target.closest(".token");
    if (!token) return;
    for (const node of root.querySelectorAll(`[data-pair="${token.dataset.pair}"]`))
      node.classList.add("beside");
  };
  const mark = (pair) => {
    for (const node of root.querySelectorAll(".token")) {
      const chosen = node.dataset.pair === String(pair);
      node.classList.toggle("chosen", chosen);
      if (chosen) node.setAttribute("aria-current", "true");
      else node.removeAttribute("aria-current");
      node.tabIndex = -1;
    }
    for (const side of root.querySelectorAll(".text")) {
      const stop = side.querySelector(".chosen") ?? side.querySelector(".token");
      if (stop) stop.tabIndex = 0;
    }
  };
  mark(data.chosen);
  if (at >= 0) root.querySelectorAll(".token")[at]?.focus({ preventScroll: true });
  root.onclick = (event) => {
    const token = event.target.closest(".token");
    if (!token || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    mark(token.dataset.pair);
    setTriggerValue("pick", Number(token.dataset.pair));
  };
  root.onkeydown = (event) => {
    const token = event.target.closest(".token");
    const to = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
    if (!token || !to || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    token[to]?.focus();
  };
  root.onmouseover = beside;
  root.onmouseleave = beside;
  root.onfocusin = beside;
}

function draw(token, side) {
  const node = write(make("a", "token"), token.text);
  const place = token.position === undefined ? `step=${token.step}` : `position=${token.position}`;
  node.href = `./?conversation=${side.conversation}&message=${side.message}&${place}`;
  node.title = token.title;
  node.dataset.pair = token.pair;
  node.draggable = false;
  if (token.mark) node.classList.add("mark");
  if (token.heat)
    node.style.background = `color-mix(in oklab, var(--accent) ${70 * token.heat}%, transparent)`;
  if (!token.same) node.classList.add("other");
  if (token.first) node.classList.add("first");
  return node;
}
