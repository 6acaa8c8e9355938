// A message that was typed by a person. data: {text, label}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const said = document.createElement("div");
  said.className = "said";
  if (data.label) {
    const who = document.createElement("div");
    who.className = "who";
    who.textContent = data.label;
    said.append(who);
  }
  const text = document.createElement("span");
  text.textContent = data.text;
  said.append(text);
  root.replaceChildren(said);
}
