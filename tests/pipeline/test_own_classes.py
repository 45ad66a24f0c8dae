"""What a `classes.json` may say, and what is said of one that is missing or wrong."""

import json
from pathlib import Path

import pytest

from pipeline.dataset import IGNORE_LABEL
from pipeline.errors import PipelineError
from pipeline.labels import LabelCoding
from pipeline.layouts import read_layout
from tests.pipeline.labelled_source import CLASSES
from tests.pipeline.listed_trees import PAIR, folders, listing

__all__ = ["folders"]  # a fixture


@pytest.mark.parametrize("layout", ["folders", "webdataset", "parquet"])
def test_without_classes_json_it_is_said_how_to_write_one(layout: str, tmp_path: Path) -> None:
    paths = [*PAIR, "train.tar", "train.parquet"]
    with pytest.raises(PipelineError) as refusal:
        read_layout(layout, str(tmp_path), listing(paths, str(tmp_path)))
    assert f"The layout {layout} needs {tmp_path}/classes.json, which does not exist" in str(refusal.value)
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
        ({**CLASSES, "ignore_label": 65536}, "ignore_label is 65536"),
        ({**CLASSES, "ignore_label": True}, "ignore_label is True"),
        ({**CLASSES, "ignore_label": 2}, "ignore_label 2 is also the value of the class 'sky'"),
        ({**CLASSES, "ignore_colour": "white"}, "ignore_colour is 'white': give three integers from 0 to 255"),
        ({**CLASSES, "ignore_colour": [1, 2]}, "ignore_colour is [1, 2]"),
        ({**CLASSES, "ignore_colour": [1.5, 2, 3]}, "ignore_colour is [1.5, 2, 3]"),
        ({**CLASSES, "ignore_colour": [0, 256, 0]}, "ignore_colour is [0, 256, 0]"),
        ({**CLASSES, "ignore_colour": [0, -1, 0]}, "ignore_colour is [0, -1, 0]"),
        ({**CLASSES, "ignore_colour": [0, 0, 255]}, "ignore_colour [0, 0, 255] is also the colour of 'sky'"),
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
    values = {**{value: value for value in range(255)}, 1000: IGNORE_LABEL}
    assert layout.codings == {"values": LabelCoding(values, colours=None)}
