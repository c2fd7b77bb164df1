// The page: what is chosen becomes a question, and what comes back is shown.

import { ask } from "./asking.js";
import { GrowingText } from "./answer.js";
import * as overlay from "./overlay.js";
import { picture, show, watchSources } from "./picture.js";
import { program } from "./python.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const fields = form.elements;

const VERBS = {
  caption: "Describe", query: "Ask", detect: "Detect", point: "Point", segment: "Segment", chat: "Send",
};
const SETTINGS = ["max_tokens", "max_objects", "temperature"];

let about = null;
let turns = []; // of the conversation
let running = null; // an AbortController while an answer is on its way
let ended = Promise.resolve(); // when it has been put away
let chosen = null; // the skill, whose answer is shown

// -- the question --------------------------------------------------------------------------

function question() {
  const skill = fields.skill.value;
  const asked = { skill, settings: {} };
  if (skill === "caption") asked.length = fields.namedItem("length").value; // not how many there are
  if (skill === "query") asked.question = fields.question.value;
  if (["detect", "point", "segment"].includes(skill)) asked.object = fields.object.value;
  if (skill === "chat") asked.messages = messages();
  if (["query", "chat"].includes(skill) && fields.reasoning.checked) asked.reasoning = true;
  for (const name of SETTINGS) {
    const field = fields[name];
    if (isFor(field, skill) && field.value !== "" && field.validity.valid) {
      asked.settings[name] = Number(field.value);
    }
  }
  return asked;
}

// The conversation with the next message; until there is one, as it was last asked.
function messages() {
  const content = fields.message.value;
  return content.trim() || turns.length === 0
    ? [...turns, { role: "user", content }]
    : turns.slice(0, -1);
}

function isFor(element, skill) {
  const skills = element.closest("[data-for]")?.dataset.for;
  return !skills || skills.split(" ").includes(skill);
}

function arrange() {
  const skill = fields.skill.value;
  for (const part of document.querySelectorAll("[data-for]")) {
    part.hidden = !isFor(part, skill);
    // What is hidden takes no part in the form: the browser must not ask to fill it in.
    for (const input of part.querySelectorAll("input")) input.disabled = part.hidden;
  }
  $("restart").hidden = skill !== "chat" || turns.length === 0;
  $("ask").textContent = VERBS[skill];
  if (skill !== chosen) clearAnswer();
  chosen = skill;
  tellPython();
}

function tellPython() {
  if (about) $("code").textContent = program(question(), { about, picture: picture.source });
}

// -- the answer ----------------------------------------------------------------------------

class Clock {
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
    const spread = (this.last - this.first) / 1000;
    $("first-label").textContent = "First chunk";
    $("first").textContent = this.first ? seconds(this.first - this.start) : "–";
    const pace = (this.count - 1) / spread;
    $("pace").textContent = pace > 0 && spread > 0
      ? `${pace.toFixed(pace < 100 ? 1 : 0)} chunks/s` : "–";
    $("count").textContent = this.count;
    for (const id of ["pace", "count"]) $(id).parentElement.hidden = false;
    $("numbers").hidden = false;
  }

  showWhole() {
    $("first-label").textContent = "Time";
    $("first").textContent = seconds(performance.now() - this.start);
    for (const id of ["pace", "count"]) $(id).parentElement.hidden = true;
    $("numbers").hidden = false;
  }
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

function clearAnswer() {
  overlay.clear();
  $("answer").replaceChildren();
  $("answer").className = "";
  $("state").textContent = "";
  $("numbers").hidden = true;
  $("thoughts").hidden = true;
  $("thoughts").querySelector("p").replaceChildren();
  $("request").parentElement.hidden = true;
  complain("");
}

function complain(sentence) {
  $("error").textContent = sentence;
}

async function answer() {
  const asked = question();
  const mine = new AbortController();
  running = mine;
  clearAnswer();
  setBusy(true);
  $("state").textContent = "Waiting for the answer to begin";
  const clock = new Clock();
  const text = new GrowingText(asked.skill === "chat" ? addTurns(asked) : $("answer"));
  $("answer").classList.toggle("path", asked.skill === "segment");
  $("answer").ariaLive = asked.skill === "segment" ? "off" : "polite"; // nobody wants to hear a path
  // What will be drawn there is to be seen: on a phone, the button is far below.
  if (["detect", "point", "segment"].includes(asked.skill)) $("frame").scrollIntoView({ block: "nearest" });
  let box = null;
  let ending = "";
  try {
    for await (const { type, data } of ask(asked, picture.blob, mine.signal)) {
      if (type === "chunk") {
        clock.tick();
        clock.show();
        $("state").textContent = "Writing";
        text.append(data.chunk);
        if (asked.skill === "segment") overlay.drawOutline(text.text, box, asked.object, { coarse: true });
      } else if (type === "bbox") {
        box = data.bbox;
      } else if (type === "reasoning") {
        $("state").textContent = "Thinking";
        think(data.text);
      } else if (type === "error") {
        throw new Error(data.error.message);
      } else if (type === "done") {
        ending = finish(asked, data, text, clock, box);
      }
    }
    if (!ending) throw new Error("The page’s own server ended the answer before it was complete.");
  } catch (error) {
    ending = text.text ? "Failed after this had arrived" : "Failed";
    if (mine.signal.aborted) ending = "Stopped: the connection to the server is closed";
    if (!mine.signal.aborted) complain(sentence(error));
  } finally {
    text.finish();
    if (asked.skill === "chat") keepTurns(asked, text);
    $("state").textContent = ending;
    running = null;
    setBusy(false);
    arrange();
  }
}

