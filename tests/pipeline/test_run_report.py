"""Which photographs the report of a whole run shows with their masks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import mask_store, masks, storage
from pipeline.images import encode_png
from pipeline.parquet_files import write_table
from pipeline.run_report import OVERLAYS, overlays

PALETTE = ((0, 0, 0), (255, 0, 0))


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    """Four for each that is shown, in the order of their names."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number:02}.png" for number in range(4 * OVERLAYS)]
    for path in paths:
        path.write_bytes(encode_png(np.zeros((6, 8, 3), np.uint8)))
    return paths


def _segmented(url: str, paths: list[Path], model_id: str, class_id: int, status: str = "ok") -> None:
    mask = masks.encode_mask(np.full((6, 8), class_id, np.uint8), PALETTE)
    rows = [
        {**dict.fromkeys(masks.PREDICTION_SCHEMA.names), "model_id": model_id, "status": status}
        | {"image_uri": str(path), "version": storage.stat(str(path)).version, "mask": mask if status == "ok" else None}
        for path in paths
    ]
    file = f"part-{model_id}-{class_id}-{status}.parquet"
    write_table(storage.join(url, mask_store.FOLDER, file), pa.Table.from_pylist(rows, schema=masks.PREDICTION_SCHEMA))


def test_they_are_spread_evenly_over_what_this_model_has_segmented(photographs: list[Path], tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    _segmented(url, photographs[8:], "this", 1)
    _segmented(url, photographs[:8], "this", 0, status="damaged")
    _segmented(url, photographs, "another", 0)
    shown = overlays(url, "this")
    assert [Path(overlay.uri) for overlay in shown] == photographs[8::3]
    assert all((overlay.class_map == 1).all() for overlay in shown)
    assert all(overlay.image.shape == (6, 8, 3) for overlay in shown)


def test_what_is_gone_or_replaced_gives_way_to_its_neighbour(photographs: list[Path], tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    _segmented(url, photographs, "this", 0)
    photographs[0].unlink()
    photographs[4].write_bytes(encode_png(np.zeros((60, 80, 3), np.uint8)))
    shown = [Path(overlay.uri).name for overlay in overlays(url, "this")]
    assert shown[:2] == ["01.png", "05.png"]
    for path in photographs:
        path.unlink(missing_ok=True)
    assert overlays(url, "this") == []
