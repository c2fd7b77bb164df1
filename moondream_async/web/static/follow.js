// Keeps the end of a growing text in view. It stops when the reader scrolls away from the end,
// and begins again when the reader scrolls back.

const NEAR = 48; // pixels
const BY_HAND = ["wheel", "touchmove", "pointerdown", "keydown"];

export class Follower {
  constructor(visible) {
    this.visible = visible; // returns the top and bottom of what nothing covers, in pixels
    this.target = null;
    this.follows = false;
    // Before the text begins, the page may still move by what the reader did before asking.
    this.isRead = false;
    for (const name of BY_HAND) {
      addEventListener(name, () => { this.isRead = true; }, { passive: true });
    }
    addEventListener("scroll", () => {
      if (this.target && this.isRead) this.follows = this.#isInView();
    }, { passive: true });
  }

  begin(target) {
    [this.target, this.follows, this.isRead] = [target, true, false];
    this.#show();
  }

  end() {
    this.target = null;
  }

  // The target has grown.
  update() {
    this.isRead = true;
    this.#show();
  }

  #show() {
    if (!this.follows || !this.target || this.#isInView(0)) return;
    const { bottom } = this.target.getBoundingClientRect();
    scrollBy({ top: bottom - this.visible().bottom + NEAR, behavior: "instant" });
  }

  #isInView(slack = NEAR) {
    const { bottom } = this.target.getBoundingClientRect();
    const visible = this.visible();
    return bottom > visible.top && bottom <= visible.bottom + slack;
  }
}
