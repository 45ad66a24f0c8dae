"""Size, speed and memory of RSSNet beside UPerNet and DPT, as a table and JSON.

    python -m tests.benchmarks.model                    # all that needs no accelerator
    python -m tests.benchmarks.model --device cuda      # images per second and peak memory there

UPerNet and DPT come from the transformers library; without it (no extra `benchmarks`) those lines are left out and said
to be missing. Nothing is downloaded: all weights are random.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rssnet import RSSNet, RSSNetConfig
from rssnet.separation import SpatiallyAdaptiveSeparation
from tests.benchmarks.machine import describe, results_file
from tests.rssnet.peak_memory import PeakMemory

CLASSES = 150
BEIT_L, VIT_S = "beit_large_patch16_224", "vit_small_patch16_224"
# rssnet.md, section 8, and the issue: what RSSNet must reach.
LIMITS = {
    "parameters_m": 330.0,
    "flops_ratio": {(BEIT_L, 640): 0.06, (VIT_S, 512): 0.12},
    "cpu_time_ratio": 0.25,
    "peak_memory_ratio": 0.25,
    "sasm_peak_maps": 4.0,
}
# The default first; it is what must keep the limit.
SASM_OPTIONS: tuple[dict[str, Any], ...] = (
    {"form": "conv", "kernel_size": 3, "groups": 1},
    {"form": "conv", "kernel_size": 5, "groups": 1},
    {"form": "conv", "kernel_size": 3, "groups": 8},
    {"form": "affinity", "kernel_size": 3, "groups": 1},
    {"form": "plain", "kernel_size": 3, "groups": 1},
)


@dataclass(frozen=True)
class Contender:
    """A model to be measured, with the name of the submodule that is its backbone."""

    name: str
    build: Callable[[], nn.Module]
    backbone: str = "backbone"


def ours(backbone: str, size: int, **options: Any) -> Callable[[], nn.Module]:
    """Builds a model of this project for square images."""
    return lambda: RSSNet(RSSNetConfig(backbone, CLASSES, size, **options))


def contenders(backbone: str, size: int) -> list[Contender]:
    """RSSNet first, then what it is compared with, on the same backbone."""
    found = [
        Contender("RSSNet", ours(backbone, size)),
        Contender("linear head", ours(backbone, size, head="linear")),
        Contender("UPerNet, 512 channels (rssnet.baselines)", ours(backbone, size, head="upernet")),
    ]
    if importlib.util.find_spec("transformers") is None:
        return found
    transformers: Any = importlib.import_module("transformers")  # not a dependency of the tests
    width, depth, heads = (1024, 24, 16) if backbone == BEIT_L else (384, 12, 6)
    shape = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": size,
        "num_labels": CLASSES,
        "use_auxiliary_head": False,
    }
    quarters = [depth * i // 4 for i in range(1, 5)]
    relative = backbone == BEIT_L
    upernet = transformers.BeitConfig(
        **shape,
        out_indices=quarters,
        use_relative_position_bias=relative,
        use_absolute_position_embeddings=not relative,
        use_mean_pooling=False,
    )
    dpt = transformers.DPTConfig(
        **shape,
        patch_size=16,
        backbone_out_indices=[index - 1 for index in quarters],
        neck_hidden_sizes=[width // 4, width // 2, width, width],
    )
    return [
        *found,
        Contender(
            f"UPerNet, {width} channels (transformers)",
            lambda: transformers.BeitForSemanticSegmentation(upernet),
            "beit",
        ),
        Contender("DPT (transformers)", lambda: transformers.DPTForSemanticSegmentation(dpt), "dpt"),
    ]


def size_and_flops(contender: Contender, size: int) -> dict[str, Any]:
    """Parameters and FLOPs, counted on the meta device; torch's counter sees matrix products and convolutions alone.

    What it leaves out of RSSNet: SASM's k^2 multiply-adds per fine location and channel, 0.03 GFLOPs at 640 x 640.
    """
    with torch.device("meta"):
        model = contender.build().eval()
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
        model(images)
    whole = counter.get_total_flops()
    counts = counter.get_flop_counts()
    backbone = sum(counts[f"{type(model).__name__}.{contender.backbone}"].values())
    return {
        "parameters_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "backbone_gflops": backbone / 1e9,
        "decoder_gflops": (whole - backbone) / 1e9,
        "flops_ratio": (whole - backbone) / backbone,
    }


def peak_memory_ratio(backbone: str, size: int, batch: int) -> dict[str, float]:
    """Peak memory of inference, weights included, over that of the bare backbone; counted on the meta device."""
    with torch.device("meta"):
        model = RSSNet(RSSNetConfig(backbone, CLASSES, size)).eval()
        images = torch.empty(batch, 3, size, size)

    def peak(part: nn.Module) -> float:
        weights = sum(tensor.nbytes for tensor in [*part.parameters(), *part.buffers()])
        with torch.inference_mode(), PeakMemory([images, *model.parameters(), *model.buffers()]) as memory:
            part(images)
        return (weights + memory.peak) / 2**20

    alone, whole = peak(model.backbone), peak(model)
    return {"backbone_mib": alone, "whole_mib": whole, "peak_memory_ratio": whole / alone - 1}


def sasm_peak(width: int, ratio: int = 2, **options: Any) -> float:
    """Peak memory of SASM's forward and backward above its inputs', in feature maps (B, d, h, w) at the fine stride."""
    module = SpatiallyAdaptiveSeparation(
        width=width,
        local_width=width,
        ratio=ratio,
        **{"kernel_size": 3, "max_gate": 1.0, "gate_bias": -3.0} | options,
    )
    deep = torch.randn(1, width, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    local, gradient = (
        torch.randn(1, width, 32 * ratio, 32 * ratio).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    local.requires_grad_()
    with PeakMemory([deep, local, gradient, *module.parameters(), *module.buffers()]) as memory:
        separated, _ = module(deep, local)
        separated.backward(gradient)
    return memory.peak / (local.numel() * local.element_size())


class Stopwatch:
    """Times a model's forward pass, and how much of it its backbone took."""

    def __init__(self, contender: Contender, images: Tensor) -> None:
        self.model, self.images = contender.build().eval(), images
        self._backbone: list[float] = []
        part = self.model.get_submodule(contender.backbone)
        part.register_forward_pre_hook(lambda *_: self._backbone.append(-time.perf_counter()))
        part.register_forward_hook(lambda *_: self._backbone.append(time.perf_counter()))

    def __call__(self) -> tuple[float, float]:
        """Seconds of the backbone and of the rest."""
        self._backbone.clear()
        started = time.perf_counter()
        with torch.inference_mode():
            self.model(self.images)
        whole, backbone = time.perf_counter() - started, sum(self._backbone)
        return backbone, whole - backbone


