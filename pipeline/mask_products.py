"""What is made of a class map beside the mask: a subset of classes, no tiny regions, polygons, overlays and more.

Plain functions of arrays. Knows no model and no Ray, and imports no torch, which the many processes that encode would
take seconds to load.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import masks, storage
from pipeline.errors import PipelineError

OVERLAY_QUALITY = 90
_JPEG_SIDE = 65_500  # pixels; libjpeg takes no more
_NAME_LENGTH = 80
_ODD_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ProductsConfig:
    """What rows hold beside the mask, and how the mask is simplified.

    All but the place of the overlays is part of the model's id: rows with other products are other rows.

    Args:
        classes: names of the classes to keep. All other pixels get one id, 255, or 65535 where the model has more than
            255 classes: what labels call ignored. It counts as no class in `class_ids`.
        min_region: connected regions of fewer pixels get the class of their largest neighbour; 0 keeps all. Regions are
            connected over edges, not corners. Done after `classes`, so what is left out closes around small regions.
        polygons: a column with the outlines of all regions as GeoJSON.
        confidence_map: a column with the probability of the winning class as a grey PNG, 0 to 255 being 0 to 1.
        top_k: columns with so many most probable classes and their probabilities, a PNG for each rank; 0 is none. They
            are what the model said, before `classes` and `min_region`.
        overlays: URL prefix where a JPEG of each photograph tinted with its mask is put. An image has one name there,
            whatever its version and the model; images that were segmented before get none.
    """

    classes: tuple[str, ...] | None = None
    min_region: int = 0
    polygons: bool = False
    confidence_map: bool = False
    top_k: int = 0
    overlays: str | None = field(default=None, metadata={"identity": False})

    def normalized(self) -> "ProductsConfig":
        """The same with one way to say what makes the same rows."""
        classes = None if self.classes is None else tuple(sorted(set(self.classes)))
        return replace(self, classes=classes, min_region=self.min_region if self.min_region > 1 else 0)

    def require(self, names: Sequence[str]) -> None:
        """Refuse what cannot be made of masks of a model whose classes have these names.

        Raises:
            PipelineError: naming the value and what is accepted.
        """
        self.kept_ids(names)
        if self.min_region < 0:
            raise PipelineError(f"min_region is {self.min_region}: give a number of pixels, 0 keeping all regions.")
        if not 0 <= self.top_k <= len(names):
            raise PipelineError(
                f"top_k is {self.top_k}: give 0 for none, and at most {len(names)}, the number of the model's classes."
            )

    def kept_ids(self, names: Sequence[str]) -> list[int]:
        """The ids of the classes that are kept, of a model whose classes have these names.

        Raises:
            PipelineError: for a name that no class has.
        """
        if self.classes is None:
            return list(range(len(names)))
        unknown = [name for name in self.classes if name not in names]
        if unknown or not self.classes:
            what = f"The model has no class {', '.join(map(repr, unknown))}" if unknown else "classes names no class"
            raise PipelineError(f"{what}: give some of {', '.join(names)}.")
        return sorted({list(names).index(name) for name in self.classes})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `masks.PRODUCT_COLUMNS` that rows have."""
        asked_for = {
            "polygons": self.polygons,
            "confidence_map": self.confidence_map,
            "top_classes": self.top_k > 0,
            "top_probabilities": self.top_k > 0,
            "overlay_uri": self.overlays is not None,
        }
        return tuple(name for name in masks.PRODUCT_COLUMNS.names if asked_for[name])

    @property
    def needs_probabilities(self) -> bool:
        """Whether the probability of each pixel's winning class is needed, not only their mean."""
        return self.confidence_map or self.classes is not None


def prediction_schema(products: ProductsConfig) -> pa.Schema:
    """The schema of prediction rows with these products: those of `masks.PREDICTION_SCHEMA`, then the others."""
    schema = masks.PREDICTION_SCHEMA
    for name in products.columns:
        schema = schema.append(masks.PRODUCT_COLUMNS.field(name))
    return schema


