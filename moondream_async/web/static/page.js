// The page: it makes questions of the form, and shows the answers.

import { ask } from "./asking.js";
import { GrowingText } from "./answer.js";
import { examples } from "./examples.js";
import { Follower } from "./follow.js";
import { fillIn, keep, keepPicture, keptPicture } from "./kept.js";
import { live } from "./live.js";
import * as overlay from "./overlay.js";
import { fault, picture, show, watchSources } from "./picture.js";
import { program } from "./python.js";
import * as shown from "./shown.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const fields = form.elements;

const VERBS = {
  caption: "Describe", query: "Ask", detect: "Detect", point: "Point", segment: "Segment", chat: "Send",
};
const SETTINGS = ["max_tokens", "max_objects", "temperature"];
const DRAWN = ["detect", "point", "segment"];

let about = null;
let turns = []; // of the conversation
let running = null; // the AbortController of an answer or a moving picture under way
let ended = Promise.resolve(); // its end
let chosen = null; // the skill of the answer that is shown
const isLive = () => $("live").getAttribute("aria-pressed") === "true";

// -- the question --------------------------------------------------------------------------

function question() {
  const skill = fields.skill.value;
  const asked = { skill, settings: {} };
  if (skill === "caption") asked.length = fields.namedItem("length").value; // fields.length is a number
  if (skill === "query") asked.question = fields.question.value;
  if (DRAWN.includes(skill)) asked.object = fields.object.value;
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

// The conversation with the next message; without a message, the conversation last sent.
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
    // Hidden inputs are disabled: the browser must not require them.
    for (const input of part.querySelectorAll("input")) input.disabled = part.hidden;
  }
  $("restart").hidden = skill !== "chat" || turns.length === 0;
  $("ask").textContent = VERBS[skill];
  if (skill !== chosen) {
    if (isLive()) overlay.clear();
    else shown.clear();
    offer(skill);
  }
  chosen = skill;
  tellPython();
}

// Offer example questions as buttons, which ask them.
function offer(skill) {
  const { field, questions } = examples(skill, picture.source === null);
  $("examples").replaceChildren(...questions.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      fields[field].value = text;
      tellPython();
      if (!isLive()) form.requestSubmit();
    });
    return button;
  }));
}

function tellPython() {
  if (!about) return;
  $("code").textContent = program(question(), { about, picture: picture.source });
  keep(fields, turns);
}

// -- the answer ----------------------------------------------------------------------------

// What neither a sticky picture nor a fixed button covers of the window, in pixels from its top.
function visible() {
  const covers = (id, position) => getComputedStyle($(id)).position === position;
  return {
    top: covers("view", "sticky") ? $("view").offsetHeight : 0,
    bottom: covers("stop", "fixed") && !$("stop").hidden ? $("stop").getBoundingClientRect().top : innerHeight,
  };
}

const follower = new Follower(visible);

// Scroll to the answer's place: on a phone it is below the screen.
function reveal() {
  const { top } = $("answering").getBoundingClientRect();
  if (top > innerHeight * 0.7 || top < visible().top) {
    $("answering").scrollIntoView({ block: "start", behavior: "instant" });
  }
}

async function answer() {
  const asked = question();
  const mine = new AbortController();
  running = mine;
  shown.clear();
  setBusy(true);
  shown.tell("Waiting for the answer to begin");
  const clock = new shown.Clock();
  const isChat = asked.skill === "chat";
  const place = isChat ? addTurns(asked) : $("answer");
  const text = new GrowingText(place);
  if (!isChat) reveal();
  follower.begin(place);
  let box = null;
  let path = "";
  let ending = "";
  try {
    for await (const { type, data } of ask(asked, picture.blob, mine.signal)) {
      if (type === "chunk") {
        clock.tick();
        clock.show();
        if (asked.skill === "segment") {
          shown.tell("Drawing the outline");
          path += data.chunk;
          overlay.drawOutline(path, box, asked.object, { coarse: true });
        } else {
          shown.tell("Writing");
          text.append(data.chunk);
          follower.update();
        }
      } else if (type === "bbox") {
        box = data.bbox;
      } else if (type === "reasoning") {
        shown.tell("Thinking");
        shown.think(data.text);
      } else if (type === "error") {
        throw failure(data);
      } else if (type === "done") {
        ending = finish(asked, { ...data, bbox: data.bbox ?? box }, text, clock);
      }
    }
    if (!ending) throw new Error("The page’s own server ended the answer before it was complete.");
  } catch (error) {
    ending = text.text || path ? "Failed after this had arrived" : "Failed";
    if (mine.signal.aborted) ending = "Stopped: the connection to the server is closed";
    else shown.complain(error, about.endpoint);
  } finally {
    text.finish();
    follower.update();
    follower.end();
    if (isChat) keepTurns(asked, text);
    shown.tell(ending);
    running = null;
    setBusy(false);
    arrange();
  }
}

function failure({ error }) {
  return fault(error.type, error.message);
}

// Show the end of an answer; return a sentence about it.
function finish(asked, data, text, clock) {
  shown.showRequest(data.request_id);
  if (data.reasoning?.text) shown.think(data.reasoning);
  if (DRAWN.includes(asked.skill)) text.append(shown.showFound(asked.skill, data, asked.object));
  clock.show();
  return data.finish_reason === "length" ? "Done: cut at the number of tokens" : "Done";
}

