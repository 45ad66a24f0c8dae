"""What batch segmentation costs beside the model, and what grows with the number of images.

    python -m tests.benchmarks.segment                     # all parts
    python -m tests.benchmarks.segment --parts speed       # one of them

`speed`: images per second from the listing of a bucket to its committed Parquet, over those of a bare loop on decoded
images in memory with the same model and batch. `growth`: time and memory for 1,000, 5,000 and 10,000 small images, and
a second run over the unchanged bucket. `listing`: 10 million objects that a synthetic S3 lists, compared with an output
that has no rows, and with one that has all but a thousand.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch
from PIL import Image

from pipeline import image_sources, mask_store, masks, storage
from pipeline.census import Census
from pipeline.cluster import connected
from pipeline.image_sources import ImageSource
from pipeline.images import decode_photograph
from pipeline.inference_config import InferenceConfig
from pipeline.local_s3 import LocalS3
from pipeline.parquet_files import write_table
from pipeline.prediction import load_predictor
from pipeline.process_memory import peak_memory
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
from rssnet import RSSNet, RSSNetConfig
from tests.benchmarks.machine import describe, results_file
from tests.pipeline.endless_s3 import endless_s3, etag_of, key_of
from tests.pipeline.image_files import encoded

HEIGHT, WIDTH = 360, 480
BATCH = 8
SMALL = 64  # pixels of a side of the images of which many are segmented
COUNTS = (1_000, 5_000, 10_000)
WARM = 500  # of them, after which Ray has all the processes that it will have
OBJECTS, FOLDERS, PENDING = 10_000_000, 100, 1_000
OWNERS = ("driver", "models", "tasks and other actors", "Ray", "object store")
TARGET = {"cpu": 0.85, "cuda": 0.9}


def write_model(folder: Path, device: str) -> None:
    """The models that are applied: untrained, for what they say does not matter here."""
    torch.manual_seed(0)
    backbone = "vit_large_patch16_224" if device == "cuda" else "vit_small_patch16_224"
    RSSNet(RSSNetConfig(backbone=backbone, num_classes=19, image_size=(HEIGHT // 16 * 16, WIDTH))).save_pretrained(
        str(folder / "model")
    )
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    tiny = RSSNetConfig(
        backbone="vit_tiny_patch16_224", backbone_options=options, num_classes=19, image_size=SMALL, decoder_width=16
    )
    RSSNet(tiny).save_pretrained(str(folder / "tiny"))


def write_images(url: str, count: int, height: int, width: int) -> None:
    """Photographs of smooth colours."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        data = encoded(image, "JPEG", quality=90)
        storage.write_bytes(storage.join(url, f"{number % 100:02}/{number:06}.jpg"), data)


def bare_loop(model: str, images: str, count: int, device: str) -> dict[str, float]:
    """Decoded images in memory, batch after batch, on all cores or the GPU."""
    predictor = load_predictor(model, InferenceConfig())
    predictor.model.to(device)
    found = [item.url for item in storage.list_objects(images)][:count]
    decoded = [torch.tensor(decode_photograph(storage.read_bytes(url))).permute(2, 0, 1) for url in found]
    predictor(decoded[:BATCH])
    started = time.perf_counter()
    for start in range(0, len(decoded), BATCH):
        predictor(decoded[start : start + BATCH])
    return {"images": len(decoded), "seconds": time.perf_counter() - started}


def end_to_end(model: str, images: str, out: str, device: str, warm: str) -> dict[str, Any]:
    """A segmentation on a local Ray that is warm, a second one, and the memory that they take."""
    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "3600000"  # noqa: SIM112 - Ray's name; what is warm stays so
    config = _config(model, images, out, device)
    with connected():
        segment(dataclasses.replace(config, images=warm, out=f"{out}-warm"))
        with _Memory() as memory:
            started = time.perf_counter()
            record = segment(config)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            segment(config)
            again = time.perf_counter() - started
    assert record.counts["ok"] == record.counts["listed"]
    driver = peak_memory() / 2**20
    return {
        "images": record.counts["ok"],
        "seconds": seconds,
        "again": again,
        "driver_mib": driver,
        "all_mib": memory.peak,
        "processes": memory.processes,
        "parts": memory.parts,
    }


def nothing_new(model: str, images: str, out: str, device: str) -> dict[str, float]:
    """A segmentation that has nothing to do, from the start of its Ray to the end of it."""
    started = time.perf_counter()
    with connected():
        record = segment(_config(model, images, out, device))
    assert record.counts["ok"] == record.counts["listed"]
    return {"seconds": time.perf_counter() - started}


