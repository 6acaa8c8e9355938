// Keys, the step that is shown first, and what redraws the report.
document.addEventListener("keydown", (event) => {
  if (at.reply < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target instanceof Element && event.target.closest("select, input")) return;
  const { reply, steps } = mapped();
  const next = { ArrowLeft: at.step - 1, ArrowRight: at.step + 1, Home: numberOf(0), End: numberOf(steps.length - 1) }[event.key];
  if (next === undefined || !stepOf(reply, next)) return;
  event.preventDefault();
  choose(at.reply, next, { focus: true });
});

function open() {
  const [, reply, step] = /^#(\d+)\.(-?\d+)$/.exec(location.hash) ?? [];
  if (trace.replies[reply - 1] && stepOf(trace.replies[reply - 1], Number(step))) return choose(reply - 1, Number(step));
  let first = trace.replies.findIndex((r) => r.steps.length);
  if (first < 0) first = trace.replies.findIndex((r) => r.given.length);
  if (first < 0) return fill(byId("panel"), make("p", "dim", "No reply of this conversation has traced tokens."));
  // Select the least likely token outside of thinking.
  const { steps, given, parts, promptLen } = trace.replies[first];
  const hidden = (n) => parts.some(([kind, from, to]) => kind === "thinking" && n >= from && n < to);
  const shown = steps.length ? steps : given;
  const rated = shown.map((s, n) => (steps.length && hidden(n) ? -2 : s.surprisal ?? -1));
  const best = rated.indexOf(rated.reduce((a, b) => Math.max(a, b), -2));
  return choose(first, steps.length ? best : given[best].position - promptLen);
}

drawTalk();
paint();
open();
new ResizeObserver(() => at.reply >= 0 && layMap(false)).observe(frame);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
matchMedia("print").addEventListener("change", () => at.reply >= 0 && layMap(false));
window.addEventListener("hashchange", open);
// Print includes the details of each reply, which cannot be opened on paper.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
