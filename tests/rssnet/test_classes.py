"""Names and colours of classes."""

import itertools
import json

import pytest

from rssnet import Classes


def test_json_gives_back_the_same_classes():
    classes = Classes(names=("sky", "Straße"), palette=((1, 2, 3), (255, 0, 128)))
    assert Classes.from_json(classes.to_json()) == classes


@pytest.mark.parametrize("num_classes", [2, 19, 171])
def test_default_colours_all_differ(num_classes):
    classes = Classes.default(num_classes)
    assert len(classes) == num_classes
    assert len(set(classes.palette)) == num_classes


def test_default_colours_of_a_few_classes_are_far_apart():
    palette = Classes.default(19).palette
    distances = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(palette, 2)]
    assert min(distances) > 40


def test_default_colours_do_not_depend_on_how_many_there_are():
    assert Classes.default(150).palette[:11] == Classes.default(11).palette


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        (("one",), ((0, 0, 0),), "1 class named; a segmentation needs 2"),
        (("a", "b"), ((0, 0, 0),), "2 class names but 1 colours"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), "must differ; repeated: a"),
        (("a", " "), ((0, 0, 0), (1, 1, 1)), "Class name ' ' is not"),
        (("a", "b"), ((0, 0, 256), (1, 1, 1)), "colour .* of class 'a' has a channel outside"),
    ],
)
def test_classes_that_cannot_be_are_refused(names, palette, message):
    with pytest.raises(ValueError, match=message):
        Classes(names=names, palette=palette)


@pytest.mark.parametrize("text", ["not json", "{}", '{"classes": [{"id": 0}]}', '{"classes": [3]}'])
def test_text_that_holds_no_classes_is_refused_with_what_would(text):
    with pytest.raises(ValueError, match="Classes must be JSON such as"):
        Classes.from_json(text)


def test_ids_out_of_order_are_refused():
    entries = json.loads(Classes.default(2).to_json())
    entries["classes"].reverse()
    with pytest.raises(ValueError, match=r"ids must be 0, 1, 2, ... in order; they are \[1, 0\]"):
        Classes.from_json(json.dumps(entries))
