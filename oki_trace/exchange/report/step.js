// The panel of the selected step: its numbers, candidates, evidence, lens and ranks.
function choose(reply, step, { focus = false } = {}) {
  const old = document.querySelector(".token.chosen");
  old?.classList.remove("chosen");
  old?.removeAttribute("aria-selected");
  if (old) old.tabIndex = -1;
  const other = at.reply !== reply || (at.step < 0) !== (step < 0);
  at.reply = reply;
  at.step = step;
  // A token of the chat template belongs to no message.
  const node = trace.replies[reply].nodes?.get(step);
  if (node) {
    node.classList.add("chosen");
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    if (node.classList.contains("thinking")) node.parentElement.unfold?.(true);
    if (focus) node.focus();
  }
  history.replaceState(null, "", `#${reply + 1}.${step}`);
  drawPanel();
  layMap(other);
}

function drawPanel() {
  const reply = trace.replies[at.reply];
  const step = stepOf(reply, at.step);
  const where = make("div", "where");
  const place = at.step < 0 ? `position ${step.position} of ${reply.promptLen} in the ${reply.scored ? "text" : "prompt"}`
    : `step ${at.step + 1} of ${reply.steps.length} · position ${step.position}`;
  where.append(make("span", "", place), make("span", "", "← →"));
  const numbers = make("dl", "numbers");
  const settled = (step.settle ?? null) === null ? "–" : `layer ${step.settle}`;
  const facts = [["prob", figure(step.prob, 3)], ["rank", step.rank ? String(step.rank) : "–"], ["surprisal", figure(step.surprisal, 2, " nats")],
    ["entropy", figure(step.entropy, 2, " nats")], ["settled", settled]];
  if (step.sampled !== null) facts.splice(1, 0, ["sampled", figure(step.sampled, 3)]);
  for (const [name, value] of facts) {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    numbers.append(pair);
  }
  fill(byId("panel"), where, make("div", "what", tokenText(step.token)), numbers, make("p", "why", step.why ?? GIVEN),
    ...drawBars(step), ...drawEvidence(reply, step), ...drawLens(reply, step));
  const strongest = document.querySelector(".seen .strongest");
  const seen = document.querySelector(".seen");
  if (strongest) seen.scrollTop = strongest.offsetTop - seen.clientHeight * 0.7;
}

function drawBars(step) {
  if (!step.top.length) return [];
  const drawn = step.topSampled !== undefined;
  const bars = make("div", drawn ? "bars drawn" : "bars");
  if (drawn) {
    const head = make("div", "bar head");
    head.append(make("span"), make("span"), make("span", "num", "model"), make("span", "num", "sampled"));
    bars.append(head);
  }
  const rows = step.top.map((number, k) => ({
    number, rank: k + 1, prob: step.topProb[k], after: step.topSampled?.[k],
  }));
  // The chosen token is always there, with its rank where it is below the kept candidates.
  if (step.rank > rows.length)
    rows.push({ number: step.token, rank: step.rank, prob: step.prob, after: step.sampled });
  for (const [k, { number, rank, prob, after }] of rows.entries()) {
    const bar = make("div", number === step.token ? "bar picked" : "bar");
    const track = make("div", "track");
    const inner = make("div", "fill");
    const name = make("span", "token-text mono", tokenText(number));
    if (rank > k + 1) name.prepend(make("span", "dim", `${rankText(rank)} `));
    inner.style.width = `${(prob ?? 0) * 100}%`;
    track.append(inner);
    bar.append(name, track, make("span", "num", figure(prob, 3)));
    if (drawn) {
      bar.classList.toggle("gone", after === 0);
      bar.append(make("span", "num", after === 0 ? "–" : figure(after, 3)));
    }
    const id = trace.tokens[number][0];
    bar.title = `${tokenText(number)} · rank ${rank}${id === null ? "" : ` · id ${id}`} · prob ${prob ?? "unknown"}`;
    bars.append(bar);
  }
  return [make("h2", "", "Candidates"), bars];
}

