"""Answers as they are written.

`stream` is what callers see, `reading` fills and ends it, `clock` has its deadlines, and `relay`
sends it on to browsers.
"""