function setBusy(busy) {
  const [from, to] = busy ? [$("ask"), $("stop")] : [$("stop"), $("ask")];
  const hadFocus = document.activeElement === from || $("skills").contains(document.activeElement);
  to.hidden = false;
  if (hadFocus) to.focus({ preventScroll: true });
  from.hidden = true;
  $("skills").disabled = busy;
}

// -- the moving picture --------------------------------------------------------------------

async function goLive(file) {
  await stop();
  const mine = new AbortController();
  running = mine;
  if (fields.skill.value === "chat") fields.skill.value = "detect"; // frames are no conversation
  shown.clear();
  restart();
  setLive(true);
  arrange();
  let ending = "Stopped";
  try {
    shown.tell("Waiting for the camera");
    ending = await live({
      file,
      signal: mine.signal,
      answer: answerFrame,
      complain: (error) => shown.complain(error, about.endpoint),
      started: () => shown.tell("Live: every answer is about the newest frame"),
    });
  } catch (error) {
    ending = "Failed";
    shown.complain(error, about.endpoint);
  } finally {
    overlay.clear();
    shown.tell(ending);
    running = null;
    setLive(false);
    arrange();
  }
}

function setLive(moves) {
  const hadFocus = document.activeElement === (moves ? $("ask") : $("stop"));
  $("live").setAttribute("aria-pressed", moves);
  $("ask").hidden = moves;
  $("stop").hidden = !moves;
  if (hadFocus) (moves ? $("stop") : $("ask")).focus({ preventScroll: true });
  $("answer").ariaLive = moves ? "off" : "polite"; // a screen reader must not read every frame
}

// Ask about a frame, and show the answer when it is whole: partial answers would flicker.
async function answerFrame(blob, signal, drawn) {
  const asked = question();
  if (asked.skill === "chat") return;
  let text = "";
  let box = null;
  for await (const { type, data } of ask(asked, blob, signal)) {
    if (type === "error") throw failure(data);
    if (type === "chunk") text += data.chunk;
    if (type === "bbox") box = data.bbox;
    if (type !== "done" || asked.skill !== fields.skill.value) continue;
    const found = { ...data, bbox: data.bbox ?? box };
    const isDrawn = DRAWN.includes(asked.skill);
    const said = isDrawn
      ? shown.showFound(asked.skill, found, asked.object, { listed: false }) : text;
    const answered = new GrowingText($("answer"));
    answered.append(said);
    answered.finish();
    drawn();
  }
}

// -- the conversation ----------------------------------------------------------------------

function addTurn(className) {
  const item = document.createElement("li");
  item.className = className;
  $("conversation").append(item);
  return item;
}

function addTurns(asked) {
  addTurn("user said").append(paragraph(asked.messages.at(-1).content));
  return addTurn("assistant said");
}

function paragraph(text) {
  const made = document.createElement("p");
  made.textContent = text;
  return made;
}

// A partial answer is kept. Without an answer the question stays in the field.
function keepTurns(asked, text) {
  if (text.text) {
    turns = [...asked.messages, { role: "assistant", content: text.text }];
    fields.message.value = "";
  } else {
    for (const item of [...$("conversation").children].slice(-2)) item.remove();
  }
}

function showTurns(kept) {
  turns = kept;
  for (const { role, content } of turns) {
    const item = addTurn(`${role} said`);
    if (role === "user") item.append(paragraph(content));
    else {
      const text = new GrowingText(item);
      text.append(content);
      text.finish();
    }
  }
}

function restart() {
  turns = [];
  $("conversation").replaceChildren();
  shown.clear();
}

async function stop() {
  running?.abort();
  await ended;
}

// -- what the user does --------------------------------------------------------------------

async function take(blob, name) {
  if (blob.type.startsWith("video/")) {
    await stop();
    ended = goLive(blob);
    return;
  }
  await stop();
  try {
    await show(blob, name, { source: JSON.stringify(name), maxBytes: about.max_bytes });
    restart(); // the conversation was about the last picture
    await keepPicture(blob, name);
  } catch (error) {
    refuse(error);
  }
  arrange();
  offer(fields.skill.value); // questions for any picture, not those for the sample
}

function refuse(error) {
  shown.complain(error, about.endpoint);
  reveal();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && picture.blob) ended = answer();
});
form.addEventListener("change", arrange);
form.addEventListener("input", tellPython);
$("stop").addEventListener("click", stop);
$("live").addEventListener("click", () => {
  if (isLive()) stop();
  else ended = goLive(null);
});
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
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--covered", `${visible().top}px`);
}).observe($("view"));

async function start() {
  about = await (await fetch("/about")).json();
  $("server").classList.toggle("simulated", about.simulated);
  $("server").textContent = about.simulated
    ? "No model is looking at the picture: a simulator answers"
    : `Answers come from ${about.endpoint}`;
  watchSources(take, refuse);
  const kept = await keptPicture();
  const blob = kept?.blob ?? (await (await fetch("/picture")).blob());
  const name = kept?.name ?? about.picture?.split(/[/\\]/).at(-1) ?? "sample.jpg";
  const source = kept?.name ?? about.picture;
  await show(blob, name, { source: source ? JSON.stringify(source) : null });
  showTurns(fillIn(fields));
  arrange();
}

start();
