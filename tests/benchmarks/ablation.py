"""The claim, checked: what each part of RSSNet does for a fixed budget on CamVid, seed by seed.

Every variant sees the same backbone, crops, iterations and order of samples, and starts from the same weights where it
has the same layers; they differ by their switches alone. Runs are written down one by one, so an interrupted benchmark
goes on where it was:

    python -m tests.benchmarks.ablation --data /path/to/camvid

Needs `rssnet`, torch and Pillow alone, so that it runs where there is a GPU and no Ray.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rssnet import RSSNet, RSSNetConfig
from rssnet.config import CrossAttentionConfig, LocalPathwayConfig, LossConfig, SeparationConfig
from rssnet.diagnostics import LayerDiagnostics, diagnose, draw_diagnostics
from rssnet.inference import Predictor
from rssnet.losses import RSSNetLoss
from rssnet.metrics import ConfusionMatrix, boundary_band
from rssnet.optim import parameter_groups, poly_with_warmup
from rssnet.separation import BilinearUpsampling
from tests.benchmarks.machine import commit, describe, results_file

CLASSES = 11  # of CamVid; its label 11 is "unlabelled"
IGNORE = 255
BOUNDARY_RADIUS = 3  # pixels of the photographs as they are published


@dataclass(frozen=True)
class Settings:
    """The budget, the same for all variants.

    Attributes:
        backbone: a timm model, from random weights.
        depth: its number of blocks.
        crop: height and width of the model's input.
        scale: photographs are taken at this size, and predictions scaled back to the whole one.
        jitter: range of the random factor on top of that in training.
        iterations, batch_size, lr, decoder_lr_scale, warmup, weight_decay, drop_path: of the training.
    """

    backbone: str = "vit_tiny_patch16_224"
    depth: int = 6
    crop: tuple[int, int] = (160, 224)
    scale: float = 0.5
    jitter: tuple[float, float] = (0.75, 1.5)
    iterations: int = 800
    batch_size: int = 4
    lr: float = 1e-3
    decoder_lr_scale: float = 5.0
    warmup: int = 20
    weight_decay: float = 0.05
    drop_path: float = 0.0


# Two cores and an hour; one accelerator, 200 epochs, as many runs as the deadline allows.
CPU = Settings()
GPU = Settings(depth=12, crop=(352, 480), scale=1.0, iterations=4600, batch_size=16, warmup=200, lr=5e-4, drop_path=0.1)


@dataclass(frozen=True)
class Variant:
    """A line of the table: how the model and its losses differ from the default."""

    name: str
    model: dict[str, Any]
    loss: dict[str, Any]


FULL = "RSSNet"
VARIANTS = (
    Variant("linear head", {"head": "linear"}, {}),
    Variant(FULL, {}, {}),
    Variant("without local pathway", {"local_pathway": LocalPathwayConfig(enabled=False)}, {}),
    Variant("without SASM", {"separation": SeparationConfig(enabled=False)}, {}),
    Variant("without DCA", {"cross_attention": CrossAttentionConfig(enabled=False)}, {}),
    Variant("UPerNet, 64 channels", {"head": "upernet", "decoder_width": 64}, {}),
    Variant("SASM told by the labels", {}, {"separation_supervision": 0.5}),
    Variant("DCA without attention supervision", {}, {"attention_bce": 0.0, "attention_dice": 0.0}),
    Variant("DCA without region classification", {}, {"region_classification": 0.0}),
    Variant("DCA without region separation", {}, {"region_separation": 0.0}),
    Variant("region separation moves regions alone", {}, {"detach_prototypes": True}),
)


@dataclass(frozen=True)
class Scores:
    """mIoU over all pixels, and over those within `BOUNDARY_RADIUS` of a boundary."""

    miou: float
    boundary_miou: float


@dataclass(frozen=True)
class Run:
    """What one training of one variant came to; `bilinear` with SASM forced to bilinear upsampling after training."""

    commit: str
    settings: Settings
    variant: str
    seed: int
    scores: Scores
    bilinear: Scores | None
    loss: float
    seconds: float
    diagnostics: list[LayerDiagnostics]

    def to_json(self) -> str:
        """One line; what is nan is null, as JSON wants it."""
        values = asdict(self)
        values["diagnostics"] = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
            for row in values["diagnostics"]
        ]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Run:
        """Reads what `to_json` wrote."""
        values = json.loads(line)
        settings: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values["settings"].items()
        }
        return cls(
            **values
            | {
                "settings": Settings(**settings),
                "scores": Scores(**values["scores"]),
                "bilinear": Scores(**values["bilinear"]) if values["bilinear"] else None,
                "diagnostics": [_diagnostics(row) for row in values["diagnostics"]],
            }
        )


def _diagnostics(row: dict[str, Any]) -> LayerDiagnostics:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in row.items()}
    return LayerDiagnostics(**values)


class Photographs:
    """One split of CamVid, in memory.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N, H, W) uint8, `IGNORE` where unlabelled.
    """

    def __init__(self, data: Path, split: str) -> None:
        stems = sorted(path.stem for path in (data / split).glob("*.jpg"))
        if not stems:
            raise SystemExit(f"There are no photographs at {data / split}: give --data the CamVid folder.")
        images = np.stack([np.asarray(Image.open(data / split / f"{stem}.jpg").convert("RGB")) for stem in stems])
        labels = np.stack([np.asarray(Image.open(data / f"{split}annot" / f"{stem}.png")) for stem in stems])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(np.where(labels < CLASSES, labels, IGNORE).astype(np.uint8))

    def scaled(self, scale: float) -> Photographs:
        """The same photographs smaller, pictures antialiased and labels by the nearest pixel."""
        if scale == 1:
            return self
        size = [round(side * scale) for side in self.images.shape[-2:]]
        other = object.__new__(Photographs)
        other.images = torch.cat(
            [
                F.interpolate(part.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
                for part in self.images.split(16)
            ]
        )
        other.labels = F.interpolate(self.labels[:, None], size=size, mode="nearest-exact")[:, 0]
        return other


def batches(
    photographs: Photographs, settings: Settings, seed: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless training batches, made on the device; which samples and how they are varied hangs on the seed alone.

    Scaled by `jitter`, cropped, mirrored, brightness and contrast varied by up to 30 %.

    Yields:
        (B, 3, h, w) float32 from 0 to 1, and (B, h, w) int64.
    """
    images, labels = photographs.images.to(device), photographs.labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    (height, width), crop = images.shape[-2:], torch.tensor(settings.crop)
    while True:
        while len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        low, high = settings.jitter
        factor = low + (high - low) * torch.rand(settings.batch_size, 1, generator=generator)
        extent = crop / factor  # (B, 2), of the crop in pixels of the photograph
        room = torch.tensor([height, width]) - extent
        start = room.clamp(min=0) * torch.rand(settings.batch_size, 2, generator=generator)
        mirror = torch.rand(settings.batch_size, generator=generator) < 0.5
        brightness, contrast = 0.7 + 0.6 * torch.rand(2, settings.batch_size, 1, 1, 1, generator=generator)

        # Sampling coordinates of grid_sample, -1 to 1 over the photograph.
        rows = (start[:, :1] + (torch.arange(settings.crop[0]) + 0.5) / factor) * 2 / height - 1  # (B, h)
        columns = (start[:, 1:] + (torch.arange(settings.crop[1]) + 0.5) / factor) * 2 / width - 1  # (B, w)
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
        shape = (settings.batch_size, *settings.crop)
        grid = torch.stack([columns[:, None].expand(shape), rows[:, :, None].expand(shape)], dim=-1).to(device)
        picked = chosen.to(device)
        pictures = F.grid_sample(images[picked].float() / 255, grid, mode="bilinear", align_corners=False)
        # One more than the label, so that the zeros outside the photograph mean "ignored".
        shifted = F.grid_sample(labels[picked, None].float() + 1, grid, mode="nearest", align_corners=False)[:, 0]
        target = torch.where(shifted == 0, IGNORE, shifted.long() - 1)
        mean = pictures.mean(dim=(1, 2, 3), keepdim=True)
        pictures = (pictures - mean) * contrast.to(device) + mean * brightness.to(device)
        yield pictures.clamp(0, 1), target


