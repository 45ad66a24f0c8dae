"""How well a sweep spends a cluster: places in use, what a trial costs beside its steps, what ASHA saves.

    python -m tests.benchmarks.sweep --data /path/to/camvid            all of it
    python -m tests.benchmarks.sweep --data /path/to/camvid --record   the learning curves that are simulated with
    python -m tests.benchmarks.sweep --data /path/to/camvid --sweeps random   some of the real sweeps, only shown
    python -m tests.benchmarks.sweep                                   the simulation alone, with the curves on record

The curves are those of real trainings on CamVid, of points drawn at random from a search space, without Ray. The
simulation runs the sweep's own scheduler over thousands of trials made from them: each is a mixture of two curves and
the noise of a validation. A second set of curves is that of the real sweep to the end,
which are kept where there is no such file yet.

The real sweeps are random search, all of whose trials run to their end; ASHA on the same points; and what a sweep does
by itself, ASHA with Optuna. Their recipe has a learning rate for fine-tuning, so that it is not the best point of a
model whose weights begin at random.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
import yaml

from pipeline import storage
from pipeline.cluster import connected
from pipeline.images import decode_label, decode_photograph
from pipeline.ingest import IngestConfig, ingest
from pipeline.prediction import predictor_of
from pipeline.run_folder import HISTORY_FILE
from pipeline.schedulers import SchedulerName, make_scheduler
from pipeline.search_space import SearchSpace
from pipeline.searchers import SearcherName, new_study
from pipeline.sweep import SweepConfig, sweep
from pipeline.train_config import TrainConfig
from pipeline.train_parts import build_optimizer
from pipeline.train_step import TrainStep
from pipeline.transforms import Augmentation
from pipeline.trial_book import TrialRecord
from pipeline.warm_start import read_trials
from rssnet import RSSNet, RSSNetConfig, RSSNetLoss
from rssnet.metrics import ConfusionMatrix
from tests.benchmarks.machine import RESULTS, describe, results_file
from tests.simulated_sweep import SimulatedSweep

CURVES = RESULTS / "sweep-curves.json"
SECOND_CURVES = RESULTS / "sweep-curves-second.json"
CLASSES = 11
ITERATIONS, EVERY = 243, 9
RECORDED = 24  # curves
VALIDATED = 12  # photographs of a validation
BASE: dict[str, Any] = {
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {"depth": 3, "embed_dim": 96, "num_heads": 3},
        "image_size": [96, 128],
        "decoder_width": 32,
    },
    "optimizer": {"lr": 1e-3, "decoder_lr_scale": 2.0, "warmup_iterations": 6, "clip_grad_norm": 1.0},
    "augmentation": {"scale": [0.3, 0.6]},
    "inference": {"scales": [0.4]},
    "iterations": ITERATIONS,
    "batch_size": 4,
    "evaluate_every": EVERY,
    "checkpoint_every": ITERATIONS,
    "resources": {"cpus_per_worker": 0.4},
}
SPACE = {
    "optimizer.lr": {"loguniform": [1e-5, 1e-2]},
    "optimizer.decoder_lr_scale": {"loguniform": [0.5, 10.0]},
    "optimizer.layer_decay": {"uniform": [0.5, 1.0]},
    "model.local_pathway.enabled": {"choice": [True, False]},
    "model.separation.enabled": {"choice": [True, False]},
    "model.cross_attention.enabled": {"choice": [True, False]},
}
SIMULATED = 81  # trials of a simulated sweep
REPETITIONS = 100  # of it
PLACES = 8
NOISE = 0.005  # standard deviation of a validation's mIoU from seed to seed, of the ablation's tables
REAL_TRIALS = 24
FINE_TUNING_LR = 1e-4  # of the real sweeps' recipe
REAL_SWEEPS: dict[str, tuple[SearcherName, SchedulerName]] = {
    "random": ("random", "none"),
    "random, asha": ("random", "asha"),
    "optuna, asha": ("optuna", "asha"),
}
TARGET = 0.35  # of the steps of random search


def points(space: SearchSpace, count: int) -> list[dict[str, Any]]:
    """The recipe and `count` - 1 points drawn at random, always the same."""
    study = new_study(["max"], optuna.samplers.RandomSampler(seed=0))
    return [space.default(), *(space.suggest(study.ask()) for _ in range(count - 1))]


def record(camvid: Path) -> None:
    """Train each point without Ray, and write down its validations."""
    torch.set_num_threads(1)
    space = SearchSpace(BASE, {}, SPACE)
    samples = {split: _photographs(camvid, split) for split in ("train", "val")}
    curves = []
    for point in points(space, RECORDED):
        curves.append(curve_of(space.config("unused", "unused", point), samples["train"], samples["val"][:VALIDATED]))
        print(f"{len(curves)}/{RECORDED}: {curves[-1][-1]:.3f}", flush=True)
        keep_curves(CURVES, points(space, len(curves)), curves)


def keep_curves(file: Path, tried: Sequence[dict[str, Any]], curves: Sequence[Sequence[float]]) -> None:
    """Write down learning curves and the points that they belong to."""
    document = {**describe(torch.device("cpu")), "every": EVERY, "points": tried, "miou": curves}
    file.write_text(json.dumps(document, indent=1, default=list) + "\n")


def _photographs(camvid: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every third photograph of a split with its label, of which the sky's last class is none."""
    found = []
    for file in sorted((camvid / split).iterdir())[::3]:
        label = decode_label((camvid / f"{split}annot" / file.name).with_suffix(".png").read_bytes())
        found.append((decode_photograph(file.read_bytes()), np.where(label >= CLASSES, 255, label)))
    return found


