"""The demo: fills a local S3 server with street scenes or CamVid photographs, and runs the whole chain on it."""

import tempfile
import time
from pathlib import Path

from pipeline import storage
from pipeline.end_to_end import EndToEndConfig, end_to_end
from pipeline.errors import PipelineError
from pipeline.local_s3 import LocalS3
from pipeline.masks import read_masks
from pipeline.prediction import InferenceConfig
from pipeline.progress import announce
from pipeline.report import FILE_NAME
from pipeline.run_record import RunRecord
from pipeline.street_scenes import write_street_scenes

SCENES = {"train": 160, "val": 32, "photos": 48}
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
    if camvid and not (camvid / "trainannot").is_dir():
        raise PipelineError(f"{camvid} is not CamVid's folder (it has no trainannot/): correct DATA, or leave it out.")
    bucket = "camvid" if camvid else "street-scenes"
    with LocalS3(folder / "s3") as server:
        server.create_bucket(bucket)
        announce(f"local S3 at {server.endpoint}, kept in {server.folder}")
        labelled, photos = _filled(bucket, camvid)
        server.save()
        config = EndToEndConfig(
            source=labelled,
            photos=photos,
            root=f"s3://{bucket}/results",
            inference=InferenceConfig(scales=(0.5,)),
            cpus_per_worker=1.5,
            mirror=str(server.folder),
        )
        records = end_to_end(config, after_stage=server.save)
        report = folder / f"{bucket}-report.html"
        report.write_bytes(storage.read_bytes(storage.join(config.root, "report", FILE_NAME)))
        _last_screen(config, records, report, server.folder / bucket, time.monotonic() - begun)


def _filled(bucket: str, camvid: Path | None) -> tuple[str, str]:
    """Put the images into the bucket, if they are not there yet; the URLs of the labelled ones and the photographs."""
    labelled, photos, mark = f"s3://{bucket}/labelled", f"s3://{bucket}/photos", f"s3://{bucket}/{READY_MARK}"
    if storage.exists(mark):
        return labelled, photos
    if camvid:
        announce(f"uploading CamVid from {camvid}")
        for part in ("train", "trainannot", "val", "valannot"):
            storage.upload_folder(camvid / part, f"{labelled}/{part}")
        storage.upload_folder(camvid / "val", photos)
    else:
        announce(f"drawing {sum(SCENES.values())} street scenes")
        with tempfile.TemporaryDirectory() as drawn:
            write_street_scenes(Path(drawn), **SCENES)
            storage.upload_folder(Path(drawn) / "labelled", labelled)
            storage.upload_folder(Path(drawn) / "photos", photos)
    storage.write_bytes(mark, b"")
    return labelled, photos


def _last_screen(
    config: EndToEndConfig, records: dict[str, RunRecord], report: Path, mirror: Path, seconds: float
) -> None:
    scores = records["evaluate"].results
    best = records["sweep"].results
    masks = f"{config.root}/segment"
    lines = [
        "",
        f"Done in {seconds:.0f} s.",
        f"  report    {report}",
        f"  masks     {masks} ({read_masks(masks).num_rows} rows; on disk below {mirror}/results/segment)",
        f"  scores    mIoU {scores['miou']:.3f}, pixel accuracy {scores['aacc']:.3f} ({config.root}/evaluate)",
        f"  model     {config.root}/train/model",
        f"  sweep     trial {best['best_trial']} of {records['sweep'].counts['trials']} is best ({config.root}/sweep)",
        f"  look      duckdb -c \"SELECT * FROM '{mirror}/results/segment/masks/*.parquet' LIMIT 5\"",
        "The S3 server has stopped; the next `make demo` starts it again with the same contents.",
    ]
    for line in lines:
        announce(line)
