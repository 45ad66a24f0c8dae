"""The classes of a source: a published benchmark's, or those that a `classes.json` describes."""

import importlib.resources
import json
from collections.abc import Mapping

from pipeline import storage
from pipeline.dataset import IGNORE_LABEL
from pipeline.errors import PipelineError
from pipeline.labels import LabelCoding
from pipeline.layouts.layout import CLASSES_FILE
from rssnet.classes import Classes

EXAMPLE = '{"names": ["road", "car"], "palette": [[128, 64, 128], [64, 0, 128]], "ignore_label": 255}'


def class_set(name: str) -> Classes:
    """The class names and palette of a published benchmark, from the data files of this package."""
    text = (importlib.resources.files("pipeline") / "class_sets" / f"{name}.json").read_text("utf-8")
    return _classes_from(json.loads(text), f"class set {name}")


def own_classes(source: str, layout: str) -> tuple[Classes, LabelCoding]:
    """The classes that `classes.json` in the source describes, and what label values mean there.

    Labels hold the classes' ids and `ignore_label`; drawn in colours they have those of the palette and, for what is to
    be ignored, `ignore_colour` if given.

    Raises:
        PipelineError: if there is no such file, or it is wrong.
    """
    place = storage.join(source, CLASSES_FILE)
    try:
        document = storage.read_json(place)
    except FileNotFoundError:
        raise PipelineError(
            f"The layout {layout} needs {place}, which does not exist: write one like {EXAMPLE}."
        ) from None
    classes = _classes_from(document, place)
    ignore = document.get("ignore_label", IGNORE_LABEL)
    if type(ignore) is not int or not 0 <= ignore <= 65535:
        raise PipelineError(f"{place}: ignore_label is {ignore!r}: give an integer from 0 to 65535.")
    if ignore < len(classes):
        raise PipelineError(
            f"{place}: ignore_label {ignore} is also the value of the class {classes.names[ignore]!r}: "
            f"the {len(classes)} classes take the values 0 to {len(classes) - 1}, so give another one."
        )
    values = {value: value for value in range(len(classes))} | {ignore: IGNORE_LABEL}
    return classes, LabelCoding(values, _colours(classes, document.get("ignore_colour"), place))


def palette_coding(classes: Classes, ignored: tuple[int, int, int] | None = None) -> LabelCoding:
    """Labels of ids from 0 and 255, or drawn in the classes' colours and one that is ignored."""
    values = {value: value for value in range(len(classes))} | {IGNORE_LABEL: IGNORE_LABEL}
    return LabelCoding(values, _colours(classes, list(ignored) if ignored else None, "the class set"))


def _colours(classes: Classes, ignored: object, place: str) -> Mapping[tuple[int, int, int], int] | None:
    """What colours mean; None where two classes share one, so that they tell nothing."""
    colours = {colour: training_id for training_id, colour in enumerate(classes.palette)}
    if ignored is not None:
        if not (
            isinstance(ignored, list) and len(ignored) == 3 and all(type(v) is int and 0 <= v <= 255 for v in ignored)
        ):
            raise PipelineError(f"{place}: ignore_colour is {ignored!r}: give three integers from 0 to 255.")
        colour = (ignored[0], ignored[1], ignored[2])
        if colour in colours:
            raise PipelineError(
                f"{place}: ignore_colour {list(colour)} is also the colour of {classes.names[colours[colour]]!r}: "
                "give another one."
            )
        colours[colour] = IGNORE_LABEL
    return colours if len(set(classes.palette)) == len(classes) else None


def _classes_from(document: object, place: str) -> Classes:
    try:
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        names, palette = document["names"], document["palette"]
        if not isinstance(names, list) or len(names) > IGNORE_LABEL:
            raise ValueError(
                f"names must be a list of 2 to {IGNORE_LABEL} names, {IGNORE_LABEL} being the ignore label"
            )
        return Classes(tuple(names), tuple((int(r), int(g), int(b)) for r, g, b in palette))
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{place} does not describe classes ({type(error).__name__}: {error}): "
            'write {"names": [...], "palette": [[r, g, b], ...]} with one colour for each name.'
        ) from error
