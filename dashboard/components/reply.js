// A reply, or a message before one, as clickable tokens. A click selects the step in all elements
// of the page.
// A button above folds the thinking; selecting one of its tokens opens it.
// data: {tokens: [{text, value, mark, title, part}], thinking, fold, conversation, message, live,
// first, newest, blue, low, high, name, status, bad, rows: of the CSV, empty while the reply is live,
// label: the role of a message before the reply, "" for the user's; null for a reply}. The n-th
// token is step ``first`` + n; negative steps are tokens of the prompt, -1 the last one.
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const signal = listening(root);
  const signatures = (root.signatures ??= []);
  const text = (root.text ??= make("div", "text"));
  const foot = (root.foot ??= make("div", "foot"));
  const fold = (root.fold ??= make("button", "fold tool"));
  if (!text.isConnected) root.replaceChildren(fold, text, foot);
  root.classList.toggle("given", data.label !== null);
  root.dataset.role = data.label ?? "";
  const unfold = (open) => {
    root.open = open;
    text.classList.toggle("folded", !open);
    fold.setAttribute("aria-expanded", String(open));
    fold.textContent = `${open ? "▾" : "▸"} ${data.thinking}`;
  };
  fold.type = "button";
  fold.hidden = !data.fold;
  fold.onclick = () => unfold(!root.open);
  if (data.fold) unfold(root.open ?? false);
  else text.classList.remove("folded");
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", data.label === null ? "Tokens of the reply"
    : `Tokens of a message: ${data.label || "user"}`);

  root.querySelector(".cursor")?.remove();
  data.tokens.forEach((token, index) => {
    const signature = JSON.stringify([token, data.blue]);
    if (signatures[index] === signature) return;
    signatures[index] = signature;
    const node = draw(token, data.blue);
    node.dataset.index = index;
    const old = text.children[index];
    if (old) old.replaceWith(node);
    else text.append(node);
  });
  while (text.children.length > data.tokens.length) text.lastChild.remove();
  signatures.length = data.tokens.length;
  if (data.live) text.append(make("span", "cursor"));
  footing(foot, data);

  const follow = (event) => {
    const here = place.message === data.message && place.step !== null;
    const index = here ? place.step - data.first : null;
    mark(text, index);
    const node = index === null ? null : text.children[index];
    if (node?.classList.contains("thinking") && data.fold) unfold(true);
    if (event?.detail?.focus) node?.focus({ preventScroll: true });
    if (event?.detail?.reveal) node?.scrollIntoView({ block: "nearest" });
  };
  follow();
  place.addEventListener("pick", follow, { signal });
  place.addEventListener("shown", follow, { signal });
  text.onclick = (event) => {
    const node = event.target.closest(".token:not(.untraced)");
    if (node) pick(data.conversation, data.message, data.first + Number(node.dataset.index));
  };
  if (data.newest !== null && (data.live || place.newest?.message === data.message)) {
    place.newest = { message: data.message, step: data.newest };
    place.dispatchEvent(new Event("news"));
  }
  return () => root.stop.abort();
}

function draw(token, blue) {
  const node = write(make("span", "token"), token.text);
  node.title = token.title;
  node.tabIndex = -1;
  node.setAttribute("role", "option");
  if (token.mark) node.classList.add("mark");
  if (token.untraced) node.classList.add("untraced");
  if (token.part) node.classList.add(token.part);
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
  for (const node of text.querySelectorAll(".chosen, [tabindex='0']")) {
    node.classList.remove("chosen");
    node.removeAttribute("aria-selected");
    node.tabIndex = -1;
  }
  // One tab stop: the selected token, or the first.
  const node = text.children[index ?? 0] ?? text.children[0];
  if (node && (index === null || !text.children[index])) node.tabIndex = 0;
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
  const csv = data.rows.length ? [csvButton(`${data.label === null ? "reply" : "given"}-${data.message}`, () => data.rows)] : [];
  const end = make("span", "end");
  end.append(make("span", data.bad ? "bad" : "status", data.status), ...csv);
  foot.replaceChildren(legend, end);
}
