// A whole map as a picture, with the parts out of sight.
function whole(model, [w, h]) {
  return { x: 0, y: 0, width: model.gutter([w, h]) + model.columns * w, height: HEAD + model.rows * h };
}

function savePng(data, model, look, size, chosen) {
  const view = whole(model, size);
  // Browsers refuse canvases beyond some sixty million points.
  const scale = Math.min(2, Math.sqrt(4e7 / (view.width * view.height)), 16_000 / view.width,
    16_000 / view.height);
  const canvas = make("canvas");
  canvas.width = view.width * scale;
  canvas.height = view.height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = look.back;
  pen.fillRect(0, 0, view.width, view.height);
  const inked = { model, look, size, chosen, cursor: null, ...view };
  pen.clearRect = () => {};
  paint(pen, inked);
  canvas.toBlob((blob) => save(`${data.name}.png`, "image/png", [blob]));
}

function asSvg(model, look, size, chosen) {
  const view = whole(model, size);
  const pen = make("canvas").getContext("2d");
  const safe = (text) => text.replace(/[^\t\n\r\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "�")
    .replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const anchors = { left: "start", center: "middle", right: "end" };
  const parts = [`<svg xmlns="http://www.w3.org/2000/svg" width="${view.width}" height="${view.height}">`,
    `<rect width="100%" height="100%" fill="${look.back}"/>`];
  for (const one of shapes({ model, look, size, chosen, cursor: null, ...view })) {
    if (one.box) {
      const [x, y, w, h] = one.box.map((v) => +v.toFixed(2));
      parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" ` + (one.fill
        ? `fill="${one.fill}"/>` : `fill="none" stroke="${one.stroke}" stroke-width="${one.wide ?? 1.5}"/>`));
      continue;
    }
    const family = one.code ? "monospace" : "sans-serif";
    pen.font = `${one.bold ? 600 : 400} ${one.font}px ${family}`;
    parts.push(`<text x="${one.at[0].toFixed(1)}" y="${one.at[1].toFixed(1)}" fill="${one.ink}" ` +
      `font-family="${family}" font-size="${one.font}" font-weight="${one.bold ? 600 : 400}" ` +
      `text-anchor="${anchors[one.align]}" dominant-baseline="central" xml:space="preserve">` +
      `${safe(fit(pen, one.text, one.room))}</text>`);
  }
  parts.push("</svg>");
  return parts.join("\n");
}