function drawEvidence(reply, step) {
  if (!step.attention.length) return [make("h2", "", "Evidence"), make("p", "note", reply.provenance)];
  const final = step.attention.at(-1);
  const entry = step.attention.find(([layer]) => layer === at.layer) ?? final;
  const head = make("div", "row");
  const title = make("h2", "", "Evidence");
  head.append(title);
  const named = (layer) => (layer === final[0] ? `final layer (${layer})` : `layer ${layer}`);
  if (step.attention.length > 1) {
    title.append(make("span", "paper", `: ${named(entry[0])}`));
    const pick = make("select");
    pick.setAttribute("aria-label", "Layer of the evidence");
    for (const [layer] of [...step.attention].reverse()) {
      const option = make("option", "", named(layer));
      option.value = layer;
      option.selected = layer === entry[0];
      pick.append(option);
    }
    pick.onchange = () => { at.layer = Number(pick.value) === final[0] ? null : Number(pick.value); drawPanel(); };
    head.append(pick);
  }
  const weights = new Map(entry[1].map((position, n) => [position, entry[2][n] ?? 0]));
  // The first token is an attention sink: the note states its share, the shading omits it.
  const sink = weights.size > 1 ? weights.get(0) ?? 0 : 0;
  const top = Math.max(1, ...[...weights].filter(([p]) => p || weights.size === 1).map(([, w]) => w));
  const seen = make("div", "seen");
  const shown = [...reply.prompt.map((number, n) => [running(trace.tokens[number][1]), reply.segments[n]]),
    ...reply.steps.slice(0, Math.max(at.step, 0)).map((s) => [s.special ? tokenText(s.token) : running(s.run), s.special ? "template" : "reply"])];
  if (at.step < 0) shown.length = step.position;
  let marked = false;
  shown.forEach(([text, kind], position) => {
    if (position === reply.promptLen) seen.append(make("span", "seam"));
    const weight = weights.get(position) ?? 0;
    const value = sink && position === 0 ? 0 : weight / top;
    const piece = make("span", `piece ${kind}`, text || (weight ? "◌" : ""));
    contain(piece);
    if (value) piece.style.setProperty("--v", value);
    if (value === 1 && !marked) { piece.classList.add("strongest"); marked = true; }
    piece.title = `position ${position} · ${kind} · weight ${(weight / 1000).toFixed(3)}`;
    seen.append(piece);
  });
  const left = sink ? `The first token, which has ${(sink / 10).toFixed(0)} % of the attention, is not shaded. ` : "";
  const most = weights.size === 1 ? "The most attended position is" : `The ${weights.size} most attended positions are`;
  return [head, seen, make("p", "note", `${most} shaded. ${left}Attention shows where the model looked, not why.`)];
}

function drawLens(reply, step) {
  if (!step.lens) return [make("h2", "", "Logit Lens"), make("p", "note", reply.lens ?? "Not computed for this step.")];
  const width = Math.min(3, step.lens[0].length);
  const table = make("table");
  const columns = make("colgroup");
  columns.append(make("col", "layer"), ...Array.from({ length: width }, (_, k) => make("col", k === 2 ? "third" : "")), make("col", "rank"));
  const body = make("tbody");
  for (let n = step.lens.length - 1; n >= 0; n -= 1) {
    const layer = layerOf(step, n);
    const row = make("tr", step.settle === layer ? "settled" : "");
    row.append(make("td", "num dim", String(layer)));
    for (let k = 0; k < width; k += 1) {
      const number = step.lens[n][k];
      const share = step.lensProb[n][k];
      const cell = make("td", number === step.token ? "cell picked" : "cell");
      cell.classList.toggle("third", k === 2);
      cell.style.setProperty("--v", (share ?? 0) / 1000);
      cell.title = `layer ${layer}, rank ${k + 1}: ${tokenText(number)}`;
      const pair = make("div", "pair");
      pair.append(make("span", "token-text mono", tokenText(number)), make("span", "num", share === null ? "–" : (share / 1000).toFixed(2)));
      cell.append(pair);
      row.append(cell);
    }
    row.append(make("td", "num dim", rankText(step.lensRank[n])));
    body.append(row);
  }
  table.append(columns, body);
  return [make("h2", "", "Logit Lens"), table, make("p", "note", "#n is the rank of this token at that layer. The line marks the layer from which it stays on top."),
    ...drawRanks(step)];
}

// The layer of a row of the lens: given tokens may be read at some layers only.
function layerOf(step, n) {
  return step.lensLayers?.[n] ?? n;
}

// The rank of the chosen token through the layers, on a logarithmic scale.
function drawRanks(step) {
  const ranks = step.lensRank;
  if (ranks.length < 2 || ranks.some((rank) => !rank)) return [];
  const top = Math.log(Math.max(10, ...ranks));
  const first = layerOf(step, 0), last = layerOf(step, ranks.length - 1);
  const points = ranks.map((rank, n) => `${((layerOf(step, n) - first) / (last - first)) * 100},${(Math.log(rank) / top) * 100}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const ends = make("div", "ends");
  ends.append(make("span", "", `layer ${first}`), make("span", "", `log scale: rank 1 at the top, ${Math.max(...ranks).toLocaleString("en")} at the bottom`), make("span", "", `layer ${last}`));
  return [make("h2", "", "Rank of this token by layer"), svg, ends];
}
