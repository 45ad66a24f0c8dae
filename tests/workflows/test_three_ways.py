"""Each workflow does the same job directly, under `ray job submit` with token authentication, and from Python."""

import pyarrow.parquet as pq
import pytest

from pipeline import dataset, storage
from pipeline.command_line import load, read_yaml
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.ingest import IngestConfig, ingest
from pipeline.masks import decode, read_masks
from pipeline.run_record import read_record
from pipeline.segmentation import SegmentConfig, segment
from pipeline.sweep import SweepConfig, sweep
from pipeline.train_config import TrainConfig
from pipeline.training import train
from tests.workflows.conftest import Run, TinyChain, chain_commands
from tests.workflows.ray_head import Head

pytestmark = pytest.mark.slow


def assert_chain_is_there(tiny: TinyChain, root: str) -> None:
    """Every stage's output is on its contract."""
    for place in ("dataset", "run", "run/eval", "sweep", "masks"):
        record = read_record(f"{root}/{place}")
        assert record is not None, place
        assert (record.outcome, record.error) == ("done", None), place
    data = dataset.open(f"{root}/dataset")
    assert {name: split.rows for name, split in data.info.splits.items()} == {"train": 12, "val": 4}
    scores = storage.read_json(f"{root}/run/eval/scores.json")
    assert scores["images"] == 4
    assert 0 <= scores["miou"] <= 1
    best = read_yaml(f"{root}/sweep/best.yaml")
    assert load(TrainConfig, best, {"run": "elsewhere"}).iterations == 2
    filesystem, path = storage.arrow_filesystem(f"{root}/sweep/trials.parquet")
    trials = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert [trial["trial"] for trial in trials] == [0, 1]
    assert "0.001" in trials[0]["parameters"], "trial 0 is the recipe as it stands"
    rows = read_masks(f"{root}/masks").to_pylist()
    assert len(rows) == tiny.photographs
    for row in rows:
        assert row["status"] == "ok"
        assert decode(row).shape == (row["height"], row["width"])


@pytest.mark.heavy  # `ray job submit` runs the same scripts, and more
def test_directly(tiny: TinyChain, run_script: Run) -> None:
    root = "s3://test/directly"
    for workflow, arguments in chain_commands(tiny, root).items():
        finished = run_script(workflow, *arguments)
        assert finished.code == 0, f"{workflow}: {finished.errors}"
    assert_chain_is_there(tiny, root)
    again = run_script("train", *chain_commands(tiny, root)["train"])
    assert again.code == 0
    assert again.output.startswith("already trained")


@pytest.mark.heavy  # test_end_to_end.py calls the same functions in every run
def test_from_python(tiny: TinyChain, ray_cluster: None) -> None:  # noqa: ARG001
    root = "s3://test/from-python"
    data, run, model = f"{root}/dataset", f"{root}/run", f"{root}/run/model"
    assert ingest(IngestConfig(tiny.labelled, data)).counts == {"in": 16, "out": 16, "rejected": 0}
    train(load(TrainConfig, read_yaml(tiny.train), {"dataset": data, "run": run}))
    evaluate(EvaluateConfig(model, data, f"{run}/eval"))
    sweep(load(SweepConfig, read_yaml(tiny.sweep), {"dataset": data, "run": f"{root}/sweep"}))
    segment(SegmentConfig(model, tiny.photos, f"{root}/masks"))
    assert_chain_is_there(tiny, root)


@pytest.mark.heavy  # test_end_to_end.py submits all stages as one job in every run
def test_under_ray_job_submit(tiny: TinyChain, head: Head) -> None:
    root = "s3://test/job-submit"
    for workflow, arguments in chain_commands(tiny, root).items():
        finished = head.submit("python", f"workflows/{workflow}.py", *arguments)
        assert finished.returncode == 0, f"{workflow}: {finished.stdout[-3000:]}{finished.stderr[-1000:]}"
    assert_chain_is_there(tiny, root)


def test_a_failing_job_says_why_and_fails(tiny: TinyChain, head: Head) -> None:
    arguments = chain_commands(tiny, "s3://test/failing")["train"]
    finished = head.submit("python", "workflows/train.py", *arguments)
    assert finished.returncode == 1
    assert "error: There is no finished dataset at s3://test/failing/dataset" in finished.stdout


def test_a_job_without_the_token_is_refused(head: Head) -> None:
    finished = head.submit("true", token="0" * 64)
    assert finished.returncode != 0
    assert "token" in (finished.stdout + finished.stderr).lower()
