"""The API key, and how it is kept out of what is printed."""

from __future__ import annotations

from typing import Any, TypeVar

_HIDDEN = "***"

_Error = TypeVar("_Error", bound=BaseException)


class Secret(str):
    """A string whose repr does not show it, in whatever it ends up."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(_HIDDEN)


def redact(data: bytes, secret: str) -> bytes:
    """Take `secret` out of bytes that a server sent."""
    return data.replace(secret.encode(), _HIDDEN.encode()) if secret else data


def conceal(error: _Error, secret: str) -> _Error:
    """Take `secret` out of an exception and of those behind it, and return it.

    Servers may quote the key, and HTTP libraries quote servers. Tracebacks are cut
    off here, too: some tools print the local variables of each frame, and in the
    frames below are requests and answers as they went over the wire.

    >>> error = conceal(ValueError("Bad key: 123", {"key": b"123"}), "123")
    >>> error
    ValueError('Bad key: ***', {'key': b'***'})
    """
    each: BaseException | None = error if secret else None
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        each.__traceback__ = None
        each.args = tuple(_hide(value, secret) for value in each.args)
        fields = vars(each)
        fields.update({name: _hide(value, secret) for name, value in fields.items()})
        each = each.__cause__ or each.__context__
    return error


def _hide(value: Any, secret: str) -> Any:
    if isinstance(value, str):
        return value.replace(secret, _HIDDEN) if secret in value else value
    if isinstance(value, bytes):
        return redact(value, secret)
    if type(value) is dict:
        return {_hide(key, secret): _hide(each, secret) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_hide(each, secret) for each in value)
    return _HIDDEN if secret in repr(value) else value