def _config(model: str, images: str, out: str, device: str) -> SegmentConfig:
    # A thread for each core, and room for the stages beside.
    cpus = 1 if device == "cuda" else len(os.sched_getaffinity(0)) - 0.75
    return SegmentConfig(model, images, out, batch_size=BATCH, use_gpu=device == "cuda", cpus_per_worker=cpus)


class _Memory:
    """The most memory that this process and those below it had in any second, in MiB; what they share counts once.

    `parts` says whose it was, by `OWNERS`; the object store's is what all of them map, tasks' also what Ray keeps idle.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = dict.fromkeys(OWNERS, 0.0)
        self.processes = 0
        self._stop = threading.Event()
        self._watching = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Memory":
        self._watched = self._watching.submit(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watched.result()  # or what has ended it

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(1.0):
            found: dict[str, float] = dict.fromkeys(OWNERS, 0.0)
            count = 0
            for process in (driver, *driver.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    pss = _proportional(process.pid)
                    command = " ".join(process.cmdline())
                    whose = "driver" if process == driver else _owner(command)
                    found[whose] += pss["Pss"] - pss["Pss_Shmem"]
                    found["object store"] += pss["Pss_Shmem"]
                    count += 1
            if sum(found.values()) > self.peak:
                self.parts, self.processes = found, count


def _proportional(process: int) -> dict[str, float]:
    """The kinds of a process's proportional set size, in MiB."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return {name: int(size) / 1024 for name, size in re.findall(r"^(Pss\w*):\s+(\d+) kB$", text, re.MULTILINE)}


def _owner(command: str) -> str:
    """Whose a process of Ray's is, by how it calls itself."""
    if command.startswith("ray::MapWorker"):
        return "models"
    return "tasks and other actors" if command.startswith("ray::") else "Ray"


def listing(folder: str) -> dict[str, float]:
    """A census of more objects than a disk would hold, twice: nothing is done yet, and nearly all."""
    out, found = f"{folder}/out", {}
    with endless_s3(OBJECTS, FOLDERS) as bucket, connected():
        parts = image_sources.parts(ImageSource(bucket.url))
        for name in ("first", "second"):
            started = time.perf_counter()
            pending = Census(parts, out, "model").pending(f"{folder}/work-{name}")
            found |= {f"{name}_seconds": time.perf_counter() - started, f"{name}_pending": pending.images}
            found[f"{name}_driver_mib"] = peak_memory() / 2**20
            assert pending.listed == OBJECTS
            if name == "first":
                ray.get(ray.remote(_write_rows).remote(out, bucket.url))  # whose memory is not to count
    return found


