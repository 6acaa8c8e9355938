// A message of a user, the system or a tool. data: {pieces: [{text, mark}], label}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const said = make("div", "said");
  if (data.label) said.append(make("div", "who", data.label));
  for (const piece of data.pieces) {
    const node = make("span", piece.mark ? "mark" : "", piece.text);
    if (piece.mark) node.title = "A special token to the model";
    said.append(node);
  }
  root.replaceChildren(said);
}
