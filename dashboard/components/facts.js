// The chosen token and its numbers. data: {where, hint, what, facts: [{name, value, title}]}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const where = make("div", "where");
  where.append(make("span", "", data.where), make("span", "", data.hint));
  const list = make("dl");
  for (const fact of data.facts) {
    const pair = make("div");
    pair.title = fact.title;
    pair.append(make("dt", "", fact.name), make("dd", "", fact.value));
    list.append(pair);
  }
  root.replaceChildren(where, make("div", "what", data.what), list);
}
