"""Each workflow does the same job directly, under `ray job submit` with token authentication, and from Python.

Each way takes minutes; what `make test` has of them is the whole chain as one job, in `test_end_to_end.py`.
"""

import pytest

from pipeline.command_line import load, read_yaml
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.ingest import IngestConfig, ingest
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
from pipeline.sweep import SweepConfig, sweep
from pipeline.train_config import TrainConfig
from pipeline.training import train
from tests.workflows.chain import assert_chain_is_there, places_below
from tests.workflows.conftest import Run, TinyChain, chain_commands
from tests.workflows.ray_head import Head

pytestmark = pytest.mark.slow


@pytest.mark.heavy
def test_directly(tiny: TinyChain, run_script: Run) -> None:
    root = "s3://test/directly"
    for workflow, arguments in chain_commands(tiny, root).items():
        finished = run_script(workflow, *arguments)
        assert finished.code == 0, f"{workflow}: {finished.errors}"
    assert_chain_is_there(tiny, places_below(root))
    again = run_script("train", *chain_commands(tiny, root)["train"])
    assert again.code == 0
    assert again.output.startswith("already trained")


@pytest.mark.heavy
def test_from_python(tiny: TinyChain, ray_cluster: None) -> None:  # noqa: ARG001
    root = "s3://test/from-python"
    data, run, model = f"{root}/dataset", f"{root}/run", f"{root}/run/model"
    assert ingest(IngestConfig(tiny.labelled, data)).counts == {"in": 16, "out": 16, "rejected": 0}
    train(load(TrainConfig, read_yaml(tiny.train), {"dataset": data, "run": run}))
    evaluate(EvaluateConfig(model, data, f"{run}/eval"))
    sweep(load(SweepConfig, read_yaml(tiny.sweep), {"dataset": data, "run": f"{root}/sweep"}))
    segment(SegmentConfig(model, tiny.photos, f"{root}/masks"))
    assert_chain_is_there(tiny, places_below(root))


@pytest.mark.heavy
def test_under_ray_job_submit(tiny: TinyChain, head: Head) -> None:
    root = "s3://test/job-submit"
    for workflow, arguments in chain_commands(tiny, root).items():
        finished = head.submit("python", f"workflows/{workflow}.py", *arguments)
        assert finished.returncode == 0, f"{workflow}: {finished.stdout[-3000:]}{finished.stderr[-1000:]}"
    assert_chain_is_there(tiny, places_below(root))


def test_a_failing_job_says_why_and_fails(tiny: TinyChain, head: Head) -> None:
    arguments = chain_commands(tiny, "s3://test/failing")["train"]
    finished = head.submit("python", "workflows/train.py", *arguments)
    assert finished.returncode == 1
    assert "error: There is no finished dataset at s3://test/failing/dataset" in finished.stdout


def test_a_job_without_the_token_is_refused(head: Head) -> None:
    finished = head.submit("true", token="0" * 64)
    assert finished.returncode != 0
    assert "token" in (finished.stdout + finished.stderr).lower()
