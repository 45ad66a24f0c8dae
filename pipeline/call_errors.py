"""What jsonargparse says of a wrong call, in one sentence with the value and what to give instead."""

import dataclasses
import difflib
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_VALUE = re.compile(r'Parser key "(?P<name>[^"]+)": .*(?:Got|Given) value: (?P<value>.*)')
_NO_FILE = re.compile(r'Parser key "config": (?P<what>.*)')
_NO_YAML = re.compile(r"Problems parsing config: (?P<what>.*)")
_NAMELESS = re.compile(r' in "<unicode string>",')
_UNKNOWN = re.compile(r"Option '(?P<name>[^']+)' is not accepted|unrecognized arguments: --(?P<flag>[^\s=]+).*")
_KINDS = {int: "whole number", float: "number", str: "text"}


def plain_error(message: str, config_class: type) -> str:
    """The same in a user's words; what is not known here is left as it is."""
    if found := _NO_FILE.match(message) or _NO_YAML.match(message):
        return f"The configuration cannot be read: {_NAMELESS.sub(' in', found['what'])}"
    if found := _UNKNOWN.match(message):
        name = found["name"] or found["flag"]
        return f"There is no field {name}{meant(name, config_class)}"
    found, hints = _VALUE.match(message), _hints(config_class)
    wanted = found and found["name"] in hints and _kind(hints[found["name"]])
    return f"{found['name']} is {found['value']}: give {wanted}" if found and wanted else message


def meant(name: str, config_class: type) -> str:
    """The question for the field whose name, or the last part of it, is like that; empty if none is."""
    names = _hints(config_class)
    last = {known.rpartition(".")[2]: known for known in names}
    close = difflib.get_close_matches(name, names, 1) or [last[one] for one in difflib.get_close_matches(name, last, 1)]
    return f": did you mean {close[0]}?" if close else ""


def _hints(config_class: type, above: str = "") -> dict[str, Any]:
    """The type of every field, by dotted name."""
    found = {}
    for name, hint in get_type_hints(config_class).items():
        group = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= _hints(hint, f"{above}{name}.") if group else {above + name: hint}
    return found


def _kind(hint: Any) -> str | None:
    """What values of a type are called; None for types that no word is known for."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _KINDS:
        return f"a {_KINDS[hint]}"
    if hint is bool:
        return "true or false"
    if hint is types.NoneType:
        return "null"
    if origin is Literal:
        *first, last = map(str, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin in (Union, types.UnionType):
        kinds = [_kind(one) for one in inner]
        return " or ".join(map(str, kinds)) if all(kinds) else None
    if origin in (tuple, list) and inner[0] in _KINDS:
        count = "" if origin is list or inner[-1] is Ellipsis else f"{len(inner)} "
        example = """, such as '["a", "b"]'""" if inner[0] is str else ""  # without quotes, YAML takes a * for an alias
        return f"a list of {count}{_KINDS[inner[0]]}s{example}"
    return None
