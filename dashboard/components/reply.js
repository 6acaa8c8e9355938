// A reply as its tokens; each is a button.
// data: {tokens: [{text, value, mark, title}], chosen, keys, live, blue, low, high, name, status, bad}
// Triggers: pick = the index of the token chosen by click or arrow key.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const state = (root.state ??= { signatures: [], chosen: null });
  const text = (root.text ??= make("div", "text"));
  const foot = (root.foot ??= make("div", "foot"));
  if (!text.isConnected) root.replaceChildren(text, foot);
  state.chosen = data.chosen;

  const choose = (index) => {
    state.chosen = index;
    mark(text, index);
    setTriggerValue("pick", index);
  };
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", "Tokens of the reply");

  root.querySelector(".cursor")?.remove();
  data.tokens.forEach((token, index) => {
    const signature = JSON.stringify([token, data.blue]);
    if (state.signatures[index] === signature) return;
    state.signatures[index] = signature;
    const node = draw(token, data.blue);
    node.dataset.index = index;
    const old = text.children[index];
    if (old) old.replaceWith(node);
    else text.append(node);
  });
  while (text.children.length > data.tokens.length) text.lastChild.remove();
  state.signatures.length = data.tokens.length;
  if (data.live) text.append(make("span", "cursor"));
  mark(text, data.chosen);
  text.onclick = (event) => {
    const node = event.target.closest(".token");
    if (node) choose(Number(node.dataset.index));
  };
  footing(foot, data);

  if (root.onkey) document.removeEventListener("keydown", root.onkey);
  root.onkey = null;
  if (data.keys) {
    root.onkey = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey || typing(event)) return;
      const next = (state.chosen ?? -1) + step;
      if (next < 0 || next >= data.tokens.length) return;
      event.preventDefault();
      choose(next);
      text.children[next].focus();
    };
    document.addEventListener("keydown", root.onkey);
  }
  return () => root.onkey && document.removeEventListener("keydown", root.onkey);
}

function draw(token, blue) {
  const node = make("span", "token", token.text);
  node.title = token.title;
  node.tabIndex = -1;
  node.setAttribute("role", "option");
  if (token.mark) node.classList.add("mark");
  if (blue) node.classList.add("blue");
  if (token.value !== null) node.style.setProperty("--v", token.value);
  node.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      node.click();
    }
  };
  return node;
}

function mark(text, index) {
  for (const node of text.querySelectorAll(".chosen")) {
    node.classList.remove("chosen");
    node.removeAttribute("aria-selected");
    node.tabIndex = -1;
  }
  // One stop for the Tab key: the chosen token, or the first.
  const node = text.children[index ?? 0];
  if (node && index === null) node.tabIndex = 0;
  else if (node?.classList.contains("token")) {
    node.classList.add("chosen");
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
  }
}

function footing(foot, data) {
  const legend = make("span");
  if (data.name) {
    const ramp = make("span", "scale");
    ramp.style.setProperty("--ramp", data.blue ? "var(--blue)" : "var(--accent)");
    legend.append(`${data.name}  ${data.low}`, ramp, data.high);
  }
  foot.replaceChildren(legend, make("span", data.bad ? "bad" : "", data.status));
}

function typing(event) {
  const at = event.composedPath()[0];
  return at instanceof HTMLElement && (at.isContentEditable ||
    /^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName) || at.getAttribute("role") === "slider");
}
