"""The demo: fills a local S3 server with street scenes or CamVid photographs, and runs the whole chain on it."""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from pipeline import storage
from pipeline.end_to_end import EndToEndConfig, end_to_end
from pipeline.errors import PipelineError
from pipeline.local_s3 import LocalS3
from pipeline.masks import open_masks
from pipeline.progress import announce
from pipeline.report import FILE_NAME
from pipeline.run_record import RunRecord
from pipeline.street_scenes import write_street_scenes

SCENES = {"train": 160, "val": 32, "photos": 48}
CAMVID_FOLDERS = ("train", "trainannot", "val", "valannot")
READY_MARK = ".uploaded"


def demo(data: str, output: str) -> None:
    """Run every stage over `s3://` URLs; what an earlier demo in the same output finished is skipped.

    Args:
        data: CamVid's folder; empty for generated street scenes.
        output: local folder for the server's buckets and the report.

    Raises:
        PipelineError: if `data` is not CamVid's folder, or a stage fails.
    """
    begun = time.monotonic()
    folder = Path(output).expanduser().absolute()
    camvid = Path(data).expanduser().absolute() if data else None
    if camvid:
        _require_camvid(camvid)
    bucket = "camvid" if camvid else "street-scenes"
    with LocalS3(folder / "s3") as server:
        server.create_bucket(bucket)
        announce(f"local S3 at {server.endpoint}, kept in {server.folder}")
        labelled, photos = fill_bucket(bucket, camvid)
        server.save()
        config = EndToEndConfig(
            source=labelled,
            photos=photos,
            root=_root(bucket),
            cpus_per_worker=1.25,  # two threads, which leave room beside on two cores
            mirror=str(server.folder),
        )
        records = end_to_end(config, after_stage=server.save)
        report = folder / f"{bucket}-report.html"
        report.write_bytes(storage.read_bytes(storage.join(config.root, "report", FILE_NAME)))
        _last_screen(config, records, report, server.folder / bucket, time.monotonic() - begun)


def _root(bucket: str) -> str:
    return f"s3://{bucket}/results"


def _require_camvid(folder: Path) -> None:
    lacking = [name for name in CAMVID_FOLDERS if not any((folder / name).glob("*"))]
    if lacking:
        raise PipelineError(
            f"{folder} is not CamVid's folder (nothing in {', '.join(f'{name}/' for name in lacking)}): "
            "correct DATA, or leave it out."
        )


def fill_bucket(bucket: str, camvid: Path | None) -> tuple[str, str]:
    """Put the images into a bucket; those of an earlier demo stay if they are the same, and are replaced if not.

    Args:
        bucket: name of a bucket that is there.
        camvid: CamVid's folder; None for generated street scenes.

    Returns:
        The URLs of the labelled images and of the photographs.
    """
    labelled, photos, mark = f"s3://{bucket}/labelled", f"s3://{bucket}/photos", f"s3://{bucket}/{READY_MARK}"
    source = _digest(camvid)
    if storage.exists(mark):
        if storage.read_bytes(mark) == source:
            return labelled, photos
        announce(f"s3://{bucket} has the images of another demo: they and what was made of them are replaced")
        storage.delete(mark)  # first: killed in between, what is half replaced is not taken for either
    # Without the ingested images every later stage is out of date, and replaced in its turn.
    for place in (labelled, photos, storage.join(_root(bucket), "ingest")):
        storage.delete(place)
    if camvid:
        announce(f"uploading CamVid from {camvid}")
        for part in CAMVID_FOLDERS:
            storage.upload_folder(camvid / part, f"{labelled}/{part}")
        storage.upload_folder(camvid / "val", photos)
    else:
        announce(f"drawing {SCENES['train'] + SCENES['val']} labelled street scenes and {SCENES['photos']} photographs")
        with tempfile.TemporaryDirectory() as drawn:
            write_street_scenes(Path(drawn), SCENES["train"], SCENES["val"], SCENES["photos"])
            storage.upload_folder(Path(drawn) / "labelled", labelled)
            storage.upload_folder(Path(drawn) / "photos", photos)
    storage.write_bytes(mark, source)
    return labelled, photos


def _digest(camvid: Path | None) -> bytes:
    """What tells one set of images from another: names and sizes of CamVid's files, or how many scenes are drawn."""
    described: object = SCENES
    if camvid:
        files = [file for name in CAMVID_FOLDERS for file in sorted((camvid / name).rglob("*")) if file.is_file()]
        described = [(file.relative_to(camvid).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest().encode()


def _last_screen(
    config: EndToEndConfig, records: dict[str, RunRecord], report: Path, mirror: Path, seconds: float
) -> None:
    scores = records["evaluate"].results
    best = records["sweep"].results
    masks, results = f"{config.root}/segment", mirror / "results"
    lines = [
        "",
        f"Done in {seconds:.0f} s.",
        f"  report    {report}",
        f"  masks     {results}/segment ({open_masks(masks).count_rows()} rows)",
        f"  scores    {results}/evaluate (mIoU {scores['miou']:.3f}, pixel accuracy {scores['aacc']:.3f})",
        f"  model     {results}/train/model",
        f"  sweep     {results}/sweep (trial {best['best_trial']} of {records['sweep'].counts['trials']} is best)",
        f"  look      {sys.executable} -c \"import duckdb; print(duckdb.sql('SELECT * EXCLUDE mask FROM "
        f"\\'{results}/segment/masks/*.parquet\\' LIMIT 5'))\"",
        f"The S3 server has stopped; the next `make demo` starts it again, with these places as {config.root}/...",
    ]
    for line in lines:
        announce(line)
