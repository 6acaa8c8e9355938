// Saves a chart of the page as a picture, and its rows as CSV. The chart is an SVG in the page; the
// picture gets a background, and a font for where ours is missing.
// data: {within: class of the element around the chart, name: of the file, rows: [[..]], with a header;
// without rows there is no CSV button}
export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root");
  const chart = () => document.querySelector(`.${CSS.escape(data.within)} svg.marks`);
  const whole = () => {
    const drawn = chart();
    if (!drawn) return null;
    const copy = drawn.cloneNode(true);
    const { width, height } = drawn.getBoundingClientRect();
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    ground.setAttribute("width", "100%");
    ground.setAttribute("height", "100%");
    ground.setAttribute("fill", getComputedStyle(root).getPropertyValue("--st-background-color"));
    copy.prepend(ground);
    for (const text of copy.querySelectorAll("[font-family]"))
      text.setAttribute("font-family", `${text.getAttribute("font-family")}, sans-serif`);
    return { text: new XMLSerializer().serializeToString(copy), width, height };
  };
  root.replaceChildren(
    ...(data.rows ? [csvButton(data.name, () => data.rows)] : []),
    button("PNG", `Save ${data.name} as PNG`, () => {
      const picture = whole();
      if (picture) png(picture, (blob) => save(`${data.name}.png`, "image/png", [blob]));
    }),
    button("SVG", `Save ${data.name} as SVG`, () => {
      const picture = whole();
      if (picture) save(`${data.name}.svg`, "image/svg+xml", [picture.text]);
    }),
  );
}

// Three pixels of the picture to one of the page, sharp enough for print.
function png({ text, width, height }, done) {
  const image = new Image();
  image.onload = () => {
    const canvas = make("canvas");
    canvas.width = width * 3;
    canvas.height = height * 3;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(done);
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}
