// Two replies side by side, a link a token to its step. What lies beside a token is outlined with it.
// data: {sides: [{tokens: [{text, mark, pair, same, first, step, title}], conversation, message, empty}]}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  root.replaceChildren(...data.sides.map((side, number) => {
    const node = make("div", "side");
    const text = make("div", "text", side.empty);
    text.setAttribute("aria-label", number ? "The right reply" : "The left reply");
    text.append(...side.tokens.map((token) => draw(token, side)));
    node.append(text);
    return node;
  }));
  const beside = (event) => {
    for (const node of root.querySelectorAll(".beside")) node.classList.remove("beside");
    const token = event.type === "mouseleave" ? null : event.target.closest(".token");
    if (!token) return;
    for (const node of root.querySelectorAll(`[data-pair="${token.dataset.pair}"]`))
      node.classList.add("beside");
  };
  root.onmouseover = beside;
  root.onmouseleave = beside;
  root.onfocusin = beside;
}

function draw(token, side) {
  const node = make("a", "token", token.text);
  node.href = `./?conversation=${side.conversation}&message=${side.message}&step=${token.step}`;
  node.title = token.title;
  node.dataset.pair = token.pair;
  node.draggable = false;
  if (token.mark) node.classList.add("mark");
  if (!token.same) node.classList.add("other");
  if (token.first) node.classList.add("first");
  return node;
}
