// An element with a class and plain text; never markup.
function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

// A number with so many decimals: a dash if it is not known, "<0.01" if it would round to 0.
function figure(value, digits) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const least = 10 ** -digits;
  if (value > 0 && value < least / 2) return `<${least.toFixed(digits)}`;
  return unsigned(value.toFixed(digits));
}

// No "-0.00".
function unsigned(text) {
  return Number(text) === 0 ? text.replace("-", "") : text;
}

const DIRECTION_MARKS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;

// A piece of running text into its node. At a line break its leading space is not drawn, as in any
// text: else a sliver of its shade would be left at the end of the line.
function write(node, text) {
  // A direction mark acts on its own token alone.
  if (DIRECTION_MARKS.test(text)) node.style.unicodeBidi = "isolate";
  if (/^ \S/.test(text)) node.replaceChildren(make("span", "gap", " "), text.slice(1));
  else node.textContent = text;
  return node;
}

// A token in a narrow cell: <U+0001> as U+1.
function short(text) {
  return text.replace(/<U\+0*([0-9A-F]+)>/g, "U+$1");
}

// The step that this window shows, shared by all elements, so that a click in one shows in all at
// once. Events: "pick", a step was selected; "shown", the panel shows it; "news", a live reply grew.
const place = (window.okiTrace ??= Object.assign(new EventTarget(), {
  conversation: null, message: null, step: null, newest: null,
}));

// ``reveal`` scrolls to its token, ``focus`` focuses it.
function pick(conversation, message, step, { reveal = false, focus = false } = {}) {
  Object.assign(place, { conversation, message, step });
  place.dispatchEvent(new CustomEvent("pick", { detail: { reveal, focus } }));
}

// A signal for an element's listeners, which ends when it is redrawn or removed.
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

// Saves data from the browser, without a request.
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

// An apostrophe before texts that a spreadsheet would read as formulas, as in results.py.
function field(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return Number.isNaN(value) ? "" : String(value);
  const text = /^\s*[=+\-@＝＋－＠]./s.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
