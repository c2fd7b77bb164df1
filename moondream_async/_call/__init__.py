"""One call over all its attempts: `call` is the loop, `retry` and `limits` decide for it."""
