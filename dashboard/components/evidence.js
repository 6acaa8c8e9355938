// Where the model looked, painted onto what it saw.
// data: {pieces: [{text, value, weight, kind, out, title}], seam: index of the reply's first token,
// step}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const head = make("div", "head-row");
  const key = make("span", "grow");
  key.append("no weight ", make("span", "ramp"), " most");
  head.append(key, csvButton(`evidence-step-${data.step + 1}`, () => [
    ["position", "part", "token", "weight", "left_out"],
    ...data.pieces.map((p, at) => [at, p.kind, p.text, p.weight, Number(p.out)])]));
  const text = make("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", "The prompt and the reply so far, shaded by attention");
  const nodes = [];
  data.pieces.forEach((piece, index) => {
    if (index === data.seam) nodes.push(make("span", "seam"));
    const node = make("span", `piece ${piece.kind}`, piece.text);
    node.title = piece.title;
    if (piece.value) node.style.setProperty("--v", piece.value);
    if (piece.out) node.classList.add("out");
    nodes.push(node);
  });
  text.append(...nodes);
  root.replaceChildren(head, text);
  // A long prompt is scrolled to where the model looked most.
  const strongest = data.pieces.findIndex((piece) => piece.value === 1);
  const piece = text.querySelectorAll(".piece")[strongest];
  if (piece) text.scrollTop = piece.offsetTop - text.clientHeight * 0.7;
}
