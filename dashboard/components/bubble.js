// A message that was typed by a person. data: {text, label}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const said = make("div", "said");
  if (data.label) said.append(make("div", "who", data.label));
  said.append(make("span", "", data.text));
  root.replaceChildren(said);
}
