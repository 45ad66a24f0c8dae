"""What every script in `workflows/` does: configuration from the command line, YAML and environment; exit codes.

Exit code 0 means done, 1 a failure with one clear line, 2 a wrong call, 130 an interruption.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from pipeline.errors import PipelineError, mendable_cause


class _Parser(ArgumentParser):
    """Says what is wrong with a call in one line, without the usage text before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        reason = " ".join(str(message).split())
        print(f"error: {reason} See {self.prog} --help.", file=sys.stderr, flush=True)
        raise SystemExit(2)


def parser_for(config_class: type, description: str, program: str | None = None) -> ArgumentParser:
    """The parser of a workflow: every field of the dataclass is a flag, a YAML key and an environment variable."""
    set_parsing_settings(config_read_mode_fsspec_enabled=True)
    parser = _Parser(prog=program, description=description, default_env=True, env_prefix="RSSNET")
    parser.add_argument("--config", action="config", help="YAML file or URL; later flags override its fields")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=True)
    return parser


def parse(config_class: type, description: str, arguments: Sequence[str] | None = None) -> Any:
    """The configuration that a command line asks for, as an instance of `config_class`."""
    parser = parser_for(config_class, description)
    try:
        values = parser.parse_args(arguments)
    except Exception as error:  # what a store's client raises for --config URL has many classes
        parser.error(f"the configuration cannot be read: {type(error).__name__}: {error}.")
    fields = dict(vars(parser.instantiate_classes(values)))
    fields.pop("config", None)
    return config_class(**fields)


def run_workflow(
    work: Callable[[Any], object], config_class: type, description: str, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Parse, do the work, and end the process with the right exit code."""
    config = parse(config_class, description, arguments)
    raise SystemExit(guarded(lambda: work(config)))


def guarded(work: Callable[[], object]) -> int:
    """Run `work` and return an exit code, printing one clear line for whatever goes wrong."""
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    cause = error if isinstance(error, PipelineError) else mendable_cause(error)
    if cause is not None:
        return " ".join(str(cause).split())
    with tempfile.NamedTemporaryFile("w", prefix="rssnet-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"unexpected {type(error).__name__}: {first[:300]} The full traceback is in {log.name}."