def simplified(class_map: np.ndarray, products: ProductsConfig, names: Sequence[str]) -> np.ndarray:
    """The class map with the classes and without the small regions that `products` leaves out.

    Args:
        class_map: (H, W) class ids, uint8 or uint16.
        products: what to leave out.
        names: of the classes.

    Returns:
        (H, W) class ids and `masks.other_id`, uint8 or uint16.
    """
    if products.classes is not None:
        class_map = only_classes(class_map, products.kept_ids(names), len(names))
    if products.min_region > 1:
        class_map = without_small_regions(class_map, products.min_region)
    return class_map


def only_classes(class_map: np.ndarray, kept: Sequence[int], num_classes: int) -> np.ndarray:
    """The class map with `masks.other_id` at all pixels of other classes than those kept; uint8 if that fits."""
    other = masks.other_id(num_classes)
    table = np.full(num_classes, other, np.uint8 if other < 256 else np.uint16)
    table[list(kept)] = kept
    return table[class_map]


def without_small_regions(class_map: np.ndarray, min_region: int) -> np.ndarray:
    """The class map with each region of fewer than `min_region` pixels merged into its largest neighbour.

    By GDAL's sieve, over edges, again and again: once leaves small regions whose largest neighbour is small as well.
    Small regions stay only where no region at all has `min_region` pixels.
    """
    from rasterio import features  # 40 MiB that few of the processes which know this module need

    size = min(min_region, class_map.size)
    while True:
        sieved = features.sieve(class_map, size=size, connectivity=4)
        if np.array_equal(sieved, class_map):
            return sieved
        class_map = sieved


def polygons_json(class_map: np.ndarray, names: Sequence[str]) -> str:
    """The regions of a class map as the JSON text of a GeoJSON FeatureCollection.

    Each feature is a polygon, an outer ring and those of its holes, with the properties `class_id` and `class_name`.
    Coordinates are (x, y) in pixels along the edges of pixels, from (0, 0), the upper left corner, to (W, H). Pixels of
    `masks.other_id` have none.
    """
    from rasterio.features import shapes  # see above

    kept = class_map != masks.other_id(len(names))
    features = []
    for geometry, value in shapes(class_map, mask=kept, connectivity=4):
        rings = [[(int(x), int(y)) for x, y in ring] for ring in geometry["coordinates"]]
        features.append(
            {
                "type": "Feature",
                "properties": {"class_id": int(value), "class_name": names[int(value)]},
                "geometry": {"type": "Polygon", "coordinates": rings},
            }
        )
    collection = {"type": "FeatureCollection", "features": features}
    return json.dumps(collection, ensure_ascii=False, separators=(",", ":"))


def overlay_jpeg(image: np.ndarray, class_map: np.ndarray, palette: Sequence[masks.RGB]) -> bytes:
    """The photograph tinted with its mask as a JPEG; pixels of `masks.other_id` are left as they are.

    Args:
        image: (H, W, 3) uint8 RGB. A side that no JPEG can have is reduced, and the other with it.
        class_map: (H, W) class ids.
        palette: colour of each class.
    """
    picture = Image.fromarray(masks.overlay(image, class_map, palette))
    if max(picture.size) > _JPEG_SIDE:
        picture.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=OVERLAY_QUALITY)
    return buffer.getvalue()


def overlay_url(prefix: str, image_uri: str) -> str:
    """Where the overlay of an image is put: a name that a person recognises, and a digest that no other image has."""
    stem = image_uri.rpartition("/")[2].rpartition(".")[0] or image_uri.rpartition("/")[2]
    readable = _ODD_CHARACTERS.sub("_", stem)[:_NAME_LENGTH].strip("._") or "image"
    digest = hashlib.sha256(image_uri.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return storage.join(prefix, f"{readable}-{digest}.jpg")
