"""All that can be reached from a value, as debuggers and tracebacks with local variables do."""

import asyncio
import functools
import inspect
import traceback
import types
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path


def is_of_tests(frame):
    return Path(frame.f_code.co_filename).parent == Path(__file__).parent


def parts_of(value):  # noqa: C901 - a kind of value each
    """Yield all that a value holds, each with a name for it."""
    if isinstance(value, BaseException):
        yield from (("cause", value.__cause__), ("context", value.__context__), (".", value.args))
        for frame, _ in traceback.walk_tb(value.__traceback__):
            if not is_of_tests(frame):
                yield f"<{frame.f_code.co_name}>", frame.f_locals
    if isinstance(value, Mapping):
        yield from value.items()
        yield from enumerate(value)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from enumerate((value.func, value.args, value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from enumerate((inspect.getclosurevars(value).nonlocals, value.__defaults__))
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif isinstance(value, weakref.ref):
        yield "ref", value()
    frames = [getattr(value, name, None) for name in ("cr_frame", "gi_frame", "ag_frame")]
    yield from (("<>", each.f_locals) for each in frames if each is not None)
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield name, getattr(value, name, None)


def where_in(root, secret):
    """Return the ways to all strings and bytes with a secret in them; an exception's frames too."""
    found, seen, todo = [], {}, [((), root)]
    while todo:
        way, value = todo.pop()
        if isinstance(value, (str, bytes, bytearray, memoryview)):
            text = value if isinstance(value, str) else bytes(value).decode("latin-1")
            found += [way] * (secret in text)
        elif id(value) not in seen and not isinstance(
            value, (types.ModuleType, type, asyncio.AbstractEventLoop)
        ):
            seen[id(value)] = value
            todo += [((*way, name), each) for name, each in parts_of(value)]
    return found
