// Where the model looked, painted onto what it saw.
// data: {pieces: [{text, value, kind, title}], seam: index of the reply's first token}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const nodes = [];
  data.pieces.forEach((piece, index) => {
    if (index === data.seam) nodes.push(make("span", "seam"));
    const node = make("span", `piece ${piece.kind}`, piece.text);
    node.title = piece.title;
    if (piece.value) node.style.setProperty("--v", piece.value);
    nodes.push(node);
  });
  root.replaceChildren(...nodes);
  // A long prompt is scrolled to where the model looked most.
  const strongest = data.pieces.findIndex((piece) => piece.value === 1);
  const piece = root.querySelectorAll(".piece")[strongest];
  if (piece) root.scrollTop = piece.offsetTop - root.clientHeight * 0.7;
}
