"""How a workflow is called: flags, YAML, environment, help; and how it ends: an exit code and one line."""

import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import s3fs
import yaml

from pipeline import storage
from pipeline.command_line import WrongCall, guarded, load, parse, parser_for, read_yaml, run_workflow
from pipeline.errors import PipelineError
from pipeline.ingest import IngestConfig

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class _Optimizer:
    """How weights are updated.

    Args:
        lr: learning rate.
        name: which algorithm.
    """

    lr: float = 1e-3
    name: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}: give a number above 0.")


@dataclass(frozen=True)
class _Config:
    """Train.

    Args:
        run: where.
        optimizer: how.
        iterations: how long.
        crop: size, or None for the image's own.
        options: passed on.
    """

    run: str
    optimizer: _Optimizer = field(default_factory=_Optimizer)
    iterations: int = 10
    crop: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parsed(*arguments: str) -> _Config:
    return parse(parser_for(_Config), _Config, arguments)


@dataclass(frozen=True)
class _Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., _Ended]:
    """Runs `workflows/<name>.py` with arguments, as `python` does but within this process."""

    def run(name: str, *arguments: str) -> _Ended:
        monkeypatch.setattr(sys, "argv", [f"workflows/{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "workflows" / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return _Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


def assert_one_line(ended: _Ended, code: int, *says: str) -> None:
    assert ended.code == code
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")
    for words in says:
        assert words in ended.err
    assert "Traceback" not in ended.out + ended.err


def test_fields_are_flags_and_groups_have_dotted_ones() -> None:
    assert parsed("--run", "r") == _Config("r")
    config = parsed("--run=r", "--optimizer.lr", "0.1", "--crop", "[4, 6]", "--options", "{depth: 6}")
    assert config == _Config("r", _Optimizer(0.1), crop=(4, 6), options={"depth": 6})
    assert isinstance(config.optimizer, _Optimizer)


def test_a_yaml_file_sets_fields_and_later_flags_override_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: from-file\niterations: 3\noptimizer: {name: sgd}\n")
    assert parsed("--config", str(file)) == _Config("from-file", _Optimizer(name="sgd"), 3)
    overridden = parsed("--config", str(file), "--iterations", "4", "--optimizer.lr", "0.1")
    assert overridden == _Config("from-file", _Optimizer(0.1, "sgd"), 4)


def test_a_yaml_file_can_lie_in_a_bucket(bucket: str) -> None:
    s3fs.S3FileSystem.clear_instance_cache()  # other tests have had other servers
    url = storage.join(bucket, "run.yaml")
    storage.write_bytes(url, b"run: from-bucket\noptimizer:\n  lr: 0.5\n")
    assert parsed("--config", url, "--iterations=2") == _Config("from-bucket", _Optimizer(0.5), 2)
    for absent in (storage.join(bucket, "absent.yaml"), "s3://absent/run.yaml"):
        with pytest.raises(WrongCall, match=r"absent"):
            parsed("--config", absent)


def test_the_environment_sets_what_no_flag_and_no_file_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSSNET_RUN", "from-environment")
    monkeypatch.setenv("RSSNET_OPTIMIZER__LR", "0.5")
    assert parsed() == _Config("from-environment", _Optimizer(0.5))
    file = tmp_path / "run.yaml"
    file.write_text("run: from-file\n")
    assert parsed("--config", str(file)).run == "from-file"
    assert parsed("--run", "from-flag").run == "from-flag"


def test_a_program_is_not_changed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSSNET_ITERATIONS", "99")
    assert load(_Config, {"run": "r"}, {}).iterations == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "arguments are required: run"),
        (["--run", "r", "--iteration_count", "5"], "no field iteration_count: did you mean iterations?"),
        (["--run", "r", "--iter", "5"], "There is no field iter"),
        (["--run", "r", "--optimizer.weight", "5"], "There is no field optimizer.weight"),
        (["--run", "r", "--optimizer.rate", "5"], "There is no field optimizer.rate"),
        (["--run", "r", "--lr", "5"], "There is no field lr: did you mean optimizer.lr?"),
        (["--run", "r", "--iterations", "many"], "iterations is many: give a whole number"),
        (["--run", "r", "--iterations", "1.5"], "iterations is 1.5: give a whole number"),
        (["--run", "r", "--iterations", "null"], "iterations is None: give a whole number"),
        (["--run", "r", "--optimizer.name", "adam"], "optimizer.name is adam: give adamw or sgd"),
        (["--run", "r", "--optimizer.lr", "-1"], "optimizer.lr is -1.0: give a number above 0."),
        (["--run", "r", "--optimizer", "5"], "optimizer"),
        (["--run", "r", "--crop", "[1, 2, 3]"], "crop is [1, 2, 3]: give a list of 2 whole numbers or null"),
        (["--run"], "--run"),
        (["--run", "r", "surplus"], "unrecognized arguments: surplus"),
        (["--run", "r", "--config", "/nowhere/run.yaml"], "cannot be read: File does not exist: '/nowhere/run.yaml'"),
    ],
)
def test_a_wrong_call_is_answered_with_the_flag_and_the_value(arguments: list[str], says: str) -> None:
    with pytest.raises(WrongCall) as wrong:
        parsed(*arguments)
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: r\nepochs: 3\n", "epochs"),
        ("run: r\noptimizer:\n  rate: 3\n", "rate"),
        ("run: r\noptimizer:\n", "optimizer is None, but it is a group of fields: give some, or leave it out"),
        ("run: r\noptimizer: 5\n", "optimizer"),
        ("run: r\noptimizer:\n  lr:\n", "optimizer.lr has no value"),
        ("run: r\niterations: [1]\n", "iterations"),
        ("run: [", "line 2"),
        ("just text", "just text"),
    ],
)
def test_a_wrong_file_is_answered_with_the_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(WrongCall) as wrong:
        parsed("--config", str(file))
    assert says in str(wrong.value)
    assert f"(with --config {file})" in str(wrong.value)


