"""A look at a source says what an ingest would find, draws it, and writes nothing else."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.ingest import IngestConfig
from pipeline.source_preview import preview_source
from tests.pipeline.labelled_source import run_script, write_bad_inputs, write_source


def test_the_findings_name_splits_classes_sizes_and_what_would_be_rejected(tmp_path: Path, capsys) -> None:
    write_source(str(tmp_path / "source"), pairs=4)
    write_bad_inputs(str(tmp_path / "source"))
    (tmp_path / "source/notes.txt").write_text("mine")
    preview_source(IngestConfig(str(tmp_path / "source")))
    said = capsys.readouterr().out
    assert "folders: train 12, val 4 images" in said
    assert "of 16 that were read" in said
    assert "16 wide, 12 high" in said
    assert "3 of 3 classes: " in said
    assert "8 would be rejected\n    /" in said
    assert "more than --max_reject_fraction 0.01 allows: an ingest would fail" in said
    assert "2 more are rejected by the listing alone (no_image 1, no_label 1)" in said
    assert "other files, which are passed over: 1, such as" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_images_are_drawn_beside_their_labels_in_the_colours_of_the_classes(tmp_path: Path, capsys) -> None:
    write_source(str(tmp_path / "source"), pairs=2)
    preview_source(IngestConfig(str(tmp_path / "source"), preview=str(tmp_path / "sheet.png")))
    assert "4 images are drawn in" in capsys.readouterr().out
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())).convert("RGB"))
    colours = {tuple(int(channel) for channel in colour) for colour in np.unique(sheet.reshape(-1, 3), axis=0)}
    assert {(128, 64, 128), (64, 0, 128), (0, 0, 255)} <= colours


def test_a_source_that_cannot_serve_is_refused_as_an_ingest_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="has no objects: correct the URL"):
        preview_source(IngestConfig(str(tmp_path / "nowhere")))


@pytest.mark.usefixtures("ray_cluster")
def test_the_script_looks_without_a_place_for_a_dataset_and_asks_for_one_to_ingest(tmp_path: Path) -> None:
    write_source(str(tmp_path / "source"), pairs=1)
    looked = run_script("--source", str(tmp_path / "source"), "--dry_run", "true")
    assert (looked.returncode, looked.stderr) == (0, "")
    assert looked.stdout.startswith("folders: train 1, val 1 images")
    failed = run_script("--source", str(tmp_path / "source"))
    assert failed.returncode == 1
    assert failed.stderr == "error: No dataset is given: pass --dataset, the URL to write it to, or --dry_run true.\n"
