// Keeps the end of a growing text in view. It stops when the reader scrolls away from the end,
// and begins again when the reader scrolls back.

const NEAR = 48; // pixels

export class Follower {
  constructor(covered) {
    this.covered = covered; // returns the covered height at the window's top, in pixels
    this.target = null;
    this.follows = false;
    addEventListener("scroll", () => {
      if (this.target) this.follows = this.#isInView();
    }, { passive: true });
  }

  begin(target) {
    [this.target, this.follows] = [target, true];
  }

  end() {
    this.target = null;
  }

  // The target has grown.
  update() {
    if (!this.follows || !this.target || this.#isInView(0)) return;
    scrollBy({ top: this.target.getBoundingClientRect().bottom - innerHeight + NEAR, behavior: "instant" });
  }

  #isInView(slack = NEAR) {
    const { bottom } = this.target.getBoundingClientRect();
    return bottom > this.covered() && bottom <= innerHeight + slack;
  }
}
