// Text that grows. A screen reader is to hear each sentence once, and not every chunk: the
// element is a live region, the unfinished sentence in it is hidden from it, and a finished
// one becomes a new, audible piece.

const SENTENCE_ENDS = /^[^]*[.!?…:;\n]["'”’)\]]*\s+/;

export class GrowingText {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.tail = document.createElement("span");
    this.tail.ariaHidden = "true";
    element.replaceChildren(this.tail);
    element.classList.add("growing");
  }

  append(chunk) {
    this.text += chunk;
    this.tail.append(chunk);
    const finished = this.tail.textContent.match(SENTENCE_ENDS)?.[0];
    if (finished) this.#say(finished);
  }

  // Say something else instead.
  replace(text) {
    this.text = text;
    this.element.replaceChildren(this.tail);
    this.tail.textContent = text;
  }

  finish() {
    this.#say(this.tail.textContent);
    this.element.classList.remove("growing");
  }

  #say(finished) {
    if (!finished) return;
    const sentence = document.createElement("span");
    sentence.textContent = finished;
    this.tail.textContent = this.tail.textContent.slice(finished.length);
    this.tail.before(sentence);
  }
}
