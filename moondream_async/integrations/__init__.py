"""Moondream inside other frameworks: a module for each, which only its users load."""
