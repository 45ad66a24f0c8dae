"""`best.yaml`: what training takes as it is, and what it says of where it comes from."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.command_line import parse, parser_for
from pipeline.errors import PipelineError
from pipeline.search_space import SearchSpace
from pipeline.sweep import write_best
from pipeline.sweep_config import SweepConfig
from pipeline.train_config import TrainConfig
from pipeline.trial_book import TrialRecord

BASE = {
    "model": {"backbone": "vit_tiny_patch16_224", "backbone_options": {"depth": 2}, "image_size": [64, 96]},
    "inference": {"scales": [0.5, 1.0]},
    "resources": {"workers": 2, "use_gpu": True, "gpus_per_worker": 0.5, "max_failures": 7},
    "keep_best": 3,
    "keep_checkpoints": 4,
    "trackers": "mlflow",
}
RANGES = {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}, "augmentation.scale": {"choice": [[0.5, 2.0], [0.75, 1.5]]}}
FIXED = {"iterations": 60, "resources.cpus_per_worker": 3.0}


def trial(number: int, miou: float, **changes: Any) -> TrialRecord:
    parameters = {"optimizer.lr": 1e-4 * (number + 1), "augmentation.scale": [0.75, 1.5]}
    curve = [{"iteration": 60, "miou": miou}]
    return TrialRecord(number, f"id{number}", parameters, 60, 1.0, "finished", curve, 10.0, **changes)


def best_of(folder: Path, trials: list[TrialRecord], **changes: Any) -> tuple[TrainConfig, str]:
    """What `train.py --config best.yaml --run s3://b/r` would train, and the comment above it."""
    space = SearchSpace(BASE, FIXED, RANGES)
    write_best(SweepConfig("s3://b/d", str(folder), space=RANGES, **changes), space, trials)
    arguments = ["--config", str(folder / "best.yaml"), "--run", "s3://b/r"]
    lines = (folder / "best.yaml").read_text().splitlines()
    return parse(parser_for(TrainConfig), TrainConfig, arguments), "\n".join(line for line in lines if line[0] == "#")


def test_training_takes_the_best_as_it_is_with_all_that_it_was_tried_with(tmp_path: Path) -> None:
    config, comment = best_of(tmp_path, [trial(0, 0.3), trial(1, 0.5), trial(2, 0.4)])
    expected = SearchSpace(BASE, FIXED, RANGES).config("s3://b/d", "s3://b/r", trial(1, 0.5).parameters)
    assert config == expected
    assert (config.resources.gpus_per_worker, config.resources.cpus_per_worker, config.keep_best) == (0.5, 3.0, 3)
    assert comment == "# The best of 3 trials: miou 0.5000 after 60 iterations."


def test_what_a_population_ends_with_is_not_called_a_configuration(tmp_path: Path) -> None:
    _, comment = best_of(tmp_path, [trial(0, 0.3), trial(1, 0.5, parents=[2, 0])], searcher="random", scheduler="pbt")
    assert "no single configuration: pbt changed the searched fields on the way" in comment
    assert "the weights of trials 2, 0" in comment


def test_without_any_score_there_is_no_best(tmp_path: Path) -> None:
    lost = trial(0, 0.3, error="no memory")
    lost.state = "out_of_memory"
    with pytest.raises(PipelineError, match=r"None of the 1 trials .* has ended with a score: no memory"):
        best_of(tmp_path, [lost])
