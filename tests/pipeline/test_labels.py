"""What a published label means, pixel by pixel, and which labels mean nothing. The tables are the tests' own."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline import storage
from pipeline.images import BadImage
from pipeline.labels import LabelCoding, training_ids
from pipeline.layouts import class_set, read_layout
from tests.pipeline import published_trees as trees
from tests.pipeline.image_files import encoded
from tests.pipeline.published_trees import FILES, IGNORED, NAMED, OWN_CLASSES, drawn_png, mat, palette_png, png

LABELLED = {name: write for name, write in {**FILES, **NAMED}.items() if name != "unlabelled"}


def codings(write: Callable[[str], trees.Tree], folder: Path) -> dict[str, LabelCoding]:
    """Of a published tree's layout, those that its labels have."""
    layout = read_layout(write(str(folder)).layout, str(folder), list(storage.list_objects(str(folder))))
    return {pair.coding: layout.codings[pair.coding] for pair in layout.pairs if pair.label_url}


def bad(data: bytes, coding: LabelCoding) -> BadImage:
    with pytest.raises(BadImage) as refusal:
        training_ids(data, coding)
    assert "\n" not in refusal.value.detail
    return refusal.value


@pytest.fixture
def own(tmp_path: Path):
    """What labels mean under a `classes.json`."""

    def read(**changes: object) -> LabelCoding:
        (tmp_path / "classes.json").write_text(json.dumps({**OWN_CLASSES, **changes}), "utf-8")
        objects = [storage.StoredObject(f"{tmp_path}/{path}", 1, "1") for path in ("images/a/b.jpg", "labels/a/b.png")]
        return read_layout("folders", str(tmp_path), objects).codings["values"]

    return read


@pytest.mark.parametrize("name", LABELLED)
def test_every_pixel_of_a_published_label_becomes_what_its_value_means(name: str, tmp_path: Path) -> None:
    written = LABELLED[name](str(tmp_path))
    layout = read_layout(written.layout, str(tmp_path), list(storage.list_objects(str(tmp_path))))
    labels = {
        pair.image_id: training_ids(storage.read_bytes(pair.label_url), layout.codings[pair.coding])
        for pair in layout.pairs
        if pair.label_url
    }
    assert labels.keys() == {image_id for image_id, sample in written.samples.items() if sample.label is not None}
    for image_id, label in labels.items():
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, written.samples[image_id].label)


TABLES: dict[str, tuple[trees.Table, Callable[[np.ndarray], bytes]]] = {
    "camvid": (trees.CAMVID, png),
    "ade20k": (trees.ADE20K, png),
    "cityscapes": (trees.CITYSCAPES, png),
    "cityscapes_train_ids": (trees.CITYSCAPES_TRAIN_IDS, png),
    "pascal_context": (trees.PASCAL_CONTEXT_59, png),
    "pascal_context_60": (trees.PASCAL_CONTEXT_60, png),
    "pascal_context_raw_png": (trees.PASCAL_CONTEXT_RAW_59, png),
    "pascal_context_raw_mat": (trees.PASCAL_CONTEXT_RAW_59, mat("LabelMap")),
    "pascal_context_60_raw_png": (trees.PASCAL_CONTEXT_RAW_60, png),
    "pascal_context_60_raw_mat": (trees.PASCAL_CONTEXT_RAW_60, mat("LabelMap")),
    "coco_stuff10k": (trees.COCO_STUFF_10K, mat("S")),
    "coco_stuff10k_train_ids": (trees.COCO_STUFF_10K_TRAIN_IDS, png),
    "coco_stuff164k": (trees.COCO_STUFF_164K, png),
    "coco_stuff164k_train_ids": (trees.COCO_STUFF_164K_TRAIN_IDS, png),
    "voc": (trees.VOC, palette_png),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_value_is_one_of_the_table_or_makes_the_label_bad(name: str, tmp_path: Path) -> None:
    table, encode = TABLES[name]
    (coding,) = codings(LABELLED[name], tmp_path).values()
    kinds = [np.uint8, np.uint16] if encode is not palette_png else [np.uint8]
    for kind in kinds:
        for value in range(256) if kind is np.uint8 else (0, 2, 11, 255, 256, 258, 459, 460, 511, 65535):
            data = encode(np.full((1, 2), value, kind))
            if value in table:
                assert training_ids(data, coding).tolist() == [[table[value]] * 2], (value, kind)
            else:
                error = bad(data, coding)
                assert error.reason == "unknown_label_value"
                assert f"it has the value {value} at 2 pixels, which is none of the classes" in error.detail


def test_the_message_counts_the_pixels_and_says_what_would_be_right() -> None:
    values = np.zeros((4, 5), np.uint8)
    values[1, 2:] = 200
    says = "it has the value 200 at 3 pixels, which is none of the classes ({}) nor an ignore value"
    assert bad(png(values), LabelCoding({0: 0, 1: 1, 255: IGNORED})).detail == says.format("0 to 1")
    assert bad(png(values), LabelCoding({0: IGNORED, 1: 0, 2: 1})).detail == says.format("1 to 2")
    assert bad(png(values), LabelCoding({0: 0, 7: 1, 33: 2})).detail == says.format("3 values from 0 to 33")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("camvid", 11),
        ("ade20k", 150),
        ("cityscapes", 19),
        ("pascal_context_59", 59),
        ("pascal_context_60", 60),
        ("coco_stuff", 171),
        ("voc", 21),
    ],
)
def test_a_benchmark_has_its_number_of_classes(name: str, count: int) -> None:
    assert len(class_set(name)) == count