def train(settings: Settings, variant: Variant, seed: int, photographs: Photographs, device: torch.device):
    """Trains one variant.

    Returns:
        The model, and its mean loss over the last tenth of the iterations.
    """
    torch.manual_seed(seed)
    config = RSSNetConfig(
        backbone=settings.backbone,
        backbone_options={"depth": settings.depth},
        num_classes=CLASSES,
        image_size=settings.crop,
        drop_path=settings.drop_path,
    )
    full = RSSNet(config).state_dict()
    model = RSSNet(replace(config, **variant.model))
    # What a variant has in common with the whole model starts as there: seeds then differ more than variants do.
    own = model.state_dict()
    shared = {name: value for name, value in full.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(own | shared)
    model.to(device)
    criterion = RSSNetLoss(LossConfig(**variant.loss), CLASSES).to(device)
    groups = parameter_groups(
        model, settings.lr, weight_decay=settings.weight_decay, decoder_lr_scale=settings.decoder_lr_scale
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = poly_with_warmup(optimizer, settings.iterations, settings.warmup)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (model.pixel_mean, model.pixel_std))
    last: list[torch.Tensor] = []
    model.train()
    source = batches(photographs, settings, seed, device)
    for iteration in range(settings.iterations):
        images, labels = next(source)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = model((images - mean) / std)
        losses = criterion(output, labels)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration >= settings.iterations * 9 // 10:
            last.append(losses["segmentation"].detach())
    return model.eval(), torch.stack(last).mean().item()


def evaluate(model: RSSNet, settings: Settings, photographs: Photographs) -> Scores:
    """Scores on whole photographs at their published size."""
    predictor = Predictor(model, scales=(settings.scale,))
    everywhere, near = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    for images, labels in zip(photographs.images.split(8), photographs.labels.split(8), strict=True):
        on_device = images.to(predictor.device)
        predicted = torch.stack([prediction.class_map for prediction in predictor(list(on_device))])
        everywhere.update(predicted, labels)
        near.update(predicted, labels, boundary_band(labels, BOUNDARY_RADIUS))
    return Scores(everywhere.scores().miou, near.scores().miou)


def diagnosis(model: RSSNet, settings: Settings, photographs: Photographs) -> list[LayerDiagnostics]:
    """The diagnostics on the middle of each photograph, of the model's size."""
    small = photographs.scaled(settings.scale)
    device = next(model.parameters()).device
    (height, width), (h, w) = small.images.shape[-2:], settings.crop
    top, left = max(0, height - h) // 2, max(0, width - w) // 2
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (model.pixel_mean, model.pixel_std))
    window = (..., slice(top, top + h), slice(left, left + w))

    def middles() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(small.images.split(8), small.labels.split(8), strict=True):
            yield (images[window].to(device) / 255 - mean) / std, labels[window].long()

    return diagnose(model, middles())


