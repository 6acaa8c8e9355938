// The candidates: the model's own probability, and the probability after sampling.
// data: {rows: [{text, prob, sampled, id, chosen, rank, title}], sampled: bool, step, branch: whether the
// reply can be continued from a candidate}. The chosen token is the last row if it ranks below the
// kept candidates. Triggers: branch = the token id of a candidate.
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root");
  root.classList.toggle("sampled", data.sampled);
  root.classList.toggle("branch", data.branch);
  const table = make("div", "table");
  table.setAttribute("role", "table");
  table.setAttribute("aria-label", "Candidates and their probabilities");
  const csv = csvButton(`candidates-step-${data.step}`, () => [
    ["rank", "token", "token_id", "logit", "prob", "sampled_prob", "chosen"],
    ...data.rows.map((r) => [r.rank, r.text, r.id, r.logit, r.prob, r.sampled, Number(r.chosen)])]);
  const head = make("div", "row head");
  const own = make("span", "", data.sampled ? "the model's own" : "probability");
  own.title = "The model's own probability, before any sampling setting";
  const after = make("span", "", "after sampling");
  after.title = "After temperature, truncation and penalties; a dash means removed";
  const title = make("span", "title", "Candidates");
  title.setAttribute("role", "heading");
  title.setAttribute("aria-level", "4");
  head.append(title, own, ...(data.sampled ? [make("span"), after, csv] : [csv]));
  if (data.branch) head.append(make("span"));
  const rows = data.rows.map((entry, k) => {
    const row = make("div", "row");
    const beyond = entry.rank > k + 1;
    row.classList.toggle("beyond", beyond);
    row.setAttribute("role", "row");
    if (entry.chosen) row.classList.add("chosen");
    if (data.sampled && entry.sampled === 0) row.classList.add("gone");
    row.title = entry.title;
    const name = cell("name mono", entry.text);
    if (beyond) name.prepend(make("span", "rank", `#${entry.rank.toLocaleString("en")} `));
    row.append(name, bar(entry.prob), cell("num", figure(entry.prob, 3)));
    if (data.sampled) {
      const after = entry.sampled === 0 ? "–" : figure(entry.sampled, 3);
      row.append(bar(entry.sampled), cell("num", after));
    }
    if (data.branch) {
      const go = button("→", `Continue from here with ${entry.text}`,
        () => setTriggerValue("branch", entry.id));
      go.disabled = entry.chosen || entry.id < 0;
      row.append(go);
    }
    return row;
  });
  table.append(...rows);
  root.replaceChildren(head, table);
}

function cell(name, text) {
  const node = make("span", name, text);
  node.setAttribute("role", "cell");
  return node;
}

function bar(prob) {
  const track = make("div", "track");
  const fill = make("div", "fill");
  fill.style.width = `${(prob ?? 0) * 100}%`;
  track.append(fill);
  return track;
}
