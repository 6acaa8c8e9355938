// The selected token, its numbers, and buttons to the next one.
// data: {conversation, message, step, first, total, position, following, waiting, where, what, facts: [{name, value,
// title}], rows: of the CSV}, or {empty: true}. A negative step is a token of the prompt, -1 the
// last one; ``position`` is then its position, else null. ``branch`` is that of the link, or null. ``first`` is the first step there is.
// Triggers: pick = {conversation, message, step};
// refresh = a number.
//
// This element alone tells the server which step was selected, one at a time: while a response is
// pending the marks already move, and the last selection is sent after it.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const state = (root.state ??= { sent: null, since: 0, refreshed: null });
  const signal = listening(root);
  const same = (a, b) => a && b && a.message === b.message && a.step === b.step;
  const wish = () => ({ conversation: place.conversation, message: place.message, step: place.step });
  const send = () => {
    state.sent = wish();
    state.since = performance.now();
    setTriggerValue("pick", state.sent);
  };
  const underWay = () => state.sent && performance.now() - state.since < 3000;

  if (underWay() && !same(data, state.sent)) {
    // An older response: the requested one is still pending.
  } else {
    const late = state.sent && !same(wish(), state.sent);
    state.sent = null;
    if (late) send();
    else if (!data.empty) {
      Object.assign(place, {
        conversation: data.conversation, message: data.message, step: data.step });
      place.dispatchEvent(new Event("shown"));
    } else place.message = place.step = null;
  }
  place.addEventListener("pick", () => underWay() || send(), { signal });

  const news = () => {
    const newest = place.newest;
    if (!newest || state.sent) return;
    const behind = data.empty || (newest.message === data.message && (
      (data.following && newest.step !== data.step) || (data.waiting && newest.step >= data.step)));
    const name = `${newest.message}/${newest.step}`;
    if (!behind || state.refreshed === name) return;
    state.refreshed = name;
    setTriggerValue("refresh", newest.step);
  };
  place.addEventListener("news", news, { signal });
  news();

  if (data.empty) {
    root.replaceChildren();
    return () => root.stop.abort();
  }
  // A pressed button keeps the focus.
  const walk = (by, focus = false) => {
    const next = place.message === data.message ? place.step + by : data.step + by;
    if (next < data.first || next >= data.total) return;
    pick(data.conversation, data.message, next, { reveal: true, focus });
  };
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || typing(event)) return;
    event.preventDefault();
    walk(by, true);
  }, { signal });

  const where = make("div", "where");
  const copy = button("Copy link", "Copy a link to this step", async () => {
    const query = new URLSearchParams({
      conversation: data.conversation, message: data.message,
      ...(data.position === null ? { step: data.step } : { position: data.position }),
      ...(data.branch === null ? {} : { branch: data.branch }) });
    await navigator.clipboard.writeText(`${location.origin}${location.pathname}?${query}`);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy link"), 1500);
  });
  const back = button("←", "Previous token (left key)", () => walk(-1));
  const on = button("→", "Next token (right key)", () => walk(1));
  back.disabled = data.step <= data.first;
  on.disabled = data.step + 1 >= data.total;
  // On a narrow page the panel is a sheet at the bottom, which can be folded.
  const page = document.documentElement;
  const fold = button("", "", () => {
    page.classList.toggle("oki-folded");
    told();
  });
  fold.classList.add("fold");
  const told = () => {
    const folded = page.classList.contains("oki-folded");
    fold.textContent = folded ? "Show more" : "Show less";
    fold.title = folded ? "Show the whole step" : "Show the token and its numbers only";
    fold.setAttribute("aria-label", fold.title);
    fold.setAttribute("aria-expanded", String(!folded));
  };
  told();
  const within = (root.getRootNode().host ?? root).closest(".st-key-panel");
  where.append(make("span", "grow", data.where), back, on, copy,
    csvButton(`numbers-${data.position === null ? "step" : "position"}-${data.position ?? data.step}`, () => data.rows), ...(within ? [fold] : []));
  const what = make("div", "what", data.what);
  what.setAttribute("role", "heading");
  what.setAttribute("aria-level", "2");
  const list = make("dl");
  for (const fact of data.facts) {
    const pair = make("div");
    pair.title = fact.title;
    pair.append(make("dt", "", fact.name), make("dd", "", fact.value));
    list.append(pair);
  }
  // Announced by screen readers when the step changes.
  const spoken = make("div", "spoken", `${data.where}: ${data.what.slice(0, 80)}`);
  spoken.setAttribute("aria-live", "polite");
  const focused = root.contains(root.getRootNode().activeElement)
    ? root.getRootNode().activeElement.getAttribute("aria-label") : null;
  root.replaceChildren(where, what, list, spoken);
  if (focused) root.querySelector(`[aria-label="${focused}"]`)?.focus();
  return () => root.stop.abort();
}

function typing(event) {
  const at = event.composedPath()[0];
  return at instanceof HTMLElement && (at.isContentEditable ||
    /^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName) ||
    /^(slider|radio|tab|grid|gridcell|option)$/.test(at.getAttribute("role") ?? "") && !at.closest(".reply"));
}
