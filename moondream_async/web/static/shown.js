// Shows the parts of an answer beside its text: its state, numbers, places and errors.

import * as overlay from "./overlay.js";
import { remedy } from "./remedies.js";

const $ = (id) => document.getElementById(id);

export class Clock {
  constructor() {
    this.start = performance.now();
    this.count = 0;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.count += 1;
  }

  show() {
    if (!this.count) {
      this.#showWhole();
      return;
    }
    const spread = (this.last - this.first) / 1000;
    $("first-label").textContent = "First chunk";
    $("first").textContent = seconds(this.first - this.start);
    const pace = (this.count - 1) / spread;
    $("pace").textContent = pace > 0 && spread > 0
      ? `${pace.toFixed(pace < 100 ? 1 : 0)} chunks/s` : "–";
    $("count").textContent = this.count;
    for (const id of ["pace", "count"]) $(id).parentElement.hidden = false;
    $("numbers").hidden = false;
  }

  #showWhole() {
    $("first-label").textContent = "Time";
    $("first").textContent = seconds(performance.now() - this.start);
    for (const id of ["pace", "count"]) $(id).parentElement.hidden = true;
    $("numbers").hidden = false;
  }
}

export function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

export function clear() {
  overlay.clear();
  $("answer").replaceChildren();
  $("places").replaceChildren();
  $("state").textContent = "";
  for (const id of ["places", "outline", "numbers", "thoughts"]) $(id).hidden = true;
  $("thoughts").querySelector("p").replaceChildren();
  $("request").parentElement.hidden = true;
  complain(null);
}

export function tell(state) {
  $("state").textContent = state;
}

// Show an error with advice; null removes the last error.
export function complain(error, endpoint) {
  $("error").replaceChildren();
  if (error === null) return;
  // The TypeError of fetch has no helpful message.
  const gone = error instanceof TypeError;
  const said = gone ? "The page’s own server can’t be reached. Is it still running?" : error.message;
  for (const sentence of [said, remedy(gone ? "OwnServer" : error.type, endpoint)]) {
    if (!sentence) continue;
    const paragraph = document.createElement("p");
    paragraph.textContent = sentence;
    $("error").append(paragraph);
  }
}

export function showRequest(id) {
  $("request").textContent = id ?? "";
  $("request").parentElement.hidden = !id;
}

// Draw the objects found, and return a sentence about them; `listed` lists their places, too.
export function showFound(skill, data, name, { listed = true } = {}) {
  if (skill === "segment") return showOutline(data, name);
  const found = skill === "detect" ? data.objects : data.points;
  const describe = skill === "detect" ? corners : (each) => `at ${spot(each.x, each.y)}`;
  if (skill === "detect") overlay.drawBoxes(found, name);
  else overlay.drawPoints(found, name);
  if (found.length === 0) return `Found no “${name}”.`;
  if (found.length === 1) return `Found “${name}” ${describe(found[0])}.`;
  if (listed) list(found.map(describe));
  return `Found “${name}” ${found.length} times.`;
}

function showOutline(data, name) {
  if (!data.path || !data.bbox) {
    overlay.clear();
    return `Found no “${name}”.`;
  }
  overlay.drawOutline(`${data.path} `, data.bbox, name);
  $("outline").querySelector("p").textContent = data.path;
  $("outline").hidden = false;
  return `Outlined “${name}” ${corners(data.bbox)}.`;
}

function corners(box) {
  return `from ${spot(box.x_min, box.y_min)} to ${spot(box.x_max, box.y_max)}`;
}

function spot(x, y) {
  return `(${x.toFixed(2)}, ${y.toFixed(2)})`;
}

// A line for each place. Tab reaches one line, and the arrow keys reach the others.
function list(descriptions) {
  $("places").replaceChildren(...descriptions.map((description, index) => {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    button.type = "button";
    button.textContent = `${index + 1}. ${description}`;
    button.tabIndex = index === 0 ? 0 : -1;
    item.append(button);
    return item;
  }));
  $("places").hidden = false;
}

const buttons = () => [...$("places").querySelectorAll("button")];

$("places").addEventListener("keydown", (event) => {
  const all = buttons();
  const at = all.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  all[to]?.focus();
});
$("places").addEventListener("focusin", ({ target }) => {
  for (const each of buttons()) each.tabIndex = each === target ? 0 : -1;
  overlay.pickOut(buttons().indexOf(target));
});
$("places").addEventListener("pointermove", ({ target, movementX, movementY }) => {
  const moved = movementX || movementY; // the pointer, and not the list under it
  if (moved && target.closest("button")) overlay.pickOut(buttons().indexOf(target.closest("button")));
});
$("places").addEventListener("focusout", () => overlay.pickOut(null));
$("places").addEventListener("pointerleave", () => {
  const at = buttons().indexOf(document.activeElement);
  overlay.pickOut(at < 0 ? null : at);
});

// Show a piece of the model's reasoning, or the whole of it with its places.
export function think(thought) {
  const text = $("thoughts").querySelector("p");
  $("thoughts").hidden = false;
  if (typeof thought === "string") {
    text.append(thought);
    return;
  }
  text.textContent = thought.text;
  const places = thought.grounding.flatMap((each) => each.points);
  overlay.drawPoints(places.filter((each) => each.length === 2).map(([x, y]) => ({ x, y })), "");
}
