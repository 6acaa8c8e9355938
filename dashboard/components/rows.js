// Saves rows as CSV. data: {name: of the file, rows: [[..]], with a header}
export default function ({ data, parentElement }) {
  parentElement.querySelector(".root").replaceChildren(csvButton(data.name, () => data.rows));
}