def test_a_document_is_loaded_with_values_by_dotted_name() -> None:
    document = {"run": "r", "optimizer": {"name": "sgd"}, "options": {"depth": 6}}
    config = load(_Config, document, {"optimizer.lr": 0.5, "options.width": 8, "run": "other"})
    assert config == _Config("other", _Optimizer(0.5, "sgd"), options={"depth": 6, "width": 8})
    assert document == {"run": "r", "optimizer": {"name": "sgd"}, "options": {"depth": 6}}
    values = {"optimizer": {"name": "sgd"}, "optimizer.lr": 0.5}
    assert load(_Config, {"run": "r"}, values).optimizer == _Optimizer(0.5, "sgd")
    assert values == {"optimizer": {"name": "sgd"}, "optimizer.lr": 0.5}


@pytest.mark.parametrize(
    ("document", "values", "says"),
    [
        ({"optimizer": 5}, {"optimizer.lr": 1}, "optimizer is 5, so optimizer.lr cannot be set"),
        ({}, {"iterations.x.y": 1}, "iterations"),
        ({}, {"optimizer.rate": 1}, "rate"),
        ({}, {"optimizer.lr": "fast"}, "fast"),
    ],
)
def test_a_value_that_has_no_place_is_named(document: dict, values: dict, says: str) -> None:
    with pytest.raises(WrongCall, match=says):
        load(_Config, {"run": "r", **document}, values)


def test_yaml_is_read_from_any_place(bucket: str, tmp_path: Path) -> None:
    for place in (storage.join(bucket, "a.yaml"), str(tmp_path / "a.yaml")):
        storage.write_bytes(place, b"optimizer: {lr: 1.0e-4}\n")
        assert read_yaml(place) == {"optimizer": {"lr": 1e-4}}


@pytest.mark.parametrize(
    ("text", "says"), [(b"[1]", "is not a mapping"), (b"a: [", "cannot be read"), (b"", "mapping")]
)
def test_yaml_that_is_no_configuration_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    place = str(tmp_path / "a.yaml")
    storage.write_bytes(place, text)
    with pytest.raises(WrongCall, match=f"The configuration {place} .*{says}|The configuration {place} {says}"):
        read_yaml(place)
    with pytest.raises(WrongCall, match=r"nowhere\.yaml cannot be read: .*does not exist"):
        read_yaml(str(tmp_path / "nowhere.yaml"))


def test_done_is_zero() -> None:
    assert guarded(lambda: "a record") == 0
    done: list[_Config] = []
    with pytest.raises(SystemExit) as ended:
        run_workflow(done.append, _Config, "Train.", ["--run", "r"])
    assert (ended.value.code, done) == (0, [_Config("r")])


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PipelineError("No space left:\n  free some."), 1, "error: No space left: free some.\n"),
        (WrongCall("There is no field lrr."), 2, "error: There is no field lrr. See --help.\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    ],
)
def test_a_failure_that_can_be_mended_is_one_line(capsys, error: BaseException, code: int, line: str) -> None:
    assert guarded(raising(error)) == code
    assert capsys.readouterr() == ("", line)