def _write_rows(out: str, bucket: str) -> None:
    """Rows without masks, for all objects but `PENDING`."""
    each = OBJECTS // FOLDERS
    for number in range(FOLDERS):
        numbers = range(PENDING // FOLDERS, each)
        columns: dict[str, Any] = {
            name: pa.nulls(len(numbers), kind)
            for name, kind in zip(masks.PREDICTION_SCHEMA.names, masks.PREDICTION_SCHEMA.types, strict=True)
        }
        columns["image_uri"] = pa.array([f"{bucket}/{key_of(number, item)}" for item in numbers])
        columns["version"] = pa.array([etag_of(number, item) for item in numbers])
        columns["model_id"], columns["status"] = (pa.repeat(value, len(numbers)) for value in ("model", masks.OK))
        table = pa.table(columns).cast(masks.PREDICTION_SCHEMA)
        write_table(f"{out}/{mask_store.FOLDER}/part-{number:03}.parquet", table)


def measured(*arguments: str) -> dict[str, Any]:
    """One way in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.segment", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(folder: Path, count: int, device: str) -> str:
    """The table of the first part: the bare loop before and after, for machines have moods."""
    write_images("s3://bench/photos", count, HEIGHT, WIDTH)
    write_images("s3://bench/warm", 2 * BATCH, HEIGHT, WIDTH)
    model, some = str(folder / "model"), str(max(BATCH, count // 4))
    before = measured("--way", "bare", "--places", model, "s3://bench/photos", some, device)
    whole = measured(
        "--way", "whole", "--places", model, "s3://bench/photos", "s3://bench/out", device, "s3://bench/warm"
    )
    after = measured("--way", "bare", "--places", model, "s3://bench/photos", some, device)
    bare = (before["images"] + after["images"]) / (before["seconds"] + after["seconds"])
    rate = whole["images"] / whole["seconds"]
    size = f"{whole['images']:.0f} of {WIDTH} x {HEIGHT}"
    return "The local S3 server runs on the same cores.\n\n" + (
        f"| images | bare loop, images/s | end to end, images/s | ratio | asked for |\n|---|---|---|---|---|\n"
        f"| {size} | {bare:.2f} | {rate:.2f} | {rate / bare:.2f} | {TARGET[device]} |"
    )


def growth(folder: Path, device: str, server: LocalS3) -> str:
    """The table of the second part. A bucket for each number: the local server goes through all keys to list some."""
    rows, parts, seconds = [], [], {}
    write_images("s3://bench/warm-small", WARM, SMALL, SMALL)
    for count in COUNTS:
        for bucket in (f"images-{count}", f"masks-{count}"):
            server.create_bucket(bucket)
        write_images(f"s3://images-{count}", count, SMALL, SMALL)
        places = (str(folder / "tiny"), f"s3://images-{count}", f"s3://masks-{count}/small", device)
        found = measured("--way", "whole", "--places", *places, "s3://bench/warm-small")
        afresh = measured("--way", "again", "--places", *places)
        seconds[count] = found["seconds"]
        rows.append(
            f"| {count:,} | {found['seconds']:.1f} | {count / found['seconds']:.1f} | {found['again']:.1f} | "
            f"{100 * found['again'] / found['seconds']:.1f} % | {afresh['seconds']:.1f} | {found['driver_mib']:.0f} | "
            f"{found['all_mib']:.0f} | {found['processes']} |"
        )
        parts.append(f"| {count:,} | " + " | ".join(f"{found['parts'][whose]:.0f}" for whose in OWNERS) + " |")
        print(rows[-1], flush=True)
    ratio = seconds[COUNTS[-1]] / seconds[COUNTS[-2]]
    return (
        f"Images of {SMALL} x {SMALL}, a tiny model, a local S3 server on the same cores. The first and the second run "
        "find all processes of Ray there; a third one starts its own Ray, which counts:\n\n"
        "| images | s | images/s | second run, s | share | third run, s | driver's peak memory, MiB "
        "| of all processes, MiB | processes |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nTwice as many images take {ratio:.2f} times as long ({COUNTS[-2]:,} and {COUNTS[-1]:,}). "
        + "The peak of all processes, in MiB, by whose memory it is:\n\n"
        + f"| images | {' | '.join(OWNERS)} |\n|---|---|---|---|---|---|\n"
        + "\n".join(parts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="of the part `speed`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", nargs="+", default=["speed", "growth", "listing"])
    parser.add_argument("--way", choices=("bare", "whole", "again", "listing"), help=argparse.SUPPRESS)
    parser.add_argument("--places", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        places = arguments.places
        if arguments.way == "bare":
            found = bare_loop(places[0], places[1], int(places[2]), places[3])
        else:
            ways: dict[str, Any] = {"listing": listing, "again": nothing_new, "whole": end_to_end}
            found = ways[arguments.way](*places)
        print(json.dumps(found), flush=True)
        return
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments.device)
        with LocalS3(folder / "s3") as server:
            server.create_bucket("bench")
            if "speed" in arguments.parts:
                _write("speed", device, speed(folder, arguments.images, arguments.device))
            if "growth" in arguments.parts:
                _write("growth", device, growth(folder, arguments.device, server))
        if "listing" in arguments.parts:
            _write("listing", device, compared(folder))


def compared(folder: Path) -> str:
    """The table of the third part."""
    found = measured("--way", "listing", "--places", str(folder))
    columns = ("pending", "seconds", "driver_mib")
    lines = [
        " | ".join([f"| {rows:,}", *(f"{found[f'{name}_{column}']:,.0f}" for column in columns)]) + " |"
        for name, rows in (("first", 0), ("second", OBJECTS - PENDING))
    ]
    head = "| rows of the output | pending | s | driver's peak memory, MiB |\n|---|---|---|---|\n"
    return f"{OBJECTS:,} objects of a synthetic S3, listed and compared:\n\n{head}" + "\n".join(lines)


def _write(part: str, device: torch.device, text: str) -> None:
    header = "\n".join(f"- {name}: {value}" for name, value in describe(device).items())
    whole = f"# Batch segmentation: {part}\n\n{header}\n\n{text}\n"
    results_file(f"segment-{part}", device, ".md").write_text(whole)
    print(whole, flush=True)


if __name__ == "__main__":
    main()
