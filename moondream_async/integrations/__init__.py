"""Moondream inside other people's frameworks: a module for each, loaded by whoever uses it."""
