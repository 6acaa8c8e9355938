// An element with a class and plain text; never markup.
function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

// A number with so many digits: a dash where it is not known, and never 0 for what is not 0.
function figure(value, digits) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const least = 10 ** -digits;
  if (value > 0 && value < least / 2) return `<${least.toFixed(digits)}`;
  return unsigned(value.toFixed(digits));
}

// A zero has no sign, from whichever side it was rounded.
function unsigned(text) {
  return Number(text) === 0 ? text.replace("-", "") : text;
}

// A piece of running text into its node. Where a line ends before it, the space it begins with is
// drawn at the end of neither line, as in any text: else a sliver of its shade would stand alone there.
function write(node, text) {
  if (/^ \S/.test(text)) node.replaceChildren(make("span", "gap", " "), text.slice(1));
  else node.textContent = text;
  return node;
}

// A token in little room: of a character that is told by its number, the number alone.
function short(text) {
  return text.replace(/<U\+0*([0-9A-F]+)>/g, "U+$1");
}

// Which step this window looks at: one for all elements, so that a click in one shows in all at
// once. "pick": someone chose a step. "shown": the panel shows it. "news": a live reply has grown.
const place = (window.okiTrace ??= Object.assign(new EventTarget(), {
  conversation: null, message: null, step: null, newest: null,
}));

// ``reveal``: its token is scrolled to; ``focus``: it gets the keys.
function pick(conversation, message, step, { reveal = false, focus = false } = {}) {
  Object.assign(place, { conversation, message, step });
  place.dispatchEvent(new CustomEvent("pick", { detail: { reveal, focus } }));
}

// What listens on behalf of an element, until it is drawn anew or goes.
function listening(root) {
  root.stop?.abort();
  root.stop = new AbortController();
  return root.stop.signal;
}

function button(name, title, act) {
  const node = make("button", "tool", name);
  node.type = "button";
  node.title = title;
  node.setAttribute("aria-label", title);
  node.onclick = act;
  return node;
}

// Saves what is shown; nothing is asked of any server.
function save(name, type, parts) {
  const address = URL.createObjectURL(new Blob(parts, { type }));
  const link = make("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function csvButton(name, rows) {
  return button("CSV", `Save ${name} as CSV`, () =>
    save(`${name}.csv`, "text/csv", [rows().map((row) => row.map(field).join(",")).join("\r\n")]));
}

// A spreadsheet takes some texts for formulas: an apostrophe keeps them text, as in results.py.
function field(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return Number.isNaN(value) ? "" : String(value);
  const text = /^\s*[=+\-@＝＋－＠]./s.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