def curve_of(config: TrainConfig, train: Sequence[Any], val: Sequence[Any]) -> list[float]:
    """mIoU after every `EVERY` iterations of a training."""
    torch.manual_seed(0)
    model = RSSNet(_with_classes(config))
    step = TrainStep(
        model,
        model,
        RSSNetLoss(config.loss, CLASSES),
        *build_optimizer(model, config),
        clip_grad_norm=config.optimizer.clip_grad_norm,
    )
    augment = Augmentation(config.augmentation, config.model.image_hw, (0, 0, 0))
    predictor, random = predictor_of(model, config.inference), np.random.default_rng(0)
    curve = []
    for iteration in range(1, config.iterations + 1):
        chosen = random.integers(len(train), size=config.batch_size)
        pairs = [augment(train[index][0], train[index][1], int(random.integers(2**31))) for index in chosen]
        images = torch.from_numpy(np.stack([image for image, _ in pairs])).float() / 127.5 - 1
        step(images, torch.from_numpy(np.stack([label for _, label in pairs])).long())
        if iteration % EVERY == 0:
            model.eval()
            matrix = ConfusionMatrix(CLASSES)
            seen = predictor([torch.from_numpy(image.copy()).permute(2, 0, 1) for image, _ in val])
            for prediction, (_, label) in zip(seen, val, strict=True):
                matrix.update(prediction.class_map, torch.from_numpy(label))
            curve.append(float(matrix.scores().miou))
    return curve


def _with_classes(config: TrainConfig) -> RSSNetConfig:
    return dataclasses.replace(config.model, num_classes=CLASSES)


