"""Training the best configuration of a sweep again with several seeds: its score, and how far chance moves it."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.train_config import TrainConfig
from pipeline.training import train

RETRAINED_FOLDER = "retrained"
RETRAINED_FILE = "retrained.json"


@dataclass(frozen=True)
class Retrained:
    """Scores of the same configuration, each with another seed.

    Args:
        seeds: in order.
        mious: of the last validation of each.
    """

    seeds: Sequence[int]
    mious: Sequence[float]

    @property
    def mean(self) -> float:
        """Of the mIoU over all seeds."""
        return statistics.fmean(self.mious)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the mIoU as the seeds estimate it; None for a single one."""
        return statistics.stdev(self.mious) if len(self.mious) > 1 else None

    @property
    def text(self) -> str:
        """For a person to read."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"mIoU {self.mean:.4f}{spread} with {len(self.mious)} seed{'s' if len(self.mious) > 1 else ''}"


def retrained(run: str, config: TrainConfig, count: int) -> Retrained:
    """Train with `count` seeds, from the configuration's own on; each is a run of its own, and goes on after a kill.

    Args:
        run: URL of the sweep; `retrained/seed-<n>` below it has each run, and `retrained.json` the scores.
        config: of each, but for its place and seed.
        count: of the seeds.

    Raises:
        PipelineError: what `train` raises.
    """
    seeds = [config.seed + number for number in range(count)]
    mious = []
    for seed in seeds:
        place = storage.join(run, RETRAINED_FOLDER, f"seed-{seed}")
        mious.append(float(train(dataclasses.replace(config, run=place, seed=seed)).results["miou"]))
    found = Retrained(seeds, mious)
    document = {**dataclasses.asdict(found), "mean": found.mean, "standard_deviation": found.deviation}
    storage.write_json(storage.join(run, RETRAINED_FILE), document)
    return found
