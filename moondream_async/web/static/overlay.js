// Draws boxes, points and outlines over the picture. The drawing's unit is the picture, 0-1 each
// way, as in the answers; strokes have the same width at any size.

const shapes = document.getElementById("shapes");
const labels = document.getElementById("labels");

const MOST_LABELS = 24; // more of them would hide the picture

export function clear() {
  shapes.replaceChildren();
  labels.replaceChildren();
  for (const layer of [shapes, labels]) layer.classList.remove("many", "crowd");
}

export function drawBoxes(boxes, name) {
  clear();
  crowd(boxes.length);
  boxes.forEach((box, index) => {
    const sides = {
      x: box.x_min,
      y: box.y_min,
      width: box.x_max - box.x_min,
      height: box.y_max - box.y_min,
    };
    shapes.append(twice("rect", sides));
    if (boxes.length <= MOST_LABELS) labels.append(label(box, boxes.length > 1 ? index + 1 : name));
  });
}

export function drawPoints(points, name) {
  clear();
  crowd(points.length);
  points.forEach((point, index) => {
    const dot = document.createElement("i");
    place(dot, point.x, point.y);
    labels.append(dot);
    if ((points.length === 1 && !name) || points.length > MOST_LABELS) return;
    const text = document.createElement("span");
    text.textContent = points.length > 1 ? index + 1 : name;
    text.classList.toggle("leftwards", point.x > 0.5);
    place(text, point.x, point.y);
    labels.append(text);
  });
}

// Highlight one of several shapes; `null` is none.
export function pickOut(index) {
  labels.querySelector(".picked-out")?.remove();
  const drawn = [...shapes.children, ...labels.querySelectorAll("i")];
  drawn.forEach((each, number) => each.classList.toggle("picked", number === index));
  if (index === null || labels.querySelector("span")) return;
  const text = document.createElement("span"); // a crowd has no other labels
  text.textContent = index + 1;
  text.className = "picked-out";
  const [at, frame] = [drawn[index].getBoundingClientRect(), labels.getBoundingClientRect()];
  const y = (at.top - frame.top) / frame.height;
  text.classList.toggle("hanging", y < 0.1);
  place(text, (at.left - frame.left) / frame.width, y < 0.1 ? (at.bottom - frame.top) / frame.height : y);
  labels.append(text);
}

function crowd(count) {
  for (const layer of [shapes, labels]) {
    layer.classList.toggle("many", count > 8);
    layer.classList.toggle("crowd", count > MOST_LABELS);
  }
}

// A path's coordinates are 0-1 of its box. A coarse path may be cut anywhere.
export function drawOutline(path, box, name, { coarse = false } = {}) {
  clear();
  if (!box) return;
  const size = [box.x_max - box.x_min, box.y_max - box.y_min];
  const transform = `translate(${box.x_min} ${box.y_min}) scale(${size.join(" ")})`;
  const group = twice("path", { d: wholeCommands(path), transform });
  group.lastChild.classList.add("mask");
  group.classList.toggle("coarse", coarse);
  shapes.append(group);
  labels.append(label(box, name));
}

const OPERANDS = { M: 2, L: 2, T: 2, H: 1, V: 1, S: 4, Q: 4, C: 6, A: 7, Z: 0 };

// The longest beginning of a path with whole commands: browsers report other paths as errors.
// The last number may go on in the next piece, and counts only if text follows it.
export function wholeCommands(path) {
  let end = 0;
  let operands; // of the command
  let count; // of operands so far
  for (const { 0: token, index } of path.matchAll(/[a-z]|[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?/gi)) {
    const after = index + token.length;
    if (/^[a-z]$/i.test(token)) {
      operands = OPERANDS[token.toUpperCase()];
      count = 0;
      const mayStand = end > 0 || token.toUpperCase() === "M";
      if (operands === undefined || !mayStand) break;
      if (operands === 0) end = after;
    } else {
      count += 1;
      if (!operands) break;
      if (count % operands === 0 && after < path.length) end = after;
    }
  }
  return path.slice(0, end);
}

// A shape in white and, narrower, in the accent colour: visible on any picture.
function twice(tag, attributes) {
  const group = svg("g", {});
  for (const name of ["halo", "edge"]) group.append(svg(tag, { class: name, ...attributes }));
  return group;
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// A label above its box; without room there, below the box, or else inside it. It starts at the
// left side of a box in the left half, and ends at the right side of any other.
function label(box, text) {
  const element = document.createElement("span");
  element.textContent = text;
  const isHigh = box.y_min < 0.1;
  element.classList.toggle("hanging", isHigh);
  place(element, box.x_min, isHigh && box.y_max < 0.88 ? box.y_max : box.y_min);
  if (box.x_min + box.x_max > 1) {
    element.style.left = "auto";
    element.style.right = `${(1 - box.x_max) * 100}%`;
  }
  return element;
}

function place(element, x, y) {
  element.style.left = `${x * 100}%`;
  element.style.top = `${y * 100}%`;
}