// Show the end of an answer; return what there is to say of it.
function finish(asked, data, text, clock, box) {
  if (data.request_id) {
    $("request").textContent = data.request_id;
    $("request").parentElement.hidden = false;
  }
  if (data.reasoning?.text) think(data.reasoning);
  if (asked.skill === "detect") {
    overlay.drawBoxes(data.objects, asked.object);
    text.append(list(data.objects, asked.object, corners));
  } else if (asked.skill === "point") {
    overlay.drawPoints(data.points, asked.object);
    text.append(list(data.points, asked.object, (each) => `at ${spot(each.x, each.y)}`));
  } else if (asked.skill === "segment") {
    const place = data.bbox ?? box;
    const found = data.path && place;
    if (found) {
      overlay.drawOutline(`${data.path} `, place, asked.object);
      text.replace(data.path);
    }
    clock.show();
    return found ? `Outlined “${asked.object}” ${corners(place)}` : `Found no “${asked.object}”`;
  }
  if (clock.count) clock.show();
  else clock.showWhole();
  return data.finish_reason === "length" ? "Done: cut at the number of tokens" : "Done";
}

function list(found, name, describe) {
  if (found.length === 0) return `Found no “${name}”.`;
  if (found.length === 1) return `Found “${name}” ${describe(found[0])}.`;
  const lines = found.map((each, index) => `${index + 1}. ${describe(each)}`);
  return `Found “${name}” ${found.length} times:\n${lines.join("\n")}`;
}

function corners(box) {
  return `from ${spot(box.x_min, box.y_min)} to ${spot(box.x_max, box.y_max)}`;
}

function spot(x, y) {
  return `(${x.toFixed(2)}, ${y.toFixed(2)})`;
}

// Show a piece of what the model thinks, or all of it, with the places that it speaks of.
function think(thought) {
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

function sentence(error) {
  // fetch has no words for it that a reader could use.
  if (error instanceof TypeError) return "The page’s own server can’t be reached. Is it still running?";
  return error.message;
}

function setBusy(busy) {
  const [from, to] = busy ? [$("ask"), $("stop")] : [$("stop"), $("ask")];
  const hadFocus = document.activeElement === from || $("skills").contains(document.activeElement);
  to.hidden = false;
  if (hadFocus) to.focus({ preventScroll: true });
  from.hidden = true;
  $("skills").disabled = busy;
}

// -- the conversation ----------------------------------------------------------------------

function addTurns(asked) {
  const items = [document.createElement("li"), document.createElement("li")];
  items[0].textContent = asked.messages.at(-1).content;
  items[0].className = "user";
  items[1].className = "assistant";
  $("conversation").append(...items);
  return items[1];
}

// An answer that did not come whole is kept as far as it came. One that never began is no turn,
// and its question goes back into the field.
function keepTurns(asked, text) {
  if (text.text) {
    turns = [...asked.messages, { role: "assistant", content: text.text }];
    fields.message.value = "";
  } else {
    for (const item of [...$("conversation").children].slice(-2)) item.remove();
  }
}

function restart() {
  turns = [];
  $("conversation").replaceChildren();
  clearAnswer();
}

async function stop() {
  running?.abort();
  await ended;
}

// -- what the user does --------------------------------------------------------------------

async function take(blob, name) {
  await stop();
  try {
    await show(blob, name, { source: JSON.stringify(name), maxBytes: about.max_bytes });
    restart(); // it was about the picture before
  } catch (error) {
    complain(error.message);
  }
  arrange();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && picture.blob) ended = answer();
});
form.addEventListener("change", arrange);
form.addEventListener("input", tellPython);
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("camera").open) stop();
});
$("restart").addEventListener("click", async () => {
  await stop();
  restart();
  arrange();
  fields.message.focus();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("code"));
    $("copy").textContent = "Selected";
  }
});
$("copy").addEventListener("blur", () => { $("copy").textContent = "Copy"; });

async function start() {
  about = await (await fetch("/about")).json();
  $("server").classList.toggle("simulated", about.simulated);
  $("server").textContent = about.simulated
    ? "No model is looking at the picture: a simulator answers"
    : `Answers come from ${about.endpoint}`;
  watchSources(take, complain);
  const response = await fetch("/picture");
  const name = about.picture?.split(/[/\\]/).at(-1) ?? "sample.jpg";
  await show(await response.blob(), name, { source: about.picture && JSON.stringify(about.picture) });
  arrange();
}

start();
