// Attention, as shades of the text that the model saw.
// data: {pieces: [{text, value, weight, kind, out, title}], seam: index of the reply's first token,
// step}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const head = make("div", "head-row");
  const key = make("span", "grow");
  key.append("No weight ", make("span", "ramp"), " most");
  head.append(key, csvButton(`evidence-step-${data.step}`, () => [
    ["position", "part", "token", "weight", "left_out"],
    ...data.pieces.map((p, at) => [at, p.kind, p.text, p.weight, Number(p.out)])]));
  const text = make("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", "The prompt and the reply so far, shaded by attention");
  const nodes = [];
  data.pieces.forEach((piece, index) => {
    if (index === data.seam) nodes.push(make("span", "seam"));
    const node = write(make("span", `piece ${piece.kind}`), piece.text);
    node.title = piece.title;
    if (piece.value) node.style.setProperty("--v", piece.value);
    if (piece.out) node.classList.add("out");
    nodes.push(node);
  });
  text.append(...nodes);
  // The same for screen readers.
  const most = data.pieces.map((piece, at) => ({ ...piece, at })).filter((piece) => piece.weight)
    .sort((a, b) => b.weight - a.weight).slice(0, 5)
    .map((piece) => `${piece.text.trim() || "blank"} at position ${piece.at}, ${figure(piece.weight, 3)}`);
  const spoken = make("div", "spoken", `Most attended: ${most.join("; ") || "nothing"}.`);
  spoken.id = "most-attended";
  text.setAttribute("aria-describedby", spoken.id);
  root.replaceChildren(head, text, spoken);
  // Scroll a long prompt to the most attended piece.
  const strongest = data.pieces.findIndex((piece) => piece.value === 1);
  const piece = text.querySelectorAll(".piece")[strongest];
  if (piece) text.scrollTop = piece.offsetTop - text.clientHeight * 0.7;
}
