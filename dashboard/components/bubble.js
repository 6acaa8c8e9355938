// A message of a user, the system or a tool. data: {pieces: [{text, mark}], label}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const bubble = make("div", "message");
  if (data.label) bubble.append(make("div", "role", data.label));
  for (const piece of data.pieces) {
    const node = make("span", piece.mark ? "mark" : "", piece.text);
    if (piece.mark) node.title = "A special token to the model";
    bubble.append(node);
  }
  root.replaceChildren(bubble);
}
