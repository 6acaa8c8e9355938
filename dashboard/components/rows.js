// Saves what is shown beside it. data: {name: of the file, rows: [[..]], the first of them the names of
// the columns}
export default function ({ data, parentElement }) {
  parentElement.querySelector(".root").replaceChildren(csvButton(data.name, () => data.rows));
}