@functools.cache
def _photographs(data: str) -> tuple[Photographs, Photographs]:
    return Photographs(Path(data), "train"), Photographs(Path(data), "val")


def one_run(data: str, settings: Settings, variant: Variant, seed: int, device_name: str, threads: int) -> Run:
    """Trains and scores one variant with one seed; what a worker process does."""
    torch.set_num_threads(threads)
    device, started = torch.device(device_name), time.perf_counter()
    training, validation = _photographs(data)
    model, loss = train(settings, variant, seed, training.scaled(settings.scale), device)
    seconds = time.perf_counter() - started
    scores = evaluate(model, settings, validation)
    table = diagnosis(model, settings, validation)
    forced = None
    separation = getattr(model.decoder, "separation", None)
    if separation is not None and not isinstance(separation, BilinearUpsampling):
        model.decoder.separation = BilinearUpsampling(ratio=separation.ratio)
        forced = evaluate(model, settings, validation)
    return Run(commit(), settings, variant.name, seed, scores, forced, loss, seconds, table)


def read_runs(file: Path, settings: Settings) -> list[Run]:
    """The runs with these settings that the file holds."""
    if not file.exists():
        return []
    runs = [Run.from_json(line) for line in file.read_text().splitlines() if line.strip()]
    return [run for run in runs if run.settings == settings]


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± sample standard deviation, in points of a hundred."""
    mean = 100 * statistics.fmean(values)
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:+.1f}{deviation}" if signed else f"{mean:.1f}{deviation}"


def table(runs: Sequence[Run]) -> str:
    """The variants as a Markdown table. Differences are taken seed by seed, for a seed fixes data and backbone."""
    by_variant = {variant.name: {r.seed: r for r in runs if r.variant == variant.name} for variant in VARIANTS}
    full = by_variant[FULL]
    lines = [
        f"| variant | seeds | mIoU | within {BOUNDARY_RADIUS} px of a boundary "
        "| less RSSNet's mIoU, over the same seeds | mIoU with bilinear forced | boundary mIoU with bilinear forced "
        "| s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_variant.items():
        if not found:
            continue
        all_runs = list(found.values())
        shared = sorted(found.keys() & full.keys()) if name != FULL else []
        paired = [found[seed].scores.miou - full[seed].scores.miou for seed in shared]
        forced = [r.bilinear for r in all_runs if r.bilinear]
        cells = [
            name,
            str(len(all_runs)),
            spread([r.scores.miou for r in all_runs]),
            spread([r.scores.boundary_miou for r in all_runs]),
            spread(paired, signed=True) if paired else "",
            spread([scores.miou for scores in forced]) if forced else "",
            spread([scores.boundary_miou for scores in forced]) if forced else "",
            f"{statistics.fmean(r.seconds for r in all_runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_diagnostics(runs: Sequence[Run], variant: str) -> list[LayerDiagnostics]:
    """The diagnostics of a variant, averaged over its seeds."""
    tables = [run.diagnostics for run in runs if run.variant == variant]
    measures = [item.name for item in fields(LayerDiagnostics) if item.name not in ("layer", "stride")]
    return [
        replace(rows[0], **{name: statistics.fmean(getattr(row, name) for row in rows) for name in measures})
        for rows in zip(*tables, strict=True)
    ]


def diagnostics_table(rows: Sequence[LayerDiagnostics]) -> str:
    """The diagnostics as a Markdown table."""
    lines = [
        "| layer | stride | token cosine | high-frequency share | class scatter | region cosine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row.token_cosine, row.high_frequency_share, row.class_scatter, row.region_cosine)
        cells = ["" if math.isnan(value) else f"{value:.3f}" for value in numbers]
        stride = "" if math.isnan(row.stride) else f"{row.stride:.0f}"
        lines.append("| " + " | ".join([row.layer, stride, *cells]) + " |")
    return "\n".join(lines)


def write_report(file: Path, runs: Sequence[Run], settings: Settings, header: dict[str, str]) -> str:
    """Writes the Markdown beside the runs, and the drawing of the diagnostics; returns the first table."""
    scores = table(runs)
    budget = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    parts = [
        "# Ablation on CamVid",
        "Trained on the 367 training photographs, scored on the 101 validation ones, 11 classes, random initial "
        "weights. Scores are mean ± sample standard deviation over seeds, in percent.",
        "\n".join(f"- {name}: {value}" for name, value in header.items()),
        f"{len(runs)} runs, trained at commit {', '.join(sorted({run.commit for run in runs}))}. "
        "A variant without a deviation has one seed, which tells nothing. Seconds may be those of a shared machine.",
        f"Budget: {budget}.",
        scores,
    ]
    shown = {}
    for name in (FULL, "linear head", "without SASM", "DCA without region separation"):
        rows = mean_diagnostics(runs, name)
        if rows:
            shown[name] = rows
            parts += [f"## Diagnostics: {name}", diagnostics_table(rows)]
    file.write_text("\n\n".join(parts) + "\n")
    try:
        draw_diagnostics(shown).savefig(file.with_suffix(".png"), dpi=80)
    except ImportError as error:
        print(f"no picture: {error}", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the CamVid folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="runs at a time; one per core on a CPU, four on an accelerator")
    parser.add_argument("--iterations", type=int, help="another budget than that of the device")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run is begun")
    arguments = parser.parse_args()

    device, started = torch.device(arguments.device), time.monotonic()
    settings = CPU if device.type == "cpu" else GPU
    if arguments.iterations:
        settings = replace(settings, iterations=arguments.iterations)
    processes = arguments.processes or (len(os.sched_getaffinity(0)) if device.type == "cpu" else 4)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    file = results_file("ablation", device, ".jsonl")
    file.parent.mkdir(exist_ok=True)

    runs = read_runs(file, settings)
    done = {(run.variant, run.seed) for run in runs}
    # Seed by seed, the linear head and RSSNet without each part first, so that a benchmark cut short has whole rounds.
    rounds = [(v, s) for part in (VARIANTS[:5], VARIANTS[5:]) for s in range(arguments.seeds) for v in part]
    missing = [(v, s) for v, s in rounds if (v.name, s) not in done]
    print(f"{len(done)} runs are there, {len(missing)} to do, {processes} at a time", flush=True)
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    waiting = iter(missing)
    job = functools.partial(one_run, str(arguments.data), settings)
    with pool:
        pending = {pool.submit(job, v, s, str(device), threads) for v, s in _take(waiting, processes)}
        while pending:
            finished = next(as_completed(pending))
            pending.remove(finished)
            run = finished.result()
            runs.append(run)
            with file.open("a") as stream:
                stream.write(run.to_json() + "\n")
            print(f"{run.variant}, seed {run.seed}: {run.scores} in {run.seconds:.0f} s", flush=True)
            if time.monotonic() - started < arguments.deadline:
                pending |= {pool.submit(job, v, s, str(device), threads) for v, s in _take(waiting, 1)}
    header = describe(device)
    hours = sum(run.seconds for run in runs) / 3600
    header["all runs"] = f"{hours:.1f} hours, one at a time"
    print(write_report(file.with_suffix(".md"), runs, settings, header), flush=True)


def _take(items: Iterator[Any], count: int) -> list[Any]:
    return [item for _, item in zip(range(count), items, strict=False)]


if __name__ == "__main__":
    main()
