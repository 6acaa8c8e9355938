// What the model said each way from one step, as cards side by side. A click on a card opens it.
// data: {kept: the text before, cut: whether it is longer, cards: [{id, name: the first token, prob,
// rank, tokens: [{text, mark}], path, status, live}]}. Triggers: open = a message.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  const held = root.getRootNode().activeElement?.dataset?.id;
  root.replaceChildren(...data.cards.map((card) => {
    const node = make("article", "card");
    const head = make("div", "head");
    const name = make("span", "name mono", card.name);
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = `${(card.prob ?? 0) * 100}%`;
    track.append(fill);
    const prob = make("span", "num", figure(card.prob, 3));
    if (card.rank) prob.title = `Rank ${card.rank} at this step`;
    head.append(name, prob);
    const text = make("p", "text");
    if (data.kept) text.append(write(make("span", "kept"), (data.cut ? "…" : "") + data.kept));
    card.tokens.forEach((token, n) => {
      const piece = write(make("span", n ? "token" : "token first", ""), token.text);
      if (token.mark) piece.classList.add("mark");
      text.append(piece);
    });
    if (card.live) text.append(make("span", "cursor"));
    const foot = make("div", "foot");
    const open = button("Open in chat", `Open message ${card.id} in Chat`,
      () => setTriggerValue("open", card.id));
    open.dataset.id = card.id;
    const about = make("span", "about");
    for (const part of [card.path, card.status]) if (part) about.append(make("span", "", part));
    foot.append(about, open);
    node.append(head, track, text, foot);
    return node;
  }));
  if (held) root.querySelector(`[data-id="${held}"]`)?.focus({ preventScroll: true });
}
