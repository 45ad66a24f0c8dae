"""What ingestion costs: images per second beside a plain loop that does the same, and the driver's memory.

    python -m tests.benchmarks.ingest --data /path/to/camvid

The plain loop is one process that reads, checks, converts and writes image after image with the same functions; the
limit of `n` cores is `n` times its rate. Objects lie on a local S3 server, which takes part of the same cores, and on
the disk. Both ways start with their libraries imported and, for the pipeline, its workers started by a small ingest.
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline import dataset, storage
from pipeline import ingest as stage
from pipeline.cluster import connected
from pipeline.conversion import checked
from pipeline.images import encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.inventory import Cut, Selection, selected_layout
from pipeline.local_s3 import LocalS3
from pipeline.parquet_files import ROW_GROUP_ROWS, BufferedParquet
from pipeline.process_memory import peak_memory
from pipeline.records import Record
from tests.benchmarks.machine import describe, results_file
from tests.pipeline.image_files import encoded

LISTED = (1_000, 10_000, 100_000)
LINKS = 50_000  # to one file, of which disks allow 65,000
HEIGHT, WIDTH = 360, 480


def write_generated(url: str, count: int) -> None:
    """Images of smooth colours and noise, and labels of stripes: a tree of the layout `folders`."""
    classes = {"names": [f"stripe {n}" for n in range(8)], "palette": [[n * 30, 255 - n * 30, 99] for n in range(8)]}
    storage.write_json(storage.join(url, "classes.json"), classes)
    generator = np.random.default_rng(0)
    label = encode_png(np.repeat(np.arange(8, dtype=np.uint8), WIDTH // 8)[None].repeat(HEIGHT, 0))
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        data = encoded(image, "JPEG", quality=90)
        storage.write_bytes(storage.join(url, f"images/train/{number:05}.jpg"), data)
        storage.write_bytes(storage.join(url, f"labels/train/{number:05}.png"), label)


def plain(source: str, target: str) -> dict[str, float]:
    """One process, one image after the other."""
    started = time.perf_counter()
    layout, _, _ = selected_layout(source, "auto", Selection())
    assert layout.classes
    files: dict[str, BufferedParquet] = {}
    waiting: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for pair in layout.pairs:
        assert pair.label_url
        image, label = storage.read_bytes(pair.image_url), storage.read_bytes(pair.label_url)
        record = Record(pair.image_id, pair.split, pair.image_url, image, label, pair.label_url, pair.coding)
        row = checked(record, layout.codings, len(layout.classes))
        waiting[row.split].append(row.values)
        if len(waiting[row.split]) == ROW_GROUP_ROWS:
            file = files.setdefault(row.split, BufferedParquet(dataset.SCHEMA))
            file.write(pa.Table.from_pylist(waiting.pop(row.split), schema=dataset.SCHEMA))
    for split, rows in waiting.items():
        files.setdefault(split, BufferedParquet(dataset.SCHEMA)).write(
            pa.Table.from_pylist(rows, schema=dataset.SCHEMA)
        )
    for split, file in files.items():
        file.store(storage.join(target, f"{split}.parquet"))
    return {"images": len(layout.pairs), "seconds": time.perf_counter() - started}


def pipeline(source: str, target: str) -> dict[str, float]:
    """The ingest on a local Ray that is warm."""
    with connected(), tempfile.TemporaryDirectory() as folder:
        write_generated(f"{folder}/source", 200)
        cut, stage.CUT = stage.CUT, Cut(most_images=5)  # enough chunks for all workers to be started
        ingest(IngestConfig(f"{folder}/source", f"{folder}/set"))
        stage.CUT = cut
        started = time.perf_counter()
        record = ingest(IngestConfig(source, target, max_reject_fraction=1.0))
        seconds = time.perf_counter() - started
    memory = peak_memory() / 2**20
    return {"images": record.counts["out"], "seconds": seconds, "driver_mib": memory}


def measured(way: str, source: str, target: str) -> dict[str, float]:
    """One way in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--way", way, "--source", source, "--target", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} of {source} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the CamVid folder")
    parser.add_argument("--images", type=int, default=5000, help="of the generated set")
    parser.add_argument("--way", choices=("plain", "pipeline"), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        way = plain if arguments.way == "plain" else pipeline
        print(json.dumps(way(arguments.source, arguments.target)), flush=True)
        return

    cores = len(os.sched_getaffinity(0))
    rows, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_generated(f"{folder}/generated", arguments.images)
        sources = {f"generated, {arguments.images} images": f"{folder}/generated"}
        if arguments.data:
            sources = {"CamVid": str(arguments.data.resolve())} | sources
        for name, source in sources.items():
            rows.append(_row(f"{name}, on disk", source, f"{folder}/out/{len(rows)}", cores))
        for number, source in enumerate(sources.values()):
            shutil.copytree(source, f"{folder}/s3/bench/{number}")
        with LocalS3(Path(folder) / "s3"):
            for number, name in enumerate(sources):
                rows.append(_row(f"{name}, on local S3", f"s3://bench/{number}", f"s3://bench/out/{number}", cores))
        for count in LISTED:
            many = Path(folder) / f"many{count}"
            many.mkdir()
            for number in range(count):
                place = many / f"{number:08}.png"
                if number % LINKS == 0:
                    place.write_bytes(encode_png(np.zeros((1, 1), np.uint8)))
                else:
                    place.hardlink_to(many / f"{number // LINKS * LINKS:08}.png")
            found = measured("pipeline", str(many), f"{folder}/out/many{count}")
            memory.append(f"| {count:,} | {found['driver_mib']:.0f} | {found['seconds']:.1f} |")
            print(memory[-1], flush=True)

    device = torch.device("cpu")
    header = "\n".join(f"- {name}: {value}" for name, value in describe(device).items())
    text = "\n\n".join(
        [
            "# Ingestion",
            header,
            f"The limit is {cores} cores that do nothing else: {cores} times the plain loop. The local S3 server "
            "runs on the same cores.",
            "| source | images | plain loop, images/s | pipeline, images/s | pipeline over plain, per core |\n"
            "|---|---|---|---|---|\n" + "\n".join(rows),
            "Images of one pixel each, so that the listing and the bookkeeping are what counts:",
            "| images listed and ingested | driver's peak memory, MiB | s |\n|---|---|---|\n" + "\n".join(memory),
        ]
    )
    results_file("ingest", device, ".md").write_text(text + "\n")
    print(text)


def _row(name: str, source: str, target: str, cores: int) -> str:
    slow = measured("plain", source, f"{target}-plain")
    fast = measured("pipeline", source, target)
    rates = [found["images"] / found["seconds"] for found in (slow, fast)]
    ratio = rates[1] / rates[0] / cores
    line = f"| {name} | {fast['images']:.0f} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio:.2f} |"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
