"""Which images and labels of a tree belong together, what label values mean, and what is said of everything else."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.dataset import IGNORE_LABEL
from pipeline.errors import PipelineError
from pipeline.layouts import LAYOUTS, Layout, class_set, read_layout

SOURCE = "s3://raw/photos"
CLASSES = {"names": ["road", "car", "sky"], "palette": [[128, 64, 128], [64, 0, 128], [0, 0, 255]]}


def listing(paths: Iterable[str], source: str = SOURCE) -> list[storage.StoredObject]:
    return [storage.StoredObject(f"{source}/{path}", 10, "1") for path in sorted(paths)]


def camvid_tree(*paths: str) -> Layout:
    return read_layout("camvid", SOURCE, listing(paths))


def pairs(layout: Layout) -> dict[str, tuple[str, str, str]]:
    """Image id -> split, image and label, as places below the source."""
    below = len(f"{SOURCE}/")
    return {pair.image_id: (pair.split, pair.image_url[below:], pair.label_url[below:]) for pair in layout.pairs}


def rejects(layout: Layout) -> set[tuple[str, str, str]]:
    return {(reject.source_uri.removeprefix(f"{SOURCE}/"), reject.split, reject.reason) for reject in layout.rejects}


@pytest.fixture
def folders(tmp_path: Path):
    """Reads a tree of the layout `folders`; `classes.json` is a real file beside the listing."""

    def read(*paths: str, classes: object = CLASSES, layout: str = "folders") -> Layout:
        (tmp_path / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes), "utf-8")
        return read_layout(layout, str(tmp_path), listing(["classes.json", *paths], str(tmp_path)))

    return read


PAIR = ("images/train/a.jpg", "labels/train/a.png")


def test_camvid_pairs_each_image_with_the_label_of_its_name() -> None:
    layout = camvid_tree("train/a.png", "trainannot/a.png", "val/a.png", "valannot/a.png", "README.md")
    assert pairs(layout) == {
        "train/a": ("train", "train/a.png", "trainannot/a.png"),
        "val/a": ("val", "val/a.png", "valannot/a.png"),
    }
    assert rejects(layout) == set()
    assert layout.classes == class_set("camvid")
    assert layout.label_values == {**{value: value for value in range(11)}, 11: IGNORE_LABEL}


def test_camvid_as_published_is_recognised(camvid: Path) -> None:
    source = str(camvid)
    layout = read_layout("auto", source, list(storage.list_objects(source)))
    assert layout.name == "camvid"
    assert [sum(pair.split == split for pair in layout.pairs) for split in ("train", "val", "test")] == [367, 101, 0]
    assert layout.rejects == []
    assert all(Path(pair.image_url).stem == Path(pair.label_url).stem for pair in layout.pairs)


def test_folders_pairs_by_path_below_the_split(folders) -> None:
    nested = ("images/train/city/a.b.JPG", "labels/train/city/a.b.png")
    layout = folders(*PAIR, *nested, "images/val/a.tiff", "labels/val/a.PNG")
    assert {pair.image_id: pair.split for pair in layout.pairs} == {
        "train/a": "train",
        "train/city/a.b": "train",
        "val/a": "val",
    }
    assert layout.rejects == []
    assert layout.classes.names == ("road", "car", "sky")
    assert layout.label_values == {0: 0, 1: 1, 2: 2, 255: IGNORE_LABEL}


def test_folders_takes_the_splits_that_it_finds(folders) -> None:
    layout = folders(*PAIR, "images/night/a.jpg", "labels/night/a.png")
    assert {pair.split for pair in layout.pairs} == {"train", "night"}


@pytest.mark.parametrize("order", [1, -1])
def test_ids_do_not_depend_on_the_place_or_the_order_of_the_listing(order: int) -> None:
    paths = ["train/a.png", "train/b.png", "trainannot/a.png", "trainannot/b.png"]
    other = "/elsewhere/photos"
    assert {pair.image_id for pair in read_layout("camvid", other, listing(paths, other)[::order]).pairs} == {
        "train/a",
        "train/b",
    }


def test_what_has_no_partner_is_rejected_and_nothing_is_lost() -> None:
    layout = camvid_tree(
        "train/a.png", "trainannot/a.png", "train/alone.png", "trainannot/orphan.png", "test/unlabelled.png"
    )
    assert set(pairs(layout)) == {"train/a"}
    assert rejects(layout) == {
        ("train/alone.png", "train", "no_label"),
        ("trainannot/orphan.png", "train", "no_image"),
        ("test/unlabelled.png", "test", "no_label"),
    }
    details = {reject.reason: reject.detail for reject in layout.rejects if "train" in reject.split}
    assert details["no_label"] == "no label named alone.png: add it, or remove the image"
    assert details["no_image"] == "no image named orphan: add it, or remove the label"


def test_two_images_or_two_labels_of_one_stem_are_rejected_but_for_the_first() -> None:
    layout = camvid_tree(
        "train/a.jpg", "train/a.png", "trainannot/a.png", "train/b.jpg", "trainannot/b.PNG", "trainannot/b.png"
    )
    assert pairs(layout) == {
        "train/a": ("train", "train/a.jpg", "trainannot/a.png"),
        "train/b": ("train", "train/b.jpg", "trainannot/b.PNG"),
    }
    assert rejects(layout) == {
        ("train/a.png", "train", "duplicate_stem"),
        ("trainannot/b.png", "train", "duplicate_stem"),
    }
    assert all(" and " in reject.detail for reject in layout.rejects)


def test_files_that_are_no_images_are_passed_over() -> None:
    paths = ("train/a.png", "trainannot/a.png", "train/notes.txt", "trainannot/colours.csv", "train.zip")
    layout = camvid_tree(*paths)
    assert rejects(layout) == set()
    passed_over = {url.removeprefix(f"{SOURCE}/") for url in layout.passed_over(listing(paths))}
    assert passed_over == {"train/notes.txt", "trainannot/colours.csv", "train.zip"}


def test_auto_tells_the_trees_apart(folders) -> None:
    assert folders(*PAIR, layout="auto").name == "folders"
    assert read_layout("auto", SOURCE, listing(["train/a.png", "trainannot/a.png"])).name == "camvid"


def test_an_unknown_layout_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PipelineError, match=r"There is no layout 'cityscape': choose auto, camvid, folders\."):
        read_layout("cityscape", SOURCE, listing(["train/a.png"]))


@pytest.mark.parametrize("paths", [["a.jpg", "b/c.png"], ["images/train/a.jpg"], ["labels/a.png"]])
def test_a_tree_that_is_none_of_them_is_answered_with_how_they_look(paths: list[str]) -> None:
    with pytest.raises(PipelineError) as refusal:
        read_layout("auto", SOURCE, listing(paths))
    message = str(refusal.value)
    assert f"The tree of {SOURCE} ({len(paths)} objects) is none of the known layouts" in message
    assert all(f"{name}: {definition.tree}" in message for name, definition in LAYOUTS.items())
    assert message.endswith("correct the URL, or rearrange the bucket as the layout `folders`.")


def test_a_tree_without_a_single_pair_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"s3://raw/photos has no image with a label in the layout 'camvid'.*2 obj"):
        camvid_tree("train/a.png", "trainannot/b.png")


def test_without_classes_json_it_is_said_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as refusal:
        read_layout("folders", str(tmp_path), listing(PAIR, str(tmp_path)))
    assert f"The layout folders needs {tmp_path}/classes.json, which does not exist" in str(refusal.value)
    example = json.loads(str(refusal.value).partition(" like ")[2].rstrip("."))
    assert example.keys() == {"names", "palette", "ignore_label"}


def grey(count: int) -> dict[str, list]:
    return {"names": [f"class {number}" for number in range(count)], "palette": [[0, 0, 0]] * count}


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("{", "classes.json is not valid JSON"),
        ([], "it is not a JSON object"),
        ({"names": ["road", "car"]}, "palette"),
        ({"palette": [[0, 0, 0]]}, "names"),
        ({**CLASSES, "names": ["road", "car"]}, "2 class names but 3 colours"),
        ({**CLASSES, "names": ["road", "car", "road"]}, "repeated: road"),
        ({**CLASSES, "names": "sky"}, "names must be a list"),
        ({**CLASSES, "palette": [[1, 2], [3, 4], [5, 6]]}, "classes.json does not describe classes"),
        ({**CLASSES, "palette": [[1, 2, 256], [3, 4, 5], [5, 6, 7]]}, "channel outside 0 to 255"),
        ({**CLASSES, "palette": ["red", "green", "blue"]}, "classes.json does not describe classes"),
        (grey(1), "needs 2 or more"),
        (grey(256), "names must be a list of 2 to 255 names"),
        ({**CLASSES, "ignore_label": "void"}, "ignore_label is 'void': give an integer from 0 to 65535"),
        ({**CLASSES, "ignore_label": -1}, "ignore_label is -1"),
        ({**CLASSES, "ignore_label": True}, "ignore_label is True"),
        ({**CLASSES, "ignore_label": 2}, "ignore_label 2 is also the value of the class 'sky'"),
    ],
)
def test_broken_classes_are_answered_with_what_is_wrong(folders, tmp_path: Path, classes: object, says: str) -> None:
    with pytest.raises(PipelineError) as refusal:
        folders(*PAIR, classes=classes)
    assert says in str(refusal.value)
    assert f"{tmp_path}/classes.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_as_many_classes_as_a_label_can_hold_and_another_ignore_value_are_accepted(folders) -> None:
    layout = folders(*PAIR, classes={**grey(255), "ignore_label": 1000})
    assert layout.label_values == {**{value: value for value in range(255)}, 1000: IGNORE_LABEL}
