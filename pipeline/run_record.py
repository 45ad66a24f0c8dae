"""The run record: `run.json` beside every output says what was run, on what, with what outcome.

It is also how a workflow knows that its work is already done: a finished record of the same workflow, configuration and
inputs, whose outputs are still there, is not run again. Another configuration at the same place is refused.
"""

import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rssnet
from pipeline import metrics, storage
from pipeline.errors import Overtaken, PipelineError, mendable_cause
from pipeline.redaction import redacted
from pipeline.storage_errors import StorageError

FILE_NAME = "run.json"
SCHEMA_VERSION = 1


@dataclass
class RunRecord:
    """What `run.json` holds.

    Args:
        workflow: `ingest`, `train`, `evaluate`, `sweep` or `segment`.
        config: every field of the workflow's configuration, defaults included.
        inputs: name of each input and its fingerprint; another fingerprint means other work.
        outputs: what the workflow writes below the record's folder; all of it must be there for the record to count.
        run_id: another one each time the work is begun.
        versions: of this code, Python, torch and ray.
        outcome: `running` until the end; a record that stays so was killed.
        counts: rows or images by name; for a human and for adding up.
        results: scores and the like.
    """

    workflow: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: list[str]
    schema_version: int = SCHEMA_VERSION
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    finished: str | None = None
    seconds: float | None = None
    outcome: Literal["running", "done", "failed"] = "running"
    error: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def read_record(url: str) -> RunRecord | None:
    """The record at `url`, or None where there is none.

    Raises:
        StorageError: if it is there but cannot be understood.
    """
    place = storage.join(url, FILE_NAME)
    try:
        document = storage.read_json(place)
    except FileNotFoundError:
        return None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise StorageError(f"{place} is not a run record of schema version {SCHEMA_VERSION}: choose another place.")
    try:
        return RunRecord(**document)
    except TypeError as error:
        raise StorageError(
            f"{place} is not a run record of schema version {SCHEMA_VERSION} ({error}): choose another place."
        ) from error


def finished_record(url: str, workflow: str, config: Any, inputs: dict[str, str]) -> RunRecord | None:
    """The record of this very work, if it was finished and everything it wrote is still there; else None."""
    record = read_record(url)
    if record is None or record.outcome != "done" or record.workflow != workflow:
        return None
    if differences(record, config, inputs):
        return None
    if not all(storage.exists(storage.join(url, output)) for output in record.outputs):
        return None
    return record


def differences(record: RunRecord, config: Any, inputs: dict[str, str]) -> list[str]:
    """How the work at hand differs from the recorded one: `name: recorded -> now` per field, and the inputs by name."""
    recorded, now, absent = flat(record.config), flat(identity(config)), "(absent)"
    fields = [
        f"{name}: {recorded.get(name, absent)} -> {now.get(name, absent)}"
        for name in sorted(recorded.keys() | now.keys())
        if recorded.get(name, absent) != now.get(name, absent)
    ]
    changed = sorted(
        name for name in record.inputs.keys() | inputs.keys() if record.inputs.get(name) != inputs.get(name)
    )
    return fields + [f"another {name}" for name in changed]


def identity(config: Any) -> dict[str, Any]:
    """A dataclass configuration as JSON-able dicts, without fields, also nested ones, marked `identity: False`."""
    return _jsonable(config)


class OtherWork(PipelineError):
    """A place holds the output of another configuration or of other inputs."""


def refuse_other_work(url: str, workflow: str, config: Any, inputs: dict[str, str], resumes: bool = False) -> None:
    """Raise `OtherWork` if `url` holds what other work than this has made; a place is an identity.

    Args:
        resumes: whether the workflow goes on with what an unfinished run left; if not, there is nothing of it to lose.
    """
    record = read_record(url)
    if record is None:
        return
    _require_workflow(url, record, workflow)
    changed = differences(record, config, inputs)
    if changed and (resumes or record.outcome == "done"):
        raise OtherWork(
            f"{url} holds the {workflow} of another configuration ({'; '.join(changed)}): "
            "choose another place, or pass --new true to replace what is there."
        )


def refuse_other_workflow(url: str, workflow: str) -> None:
    """Raise PipelineError if `url` holds the output of another workflow, which nothing here may replace."""
    record = read_record(url)
    if record:
        _require_workflow(url, record, workflow)


def _require_workflow(url: str, record: RunRecord, workflow: str) -> None:
    if record.workflow != workflow:
        raise PipelineError(f"{url} holds the output of {record.workflow}, not of {workflow}: choose another place.")


@contextmanager
def record_run(
    url: str,
    workflow: str,
    config: Any,
    inputs: dict[str, str],
    outputs: list[str],
    keep: bool = True,
    run_id: str | None = None,
) -> Iterator[RunRecord]:
    """Do the work of a `with` block under a record at `url`: `running` first, at the end `done` or `failed`.

    Args:
        outputs: what the block will write below `url`.
        keep: leave what an earlier run of the same work wrote, to go on from it; else delete those outputs first.
        run_id: of a run that has one already.

    Raises:
        PipelineError: if another workflow's output is there, which nothing here may replace.
    """
    earlier = read_record(url)
    if earlier:
        _require_workflow(url, earlier, workflow)
    # Until it is deleted, what an earlier run left belongs to this record, so that no kill can leave it without one.
    owned = outputs + [output for output in (earlier.outputs if earlier else []) if output not in outputs]
    record = RunRecord(workflow, identity(config), inputs, owned, versions=versions(), started=_now())
    record.run_id = run_id or record.run_id
    begun = time.monotonic()
    _write(url, record)
    try:
        if not keep:  # only now that the record no longer says `done`
            for output in owned:
                storage.delete(storage.join(url, str(output)))
        record.outputs = outputs
        yield record
    except Overtaken:
        raise  # the record that is there by now is the other run's
    except BaseException as error:
        record.outcome = "failed"
        record.error = _reason(error)
        record.finished, record.seconds = _now(), round(time.monotonic() - begun, 3)
        with suppress(StorageError):  # the failure being raised matters more; the record then stays `running`
            _write(url, record)
        metrics.run_ended(workflow, record.outcome, record.counts, record.results)
        raise
    record.outcome = "done"
    record.finished, record.seconds = _now(), round(time.monotonic() - begun, 3)
    _write(url, record)
    metrics.run_ended(workflow, record.outcome, record.counts, record.results)


def _reason(error: BaseException) -> str:
    if not isinstance(error, Exception):  # Ctrl-C, or the process was asked to end
        return "interrupted"
    return redacted(str(mendable_cause(error) or f"{type(error).__name__}: {error}"))[:2000]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    # Not from the package's metadata: under `ray job submit --working-dir .` this code runs without being installed.
    found = {"python": platform.python_version(), "rssnet": rssnet.__version__}
    for name in ("torch", "timm", "ray"):
        found[name] = importlib.metadata.version(name)
    commit = _commit()
    if commit:
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """The git commit of this code, with `+` if the tree differs from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() if described.returncode == 0 else None


def _write(url: str, record: RunRecord) -> None:
    storage.write_json(storage.join(url, FILE_NAME), dataclasses.asdict(record))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (item.name for item in dataclasses.fields(value) if item.metadata.get("identity", True))
        return {name: _jsonable(getattr(value, name)) for name in kept}
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, str):
        return redacted(value)
    return value


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, whose names have the outer names and a dot before them."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
