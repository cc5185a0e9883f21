"""Codec: frozen dataclasses to msgpack and back, strictly, by their annotations.

Owns the rule that nothing but annotated dataclasses travels: every field is checked by name and type, so
bytes can never become anything but what is declared. Knows no message: `wire` does. Nothing is imported by
name from the bytes and no code runs from them, which is why this is not pickle.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeAlias

import msgpack


class DecodeError(ValueError):
    """Bytes do not have the declared shape. The message names the field and what is allowed there."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self._reason, self._path = reason, path

    def inside(self, outer: str) -> DecodeError:
        """The same, seen from whatever holds the value as `outer`. Paths are written only when something is wrong."""
        return DecodeError(self._reason, outer + self._path)


def pack(value: object) -> bytes:
    """msgpack bytes of a dataclass, or of lists, tuples, maps and scalars that hold dataclasses."""
    packed: bytes = msgpack.packb(value, default=_fields)
    return packed


def unpack(body: bytes) -> Any:
    """Plain values: lists come back as tuples, so that they can be keys and frozen fields."""
    try:
        return msgpack.unpackb(body, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DecodeError(f"not msgpack: {error}") from error


def build(expected: type[_T], value: Any) -> _T:
    """`value`, as `unpack` returns it, as an `expected` dataclass. Raises `DecodeError`."""
    try:
        built: _T = _decoder(typing.cast("Hashable", expected))(value)
    except DecodeError as error:
        raise error.inside(expected.__name__) from error
    return built


_T = typing.TypeVar("_T")
_Decode: TypeAlias = Callable[[Any], Any]


def _fields(value: object) -> dict[str, Any]:
    """msgpack's hook for what it does not know: a dataclass becomes the map of its non-default fields."""
    plain: dict[str, Any] = {}
    for name, default in _defaults(typing.cast("Hashable", type(value))):
        item = getattr(value, name)
        if default is dataclasses.MISSING or (item is not default and item != default):
            plain[name] = item
    return plain


@functools.cache
def _defaults(kind: Hashable) -> tuple[tuple[str, Any], ...]:
    """Each field with its default."""
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{getattr(kind, '__name__', kind)} does not travel over the wire")
    return tuple((f.name, f.default) for f in dataclasses.fields(kind))


@functools.cache
def _decoder(expected: Hashable) -> _Decode:
    """A strict decoder for one annotation. Annotations outside this table are a programming error."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _dataclass_decoder(typing.cast("type[Any]", expected))
    if origin is Literal:
        return _checked(lambda value: value in arguments, f"one of {', '.join(map(repr, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return _union_decoder(arguments)
    if origin is dict:
        return _dict_decoder(*arguments)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return _tuple_decoder(arguments[0])
    if origin is tuple:
        return _fixed_tuple_decoder(arguments)
    if isinstance(expected, type) and issubclass(expected, tuple):  # a NamedTuple
        return _named_tuple_decoder(expected)
    if expected is float:
        return _checked(lambda value: type(value) in (int, float), "a number")
    if expected is Any:  # what a caller may give is kept, and sent, in a declared form
        return _checked(lambda _: False, "of a declared type")
    if expected in (int, str, bool, types.NoneType):
        return _checked(lambda value: type(value) is expected, expected.__name__)
    raise TypeError(f"{expected} does not travel over the wire")


def _checked(holds: Callable[[Any], bool], allowed: str) -> _Decode:
    def decode_scalar(value: Any) -> Any:
        if not holds(value):
            raise DecodeError(f"must be {allowed}, not {type(value).__name__}")
        return value

    return decode_scalar


def _tuple_decoder(item: Any) -> _Decode:
    decode_item = None if item is int else _decoder(item)

    def decode_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple:
            raise DecodeError(f"must be a list, not {type(value).__name__}")
        if decode_item is None:
            if not set(map(type, value)) <= {int}:  # token ids: thousands, so checked without a Python loop
                raise DecodeError("must be a list of integers")
            return value
        decoded: list[Any] = []
        try:
            for one in value:
                decoded.append(decode_item(one))
        except DecodeError as error:
            raise error.inside(f"[{len(decoded)}]") from error
        return tuple(decoded)

    return decode_tuple


def _fixed_tuple_decoder(items: tuple[Any, ...]) -> _Decode:
    return _row_decoder([(f"[{i}]", item) for i, item in enumerate(items)], tuple, f"a list of {len(items)}")


def _named_tuple_decoder(expected: type[Any]) -> _Decode:
    hints = typing.get_type_hints(expected)
    return _row_decoder(
        [(f".{name}", hint) for name, hint in hints.items()],
        expected._make,
        f"a list of {len(hints)}: {', '.join(hints)}",
    )


def _row_decoder(items: list[tuple[str, Any]], make: Callable[[list[Any]], Any], allowed: str) -> _Decode:
    """A list whose items have annotations of their own; each comes with its place in a path."""
    decoders = [_decoder(hint) for _, hint in items]

    def decode_row(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(decoders):
            raise DecodeError(f"must be {allowed}")
        decoded: list[Any] = []
        try:
            for decode, one in zip(decoders, value, strict=True):
                decoded.append(decode(one))
        except DecodeError as error:
            raise error.inside(items[len(decoded)][0]) from error
        return make(decoded)

    return decode_row


def _dict_decoder(key: Any, item: Any) -> _Decode:
    decode_key, decode_item = _decoder(key), _decoder(item)

    def decode_dict(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise DecodeError(f"must be a map, not {type(value).__name__}")
        decoded: dict[Any, Any] = {}
        for key, one in value.items():
            try:
                place = " key"
                decoded_key = decode_key(key)
                place = f"[{key}]"
                decoded[decoded_key] = decode_item(one)
            except DecodeError as error:
                raise error.inside(place) from error
        return decoded

    return decode_dict


def _union_decoder(members: tuple[Any, ...]) -> _Decode:
    decoders = [_decoder(member) for member in members]

    def decode_union(value: Any) -> Any:
        reasons: list[DecodeError] = []
        for decode in decoders:
            try:
                return decode(value)
            except DecodeError as error:
                reasons.append(error)
        raise DecodeError("; or ".join(map(str, reasons)))

    return decode_union


def _dataclass_decoder(expected: type[Any]) -> _Decode:
    required = {
        f.name
        for f in dataclasses.fields(expected)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    decoders: dict[str, _Decode] = {}

    def decode_dataclass(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise DecodeError(f"must be a map, not {type(value).__name__}")
        if not decoders:  # not before: a dataclass may hold another of its own kind
            hints = typing.get_type_hints(expected)
            decoders.update({name: _decoder(hint) for name, hint in hints.items()})
        if unknown := value.keys() - decoders.keys():
            raise DecodeError(f"unknown field {min(map(str, unknown))!r}")
        if missing := required - value.keys():
            raise DecodeError(f"field {min(missing)!r} is missing")
        fields: dict[str, Any] = {}
        name = ""
        try:
            for name, one in value.items():
                fields[name] = decoders[name](one)
        except DecodeError as error:
            raise error.inside(f".{name}") from error
        try:
            return expected(**fields)
        except ValueError as error:  # a value the dataclass itself refuses
            raise DecodeError(str(error)) from error

    return decode_dataclass