def simulated(curves: np.ndarray, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Learning curves of `count` trials, mixtures of two recorded ones: as they are, and as validations show them.

    Args:
        curves: (trials, validations).
    """
    first, second = random.integers(len(curves), size=(2, count))
    share = random.uniform(0, 0.5, size=(count, 1))
    mixed = (1 - share) * curves[first] + share * curves[second]
    return mixed, mixed + random.normal(0, NOISE, size=mixed.shape)


@dataclass(frozen=True)
class Outcome:
    """One simulated sweep beside random search, of `SIMULATED` trials to their end.

    Args:
        steps: share of random search's.
        trials: how many were tried with them.
        gain: mIoU of what is found best, above what random search finds best; both without the noise they chose with.
    """

    steps: float
    trials: int
    gain: float


def simulate(curves: np.ndarray, name: SchedulerName, grace: int | None, more: int) -> list[Outcome]:
    """Let a scheduler try `SIMULATED` trials, `REPETITIONS` times; or up to `more` times as many within `TARGET`."""
    space, found = SearchSpace(BASE, {}, SPACE), []
    for repetition in range(REPETITIONS):
        known, seen = simulated(curves, np.random.default_rng(repetition), SIMULATED * more)
        whole = SIMULATED * curves.shape[1]
        scheduler = make_scheduler(name, space, ITERATIONS, EVERY, grace, PLACES)
        # Those that run when the last one begins go on: a little less than the target leaves room for them.
        most = TARGET * whole - PLACES * curves.shape[1] / 2 if more > 1 else math.inf
        swept = SimulatedSweep(scheduler, seen.tolist(), PLACES, EVERY, most)
        trials = [trial for trial in swept.run() if trial.steps == curves.shape[1]]
        best = max(trials, key=lambda trial: trial.curve[-1]).number
        plain = int(seen[:SIMULATED, -1].argmax())
        gain = float(known[best, -1] - known[plain, -1])
        found.append(Outcome(swept.steps / whole, len(swept.trials), gain))
    return found


def simulation_table(file: Path) -> str:
    """The table of what early stopping saves and costs, with the curves of one file."""
    document = json.loads(file.read_text())
    curves = np.array(document["miou"])
    rows = []
    settings: Sequence[tuple[SchedulerName, int | None, int]] = [
        *(("asha", grace, more) for more in (1, 4) for grace in (EVERY, 3 * EVERY, None, 6 * EVERY)),
        ("hyperband", None, 1),
    ]
    for name, grace, more in settings:
        found = simulate(curves, name, grace, more)
        gains = [100 * outcome.gain for outcome in found]
        graces = f", grace {grace or 'as it is'}" if name == "asha" else ""
        graces += f", within {TARGET:.0%}" if more > 1 else ""
        rows.append(
            f"| {name}{graces} "
            f"| {statistics.fmean(outcome.trials for outcome in found):.0f} "
            f"| {statistics.fmean(outcome.steps for outcome in found):.1%} "
            f"| {statistics.fmean(gains):+.2f} | {statistics.median(gains):+.2f} "
            f"| {statistics.fmean(gain >= 0 for gain in gains):.0%} |"
        )
        print(rows[-1], flush=True)
    spread = f"{100 * curves[:, -1].min():.1f} to {100 * curves[:, -1].max():.1f}"
    return f"""{len(curves)} curves of {document["date"]} at {document["commit"]}, whose last mIoU is {spread} points.

| scheduler | trials | steps, of random search's | gain, mean | median | as good or better |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def simulation() -> str:
    """What is told of both sets of curves."""
    return f"""## Early stopping, simulated

{REPETITIONS} sweeps through the sweep's own scheduler, beside random search: {SIMULATED} trials, all to their end. Each
trial mixes two recorded learning curves; a validation shows it with a noise of {100 * NOISE:.1f} points. {PLACES}
trials at a time; the first one, the recipe, is never stopped under asha. Gain: how far what is found best lies above
what random search finds best, in points of mIoU. Within {TARGET:.0%}: as many trials as have room in so much of random
search's steps.

ASHA's own grace was chosen with the first set; its reduction, and that it compares the best scores so far, with both.

The first set: {simulation_table(CURVES)}
The second set: {simulation_table(SECOND_CURVES)}"""


def camvid_of(source: Path, folder: Path) -> str:
    """CamVid with every third photograph of both splits, and `VALIDATED` of them to validate on."""
    for name in ("train", "trainannot", "val", "valannot"):
        (folder / name).mkdir(parents=True)
        files = sorted((source / name).iterdir())[::3]
        for file in files if name.startswith("train") else files[:VALIDATED]:
            (folder / name / file.name).symlink_to(file)
    return str(folder)


def steps_until(trials: Sequence[TrialRecord], moment: float) -> int:
    """Iterations that all trials had done by then, as far as their histories say, which is to the last ten each."""
    steps = 0
    for trial in trials:
        history = storage.read_json(storage.join(trial.run, HISTORY_FILE))
        steps += max((point["iteration"] for point in history["training"] if point["time"] <= moment), default=0)
    return steps


def real_sweep(data: str, base: str, run: str, name: str) -> list[TrialRecord]:
    """One of `REAL_SWEEPS`, on the Ray that is connected; random search tries the same points under every scheduler."""
    searcher, scheduler = REAL_SWEEPS[name]
    config = SweepConfig(
        dataset=data,
        run=run,
        base=base,
        space=SPACE,
        points=points(SearchSpace(BASE, {}, SPACE), REAL_TRIALS)[1:] if searcher == "random" else [],
        trials=REAL_TRIALS,
        searcher=searcher,
        scheduler=scheduler,
    )
    sweep(config)
    return read_trials(run)


def in_use(trials: Sequence[TrialRecord], places: int) -> float:
    """The share of the places that trials held from the first one's start until the last one's."""
    starts = [trial.started for trial in trials]
    begin, end = min(starts), max(starts)
    held = sum(max(0.0, min(trial.started + trial.seconds, end) - trial.started) for trial in trials)
    return held / (places * (end - begin))


def overheads(trials: Sequence[TrialRecord]) -> list[float]:
    """Seconds from the start of each trial's process to the end of its first step, without building its model."""
    space, found = SearchSpace(BASE, {}, SPACE), []
    for trial in trials:
        history = storage.read_json(storage.join(trial.run, HISTORY_FILE))
        begun = time.perf_counter()
        RSSNet(_with_classes(space.config("unused", "unused", trial.parameters)))
        building = time.perf_counter() - begun
        found.append(history["training"][0]["time"] - trial.started - building)
    return found


def real_table(camvid: Path, names: Sequence[str]) -> str:
    """What real sweeps have taken and found; random search's curves are kept as the second set to simulate with."""
    rows, whole = [], REAL_TRIALS * ITERATIONS
    with tempfile.TemporaryDirectory() as folder, connected():
        data, base = f"{folder}/set", f"{folder}/base.yaml"
        ingest(IngestConfig(camvid_of(camvid.resolve(), Path(folder) / "source"), data))
        optimizer = {**BASE["optimizer"], "lr": FINE_TUNING_LR}
        Path(base).write_text(yaml.safe_dump({**BASE, "optimizer": optimizer}))
        places = int((ray.cluster_resources()["CPU"] + 1e-6) // 0.9)
        for name in names:
            trials = real_sweep(data, base, f"{folder}/{name.replace(', ', '-')}", name)
            if name == "random" and not SECOND_CURVES.is_file():
                curves = [[point["miou"] for point in trial.curve] for trial in trials]
                keep_curves(SECOND_CURVES, [trial.parameters for trial in trials], curves)
            rows.append(real_row(name, trials, places, whole))
            print(rows[-1], flush=True)
    return f"""## Real sweeps of {REAL_TRIALS} trials

CamVid, {places} trials at a time, {ITERATIONS} iterations each. Steps: of those that random search takes with all
trials to their end, in all and until the best trial had ended. In use: the share of the places that trials held until
the last one had begun. Overhead: from the start of a trial's process to the end of its first step, without building the
model.

| sweep | steps | to the best | best trial | its mIoU | recipe's | seconds | in use | overhead, s, median | longest |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def real_row(name: str, trials: Sequence[TrialRecord], places: int, whole: int) -> str:
    """The row of one real sweep, beside the `whole` steps of random search."""
    finished = [trial for trial in trials if trial.state == "finished"]
    best = max(finished, key=lambda trial: trial.metrics["miou"])
    seconds = max(trial.started + trial.seconds for trial in trials) - min(trial.started for trial in trials)
    waits = overheads(trials)
    return (
        f"| {name} | {sum(trial.iterations for trial in trials) / whole:.1%} "
        f"| {steps_until(trials, best.started + best.seconds) / whole:.1%} "
        f"| {best.trial} | {100 * best.metrics['miou']:.2f} | {100 * trials[0].metrics['miou']:.2f} "
        f"| {seconds:.0f} | {in_use(trials, places):.1%} | {statistics.median(waits):.1f} | {max(waits):.1f} |"
    )


def camvid_folder(text: str) -> Path | None:
    """What `--data` names; None for the empty text of a Makefile's variable that was not set."""
    if not text:
        return None
    if not (Path(text) / "trainannot").is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the CamVid folder: it has no folder trainannot")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=camvid_folder, help="the CamVid folder; without it, only what needs none")
    parser.add_argument("--record", action="store_true", help="only write the curves that are simulated with")
    parser.add_argument("--sweeps", nargs="+", choices=REAL_SWEEPS, default=list(REAL_SWEEPS), help="that are real")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if arguments.record:
        if not arguments.data:
            parser.error("--data is missing: the CamVid folder")
        record(arguments.data)
        return
    if not CURVES.is_file():
        parser.error(f"there are no curves to simulate with at {CURVES}: give --data FOLDER --record first")
    if not SECOND_CURVES.is_file() and not arguments.data:
        parser.error(f"there are no curves to simulate with at {SECOND_CURVES}: give --data FOLDER")
    if arguments.data:
        table = real_table(arguments.data, arguments.sweeps)
        if arguments.sweeps != list(REAL_SWEEPS):
            return
        _write("sweep-real", device, table)
    _write("sweep", device, simulation())


def _write(name: str, device: torch.device, text: str) -> None:
    header = "\n".join(f"- {name}: {value}" for name, value in describe(device).items())
    whole = f"# Sweeps\n\n{header}\n- ray: {ray.__version__}\n\n{text}"
    results_file(name, device, ".md").write_text(whole)
    print(whole)


if __name__ == "__main__":
    main()
