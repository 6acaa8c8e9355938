// The cells of a map. A model is {title, down, columns, rows, steps, reply, gutter, rowName, cell,
// tell, summary, legend, csv, seam}; ``reply`` is the column at which the reply starts, ``seam`` the
// row, if there are both; cell and tell (its tooltip) take a column and a row.
function numbers(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

// A weight in three characters, which fit into narrow cells; one below .01 shows only as a shade and
// on hover.
function weighed(weight) {
  const text = weight.toFixed(2);
  return text === "0.00" ? "" : text.startsWith("0") ? text.slice(1) : text.slice(0, 3);
}

// A part of a legend, which does not break across lines.
function item(...parts) {
  const node = make("span", "item");
  node.append(...parts);
  return node;
}

// The number of a generated token; one of the prompt has none.
function stepNumber(step) {
  return step && step.index >= 0 ? step.index : null;
}

function lensModel(data, state) {
  const L = data.layers, columns = data.steps.length;
  const top = numbers(data.top, Uint32Array), same = numbers(data.same, Uint8Array);
  const prob = numbers(data.prob, Float32Array), entropy = numbers(data.entropy, Float32Array);
  const rank = numbers(data.rank, Uint32Array), kl = numbers(data.kl, Float32Array);
  const mine = numbers(data.chosen_prob, Float32Array);
  const most = entropy.reduce((a, b) => (b > a ? b : a), 1);
  // The lens did not read this layer.
  const isBlank = (i) => Number.isNaN(prob[i]) && !data.words[top[i]];
  const worst = Math.log(Math.max(10, rank.reduce((a, b) => Math.max(a, b), 1)));
  const at = (c, r) => c * L + (L - 1 - r);
  const shade = {
    agreement: (i) => [prob[i], same[i] ? "accent" : "blue"],
    probability: (i) => [prob[i], "blue"],
    entropy: (i) => [entropy[i] / most, "blue"],
    // Rank 1 has the strongest shade.
    rank: (i) => [1 - Math.log(rank[i]) / worst, "accent"],
  };
  return {
    title: "Reply map: the prediction of each layer", down: "layers", columns, rows: L,
    steps: data.steps, reply: data.reply,
    gutter: () => 52,
    rowName: (r) => String(L - 1 - r),
    cell(c, r) {
      const i = at(c, r), [value, tone] = shade[state.view](i);
      const text = state.view === "rank" && rank[i] > 1
        ? `#${rank[i].toLocaleString("en")}` : data.words[top[i]];
      return { value: isBlank(i) || Number.isNaN(value) ? 0 : value, tone, text,
        outlined: data.settled[c] === L - 1 - r };
    },
    tell(c, r) {
      const step = data.steps[c];
      if (r < 0) return [`${step.where}: ${step.text}`,
        `surprisal ${figure(step.surprisal, 2)} nats`];
      const i = at(c, r);
      if (isBlank(i)) return [`layer ${L - 1 - r}, ${step.where}: not read by the lens`];
      return [
        `layer ${L - 1 - r}, ${step.where}: ${data.words[top[i]]}  ${figure(prob[i], 3)}`,
        `final token ${step.text}: rank ${rank[i].toLocaleString("en")}, ${figure(mine[i], 3)}`,
        `entropy ${figure(entropy[i], 2)} nats · KL to the final layer ${figure(kl[i], 2)} nats`,
        ...(data.settled[c] === L - 1 - r ? ["settled: on top from this layer on"] : []),
      ];
    },
    summary: () => {
      const layers = Array.from(data.settled).filter((layer) => layer >= 0).sort((a, b) => a - b);
      const never = columns - layers.length;
      return (layers.length ? `Settled: ${layers.length} of ${columns} steps, at layers ${layers[0]} ` +
        `to ${layers.at(-1)}, half of them by layer ${layers[layers.length >> 1]}. ` : "") +
        (never ? `${never} did not settle. ` : "") +
        "The CSV button saves every cell.";
    },
    legend(look) {
      const settled = item(make("span", "box"), "settled");
      const worded = Math.round(Math.exp(worst)).toLocaleString("en");
      return {
        agreement: () => [item("final token, prob 0", look.bar("accent"), "1"),
          item("another 0", look.bar("blue"), "1"), settled],
        probability: () => [item("probability 0", look.bar("blue"), "1"), settled],
        entropy: () => [item("entropy 0", look.bar("blue"), `${most.toFixed(1)} nats`), settled],
        rank: () => [item(`rank ${worded}`, look.bar("accent"), "1 (log)"), settled],
      }[state.view]();
    },
    csv: () => [
      ["step", "position", "chosen_token", "layer", "top_token", "top_prob", "is_final_token", "chosen_rank",
        "chosen_prob", "entropy_nats", "kl_nats", "settled_here"],
      ...data.steps.flatMap((step, c) => Array.from({ length: L }, (_, layer) => layer)
        .filter((layer) => !isBlank(c * L + layer)).map((layer) => {
        const i = c * L + layer;
        return [stepNumber(step), step.position, step.text, layer, data.words[top[i]], prob[i], same[i], rank[i],
          mine[i], entropy[i], kl[i], Number(data.settled[c] === layer)];
      }))],
  };
}

function attentionModel(data) {
  const column = numbers(data.points.column, Int32Array);
  const position = numbers(data.points.position, Int32Array);
  const weight = numbers(data.points.weight, Float32Array);
  const without = new Set(data.without);
  const cells = data.steps.map(() => new Map());
  let most = 0;
  weight.forEach((w, k) => {
    cells[column[k]]?.set(position[k], w);
    if (!without.has(position[k]) && w > most) most = w;
  });
  most ||= 1;
  return {
    title: "Reply map: attention of each step", down: "positions",
    columns: data.steps.length, rows: data.positions.length, steps: data.steps,
    reply: data.reply, seam: data.seam,
    gutter: ([, h]) => (h >= 14 ? 128 : 58),
    rowName: (r, [, h]) => (h >= 14 ? `${data.positions[r]}  ${r}` : String(r)),
    cell(c, r) {
      if (r >= data.steps[c].position) return null; // not generated yet
      const w = cells[c].get(r);
      if (w === undefined || Number.isNaN(w)) return { value: 0, tone: "blue", text: "" };
      if (without.has(r)) return { value: 0, tone: "blue", text: "", crossed: true };
      return { value: Math.sqrt(w / most), tone: "blue", text: weighed(w) };
    },
    tell(c, r) {
      const step = data.steps[c];
      const from = `${step.where} ${step.text}`;
      if (r < 0) return [from, `position ${step.position}`];
      const to = `position ${r}  ${data.positions[r]}`;
      if (r >= step.position) return [from, `${to}: not generated yet`];
      const w = cells[c].get(r);
      const part = r < data.seam ? "prompt" : "reply";
      return [`${from} looked at`, `${to} (${part})`,
        w === undefined ? "not kept, or 0" : `weight ${figure(w, 4)}` +
          (without.has(r) ? ", left out" : "")];
    },
    summary: () => {
      const sums = new Map();
      weight.forEach((w, k) => {
        if (!without.has(position[k]) && !Number.isNaN(w))
          sums.set(position[k], (sums.get(position[k]) ?? 0) + w);
      });
      const first = [...sums].sort((a, b) => b[1] - a[1]).slice(0, 3)
        .map(([at, sum]) => `${data.positions[at] ?? ""} at position ${at} (${figure(sum, 2)})`);
      return (first.length ? `Most attended, weights summed over these steps: ${first.join(", ")}. `
        : "") + "The CSV button saves every weight.";
    },
    legend: (look) => [item("weight 0", look.bar("blue"), `${figure(most, 2)} (square root)`)],
    csv: () => [["step", "token_position", "token", "position", "attended_token", "weight", "left_out"],
      ...Array.from(weight, (w, k) => {
        const step = data.steps[column[k]];
        return [stepNumber(step), step?.position, step?.text, position[k], data.positions[position[k]], w,
          Number(without.has(position[k]))];
      })],
  };
}
