// Growing text with the part of Markdown that models write: paragraphs, headings, lists, code,
// emphasis. It is made of elements and text nodes, and never of HTML: a server's text can't
// become markup.
//
// A screen reader reads each sentence once, and not every chunk: the element is a live region,
// the unfinished sentence is hidden from the reader, and a finished one becomes a new element.

const SENTENCE_ENDS = /^[^]*?[.!?…:;\n]["'”’)\]*_`]*\s+/;
const FENCE = /^\s*```/;
const BLOCKS = [
  { begins: /^\s*#{1,6}\s+/, tag: "h3" },
  { begins: /^\s*[-*+•]\s+/, tag: "ul" },
  { begins: /^\s*\d{1,3}[.)]\s+/, tag: "ol" },
  { begins: /^\s*>\s?/, tag: "blockquote" },
];
// The beginning of a line that could still become a block.
const UNDECIDED = /^\s*(#{1,6}\s*|[-*+•]\s*|\d{1,3}[.)]?\s*|>\s?|`{1,2}|`{3}[^\n]*)?$/;

export class GrowingText {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.tail = document.createElement("span");
    this.tail.ariaHidden = "true";
    this.block = null; // the element of the tail
    this.unsaid = ""; // the text of the tail
    this.line = ""; // the beginning of a line, while its block is undecided
    this.begun = false; // whether the block of the line is decided
    this.fenced = false;
    element.replaceChildren(this.tail);
    element.classList.add("growing");
  }

  append(chunk) {
    this.text += chunk;
    for (const piece of chunk.split(/(?<=\n)/)) this.#take(piece);
    this.#show();
  }

  finish() {
    if (!this.begun && this.line) this.#begin();
    this.#say(this.unsaid);
    this.tail.remove();
    this.element.classList.remove("growing");
  }

  // Take a piece of a line; a line break may only be its last character.
  #take(piece) {
    const ended = piece.endsWith("\n");
    if (this.begun) this.unsaid += piece;
    else {
      this.line += piece;
      if (!ended && UNDECIDED.test(this.line)) return;
      this.#begin();
    }
    if (!ended) return;
    this.begun = false;
    if (["H3", "LI"].includes(this.block?.tagName)) this.#close();
  }

  // Decide the block of a line, and put the tail there.
  #begin() {
    const { line } = this;
    [this.line, this.begun] = ["", true];
    if (FENCE.test(line)) {
      this.#close();
      this.fenced = !this.fenced;
      if (this.fenced) this.#open("pre");
      return; // the name of the language is not shown
    }
    if (this.fenced) {
      this.unsaid += line;
      return;
    }
    if (line.trim() === "") {
      this.#close();
      return;
    }
    const kind = BLOCKS.find(({ begins }) => begins.test(line));
    if (!kind) {
      if (this.block?.tagName !== "P") this.#open("p");
      this.unsaid += line;
      return;
    }
    const marker = line.match(kind.begins)[0];
    if (kind.tag === "blockquote" && this.block?.tagName === "BLOCKQUOTE") {
      this.unsaid += line.slice(marker.length);
      return;
    }
    this.#close();
    this.#open(kind.tag, { number: Number.parseInt(marker, 10), depth: marker.search(/\S/) >> 1 });
    this.unsaid = line.slice(marker.length);
  }

  #open(tag, { number, depth } = {}) {
    this.#close();
    let parent = this.element;
    let name = tag;
    if (["ul", "ol"].includes(tag)) {
      name = "li";
      parent = this.element.lastElementChild;
      if (parent?.localName !== tag) {
        parent = document.createElement(tag);
        this.element.append(parent);
      }
    }
    this.block = document.createElement(name);
    if (tag === "ol") this.block.value = number;
    if (depth) this.block.style.marginInlineStart = `${Math.min(depth, 4)}rem`;
    parent.append(this.block);
    this.block.append(this.tail);
  }

  #close() {
    this.#say(this.unsaid);
    this.tail.remove();
    if (this.block && !this.block.hasChildNodes()) this.block.remove();
    this.block = null;
  }

  // Say the finished sentences, and show the unfinished one.
  #show() {
    if (this.block?.tagName !== "PRE") {
      for (let end; (end = sentence(this.unsaid)) > 0;) this.#say(this.unsaid.slice(0, end));
    }
    if (!this.block) {
      if (!this.line.trim()) return;
      this.#open("p");
    }
    this.tail.replaceChildren(...this.#read(this.unsaid + this.line, true));
  }

  #say(finished) {
    this.tail.replaceChildren();
    this.unsaid = this.unsaid.slice(finished.length);
    if (!finished || !this.block) return;
    const said = document.createElement("span");
    said.append(...this.#read(finished));
    this.tail.before(said);
  }

  #read(text, unfinished = false) {
    return this.block?.tagName === "PRE" ? [text] : inline(text, unfinished);
  }
}

// The end of the first sentence that ends outside code and emphasis; or 0.
function sentence(text) {
  let end = 0;
  for (;;) {
    const found = text.slice(end).match(SENTENCE_ENDS)?.[0].length;
    if (!found) return 0;
    end += found;
    const before = text.slice(0, end);
    if (before.split("`").length % 2 && before.split("**").length % 2) return end;
  }
}

// An escape; code; strong; emphasis; a link, which is shown as text with its address.
const INLINE = new RegExp(
  [
    String.raw`\\([\\\`*_{}[\]()#+.!|>~-])`,
    "`([^`]+)`",
    String.raw`\*\*(?=\S)([^]+?)(?<=\S)\*\*(?!\*)`,
    String.raw`(?<!\w)__(?=\S)([^]+?)(?<=\S)__(?!\w)`,
    String.raw`\*(?=[^\s*])([^*]+?)(?<=\S)\*`,
    String.raw`(?<!\w)_(?=[^\s_])([^_]+?)(?<=\S)_(?!\w)`,
    String.raw`!?\[([^\]]*)\]\(([^)\s]+)\)`,
  ].join("|"),
  "g",
);

// Texts and elements for a piece of text. Unfinished code or emphasis is closed at its end.
function inline(text, unfinished = false) {
  const nodes = [];
  let end = 0;
  const whole = unfinished ? closed(text) : text;
  for (const found of whole.matchAll(INLINE)) {
    nodes.push(whole.slice(end, found.index));
    end = found.index + found[0].length;
    const [, escaped, code, strong, strong2, em, em2, label, address] = found;
    if (escaped) nodes.push(escaped);
    else if (code) nodes.push(element("code", [code]));
    else if (strong ?? strong2) nodes.push(element("strong", inline(strong ?? strong2)));
    else if (em ?? em2) nodes.push(element("em", inline(em ?? em2)));
    else nodes.push(label && label !== address ? `${label} (${address})` : address);
  }
  nodes.push(whole.slice(end));
  return nodes.filter((each) => each !== "");
}

function closed(text) {
  if (text.split("`").length % 2 === 0) return `${text.trimEnd()}\``;
  const open = text.split("**").length % 2 === 0 && !/\*\*\s*$/.test(text);
  return open ? `${text.trimEnd()}**` : text;
}

function element(tag, nodes) {
  const made = document.createElement(tag);
  made.append(...nodes);
  return made;
}
