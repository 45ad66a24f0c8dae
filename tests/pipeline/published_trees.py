"""Small trees as they are published, in real encodings, and what their labels mean by tables of this module's own.

Every label has every value of its table, so that one image checks a whole conversion. Names of ids are those of the
benchmarks' own lists: Cityscapes' `labels.py`, Pascal Context's `labels.txt`, COCO-Stuff's `labels.txt`.
"""

import functools
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from pipeline import storage
from tests.pipeline.image_files import encoded

HEIGHT, WIDTH = 20, 24
IGNORED = 255

Table = Mapping[int, int]  # published value -> training id
Encoder = Callable[[np.ndarray], bytes]

CAMVID = {**{value: value for value in range(11)}, 11: IGNORED}
ADE20K = {0: IGNORED, **{value: value - 1 for value in range(1, 151)}}

CITYSCAPES_NAMES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES = dict.fromkeys([*range(34), 255], IGNORED) | {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITYSCAPES_TRAIN_IDS = {**{value: value for value in range(19)}, 255: IGNORED}

PASCAL_CONTEXT_NAMES = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse", 220: "keyboard",
    232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate", 296: "platform",
    308: "pottedplant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk", 355: "sign",
    360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree", 424: "truck",
    427: "tvmonitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip
PASCAL_CONTEXT_59 = {0: IGNORED, **{value: value - 1 for value in range(1, 60)}, 255: IGNORED}
PASCAL_CONTEXT_60 = {**{value: value for value in range(60)}, 255: IGNORED}
PASCAL_CONTEXT_RAW_59 = dict.fromkeys(range(460), IGNORED) | {
    value: rank for rank, value in enumerate(sorted(PASCAL_CONTEXT_NAMES))
}
PASCAL_CONTEXT_RAW_60 = dict.fromkeys(range(460), 0) | {
    value: rank + 1 for rank, value in enumerate(sorted(PASCAL_CONTEXT_NAMES))
}

COCO_STUFF_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_STUFF_10K = {0: IGNORED} | {
    value: value - 1 - sum(unused < value for unused in COCO_STUFF_UNUSED)
    for value in range(1, 183)
    if value not in COCO_STUFF_UNUSED
}
COCO_STUFF_10K_TRAIN_IDS = {0: IGNORED, **{value: value - 1 for value in range(1, 172)}, 255: IGNORED}
COCO_STUFF_164K = {value - 1: training_id for value, training_id in COCO_STUFF_10K.items() if value} | {255: IGNORED}
COCO_STUFF_164K_TRAIN_IDS = {**{value: value for value in range(171)}, 255: IGNORED}

VOC = {**{value: value for value in range(21)}, 255: IGNORED}

OWN_CLASSES = {
    "names": ["road", "car", "sky"],
    "palette": [[128, 64, 128], [64, 0, 128], [0, 0, 255]],
    "ignore_label": 9,
    "ignore_colour": [255, 255, 255],
}
OWN = {0: 0, 1: 1, 2: 2, 9: IGNORED}


def voc_colour(index: int) -> tuple[int, int, int]:
    """VOC's colour of an index: its bits, three at a time from the lowest, are the channels' bits from the highest."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def published_label(table: Table, seed: int) -> np.ndarray:
    """(HEIGHT, WIDTH) values, all those of a table, in an order that depends on `seed`."""
    values = np.resize(sorted(table), HEIGHT * WIDTH)
    shuffled = np.random.default_rng(seed).permutation(values).reshape(HEIGHT, WIDTH)
    return shuffled.astype(np.uint8 if max(table) < 256 else np.uint16)


def meaning(values: np.ndarray, table: Table) -> np.ndarray:
    """The training id of every pixel, by the table alone."""
    return np.array([[table[value] for value in row] for row in values.tolist()], np.uint8)


def png(values: np.ndarray) -> bytes:
    """A grey PNG, of 16 bits for uint16."""
    return encoded(Image.fromarray(values))


def palette_png(values: np.ndarray) -> bytes:
    """A PNG of palette indices with VOC's colours."""
    image = Image.fromarray(values)
    image.putpalette([channel for index in range(256) for channel in voc_colour(index)])
    return encoded(image)


def drawn_png(values: np.ndarray) -> bytes:
    """An RGB PNG in the colours of `OWN_CLASSES`."""
    colours = np.full((256, 3), OWN_CLASSES["ignore_colour"], np.uint8)
    colours[:3] = OWN_CLASSES["palette"]
    return encoded(Image.fromarray(colours[values]))


def mat(variable: str) -> Encoder:
    """An encoder to a MATLAB file with an array of that name, among others."""

    def encode(values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        savemat(buffer, {"names": np.array(["a", "b"], object), "other": 1, variable: values}, do_compression=True)
        return buffer.getvalue()

    return encode


def photograph(seed: int, kind: str = "JPEG") -> bytes:
    """Noise, of the labels' size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


@dataclass(frozen=True)
class Sample:
    """An image file's bytes, and the training ids of its label or None."""

    image: bytes
    label: np.ndarray | None


@dataclass
class Tree:
    """What lies at a URL.

    Args:
        layout: which it is of, and but for `pascal_context_60` is recognised as.
        samples: by image id; of what lies in a shard, the shard's name and the name or number inside.
        others: paths of published files that are neither image nor label, nor any that is read.
        lists: names of a split's images.
    """

    url: str
    layout: str
    num_classes: int
    samples: dict[str, Sample] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def put(self, path: str, content: bytes = b"published with it") -> None:
        """Write a file."""
        storage.write_bytes(storage.join(self.url, path), content)

    def put_others(self, *paths: str) -> None:
        """Write files that an ingest has no use for."""
        for path in paths:
            self.put(path)
        self.others.update(paths)

    def sample(
        self, image_id: str, table: Table | None, encode: Encoder = png, kind: str = "JPEG"
    ) -> tuple[Sample, bytes]:
        """Make a sample that an ingest should find; the second is its label's file."""
        seed = len(self.samples)
        values = published_label(table or {0: 0}, seed)
        sample = Sample(photograph(seed, kind), meaning(values, table) if table else None)
        self.samples[image_id] = sample
        return sample, encode(values)

    def pair(self, image_id: str, table: Table, image: str, label: str, encode: Encoder = png) -> None:
        """Write an image and its label."""
        sample, encoded = self.sample(image_id, table, encode, "PNG" if image.endswith(".png") else "JPEG")
        self.put(image, sample.image)
        self.put(label, encoded)

    def put_lists(self, folder: str) -> None:
        """Write the splits' lists of names."""
        for split, names in self.lists.items():
            self.put(f"{folder}/{split}.txt", "".join(f"{name}\n" for name in names).encode())


def camvid(url: str) -> Tree:
    """CamVid as in the SegNet tutorial."""
    tree = Tree(url, "camvid", 11)
    for split, name in (("train", "0001TP_006690"), ("train", "0006R0_f00930"), ("val", "0016E5_07959")):
        tree.pair(f"{split}/{name}", CAMVID, f"{split}/{name}.png", f"{split}annot/{name}.png")
    tree.put_others("train.txt", "val.txt")
    return tree


def ade20k(url: str) -> Tree:
    """ADE20K's scene parsing benchmark."""
    tree = Tree(url, "ade20k", 150)
    top = "ADEChallengeData2016"
    for split, folder, number in (("train", "training", 1), ("train", "training", 2), ("val", "validation", 1)):
        name = f"ADE_{split}_{number:08d}"
        image, label = f"{top}/images/{folder}/{name}.jpg", f"{top}/annotations/{folder}/{name}.png"
        tree.pair(f"{split}/{name}", ADE20K, image, label)
    tree.put_others(f"{top}/objectInfo150.txt", f"{top}/sceneCategories.txt")
    return tree


def cityscapes(url: str, kind: str = "labelIds", table: Table = CITYSCAPES) -> Tree:
    """Cityscapes' fine labels, as ids; some with training ids beside them."""
    tree = Tree(url, "cityscapes", 19)
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        name = f"{split}/{city}/{city}_000000_000019"
        tree.pair(name, table, f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_{kind}.png")
        tree.put_others(f"gtFine/{name}_gtFine_color.png", f"gtFine/{name}_gtFine_polygons.json")
        tree.put_others(f"gtFine/{name}_gtFine_instanceIds.png")
    name = "test/berlin/berlin_000000_000019"
    sample, dummy = tree.sample(name, None, kind="PNG")
    tree.put(f"leftImg8bit/{name}_leftImg8bit.png", sample.image)
    tree.put(f"gtFine/{name}_gtFine_{kind}.png", dummy)
    tree.others.add(f"gtFine/{name}_gtFine_{kind}.png")
    return tree


def cityscapes_both(url: str) -> Tree:
    """Cityscapes with training ids beside the ids of one image, as the benchmark's scripts write them."""
    tree = cityscapes(url)
    beside = published_label(CITYSCAPES_TRAIN_IDS, 99)
    tree.put("gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png", png(beside))
    return tree


def cityscapes_train_ids(url: str) -> Tree:
    """Cityscapes with training ids alone."""
    return cityscapes(url, "labelTrainIds", CITYSCAPES_TRAIN_IDS)


def pascal_context(url: str, classes: int = 59) -> Tree:
    """Pascal Context with converted labels."""
    table = {59: PASCAL_CONTEXT_59, 60: PASCAL_CONTEXT_60}[classes]
    return _pascal_context(url, classes, table, "SegmentationClassContext/{}.png", png)


def pascal_context_raw_png(url: str, classes: int = 59) -> Tree:
    """Pascal Context with labels of 459 classes, as PNG."""
    table = {59: PASCAL_CONTEXT_RAW_59, 60: PASCAL_CONTEXT_RAW_60}[classes]
    return _pascal_context(url, classes, table, "trainval/{}.png", png)


def pascal_context_raw_mat(url: str, classes: int = 59) -> Tree:
    """Pascal Context with labels of 459 classes, as first published."""
    table = {59: PASCAL_CONTEXT_RAW_59, 60: PASCAL_CONTEXT_RAW_60}[classes]
    return _pascal_context(url, classes, table, "trainval/{}.mat", mat("LabelMap"))


def _pascal_context(url: str, classes: int, table: Table, label: str, encode: Encoder) -> Tree:
    tree = Tree(url, "pascal_context" if classes == 59 else "pascal_context_60", classes)
    tree.lists = {"train": ["2008_000002", "2008_000003"], "val": ["2010_006993"]}
    for split, names in tree.lists.items():
        for name in names:
            place = f"VOC2010/{label.format(name)}"
            tree.pair(f"{split}/{name}", table, f"VOC2010/JPEGImages/{name}.jpg", place, encode)
    tree.put_lists("VOC2010/ImageSets/SegmentationContext")
    tree.put_others("VOC2010/Annotations/2008_000002.xml", "VOC2010/JPEGImages/2007_000001.jpg")
    return tree


def coco_stuff10k(url: str) -> Tree:
    """COCO-Stuff 10K as published, with MATLAB files."""
    tree = Tree(url, "coco_stuff10k", 171)
    tree.lists = {"train": ["COCO_train2014_000000000077", "COCO_train2014_000000000110"]}
    tree.lists["test"] = ["COCO_train2014_000000000349"]
    for split, names in tree.lists.items():
        for name in names:
            place = f"annotations/{name}.mat"
            tree.pair(f"{split}/{name}", COCO_STUFF_10K, f"images/{name}.jpg", place, mat("S"))
    tree.put_lists("imageLists")
    tree.put_others("imageLists/all.txt", "README.txt")
    return tree


def coco_stuff10k_train_ids(url: str) -> Tree:
    """COCO-Stuff 10K as mmsegmentation's script converts it, which gives each split a folder."""
    tree = Tree(url, "coco_stuff10k", 171)
    tree.lists = {"train": ["COCO_train2014_000000000077"], "test": ["COCO_train2014_000000000349"]}
    for split, names in tree.lists.items():
        for name in names:
            image = f"images/{split}2014/{name}.jpg"
            label = f"annotations/{split}2014/{name}_labelTrainIds.png"
            tree.pair(f"{split}/{name}", COCO_STUFF_10K_TRAIN_IDS, image, label)
    tree.put_lists("imageLists")
    return tree


def coco_stuff164k(url: str, ending: str = ".png", table: Table = COCO_STUFF_164K) -> Tree:
    """COCO-Stuff 164K."""
    tree = Tree(url, "coco_stuff164k", 171)
    for split, number in (("train", 9), ("train", 25), ("val", 139)):
        name = f"{split}2017/{number:012d}"
        tree.pair(f"{split}/{number:012d}", table, f"images/{name}.jpg", f"annotations/{name}{ending}")
    return tree


def coco_stuff164k_both(url: str) -> Tree:
    """COCO-Stuff 164K with training ids beside its labels, as mmsegmentation's script writes them."""
    tree = coco_stuff164k(url)
    for name in ("train2017/000000000009", "train2017/000000000025", "val2017/000000000139"):
        tree.put(f"annotations/{name}_labelTrainIds.png", png(published_label(COCO_STUFF_164K_TRAIN_IDS, 99)))
    return tree


def coco_stuff164k_train_ids(url: str) -> Tree:
    """COCO-Stuff 164K with training ids alone."""
    return coco_stuff164k(url, "_labelTrainIds.png", COCO_STUFF_164K_TRAIN_IDS)


def voc(url: str) -> Tree:
    """PASCAL VOC 2012."""
    tree = Tree(url, "voc", 21)
    top = "VOCdevkit/VOC2012"
    tree.lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    for split, names in tree.lists.items():
        for name in names:
            image, label = f"{top}/JPEGImages/{name}.jpg", f"{top}/SegmentationClass/{name}.png"
            tree.pair(f"{split}/{name}", VOC, image, label, palette_png)
    tree.put_lists(f"{top}/ImageSets/Segmentation")
    tree.put_others(f"{top}/ImageSets/Segmentation/trainval.txt", f"{top}/ImageSets/Main/train.txt")
    tree.put_others(f"{top}/SegmentationObject/2007_000032.png", f"{top}/JPEGImages/2012_004331.jpg")
    return tree


def folders(url: str) -> Tree:
    """A user's own folders, with labels of values and labels drawn in colours."""
    tree = Tree(url, "folders", 3)
    storage.write_json(storage.join(url, "classes.json"), OWN_CLASSES)
    tree.pair("train/a", OWN, "images/train/a.jpg", "labels/train/a.png")
    tree.pair("train/north/a", OWN, "images/train/north/a.png", "labels/train/north/a.png", drawn_png)
    tree.pair("val/a", OWN, "images/val/a.jpg", "labels/val/a.png", palette_png)
    return tree


def webdataset(url: str) -> Tree:
    """Tar shards."""
    tree = Tree(url, "webdataset", 3)
    storage.write_json(storage.join(url, "classes.json"), OWN_CLASSES)
    for shard in ("train-000000", "train-000001", "val-000000"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for key in ("a", "b"):
                sample, label = tree.sample(f"{shard}/{key}", OWN)
                for ending, content in (("jpg", sample.image), ("png", label), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        tree.put(f"{shard}.tar", buffer.getvalue())
    return tree


def parquet(url: str) -> Tree:
    """Parquet files of encoded images."""
    tree = Tree(url, "parquet", 3)
    storage.write_json(storage.join(url, "classes.json"), OWN_CLASSES)
    for shard in ("train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001"):
        rows = []
        for number in range(2):
            sample, label = tree.sample(f"{shard}/{number}", OWN)
            rows.append({"image": sample.image, "label": label})
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        tree.put(f"{shard}.parquet", buffer.getvalue())
    return tree


def unlabelled(url: str) -> Tree:
    """Images alone, however they lie."""
    tree = Tree(url, "unlabelled", 0)
    for path in ("a.jpg", "2024/night/a.jpg", "2024/night/b.png"):
        sample, _ = tree.sample(f"all/{path}", None, kind="PNG" if path.endswith(".png") else "JPEG")
        tree.put(path, sample.image)
    tree.put_others("README.md")
    return tree


# Trees of shards, trees of single files, and those that are recognised as another layout.
SHARDS: Mapping[str, Callable[[str], Tree]] = {"webdataset": webdataset, "parquet": parquet}
FILES: Mapping[str, Callable[[str], Tree]] = {
    "camvid": camvid,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "cityscapes_both": cityscapes_both,
    "cityscapes_train_ids": cityscapes_train_ids,
    "pascal_context": pascal_context,
    "pascal_context_raw_png": pascal_context_raw_png,
    "pascal_context_raw_mat": pascal_context_raw_mat,
    "coco_stuff10k": coco_stuff10k,
    "coco_stuff10k_train_ids": coco_stuff10k_train_ids,
    "coco_stuff164k": coco_stuff164k,
    "coco_stuff164k_both": coco_stuff164k_both,
    "coco_stuff164k_train_ids": coco_stuff164k_train_ids,
    "voc": voc,
    "folders": folders,
    "unlabelled": unlabelled,
}
NAMED: Mapping[str, Callable[[str], Tree]] = {
    "pascal_context_60": functools.partial(pascal_context, classes=60),
    "pascal_context_60_raw_png": functools.partial(pascal_context_raw_png, classes=60),
    "pascal_context_60_raw_mat": functools.partial(pascal_context_raw_mat, classes=60),
}
