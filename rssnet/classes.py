"""The names and colours of a model's classes. Knows nothing of models."""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass

RGB = tuple[int, int, int]

# A step of the golden ratio around the colour wheel never comes back near an earlier hue.
_GOLDEN_RATIO_CONJUGATE = 0.618033988749895


@dataclass(frozen=True)
class Classes:
    """What each class id means and how it is drawn.

    Attributes:
        names: One name per class, by class id; no two alike.
        palette: One (red, green, blue) per class, each 0 to 255.
    """

    names: tuple[str, ...]
    palette: tuple[RGB, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "palette", tuple((int(r), int(g), int(b)) for r, g, b in self.palette))
        if len(self.names) < 2:
            raise ValueError(
                f"{len(self.names)} class named; a segmentation needs 2 or more, the background being one."
            )
        if len(self.names) != len(self.palette):
            raise ValueError(
                f"{len(self.names)} class names but {len(self.palette)} colours; give one colour per class."
            )
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"Class name {name!r} is not a text of one character or more.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"Class names must differ; repeated: {', '.join(repeated)}.")
        for name, colour in zip(self.names, self.palette, strict=True):
            if not all(0 <= channel <= 255 for channel in colour):
                raise ValueError(f"The colour {colour} of class {name!r} has a channel outside 0 to 255.")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def default(cls, num_classes: int) -> Classes:
        """Names `class_0`, `class_1`, ... and colours that tell apart, the same at every call.

        Args:
            num_classes: How many classes, 2 or more.
        """
        return cls(
            names=tuple(f"class_{index}" for index in range(num_classes)),
            palette=tuple(_distinct_colour(index) for index in range(num_classes)),
        )

    def to_json(self) -> str:
        """The classes as JSON text: a list of {"id", "name", "color"}."""
        entries = [
            {"id": index, "name": name, "color": list(colour)}
            for index, (name, colour) in enumerate(zip(self.names, self.palette, strict=True))
        ]
        return json.dumps({"classes": entries}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Classes:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: text that is not such JSON, or ids that are not 0, 1, 2, ... in order.
        """
        try:
            entries = json.loads(text)["classes"]
            ids = [entry["id"] for entry in entries]
            names = tuple(entry["name"] for entry in entries)
            palette = tuple((entry["color"][0], entry["color"][1], entry["color"][2]) for entry in entries)
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                'Classes must be JSON such as {"classes": [{"id": 0, "name": "sky", "color": [128, 128, 128]}, ...]}; '
                f"could not read it: {error!r}."
            ) from error
        if ids != list(range(len(ids))):
            raise ValueError(f"Class ids must be 0, 1, 2, ... in order; they are {ids}.")
        return cls(names=names, palette=palette)


def _distinct_colour(index: int) -> RGB:
    hue = (index * _GOLDEN_RATIO_CONJUGATE) % 1.0
    # Saturation and value cycle with different periods, so that hues that come close after many steps still differ.
    saturation = (0.85, 0.55, 0.70)[index % 3]
    value = (0.95, 0.70)[index % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
