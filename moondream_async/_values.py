"""Dicts whose items are attributes too: the base of results and records.

The top of `results` has the rules. To type checkers each class names its keys, in up to two
groups, and the type of each group's items; another key in ``value[key]`` is an error, as for
a TypedDict.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Never,
    NotRequired,
    Self,
    dataclass_transform,
    get_args,
    get_type_hints,
    overload,
)

import msgspec

if TYPE_CHECKING:
    from _typeshed import SupportsKeysAndGetItem
    from typing_extensions import TypeVar  # those of `typing` have defaults from Python 3.13 on

    Key_contra = TypeVar("Key_contra", contravariant=True, default=Never)
    Item_co = TypeVar("Item_co", covariant=True, default=Any)
    OtherKey_contra = TypeVar("OtherKey_contra", contravariant=True, default=Never)
    OtherItem_co = TypeVar("OtherItem_co", covariant=True, default=Any)

    class _Keyed(
        dict[str, Any],
        SupportsKeysAndGetItem[str, Any],  # so that ``dict(value)`` is right all the same
        Generic[Key_contra, Item_co, OtherKey_contra, OtherItem_co],
    ):
        @overload  # type: ignore[override] # a dict takes any key
        def __getitem__(self, key: Key_contra, /) -> Item_co: ...
        @overload
        def __getitem__(self, key: OtherKey_contra, /) -> OtherItem_co: ...
        def __getitem__(self, key: Any, /) -> Any: ...

else:  # a dict takes any number of types in its brackets
    _Keyed = dict
    Key_contra = Item_co = OtherKey_contra = OtherItem_co = Any

_REQUIRED: Any = msgspec.NODEFAULT


class _Item:  # an attribute that is an item, or None where there is none
    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, value: Value | None, cls: type[Value]) -> Any:
        return self if value is None else value.get(self._name)

    def __set__(self, value: Value, item: Any) -> None:
        raise AttributeError(f"attributes can't be set; items can: [{self._name!r}] = ...")


class _Beside(_Item):  # an attribute that is no item
    def __get__(self, value: Value | None, cls: type[Value]) -> Any:
        return self if value is None else getattr(value, f"_{self._name}")


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Value(_Keyed[Key_contra, Item_co, OtherKey_contra, OtherItem_co]):
    """A dict whose items are attributes too.

    The annotations of a subclass are its keys, and their defaults; a key whose value is None
    is left out. The names in `_beside` are attributes and no keys, kept in slots whose names
    begin with an underscore.
    """

    __slots__ = ()

    _fields: ClassVar[dict[str, Any]] = {}
    """The default of each field; `repr` has the same order, a class's own fields first."""
    _ordered: ClassVar[tuple[str, ...]] = ()
    """The fields that can be given without their names."""
    _beside: ClassVar[frozenset[str]] = frozenset()
    _hidden: ClassVar[frozenset[str]] = frozenset()  # from repr

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        own = [name for name in cls.__annotations__ if name[0] != "_"]
        defaults = {name: cls.__dict__.get(name, _REQUIRED) for name in own}
        cls._fields = defaults | {
            name: default for name, default in cls._fields.items() if name not in defaults
        }
        cls._ordered = () if kw_only else tuple(own)
        keys = tuple(name for name in cls._fields if name not in cls._beside)
        type.__setattr__(cls, "__match_args__", keys)
        for name in own:
            setattr(cls, name, _Beside(name) if name in cls._beside else _Item(name))

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        cls = type(self)
        if len(args) == 1 and isinstance(args[0], Iterable) and not isinstance(args[0], str):
            fields = dict(args[0], **fields)  # like a dict; libraries copy dicts in this way
        else:
            fields = cls._named(args, fields)
        nested = _nested(cls)
        for name, default in cls._fields.items():
            value = fields.pop(name, None)
            if value is None:
                if default is _REQUIRED:
                    raise TypeError(f"{cls.__name__} needs {name!r}")
                value = _fresh(default)
            elif name in nested or type(value) is tuple:
                value = _made(value, nested.get(name))
            if name in cls._beside:
                setattr(self, f"_{name}", value)
            elif value is not None:
                self[name] = value
        self.update(fields)

    @classmethod
    def _named(cls, args: tuple[Any, ...], fields: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(cls._ordered):
            raise TypeError(f"{cls.__name__} takes {len(cls._ordered)} values without a name")
        given = dict(zip(cls._ordered, args, strict=False))
        if wrong := (fields.keys() & given.keys()) | (fields.keys() - cls._fields.keys()):
            raise TypeError(f"{cls.__name__} does not take {', '.join(sorted(wrong))} as well")
        return given | fields

    @classmethod
    def fields(cls) -> dict[str, bool]:
        """Return the names of the fields, and whether each is required."""
        return {name: default is _REQUIRED for name, default in cls._fields.items()}

    @classmethod
    def of(cls, items: Mapping[str, Any], **beside: Any) -> Self:
        """Return a value with these items as they are; nothing is checked, which is faster."""
        made = cls.__new__(cls)
        made.update(items)
        for name in cls._beside:
            setattr(made, f"_{name}", beside.get(name))
        return made

    def __repr__(self) -> str:
        known = [name for name in self._fields if name in self]
        names = known + [name for name in self if name not in self._fields]
        shown = ", ".join(
            f"{name}={self.get(name)!r}" for name in names if name not in self._hidden
        )
        return f"{type(self).__name__}({shown})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (
            type(self),
            dict(self),
            {name: getattr(self, name) for name in self._beside},
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Return this type's schema for pydantic, and with it for FastAPI."""
        from pydantic_core import core_schema  # noqa: PLC0415 - only pydantic calls this

        return core_schema.no_info_wrap_validator_function(
            lambda value, check: value if isinstance(value, cls) else cls(check(value)),
            handler.generate_schema(typed_dict(cls)),
        )


@cache
def _nested(cls: type[Value]) -> dict[str, type[Value]]:
    """Return the fields that are values themselves, or lists of them."""
    hints = get_type_hints(cls)
    found = {}
    for name in cls._fields:
        for hint in (hints[name], *get_args(hints[name])):
            kind = (get_args(hint) or (hint,))[0]
            if isinstance(kind, type) and issubclass(kind, Value):
                found[name] = kind
    return found


def _made(value: Any, kind: type[Value] | None) -> Any:
    """Return plain dicts of decoded JSON as values of `kind`, and tuples as lists."""
    if isinstance(value, (list, tuple)):
        return [_made(each, kind) for each in value] if kind else list(value)
    plain = kind is not None and isinstance(value, Mapping) and not isinstance(value, Value)
    return kind(value) if kind and plain else value


def _fresh(default: Any) -> Any:
    """Return a default; a list or dict is made anew."""
    factory = getattr(default, "default_factory", _REQUIRED)
    return default if factory is _REQUIRED else factory()


def _revive(cls: type[Value], items: dict[str, Any], beside: dict[str, Any]) -> Value:
    return cls.of(items, **beside)


@cache
def typed_dict(cls: type[Value]) -> Any:
    """Return the TypedDict with the same keys, which pydantic and msgspec understand."""
    if sys.version_info >= (3, 12):
        from typing import TypedDict  # noqa: PLC0415
    else:
        from typing_extensions import TypedDict  # noqa: PLC0415 - pydantic takes no other
    hints = get_type_hints(cls)
    keys = {
        name: hints[name] if required else NotRequired[hints[name]]
        for name, required in cls.fields().items()
        if name not in cls._beside
    }
    made = TypedDict(cls.__name__, keys)  # type: ignore[misc]
    made.__doc__ = (cls.__doc__ or "").partition("\n")[0]
    made.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]
    return made


class Record(Value[Key_contra, Item_co, OtherKey_contra, OtherItem_co], kw_only=True):
    """A copy of what the server keeps, from the time of the call."""

    __slots__ = ("_raw",)
    _beside = frozenset({"raw"})

    raw: dict[str, Any] = msgspec.field(default_factory=dict)
    """The decoded record, whole. No key."""