def test_a_termination_signal_ends_the_work_as_ctrl_c_does(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # impatient; what is tidied up here is still tidied up
            ended.append("tidied up")

    assert guarded(work) == 130
    assert capsys.readouterr() == ("", "interrupted: run the same command again to go on\n")
    assert ended == ["tidied up"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_mendable_failure_is_found_below_what_wraps_it(capsys) -> None:
    def work() -> None:
        try:
            raise PipelineError("The bucket is gone: create it.")
        except PipelineError as error:
            raise RuntimeError("task failed\nTraceback ...") from error

    assert guarded(work) == 1
    assert capsys.readouterr().err == "error: The bucket is gone: create it.\n"


def test_an_unexpected_failure_is_one_line_and_a_file_with_the_traceback(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert guarded(raising(ZeroDivisionError("division by zero\nsecond line"))) == 1
    (log,) = tmp_path.iterdir()
    assert capsys.readouterr() == (
        "",
        f"error: unexpected ZeroDivisionError: division by zero The full traceback is in {log}.\n",
    )
    assert "in raising" in log.read_text() or "in work" in log.read_text()
    assert "Traceback (most recent call last)" in log.read_text()


def test_help_explains_each_field(workflow) -> None:
    ended = workflow("ingest", "--help")
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.split())
    assert "Turn a bucket of labelled images into a canonical dataset." in text
    for explained in (
        "--source SOURCE ENV: RSSNET_SOURCE URL of the images and labels, as published. (required",
        "--dataset DATASET ENV: RSSNET_DATASET URL that the canonical dataset is written to; outside the source.",
        "--layout LAYOUT ENV: RSSNET_LAYOUT camvid, ade20k, cityscapes, pascal_context (59 classes),",
        "parquet, unlabelled, or auto to recognise the tree.",
        "share of bad inputs, 0 to 1, above which the ingest fails. (type: float, default: 0.01)",
        "start afresh, replacing the dataset that an earlier ingest left there.",
    ):
        assert explained in text


def test_print_config_is_yaml_that_config_reads_back(workflow, tmp_path: Path) -> None:
    ended = workflow("ingest", "--source", "s3://raw/photos", "--max_reject_fraction", "0.5", "--print_config")
    assert (ended.code, ended.err) == (0, "")
    assert yaml.safe_load(ended.out) == {
        "source": "s3://raw/photos",
        "dataset": None,
        "layout": "auto",
        "max_reject_fraction": 0.5,
        "splits": None,
        "val_fraction": 0.0,
        "limit": None,
        "dry_run": False,
        "preview": None,
        "new": False,
    }
    file = tmp_path / "ingest.yaml"
    file.write_text(ended.out)
    config = parse(parser_for(IngestConfig), IngestConfig, ["--config", str(file), "--dataset", "d"])
    assert config == IngestConfig("s3://raw/photos", "d", max_reject_fraction=0.5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: source"),
        (["--source", "a", "--datset", "b"], "There is no field datset: did you mean dataset? See"),
        (["--source", "a", "--dataset", "b", "--new", "perhaps"], "new is perhaps: give true or false"),
        (
            ["--source", "a", "--dataset", "b", "--max_reject_fraction", "few"],
            "max_reject_fraction is few: give a number",
        ),
        (["--source", "a", "--dataset", "b", "surplus"], "surplus"),
    ],
)
def test_a_wrong_call_of_ingest_is_two_and_one_line(workflow, arguments: list[str], says: str) -> None:
    assert_one_line(workflow("ingest", *arguments), 2, says, "See --help.")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere/photos", "/nowhere/photos has no objects: correct the URL."),
        ("ftp://raw/photos", "ftp://raw/photos has the unknown scheme ftp://: use s3://"),
        ("s3:/raw/photos", "lacks a slash"),
        ("s3://KEY:hush@raw/photos", "carries credentials: remove them"),
        ("s3://absent/photos", "there is no bucket named absent: create it, or correct the name"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_a_wrong_source_is_one_and_one_line(workflow, tmp_path: Path, source: str, says: str) -> None:
    ended = workflow("ingest", "--source", source, "--dataset", str(tmp_path / "dataset"))
    assert_one_line(ended, 1, says)
    assert "hush" not in ended.err
    assert not (tmp_path / "dataset").exists()


def test_the_environment_names_the_source(workflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSSNET_SOURCE", "/nowhere/from-environment")
    assert_one_line(workflow("ingest", "--dataset", "d"), 1, "/nowhere/from-environment has no objects")
