// An element with a class and plain text; never markup.
function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

// A number with so many digits, a dash where it is not known.
function figure(value, digits) {
  return value === null ? "–" : value.toFixed(digits);
}

