"""The drawn street scenes: the same everywhere, labelled in full, textured, and laid out in files as promised."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.street_scenes import IGNORE_LABEL, NAMES, PALETTE, Scene, draw_scene, write_street_scenes

SMALL = (120, 160)
DIGEST_IN_A_NEW_PROCESS = """
import hashlib
from pipeline.street_scenes import draw_scene
scenes = [draw_scene(seed, (120, 160)) for seed in (3, 1)]
print(hashlib.sha256(b"".join(scene.image.tobytes() + scene.label.tobytes() for scene in scenes)).hexdigest())
"""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed) for seed in range(32)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("street")
    write_street_scenes(folder, train=3, val=2, photos=9, seed=5, size=SMALL)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_seed_gives_the_same_scene_in_every_process(hash_seed: str) -> None:
    drawn = [draw_scene(seed, SMALL) for seed in (3, 1)]
    digest = hashlib.sha256(b"".join(scene.image.tobytes() + scene.label.tobytes() for scene in drawn)).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DIGEST_IN_A_NEW_PROCESS]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert there == digest


def test_other_seeds_give_other_scenes(scenes: list[Scene]) -> None:
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)
    assert len({scene.label.tobytes() for scene in scenes}) == len(scenes)


@pytest.mark.parametrize("size", [(360, 480), (480, 360), (64, 64), (65, 331), (1024, 128)])
def test_a_scene_has_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    for seed in range(4):
        scene = draw_scene(seed, size)
        assert scene.image.shape == (*size, 3)
        assert scene.label.shape == size
        assert scene.image.dtype == scene.label.dtype == np.uint8


@pytest.mark.parametrize("size", [(63, 480), (360, 1025)])
def test_a_size_that_cannot_be_drawn_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"from 64 to 1024 pixels"):
        draw_scene(0, size)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed -1 is negative"):
        draw_scene(-1)


def test_names_and_colours_are_distinct() -> None:
    assert len(set(NAMES)) == len(set(PALETTE)) == len(NAMES) == 11


def test_every_class_and_nothing_else_is_labelled(scenes: list[Scene]) -> None:
    labels = np.stack([scene.label for scene in scenes])
    assert set(np.unique(labels).tolist()) == {*range(len(NAMES)), IGNORE_LABEL}
    assert (labels == IGNORE_LABEL).mean() < 0.1
    # Small objects are small, but in enough scenes to be learnt from.
    for index, name in enumerate(NAMES):
        assert (labels == index).any(axis=(1, 2)).mean() > 0.5, name


def test_big_classes_stand_where_a_street_has_them(scenes: list[Scene]) -> None:
    labels = np.stack([scene.label for scene in scenes])
    share = {name: (labels == index).mean() for index, name in enumerate(NAMES)}
    assert share["road"] > 0.25
    assert share["building"] > 0.2
    assert share["sky"] > 0.1
    assert not (labels[:, 240:] == NAMES.index("sky")).any()
    assert not (labels[:, :100] == NAMES.index("road")).any()


def test_every_class_is_textured_beyond_the_sensor_noise(scenes: list[Scene]) -> None:
    grey = np.stack([scene.image for scene in scenes]).astype(np.float32).mean(axis=3)
    labels = np.stack([scene.label for scene in scenes])

    def blocks(planes: np.ndarray, side: int) -> np.ndarray:
        count, height, width = planes.shape
        return planes.reshape(count, height // side, side, width // side, side).swapaxes(2, 3).reshape(-1, side, side)

    # Means of 4 x 4 pixels over three channels leave less than a third of a grey level of the noise.
    coarse = blocks(blocks(grey, 4).mean(axis=(1, 2)).reshape(len(labels), 90, 120), 2)
    whole = blocks(labels, 8)
    for index, name in enumerate(NAMES):
        # Poles are thinner than a block: nearly whole blocks will do.
        inside = (whole == index).mean(axis=(1, 2)) > (0.6 if name == "pole" else 0.95)
        spread = coarse[inside].std(axis=(1, 2))
        assert len(spread) > 10, name
        assert np.median(spread) > 0.8, name


def test_light_differs_between_scenes(scenes: list[Scene]) -> None:
    brightness = np.array([scene.image.mean() for scene in scenes])
    warmth = np.array([scene.image[..., 0].mean() - scene.image[..., 2].mean() for scene in scenes])
    assert brightness.std() > 8
    assert warmth.std() > 8


def test_the_written_tree_is_as_promised(written: Path) -> None:
    expected = {"labelled/classes.json"} | {f"photos/2026/street_{index:05d}.jpg" for index in range(9)}
    for split, count in (("train", 3), ("val", 2)):
        expected |= {f"labelled/images/{split}/scene_{index:05d}.jpg" for index in range(count)}
        expected |= {f"labelled/labels/{split}/scene_{index:05d}.png" for index in range(count)}
    assert set(_files(written)) == expected
    classes = json.loads((written / "labelled" / "classes.json").read_text())
    assert classes == {"names": list(NAMES), "palette": [list(colour) for colour in PALETTE], "ignore_label": 255}


def test_images_and_labels_belong_together(written: Path) -> None:
    for path in (written / "labelled" / "images").rglob("*.jpg"):
        image = Image.open(path)
        label = Image.open(written / "labelled" / "labels" / path.parent.name / f"{path.stem}.png")
        assert (image.format, image.mode, label.mode) == ("JPEG", "RGB", "L")
        assert image.size == label.size == SMALL[::-1]
        ids, red_less_blue = np.asarray(label), np.asarray(image, np.float32) @ (1, 0, -1)
        assert set(np.unique(ids).tolist()) <= {*range(len(NAMES)), IGNORE_LABEL}
        # In any weather the sky is bluer than the road beneath it, or else (at sunset) brighter.
        sky, road = ids == NAMES.index("sky"), ids == NAMES.index("road")
        brighter = np.asarray(image)[sky].mean() > np.asarray(image)[road].mean()
        assert brighter or red_less_blue[sky].mean() < red_less_blue[road].mean()


def test_photographs_have_several_sizes_and_some_lie_on_their_side(written: Path) -> None:
    paths = sorted((written / "photos" / "2026").iterdir())
    photos = [Image.open(path) for path in paths]
    turned = [photo for photo in photos if photo.getexif().get(0x0112, 1) != 1]
    assert [path.name for path, photo in zip(paths, photos, strict=True) if photo in turned] == [
        "street_00000.jpg",
        "street_00008.jpg",
    ]
    assert len({photo.size for photo in photos if photo not in turned}) == 3
    for photo in turned:
        assert photo.size == SMALL[::-1]
        upright = ImageOps.exif_transpose(photo)
        assert upright.size == SMALL
        # Upright, the lower rows are road: darker than the sky above the end of the street.
        rows = np.asarray(upright, np.float32)[:, 40:80].mean(axis=(1, 2))
        assert rows[40:60].mean() > 1.15 * rows[110:140].mean()


def test_sets_do_not_share_streets(written: Path) -> None:
    images = [content for name, content in _files(written).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 14


def test_writing_more_leaves_the_first_as_they_are(written: Path, tmp_path: Path) -> None:
    write_street_scenes(tmp_path, train=4, val=2, photos=9, seed=5, size=SMALL)
    before, after = _files(written), _files(tmp_path)
    assert before == {name: after[name] for name in before}
    assert len(after) == len(before) + 2


def test_a_negative_count_or_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val -1 is negative"):
        write_street_scenes(tmp_path, train=1, val=-1, photos=0)
    with pytest.raises(ValueError, match="seed -4 is negative"):
        write_street_scenes(tmp_path, train=1, val=1, photos=0, seed=-4)
    assert not list(tmp_path.iterdir())
