"""What every script in `workflows/` does: configuration from the command line, YAML and environment; exit codes.

Exit code 0 means done, 1 a failure with one clear line, 2 a wrong call, 130 an interruption.
"""

import copy
import dataclasses
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pipeline import storage
from pipeline.call_errors import plain_error
from pipeline.cluster import Interrupted, terminable
from pipeline.errors import PipelineError, mendable_cause
from pipeline.redaction import redacted


class WrongCall(PipelineError):
    """A configuration that cannot be understood: an unknown field, a value of the wrong type, a missing one."""


class _Parser(ArgumentParser):
    """Raises what is wrong with a call instead of printing its usage and leaving."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        raise WrongCall(" ".join(str(message).split()))


def parser_for(config_class: type, description: str | None = None, environment: bool = True) -> ArgumentParser:
    """The parser of a workflow: every field of the dataclass is a flag, a YAML key and an environment variable."""
    set_parsing_settings(config_read_mode_fsspec_enabled=True)
    parser = _Parser(description=description, default_env=environment, env_prefix="RSSNET", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file or URL; later flags override its fields")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=True)
    return parser


def parse(parser: ArgumentParser, config_class: type, arguments: Sequence[str] | None = None) -> Any:
    """The configuration that a command line asks for, as an instance of `config_class`.

    Raises:
        WrongCall: for everything that cannot be understood.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    read = []
    for position, flag in enumerate(given):
        if flag == "--config" or flag.startswith("--config="):
            read.append(flag.partition("=")[2] or " ".join(given[position + 1 : position + 2]))
            storage.split(read[-1])  # a URL with credentials is refused before it is opened
    try:
        return _instance(parser, config_class, lambda: parser.parse_args(given))
    except WrongCall as error:
        if not read:
            raise
        raise WrongCall(f"{str(error).rstrip('.')} (with --config {', '.join(read)}).") from error


def read_yaml(url: str) -> dict[str, Any]:
    """The YAML document at a URL or path.

    Raises:
        WrongCall: if there is none, or it is not a mapping.
    """
    try:
        document = yaml.safe_load(storage.read_bytes(url))
    except (FileNotFoundError, yaml.YAMLError) as error:
        raise WrongCall(f"The configuration {url} cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise WrongCall(f"The configuration {url} is not a mapping of fields to values.")
    return document


def load(config_class: type, document: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """The configuration that a YAML document describes, with some fields set.

    Args:
        document: nested, as `read_yaml` returns it; empty for the defaults.
        values: by dotted name, e.g. `optimizer.lr`.

    Raises:
        WrongCall: if a field or a value cannot be understood.
    """
    nested = copy.deepcopy(dict(document))
    for name, value in values.items():
        *parents, field = name.split(".")
        inner = nested
        for depth, parent in enumerate(parents, start=1):
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                above = ".".join(parents[:depth])
                raise WrongCall(f"{above} is {inner!r}, so {name} cannot be set: give {above} fields, or leave it out.")
        inner[field] = copy.deepcopy(value)
    parser = parser_for(config_class, environment=False)
    return _instance(parser, config_class, lambda: parser.parse_object(nested))


def _instance(parser: ArgumentParser, config_class: type, parsed: Callable[[], Any]) -> Any:
    try:
        values = parsed()
    except WrongCall as error:
        raise WrongCall(plain_error(str(error), config_class)) from error
    except Exception as error:  # what a store's client raises for --config URL has many classes
        raise WrongCall(f"The configuration cannot be read: {type(error).__name__}: {error}.") from error
    _refuse_without_value(config_class, values)
    try:
        fields = dict(vars(parser.instantiate(values)))
        fields.pop("config", None)
        return config_class(**fields)
    except ValueError as error:  # a dataclass that checks its own values
        raise WrongCall(str(error)) from error


def _refuse_without_value(config_class: type, values: Namespace, above: str = "") -> None:
    """Refuse what YAML reads from `lr:` with nothing behind it, which jsonargparse lets pass for any type."""
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        name, hint, value = above + item.name, hints[item.name], values.get(item.name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Namespace):
                raise WrongCall(f"{name} is {value!r}, but it is a group of fields: give some, or leave it out.")
            _refuse_without_value(cast(type, hint), value, f"{name}.")
        elif value is None and type(None) not in get_args(hint):
            raise WrongCall(f"{name} has no value: give it one, or leave it out.")


def run_workflow(
    work: Callable[[Any], object], config_class: type, description: str | None, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Parse, do the work, and end the process with the right exit code."""
    parser = parser_for(config_class, description)
    config = None

    def parsed() -> None:
        nonlocal config
        config = parse(parser, config_class, arguments)

    code = guarded(parsed)
    raise SystemExit(code or guarded(lambda: work(config)))


def guarded(work: Callable[[], object]) -> int:
    """Run `work` and return an exit code, printing one clear line for whatever goes wrong."""
    try:
        with terminable():
            work()
    except (KeyboardInterrupt, Interrupted):
        print("interrupted: run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    except WrongCall as error:
        said = _redacted_line(str(error)).rstrip(".")
        end = "" if said.endswith("?") else "."
        print(f"error: {said}{end}{'' if '--help' in said else ' See --help.'}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    cause = mendable_cause(error)
    if cause is not None:
        return " ".join(str(cause).split())  # redacted where it was written
    full = redacted("".join(traceback.format_exception(error)))
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    said = f"unexpected {type(error).__name__}: {_redacted_line(first)[:300]}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="rssnet-", suffix=".log", delete=False) as log:
            log.write(full)
    except OSError as failure:
        return f"{said} The full traceback could not be kept: {failure}."
    return f"{said} The full traceback is in {log.name}."


def _redacted_line(text: str) -> str:
    """On one line; word by word, for in a sentence `redacted` cannot tell where a URL ends."""
    return " ".join(redacted(word) for word in text.split())