def cpu_time(backbone: str, size: int, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Seconds of one image on one thread: backbone and decoder in the same call, models taken in turn, medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = torch.randn(1, 3, size, size)
        watches = {contender.name: Stopwatch(contender, images) for contender in contenders(backbone, size)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in watches}
        for attempt in range(rounds + 2):
            for name, watch in watches.items():
                taken = watch()
                if attempt >= 2:  # the first calls allocate and choose kernels
                    times[name].append(taken)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            "backbone_s": statistics.median(backbone for backbone, _ in taken),
            "decoder_s": statistics.median(decoder for _, decoder in taken),
            "cpu_time_ratio": statistics.median(decoder / backbone for backbone, decoder in taken),
        }
        for name, taken in times.items()
    }


def throughput(model: nn.Module, images: Tensor, rounds: int = 20) -> dict[str, float]:
    """Images per second and peak memory on an accelerator, in bf16 under autocast."""

    def step() -> None:
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
            model(images)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    for _ in range(rounds):
        step()
    ended.record()
    torch.cuda.synchronize()
    seconds = started.elapsed_time(ended) / 1000
    return {
        "images_per_s": len(images) * rounds / seconds,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def on_accelerator(device: torch.device, batch: int = 8) -> list[dict[str, Any]]:
    """Backbone alone, RSSNet and UPerNet on BEiT-L, at two sizes, eager and compiled."""
    rows: list[dict[str, Any]] = []
    for size in (512, 640):
        images = torch.randn(batch, 3, size, size, device=device)
        for name, build in (
            ("backbone alone", lambda: ours(BEIT_L, size)().get_submodule("backbone")),  # noqa: B023 - called here
            ("RSSNet", ours(BEIT_L, size)),
            ("UPerNet", ours(BEIT_L, size, head="upernet")),
        ):
            model = build().to(device).eval()  # one at a time: the peak counts every weight on the device
            for compiled in (False, True):
                torch.compiler.reset()
                called: Any = torch.compile(model) if compiled else model
                row = {"backbone": BEIT_L, "size": size, "model": name, "compiled": compiled, "batch": batch}
                rows.append(row | throughput(called, images))
                print(rows[-1], flush=True)
            del model, called
            torch.cuda.empty_cache()
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table; the columns are those of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_on_cpu() -> dict[str, list[dict[str, Any]]]:
    """All tables that need no accelerator, by title."""
    sizes = [
        {"backbone": backbone, "size": size, "model": contender.name, **size_and_flops(contender, size)}
        for backbone, size in ((BEIT_L, 640), (VIT_S, 512))
        for contender in contenders(backbone, size)
    ]
    times = [{"model": name, **row} for name, row in cpu_time(VIT_S, 512).items()]
    memory = [
        {"backbone": backbone, "size": 640, "batch": 8, **peak_memory_ratio(backbone, 640, 8)}
        for backbone in (BEIT_L, VIT_S)
    ]
    separation = [
        {"width": width, **options, "sasm_peak_maps": sasm_peak(width, **options)}
        for width in (256, 128, 64)
        for options in SASM_OPTIONS
    ]
    return {
        "Parameters and FLOPs, one image, K = 150": sizes,
        "CPU time of a forward pass, ViT-S at 512 x 512, one image, one thread": times,
        "Peak memory of inference over the bare backbone, float32": memory,
        "Peak memory of SASM, forward and backward, in maps above its inputs": separation,
    }


def verdicts(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What RSSNet must reach beside what it reached."""
    sizes, times, memory, separation = tables.values()
    rows: list[dict[str, Any]] = []

    def add(what: str, reached: float, limit: float) -> None:
        rows.append({"what": what, "reached": reached, "limit": limit, "met": "yes" if reached <= limit else "NO"})

    for row in sizes:
        if row["model"] == "RSSNet":
            if row["backbone"] == BEIT_L:
                add("parameters in millions, BEiT-L", row["parameters_m"], LIMITS["parameters_m"])
            limit = LIMITS["flops_ratio"][row["backbone"], row["size"]]
            add(f"decoder over backbone, FLOPs, {row['backbone']} at {row['size']}", row["flops_ratio"], limit)
    add("decoder over backbone, CPU time, ViT-S at 512", times[0]["cpu_time_ratio"], LIMITS["cpu_time_ratio"])
    for row in memory:
        add(
            f"extra peak memory, {row['backbone']} at 640, batch 8",
            row["peak_memory_ratio"],
            LIMITS["peak_memory_ratio"],
        )
    for row in separation:
        if {name: row[name] for name in SASM_OPTIONS[0]} == SASM_OPTIONS[0]:
            add(f"SASM's peak in maps, d = {row['width']}", row["sasm_peak_maps"], LIMITS["sasm_peak_maps"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    if device.type == "cuda":
        tables = {"Inference in bf16": on_accelerator(device)}
    else:
        tables = measure_on_cpu()
        tables = {"What RSSNet must reach": verdicts(tables), **tables}
    header = describe(device)
    if device.type == "cpu":
        header["missing"] = "images per second and peak memory on a GPU: none was at hand; `make gpu` measures them"
    if importlib.util.find_spec("transformers") is None:
        header["left out"] = "UPerNet and DPT of the transformers library, which is not installed"
    lines = ["# Size, speed and memory of the model", *(f"- {name}: {value}" for name, value in header.items())]
    text = "\n".join(lines) + "".join(f"\n\n## {title}\n\n{markdown(rows)}" for title, rows in tables.items())
    file = results_file("model", device, ".md")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text + "\n")
    file.with_suffix(".json").write_text(json.dumps({"machine": header, "tables": tables}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
