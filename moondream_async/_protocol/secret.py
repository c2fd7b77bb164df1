"""The API key and other secrets, and how they are kept out of printed text."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TypeVar

_HIDDEN = "***"
_SHORTEST = 8

# Inverts each byte: a search through attributes and items does not find a key that is kept so.
_MASK = bytes(255 - each for each in range(256))

_Error = TypeVar("_Error", bound=BaseException)


class Secret:
    """An API key that is never shown: in no repr, plan, log or traceback.

    It is no string, so that no code can slice or print it by mistake. It can be pickled, to get
    to worker processes, and the pickle holds the key.

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
        """Return a secret of `prefix` and the key."""
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
    """Return an argument as a secret, before an error can show it; None if there is none.

    White space around it is removed, and an empty string is None. An argument of a wrong type
    is an empty secret.
    """
    if isinstance(value, str):
        return Secret(value.strip()) or None
    return value if value is None or isinstance(value, Secret) else Secret()


def is_header_value(secret: Secret) -> bool:
    """Tell whether a secret can stand in a header."""
    # A function of its own, so that the key's text is freed with its local variables.
    text = secret.reveal()
    return text.isascii() and text.isprintable()


class Redactor:
    """Takes secrets out of text and values that are shown: servers and libraries may quote them.

    Secrets that are so short that they occur in other words are left; no real key is so short.
    """

    __slots__ = ("_secrets",)

    def __init__(self, *secrets: Secret | None) -> None:
        self._secrets = [each for each in secrets if each is not None and len(each) >= _SHORTEST]

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def text(self, text: str) -> str:
        """Return a text without the secrets."""
        for each in self._secrets:
            text = text.replace(each.reveal(), _HIDDEN)
        return text

    def data(self, data: bytes) -> bytes:
        """Return bytes without the secrets."""
        for each in self._secrets:
            data = data.replace(each.reveal().encode("utf-8", "surrogatepass"), _HIDDEN.encode())
        return data

    def value(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind
        """Return an attribute or an argument of an exception without the secrets."""
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
        if hasattr(value, "_replace") and hasattr(value, "_fields"):  # a named tuple
            return value._replace(**{k: self.value(getattr(value, k)) for k in value._fields})
        shown = repr(value)
        return value if self.text(shown) == shown else _HIDDEN

    def error(self, error: _Error) -> _Error:
        """Take secrets out of an exception and its causes, and return it.

        Servers may quote the key, and HTTP libraries quote servers. The tracebacks so far are
        removed, too: some tools print the local variables of each frame, and these frames hold
        requests and answers as they were sent.

        >>> secret = Redactor(Secret("key-1234"))
        >>> secret.error(ValueError("Bad: key-1234", {"key": b"key-1234"}))
        ValueError('Bad: ***', {'key': b'***'})
        """
        each: BaseException | None = error if self else None
        seen: set[int] = set()
        while each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            each.args = self.value(each.args)
            fields = vars(each)
            fields.update({name: self.value(value) for name, value in fields.items()})
            each = each.__cause__ or each.__context__
        return error


NOTHING_SECRET = Redactor()