KNOWN = {
    "camvid": {0: "sky", 1: "building", 3: "road", 8: "car", 10: "bicyclist"},
    "ade20k": {0: "wall", 1: "building", 2: "sky", 3: "floor", 6: "road", 12: "person", 20: "car", 149: "flag"},
    "cityscapes": {trees.CITYSCAPES[value]: name for value, name in trees.CITYSCAPES_NAMES.items()},
    "pascal_context_59": {
        trees.PASCAL_CONTEXT_RAW_59[value]: name for value, name in trees.PASCAL_CONTEXT_NAMES.items()
    },
    "pascal_context_60": {0: "background", 1: "aeroplane", 23: "dog", 37: "person", 59: "wood"},
    "coco_stuff": {
        trees.COCO_STUFF_10K[value]: name
        for value, name in {
            1: "person", 2: "bicycle", 11: "fire hydrant", 13: "stop sign", 18: "dog", 25: "giraffe", 27: "backpack",
            28: "umbrella", 31: "handbag", 44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet",
            72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush", 92: "banner", 106: "clouds", 149: "road",
            157: "sky-other", 169: "tree", 182: "wood",
        }.items()
    },
    "voc": {0: "background", 1: "aeroplane", 8: "cat", 12: "dog", 15: "person", 20: "tvmonitor"},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_class_has_the_name_that_its_published_id_has(name: str) -> None:
    names = class_set(name).names
    assert {training_id: names[training_id] for training_id in KNOWN[name]} == KNOWN[name]


def test_the_ends_of_the_published_ids_are_the_ends_of_the_classes() -> None:
    assert (trees.COCO_STUFF_10K[1], trees.COCO_STUFF_10K[182]) == (0, 170)
    assert (trees.COCO_STUFF_164K[0], trees.COCO_STUFF_164K[181]) == (0, 170)
    assert (trees.PASCAL_CONTEXT_RAW_59[2], trees.PASCAL_CONTEXT_RAW_59[458], trees.PASCAL_CONTEXT_RAW_60[458]) == (
        0,
        58,
        59,
    )
    assert (trees.CITYSCAPES[7], trees.CITYSCAPES[33]) == (0, 18)


def test_pascal_contexts_classes_are_in_alphabetical_order_after_the_background() -> None:
    names = class_set("pascal_context_59").names
    assert list(names) == sorted(names)
    assert class_set("pascal_context_60").names == ("background", *names)


def test_vocs_colours_are_those_of_its_rule_and_cityscapes_those_of_its_list() -> None:
    assert class_set("voc").palette == tuple(trees.voc_colour(index) for index in range(21))
    colours = dict(zip(class_set("cityscapes").names, class_set("cityscapes").palette, strict=True))
    assert (colours["road"], colours["sky"]) == ((128, 64, 128), (70, 130, 180))
    assert (colours["person"], colours["car"], colours["bicycle"]) == ((220, 20, 60), (0, 0, 142), (119, 11, 32))


def test_own_labels_hold_class_ids_and_their_ignore_value(own) -> None:
    values = np.array([[0, 1, 2, 9]], np.uint8)
    for data in (png(values), png(values.astype(np.uint16)), palette_png(values)):
        assert training_ids(data, own()).tolist() == [[0, 1, 2, 255]]
    assert bad(png(np.array([[255]], np.uint8)), own()).reason == "unknown_label_value"
    assert bad(png(np.array([[3]], np.uint8)), own()).reason == "unknown_label_value"


def test_an_ignore_value_above_255_needs_sixteen_bits(own) -> None:
    coding = own(ignore_label=1000)
    assert training_ids(png(np.array([[0, 1000]], np.uint16)), coding).tolist() == [[0, 255]]
    assert training_ids(png(np.array([[0, 2]], np.uint8)), coding).tolist() == [[0, 2]]
    assert bad(png(np.array([[1000 % 256]], np.uint8)), coding).reason == "unknown_label_value"


def test_a_label_of_one_bit_has_the_classes_0_and_1(own) -> None:
    bilevel = np.array([[False, True], [True, False]])
    assert training_ids(encoded(Image.fromarray(bilevel)), own()).tolist() == bilevel.astype(int).tolist()


def test_a_label_drawn_in_colours_has_the_classes_of_the_palette(own) -> None:
    values = np.array([[0, 1, 2], [9, 2, 0]], np.uint8)
    assert training_ids(drawn_png(values), own()).tolist() == [[0, 1, 2], [255, 2, 0]]


def test_how_opaque_a_colour_is_means_nothing(own) -> None:
    pixels = np.array([[[128, 64, 128, 255], [64, 0, 128, 0], [0, 0, 255, 7], [255, 255, 255, 1]]], np.uint8)
    assert training_ids(encoded(Image.fromarray(pixels, "RGBA")), own()).tolist() == [[0, 1, 2, 255]]


def test_a_grey_label_with_transparency_has_its_grey_levels(own) -> None:
    pixels = np.array([[[0, 255], [2, 0], [9, 7]]], np.uint8)
    assert training_ids(encoded(Image.fromarray(pixels, "LA")), own()).tolist() == [[0, 2, 255]]


@pytest.mark.parametrize("colour", [(0, 0, 254), (0, 255, 0), (128, 64, 0), (0, 1, 0)])
def test_a_colour_of_no_class_makes_the_label_bad(own, colour: tuple[int, int, int]) -> None:
    pixels = np.array([[(0, 0, 255), colour, colour]], np.uint8)
    error = bad(encoded(Image.fromarray(pixels)), own())
    assert error.reason == "unknown_label_value"
    assert error.detail.startswith(f"it has the value {colour} at 2 pixels, which is none of the classes (3 colours)")


def test_without_an_ignore_colour_every_pixel_must_have_a_class(own) -> None:
    values = np.array([[0, 9]], np.uint8)
    assert "(255, 255, 255)" in bad(drawn_png(values), own(ignore_colour=None)).detail


def test_colours_that_two_classes_share_tell_nothing(own) -> None:
    coding = own(palette=[[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    assert bad(encoded(Image.new("RGB", (2, 2), (4, 5, 6))), coding).reason == "label_mode"
    assert training_ids(png(np.array([[0, 1, 2]], np.uint8)), coding).tolist() == [[0, 1, 2]]


def test_voc_labels_drawn_in_its_colours_are_read_too(tmp_path: Path) -> None:
    (coding,) = codings(FILES["voc"], tmp_path).values()
    pixels = np.array([[trees.voc_colour(index) for index in range(21)]], np.uint8)
    assert training_ids(encoded(Image.fromarray(pixels)), coding).tolist() == [list(range(21))]


@pytest.mark.parametrize("name", [name for name, (_, encode) in TABLES.items() if encode is png])
def test_a_benchmark_whose_labels_are_values_has_none_in_colours(name: str, tmp_path: Path) -> None:
    (coding,) = codings(LABELLED[name], tmp_path).values()
    error = bad(encoded(Image.new("RGB", (2, 2))), coding)
    assert (error.reason, error.detail) == (
        "label_mode",
        "the label image has colours, class ids need a grey or palette image",
    )


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "TIFF"), ("F", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF")])
def test_a_label_of_a_mode_without_ids_is_refused(mode: str, kind: str, own) -> None:
    data = encoded(Image.new(mode, (2, 2)), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode not in ("RGB", "RGBA", "L", "P")
    error = bad(data, own())
    assert error.reason == "label_mode"
    assert "class ids need a grey or palette image" in error.detail


GOOD = np.arange(12, dtype=np.uint8).reshape(3, 4)
TO_ITSELF = {value: value for value in range(12)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_matlab_array_of_any_integers_is_read(dtype: type, compressed: bool) -> None:
    buffer = io.BytesIO()
    savemat(buffer, {"S": GOOD.astype(dtype)}, do_compression=compressed)
    np.testing.assert_array_equal(training_ids(buffer.getvalue(), LabelCoding(TO_ITSELF, variable="S")), GOOD)


def test_a_matlab_array_keeps_its_rows_and_columns() -> None:
    label = training_ids(mat("S")(GOOD), LabelCoding(TO_ITSELF, variable="S"))
    assert label.shape == (3, 4)
    assert label[2].tolist() == [8, 9, 10, 11]


def test_a_negative_value_of_a_matlab_array_is_unknown() -> None:
    error = bad(mat("S")(np.array([[0, -1]], np.int16)), LabelCoding(TO_ITSELF, variable="S"))
    assert (error.reason, error.detail[:27]) == ("unknown_label_value", "it has the value -1 at 1 pi")


@pytest.mark.parametrize(
    "array", [GOOD[None].repeat(2, 0), np.array([[0.5, 1.0]]), np.array(["a"]), np.array([["a", 1]], object)]
)
def test_a_matlab_array_of_no_class_ids_is_refused(array: np.ndarray) -> None:
    error = bad(mat("S")(array), LabelCoding(TO_ITSELF, variable="S"))
    assert error.reason == "label_mode"
    assert "not two-dimensional integers" in error.detail


def test_a_matlab_file_without_the_array_is_answered_with_its_name() -> None:
    error = bad(mat("LabelMap")(GOOD), LabelCoding(TO_ITSELF, variable="S"))
    assert (error.reason, error.detail) == ("label_mode", "the MATLAB file has no array named S")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "label_empty"),
        (b"<html>404</html>", "label_damaged"),
        (png(GOOD), "label_damaged"),
        (b"MATLAB 7.3 MAT-file, HDF5".ljust(124) + b"\x00\x02IM" + bytes(400), "label_damaged"),
    ],
    ids=["empty", "page", "png", "hdf5"],
)
def test_a_damaged_matlab_file_is_one_sentence(data: bytes, reason: str) -> None:
    assert bad(data, LabelCoding(TO_ITSELF, variable="S")).reason == reason


def test_a_truncated_matlab_file_is_bad_and_never_half_a_label() -> None:
    whole = mat("S")(GOOD)
    reasons = [bad(whole[:length], LabelCoding(TO_ITSELF, variable="S")).reason for length in range(1, len(whole))]
    assert set(reasons) <= {"label_damaged", "label_mode"}
    assert reasons[-1] == reasons[0] == "label_damaged"


def test_no_damage_to_a_matlab_file_escapes_as_another_error() -> None:
    coding = LabelCoding(TO_ITSELF, variable="S")
    whole = mat("S")(GOOD)
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        try:
            assert training_ids(bytes(damaged), coding).ndim == 2
        except BadImage as error:
            assert error.reason in ("label_damaged", "label_mode", "unknown_label_value")  # noqa: PT017


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "label_empty"),
        (b"<html>404</html>", "label_not_an_image"),
        (png(GOOD)[:-30], "label_damaged"),
        (mat("S")(GOOD), "label_not_an_image"),
    ],
    ids=["empty", "page", "truncated", "matlab"],
)
def test_a_label_file_that_is_no_image_is_named_as_the_label(data: bytes, reason: str) -> None:
    assert bad(data, LabelCoding(TO_ITSELF)).reason == reason
