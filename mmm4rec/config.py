"""Dataclass <-> plain data (YAML, JSON). Unknown keys and wrong types are errors that name the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mmm4rec.errors import BadInput

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, *, source: str) -> T:
    """Build the dataclass `cls` from plain data.

    Args: source: where the data comes from, named in errors.
    Raises BadInput on an unknown or missing key, a value of the wrong type, or one that the dataclass refuses.
    """
    return _convert(cls, data, source, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain data that JSON and YAML can hold; `from_dict` gives the dataclass back."""
    return _plain(config)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises BadInput when it is missing, broken or no mapping."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror}).", file=path, remedy="Give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise BadInput(f"is not YAML ({error}).", file=path, line=line, remedy="Correct the line.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInput("holds no mapping of keys to values.", file=path, remedy="Write `key: value` lines.")
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of nested `data` with `section.key=value` assignments applied; values are read as YAML."""
    result = merge({}, data)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise BadInput(f"'{assignment}' is no assignment.", remedy="Write it as section.key=value, for instance model.width=128.")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"'{assignment}' has a value that is not YAML.", remedy="Quote it for the shell: 'key=[a, b]'.") from error
        if isinstance(nested, str):
            nested = _number(nested)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        result = merge(result, nested)
    return result


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings joined; where both have a value, `changes` wins."""
    result = {key: merge(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        kept = result.get(key)
        result[key] = merge(kept if isinstance(kept, dict) else {}, value) if isinstance(value, dict) else value
    return result


def _convert(kind: Any, value: Any, source: str, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, source, key)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, source, key)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, source, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(arguments[1], item, source, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):
        value = _number(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise BadInput(f"'{key}' is {value!r}; it must be {_describe(kind)}.", file=source, remedy="Correct the value.")


def _convert_dataclass(cls: type, value: Any, source: str, key: str) -> Any:
    place = f"'{key}' " if key else ""
    if not isinstance(value, dict):
        raise BadInput(f"{place}is {value!r}; it must be a mapping of keys.", file=source, remedy="Write `key: value` lines.")
    kinds = typing.get_type_hints(cls)
    if hasattr(cls, "field_kinds"):  # a key whose type another key decides
        kinds |= cls.field_kinds(value)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(value) - set(fields)))
    if unknown:
        rule = f"{place}has the unknown key {', '.join(unknown)}."
        raise BadInput(rule, file=source, remedy=f"Known keys: {', '.join(fields)}.")
    required = (f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    missing = [field.name for field in required if field.name not in value]
    if missing:
        raise BadInput(f"{place}lacks the key {', '.join(missing)}.", file=source, remedy="Add it.")
    arguments = {name: _convert(kinds[name], item, source, f"{key}.{name}" if key else name) for name, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise BadInput(f"{place}{error}", file=source, remedy="Correct the value.") from error


def _convert_union(choices: tuple[Any, ...], value: Any, source: str, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    kinds = [choice for choice in choices if choice is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value, source, key)
        except BadInput:
            continue
    return _convert(kinds[-1], value, source, key)


def _number(text: str) -> float | str:
    """YAML 1.1 reads 1e-3 as text; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, f"a list or mapping ({kind})")
