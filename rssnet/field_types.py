"""Checks the fields of a dataclass against their type hints: files and command lines know no types.

Knows only the hints that configs have: plain values, None, Literal, lists, tuples, dicts, dataclasses, unions of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    NoneType: "null",
    list: "a list",
    dict: "names with values",
}


def require_types(config: object, group: str = "") -> None:
    """Refuses values of other types than their fields', and brings lists and tuples to the type that is hinted.

    What is hinted as `Any` must be what JSON can hold; its tuples become lists, as JSON would give them back.

    Args:
        config: A dataclass, frozen or not.
        group: Stands before the names of its fields in errors, such as "separation.".

    Raises:
        ValueError: a value of another type.
    """
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(group + name, getattr(config, name), hint))


def _typed(name: str, value: Any, hint: Any) -> Any:
    if hint is Any:
        kinds: tuple[Any, ...] = tuple(_PLAIN)
    else:
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = next((kind for kind in kinds if _fits(value, kind)), None)
    if kind is None:
        raise ValueError(f"{name} must be {' or '.join(_in_words(kind) for kind in kinds)}, not {value!r}.")
    inner = get_args(kind) or (Any,)
    if isinstance(value, Mapping):
        return {key: _typed(f"{name}.{key}", item, inner[-1]) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        is_tuple = get_origin(kind) is tuple
        hints = inner if is_tuple else inner * len(value)
        items = [_typed(f"{name}[{index}]", item, hints[index]) for index, item in enumerate(value)]
        return tuple(items) if is_tuple else items
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, whatever is inside it."""
    container = get_origin(kind) or kind
    if container is Literal:
        return value in get_args(kind)
    if container is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(get_args(kind))
    if container is list:
        return isinstance(value, (list, tuple))
    if container is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool):  # to Python, true is 1
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(kind) in (list, tuple):
        return f"[{', '.join(_in_words(item) for item in inner)}{', ...' if get_origin(kind) is list else ''}]"
    return _PLAIN.get(get_origin(kind) or kind, "a group of fields")
