"""The scenarios: a module for each, whose `run` measures and returns an `Outcome`."""
