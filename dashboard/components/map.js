// A reply as a grid: steps across, layers (the lens) or positions (attention) down. Steps below 0
// are tokens of the prompt. Only the visible part is drawn, onto a canvas; the axes stay in sight.
// data: see viewdata/lens.py lens_map and viewdata/attention.py attention_map; and {conversation,
// message, prompt: whether it has tokens of the prompt, name, height}. Triggers: load = {conversation, message, step}, for a step outside the map.
const ZOOMS = {
  lens: [[7, 7], [14, 14], [30, 17], [56, 19], [92, 22]],
  attention: [[4, 4], [8, 8], [14, 14], [30, 17], [56, 19]],
};
const VIEWS = {
  lens: {
    agreement: "agreement",
    probability: "probability",
    entropy: "entropy",
    rank: "rank of final token",
  },
  attention: { weight: "attention weight" },
};

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const signal = listening(root);
  const state = (root.state ??= { view: "agreement", zoom: {}, cursor: null });
  const model = data.kind === "lens" ? lensModel(data, state) : attentionModel(data);
  state.zoom[data.kind] ??= data.kind === "lens" || data.steps.length <= 60 ? 3 : 1;

  const frame = make("div", "frame");
  const room = make("div", "room");
  const canvas = make("canvas");
  const tip = make("div", "tip");
  const spoken = make("div", "spoken");
  spoken.setAttribute("aria-live", "polite");
  const summary = make("div", "spoken", model.summary());
  summary.id = "summary";
  frame.tabIndex = 0;
  frame.setAttribute("role", "application");
  frame.setAttribute("aria-label",
    `${model.title}. ${model.columns} steps, ${model.rows} ${model.down}. Left and right keys ` +
    "choose the step, up and down the row.");
  frame.setAttribute("aria-describedby", summary.id);
  room.append(canvas);
  frame.append(room);
  tip.hidden = true;

  const size = () => ZOOMS[data.kind][state.zoom[data.kind]];
  const look = theme(root, data.kind);
  const draw = () => paint(canvas.getContext("2d"), {
    model, look, size: size(), x: frame.scrollLeft, y: frame.scrollTop,
    width: frame.clientWidth, height: frame.clientHeight,
    chosen: column(), cursor: state.cursor,
  });
  const column = () => place.message === data.message
    ? data.steps.findIndex((step) => step.index === place.step) : -1;
  const gutter = () => model.gutter(size());
  const lay = () => {
    const [w, h] = size();
    const wide = gutter() + model.columns * w, tall = HEAD + model.rows * h;
    room.style.width = `${wide}px`;
    room.style.height = `${tall}px`;
    frame.style.height = `${Math.min(tall + 14, data.height)}px`;
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${frame.clientWidth}px`;
    canvas.style.height = `${frame.clientHeight}px`;
    canvas.width = frame.clientWidth * ratio;
    canvas.height = frame.clientHeight * ratio;
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    draw();
  };
  const reveal = (at) => {
    const [w, h] = size();
    // The position of the step itself: the end of the positions it can attend to.
    const end = (data.positions ? data.steps[at].position : 0) * h;
    const high = frame.clientHeight - HEAD;
    if (end > frame.scrollTop + high || end < frame.scrollTop) {
      frame.scrollTop = Math.floor((end - high * 0.8) / h) * h; // no row half under the header
    }
    const left = at * w, seen = frame.clientWidth - gutter();
    if (left < frame.scrollLeft || left + w > frame.scrollLeft + seen) {
      frame.scrollLeft = left - seen / 2;
    }
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect(), [w, h] = size();
    const x = event.clientX - box.left - gutter(), y = event.clientY - box.top - HEAD;
    const c = Math.floor((x + frame.scrollLeft) / w);
    if (x < 0 || c < 0 || c >= model.columns) return null;
    const r = y < 0 ? -1 : Math.floor((y + frame.scrollTop) / h);
    return r >= model.rows ? null : { c, r };
  };
  const explain = (at, x, y) => {
    const lines = at && model.tell(at.c, at.r);
    tip.hidden = !lines;
    if (!lines) return;
    tip.replaceChildren(...lines.map((line, k) => make("div", k ? "" : "first", line)));
    const box = root.getBoundingClientRect();
    const left = Math.min(x - box.left + 14, box.width - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${y - box.top + 18}px`;
  };
  const go = (c) => pick(data.conversation, data.message, data.steps[c].index);

  frame.onscroll = () => requestAnimationFrame(draw);
  frame.onpointermove = (event) => explain(under(event), event.clientX, event.clientY);
  frame.onpointerleave = () => (tip.hidden = true);
  frame.onclick = (event) => {
    const at = under(event);
    if (at) go(at.c);
  };
  frame.onkeydown = (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const c = column();
    if (!by || c < 0) return;
    event.preventDefault();
    const from = state.cursor ?? (by > 0 ? -1 : model.rows);
    state.cursor = Math.max(0, Math.min(model.rows - 1, from + by));
    const [w, h] = size(), top = state.cursor * h, seen = frame.clientHeight - HEAD;
    if (top < frame.scrollTop || top + h > frame.scrollTop + seen) frame.scrollTop = top - seen / 2;
    draw();
    const box = canvas.getBoundingClientRect();
    explain({ c, r: state.cursor }, box.left + gutter() + (c + 1) * w - frame.scrollLeft,
      box.top + HEAD + top - frame.scrollTop);
    spoken.textContent = model.tell(c, state.cursor).join(". ");
  };
  const follow = (event) => {
    const c = column();
    if (c >= 0) {
      if (root.last !== `${place.message}/${place.step}`) reveal(c);
      root.last = `${place.message}/${place.step}`;
    } else if (event?.type === "shown" && place.message !== null &&
        (place.step >= 0 || data.prompt || place.message !== data.message)) { // not for a hidden prompt
      const wanted = `${place.message}/${place.step}`;
      if (root.asked !== wanted) {
        root.asked = wanted;
        setTriggerValue("load", {
          conversation: place.conversation, message: place.message, step: place.step });
      }
    }
    draw();
  };
  place.addEventListener("pick", follow, { signal });
  place.addEventListener("shown", follow, { signal });

  const bar = make("div", "bar");
  const views = VIEWS[data.kind];
  const key = make("span", "key grow");
  const legend = () => key.replaceChildren(...model.legend(look));
  if (Object.keys(views).length > 1) {
    const choice = make("select", "tool");
    choice.setAttribute("aria-label", "Colour the cells by");
    for (const [name, title] of Object.entries(views)) {
      const option = make("option", "", title);
      option.value = name;
      option.selected = name === state.view;
      choice.append(option);
    }
    choice.onchange = () => {
      state.view = choice.value;
      legend();
      draw();
    };
    bar.append(choice);
  }
  const zoom = (by) => {
    const levels = ZOOMS[data.kind].length;
    const at = frame.scrollLeft / size()[0], down = frame.scrollTop / size()[1];
    state.zoom[data.kind] = Math.max(0, Math.min(levels - 1, state.zoom[data.kind] + by));
    lay();
    frame.scrollLeft = at * size()[0];
    frame.scrollTop = down * size()[1];
    if (column() >= 0) reveal(column());
    draw();
  };
  bar.append(key,
    button("−", "Smaller cells", () => zoom(-1)), button("+", "Larger cells", () => zoom(1)),
    csvButton(data.name, () => model.csv()),
    button("PNG", `Save ${data.name} as PNG`, () => savePng(data, model, look, size(), column())),
    button("SVG", `Save ${data.name} as SVG`, () => save(`${data.name}.svg`, "image/svg+xml",
      [asSvg(model, look, size(), column())])));
  legend();
  const before = root.querySelector(".frame");
  // Another map, or the same from another token on, does not keep its place.
  const self = `${data.message}/${data.kind}/${data.steps[0]?.index}`;
  const [left, top] = root.of === self && before ? [before.scrollLeft, before.scrollTop] : [0, 0];
  if (root.of !== self) root.last = null;
  root.of = self;
  root.replaceChildren(bar, frame, tip, spoken, summary);
  root.sizes?.disconnect();
  root.sizes = new ResizeObserver(() => requestAnimationFrame(lay));
  root.sizes.observe(frame);
  lay();
  frame.scrollLeft = left;
  frame.scrollTop = top;
  follow();
  // When the theme changes, the colours are read again.
  const tick = () => {
    if (!root.isConnected || signal.aborted) return;
    if (look.stale()) {
      look.read();
      legend();
      draw();
    }
    setTimeout(tick, 500);
  };
  tick();
  return () => {
    root.stop.abort();
    root.sizes.disconnect();
  };
}
