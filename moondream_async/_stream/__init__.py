"""Answers as they are written.

`stream` has the types, `clock` their deadlines, and `relay` passes them on.
"""
