"""The API key and other secrets, and how they are kept out of what is printed."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TypeVar

_HIDDEN = "***"
_SHORTEST = 8

# Turned over, byte by byte: no walk through attributes and items finds what is kept so.
_MASK = bytes(255 - each for each in range(256))

_Error = TypeVar("_Error", bound=BaseException)


class Secret:
    """An API key that shows itself nowhere: not in a repr, a plan, a log or a traceback.

    It is no string, so that nothing can slice it or print it by mistake. It can be
    pickled, which is how it gets to workers, and the pickle holds the key.

    >>> Secret("the key")
    Secret('***')
    >>> f"{Secret('the key')}"
    "Secret('***')"
    """

    __slots__ = ("_masked",)

    def __init__(self, value: str = "") -> None:
        self._masked = value.encode("utf-8", "surrogatepass").translate(_MASK)

    def reveal(self) -> str:
        """Return the key."""
        return self._masked.translate(_MASK).decode("utf-8", "surrogatepass")

    def prefixed(self, prefix: str) -> Secret:
        """Return another one, with something before it."""
        return Secret(prefix + self.reveal())

    def __bool__(self) -> bool:
        return bool(self._masked)

    def __len__(self) -> int:
        return len(self._masked)

    def __repr__(self) -> str:
        return f"Secret({_HIDDEN!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._masked == self._masked

    def __hash__(self) -> int:
        return hash(self._masked)

    def __reduce__(self) -> tuple[Any, ...]:
        return Secret, (self.reveal(),)


def hidden(value: object) -> Secret | None:
    """Hide an argument before anything can go wrong; one that is no string is as good as empty.

    White space round it is taken off. What is nothing else is none.
    """
    if isinstance(value, str):
        return Secret(value.strip()) or None
    return value if value is None or isinstance(value, Secret) else Secret()


def is_header_value(secret: Secret) -> bool:
    """Tell whether a secret can stand in a header; in a function, where its text ends with it."""
    text = secret.reveal()
    return text.isascii() and text.isprintable()


class Redactor:
    """Takes secrets out of what is shown, where a server or a library quotes them.

    Nothing is done about those that are so short that they stand in other words, too;
    no real key is.
    """

    __slots__ = ("_secrets",)

    def __init__(self, *secrets: Secret | None) -> None:
        self._secrets = [each for each in secrets if each is not None and len(each) >= _SHORTEST]

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def text(self, text: str) -> str:
        """Take them out of a text."""
        for each in self._secrets:
            text = text.replace(each.reveal(), _HIDDEN)
        return text

    def data(self, data: bytes) -> bytes:
        """Take them out of bytes that a server sent."""
        for each in self._secrets:
            data = data.replace(each.reveal().encode("utf-8", "surrogatepass"), _HIDDEN.encode())
        return data

    def value(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind
        """Take them out of an attribute or an argument of an exception."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bytes):
            return self.data(value)
        if type(value) is dict:
            return {self.value(key): self.value(each) for key, each in value.items()}
        if isinstance(value, MutableMapping) and hasattr(value, "getall"):  # headers
            kind: Any = type(value)
            return kind([(self.text(k), self.text(each)) for k, each in value.items()])
        if type(value) in (list, tuple):
            return type(value)(map(self.value, value))
        if hasattr(value, "_replace") and hasattr(value, "_fields"):  # its error looks at its parts
            return value._replace(**{k: self.value(getattr(value, k)) for k in value._fields})
        shown = repr(value)
        return value if self.text(shown) == shown else _HIDDEN


NOTHING_SECRET = Redactor()


def redact(data: bytes, secret: Redactor) -> bytes:
    """Take secrets out of bytes that a server sent."""
    return secret.data(data)


def conceal(error: _Error, secret: Redactor) -> _Error:
    """Take secrets out of an exception and of those behind it, and return it.

    Servers may quote the key, and HTTP libraries quote servers. Tracebacks are cut
    off here, too: some tools print the local variables of each frame, and in the
    frames below are requests and answers as they went over the wire.

    >>> secret = Redactor(Secret("key-1234"))
    >>> conceal(ValueError("Bad: key-1234", {"key": b"key-1234"}), secret)
    ValueError('Bad: ***', {'key': b'***'})
    """
    each: BaseException | None = error if secret else None
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        each.__traceback__ = None
        each.args = secret.value(each.args)
        fields = vars(each)
        fields.update({name: secret.value(value) for name, value in fields.items()})
        each = each.__cause__ or each.__context__
    return error
