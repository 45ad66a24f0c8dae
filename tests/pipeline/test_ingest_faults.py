"""What becomes of files that are broken, or odd but right: each is a row as it should be, or a reject that says why.

All lie in one source of the layout `folders`, which is ingested once.
"""

import io
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import dataset, storage
from pipeline.images import decode_label, encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.layouts import Shard
from pipeline.records import read_shard
from pipeline.run_record import RunRecord
from tests.pipeline.image_files import encoded
from tests.pipeline.labelled_source import (
    CLASSES,
    HEIGHT,
    WIDTH,
    label_values,
    photograph,
    portrait,
    reject_rows,
)

SHAPE = (HEIGHT, WIDTH)
LABEL = label_values(1)
COLOURS = np.array(CLASSES["palette"], np.uint8)
PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@dataclass(frozen=True)
class Case:
    """An image and its label, and what is to become of them.

    Args:
        image, label: the bytes of the files; None where there is no such file.
        becomes: the label of the row, or the reason of the reject.
        suffix: of the image.
        stem: of both files; made of the case's name if not given.
    """

    image: bytes | None
    label: bytes | None
    becomes: np.ndarray | str
    suffix: str = ".png"
    stem: str = ""


def row(image: bytes, shape: tuple[int, int] = SHAPE, **names: str) -> Case:
    """An image that becomes a row, with a good label of its own."""
    values = np.random.default_rng(zlib.crc32(image)).integers(0, 3, shape, np.uint8)
    return Case(image, encode_png(values), values, **names)


def bad(image: bytes, reason: str, **names: str) -> Case:
    """An image that becomes a reject, with a good label."""
    return Case(image, encode_png(LABEL), reason, **names)


def label(data: bytes, becomes: np.ndarray | str) -> Case:
    """A label, with a good image of its own."""
    return Case(photograph(zlib.crc32(data)), data, becomes)


def picture(mode: str, seed: int) -> Image.Image:
    """A picture that is smooth, as JPEG likes it."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def jpeg(seed: int, mode: str = "RGB", **options: Any) -> bytes:
    return encoded(picture(mode, seed), "JPEG", quality=95, **options)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of chunks by name."""
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in (*chunks, (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return whole


def bomb(side: int) -> bytes:
    """A few bytes that claim to be a grey image of side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))))


def damaged(image: bytes, chunk: bytes, where: str) -> bytes:
    """A PNG with one bit turned in the middle of a chunk's data, or in its CRC."""
    start = image.index(chunk)
    length = int.from_bytes(image[start - 4 : start], "big")
    place = start + 4 + (length // 2 if where == "data" else length)
    return image[:place] + bytes([image[place] ^ 1]) + image[place + 1 :]


def deep_colours(seed: int) -> bytes:
    """A PNG with 16 bits for each of red, green and blue."""
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, 1 + 6 * WIDTH), dtype=np.uint8)
    pixels[:, 0] = 0  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(pixels.tobytes())))


def with_palette(values: np.ndarray, colours: int = 256, **options: Any) -> bytes:
    image = Image.fromarray(values)
    image.putpalette([channel for colour in CLASSES["palette"] for channel in colour] + [0] * 3 * (colours - 3))
    return encoded(image, **options)


def grey_ramp(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 65536, SHAPE, dtype=np.uint16)
    return encoded(Image.fromarray(pixels))


def animated(kind: str, **options: Any) -> bytes:
    frames = [picture("RGB", seed) for seed in (31, 32)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def unknown_colour() -> np.ndarray:
    colours = COLOURS[LABEL % 3]
    colours[4, 4] = (1, 2, 3)
    return colours


def changed(value: int, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    values = LABEL.astype(dtype)
    values[5, 5] = value
    return values


EVERY_PIXEL = LABEL % 3  # without ignored pixels, which have no colour

CASES = {
    # Images that cannot be read.
    "an empty image": bad(b"", "empty", suffix=".jpg"),
    "a truncated JPEG": bad(jpeg(1)[:-200], "damaged", suffix=".jpg"),
    "a truncated progressive JPEG": bad(jpeg(2, progressive=True)[:-200], "damaged", suffix=".jpg"),
    "a JPEG that ends after its header": bad(jpeg(3)[:30], "damaged", suffix=".jpg"),
    "a truncated PNG": bad(photograph(101)[:-40], "damaged"),
    "a PNG whose header has a bad CRC": bad(damaged(photograph(102), b"IHDR", "crc"), "not_an_image"),
    "a PNG with a turned bit": bad(damaged(photograph(103), b"IDAT", "data"), "damaged"),
    "a PNG without pixels": bad(png((b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0))), "not_an_image"),
    "a web page named .jpg": bad(PAGE, "not_an_image", suffix=".jpg"),
    "a drawing of vectors named .png": bad(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "zeros": bad(bytes(1000), "not_an_image", suffix=".jpg"),
    "a decompression bomb": bad(bomb(60_000), "too_large"),
    "a claim of more pixels than there are": bad(bomb(20_000), "damaged"),
    # Images of odd kinds.
    "a PNG whose pixels have a bad CRC but are right": row(damaged(photograph(104), b"IDAT", "crc")),
    "a 16-bit grey image": row(grey_ramp(105)),
    "a 16-bit colour image": row(deep_colours(106)),
    "a CMYK JPEG": row(jpeg(5, "CMYK"), suffix=".jpg"),
    "a grey JPEG": row(jpeg(6, "L"), suffix=".jpeg"),
    "a progressive JPEG": row(jpeg(7, progressive=True), suffix=".jpg"),
    "a JPEG with something behind it": row(jpeg(8) + b"trailer", suffix=".jpg"),
    "a JPEG with a broken EXIF block": row(jpeg(9, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), suffix=".jpg"),
    "a palette image with transparency": row(encoded(picture("RGB", 10).quantize(8), transparency=1)),
    "an RGBA image": row(encoded(picture("RGBA", 11))),
    "a grey image with alpha": row(encoded(picture("LA", 12))),
    "a grey image": row(encoded(picture("L", 13))),
    "a black and white image": row(encoded(picture("1", 14))),
    "a BMP": row(encoded(picture("RGB", 15), "BMP"), suffix=".bmp"),
    "a WebP": row(encoded(picture("RGB", 16), "WEBP"), suffix=".webp"),
    "a TIFF": row(encoded(picture("RGB", 17), "TIFF"), suffix=".tif"),
    "a floating-point TIFF": row(encoded(picture("F", 18), "TIFF"), suffix=".tiff"),
    "an animated GIF named .png": row(animated("GIF")),
    "an animated PNG": row(animated("PNG", default_image=True)),
    "a JPEG named .png": row(jpeg(19)),
    "a suffix in capitals": row(jpeg(20), suffix=".JPG"),
    "a turned JPEG with a label as it is shown": row(portrait(), (WIDTH, HEIGHT), suffix=".jpg"),
    "a turned JPEG with a label as it is stored": bad(portrait(), "size_mismatch", suffix=".jpg"),
    "one pixel": row(encoded(Image.new("RGB", (1, 1), (9, 8, 7))), (1, 1)),
    "20,000 pixels wide": row(encoded(Image.new("RGB", (20_000, 2))), (2, 20_000)),
    # Labels that cannot be read, or mean nothing.
    "an empty label": label(b"", "label_empty"),
    "a truncated label": label(encode_png(LABEL)[:-30], "label_damaged"),
    "a label with a turned bit": label(damaged(encode_png(changed(0)), b"IDAT", "data"), "label_damaged"),
    "a web page as a label": label(PAGE, "label_not_an_image"),
    "a decompression bomb as a label": label(bomb(60_001), "label_too_large"),
    "a smaller label": label(encode_png(LABEL[:-1]), "size_mismatch"),
    "a label that lies on its side": label(encode_png(LABEL.T.copy()), "size_mismatch"),
    "the value 200": label(encode_png(changed(200)), "unknown_label_value"),
    "the value 3 of three classes": label(encode_png(changed(3)), "unknown_label_value"),
    "a 16-bit value that is 1 in its low byte": label(encode_png(changed(257, np.uint16)), "unknown_label_value"),
    "a colour of no class": label(encoded(Image.fromarray(unknown_colour())), "unknown_label_value"),
    "a floating-point label": label(encoded(Image.fromarray(LABEL.astype(np.float32)), "TIFF"), "label_mode"),
    # Labels of odd kinds.
    "a 16-bit label": label(encode_png(LABEL.astype(np.uint16)), LABEL),
    "a label with a palette": label(with_palette(LABEL), LABEL),
    "a label with a palette and transparency": label(with_palette(LABEL, transparency=0), LABEL),
    "a label with two bits a pixel": label(with_palette(EVERY_PIXEL, colours=3, bits=2), EVERY_PIXEL),
    "a label in colours": label(encoded(Image.fromarray(COLOURS[EVERY_PIXEL])), EVERY_PIXEL),
    "a label in colours with alpha": label(encoded(Image.fromarray(COLOURS[EVERY_PIXEL]).convert("RGBA")), EVERY_PIXEL),
    "a grey label with alpha": label(encoded(Image.fromarray(LABEL).convert("LA")), LABEL),
    "a label of one bit": label(encoded(Image.fromarray(LABEL == 1)), (LABEL == 1).astype(np.uint8)),
    "a label that is ignored everywhere": label(encode_png(np.full(SHAPE, 255, np.uint8)), np.full(SHAPE, 255)),
    # Names.
    "a name with spaces": row(photograph(201), stem=" two  words "),
    "a composed accent": row(photograph(202), stem="caf\u00e9"),
    "a decomposed accent": row(photograph(203), stem="cafe\u0301"),
    "a name of Chinese characters and an emoji": row(photograph(204), stem="\u8857\u9053 \U0001f697"),
    "a percent sign that looks like a code": row(photograph(205), stem="%41"),
    "the letter that the code means": row(photograph(206), stem="A"),
    "the same letter in lower case": row(photograph(207), stem="a"),
    "a plus sign": row(photograph(208), stem="1+1"),
    "a hash": row(photograph(209), stem="a#b"),
    "a question mark": row(photograph(210), stem="a?b=c"),
    "quotes, braces and stars": row(photograph(211), stem="'\"{0}*[a]\\$"),
    "dots": row(photograph(212), stem="a.b..c"),
    "a long name": row(photograph(213), stem="x" * 250),
    # Partners.
    "an image without a label": Case(photograph(301), None, "no_label"),
    "a label without an image": Case(None, encode_png(LABEL), "no_image"),
    "the first of two images of one stem": row(jpeg(302), suffix=".jpg", stem="twice"),
    "the second of two images of one stem": Case(photograph(303), None, "duplicate_stem", stem="twice"),
}
LINKS = ("nowhere", "itself")  # links to nothing, in place of images
MISNAMED = ("two\nlines", "caf\udce9 in Latin-1")  # stems of an image and a label


def source_uri(source: Path, name: str) -> str:
    """What stands for a case in a row or a reject: its image or, where there is none, its label."""
    case = CASES[name]
    stem = case.stem or name.replace(" ", "_")
    return str(source / (f"labels/train/{stem}.png" if case.image is None else f"images/train/{stem}{case.suffix}"))


@dataclass(frozen=True)
class Ingested:
    source: Path
    url: str
    record: RunRecord
    rows: dict[str, list[dict[str, Any]]]
    rejects: dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def ingested(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Ingested:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("faults")
    source, url = folder / "source", str(folder / "dataset")
    storage.write_json(str(source / "classes.json"), CLASSES)
    images, labels = source / "images/train", source / "labels/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, case in CASES.items():
        stem = case.stem or name.replace(" ", "_")
        if case.image is not None:
            (images / f"{stem}{case.suffix}").write_bytes(case.image)
        if case.label is not None:
            (labels / f"{stem}.png").write_bytes(case.label)
    (images / "round_and_round").symlink_to(images)
    (images / "nowhere.png").symlink_to(folder / "absent.png")
    (images / "itself.png").symlink_to(images / "itself.png")
    for name in LINKS:
        (labels / f"{name}.png").write_bytes(encode_png(LABEL))
    for number, stem in enumerate(MISNAMED):
        (images / f"{stem}.png").write_bytes(photograph(400 + number))
        (labels / f"{stem}.png").write_bytes(encode_png(LABEL))
    (images / "notes.txt").write_text("no image")
    record = ingest(IngestConfig(str(source), url, max_reject_fraction=0.9))
    rows, rejects = {}, {}
    for item in dataset.open(url).rows("train"):
        rows.setdefault(item["source_uri"], []).append(item)
    for item in reject_rows(url):
        rejects.setdefault(item["source_uri"], []).append(item)
    return Ingested(source, url, record, rows, rejects)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.becomes, np.ndarray)])
def test_what_is_odd_but_right_is_a_row(ingested: Ingested, name: str) -> None:
    case, place = CASES[name], source_uri(ingested.source, name)
    assert place not in ingested.rejects
    (found,) = ingested.rows[place]
    assert found["image_id"] == f"train/{case.stem or name.replace(' ', '_')}"
    assert found["image"] == case.image
    assert isinstance(case.becomes, np.ndarray)
    assert (found["height"], found["width"]) == case.becomes.shape
    np.testing.assert_array_equal(decode_label(found["label"]), case.becomes)
    with Image.open(io.BytesIO(found["label"])) as stored:
        assert (stored.format, stored.mode) == ("PNG", "L")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.becomes, str)])
def test_what_is_broken_is_a_reject_that_says_why(ingested: Ingested, name: str) -> None:
    place = source_uri(ingested.source, name)
    assert place not in ingested.rows
    (found,) = ingested.rejects[place]
    assert (found["reason"], found["split"]) == (CASES[name].becomes, "train")
    assert found["detail"]
    assert "\n" not in found["detail"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_to_nothing_is_missing(ingested: Ingested, name: str) -> None:
    (found,) = ingested.rejects[str(ingested.source / f"images/train/{name}.png")]
    assert found["reason"] == "missing"


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("stem", MISNAMED)
def test_a_name_that_cannot_be_written_down_is_a_reject(ingested: Ingested, stem: str, folder: str) -> None:
    (found,) = ingested.rejects[misnamed(ingested.source, folder, stem)]
    assert found["reason"] == "bad_name"


def misnamed(source: Path, folder: str, stem: str) -> str:
    return str(source / folder / "train" / stem.encode("unicode_escape").decode()) + ".png"


def test_a_name_in_a_tar_file_that_is_no_text_becomes_an_id_that_is(tmp_path: Path) -> None:
    url = str(tmp_path / "train.tar")
    with tarfile.open(url, "w", format=tarfile.GNU_FORMAT) as archive:
        for ending, data in (("png", photograph(1)), ("label.png", encode_png(LABEL))):
            member = tarfile.TarInfo(f"caf\udce9.{ending}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (record,) = read_shard(Shard("train", "train", url, "values", 0))
    assert (record.image_id, record.fault, record.image) == ("train/caf\\udce9", None, photograph(1))


def test_every_file_is_accounted_for_and_none_twice(ingested: Ingested) -> None:
    right = sum(isinstance(case.becomes, np.ndarray) for case in CASES.values())
    wrong = len(CASES) - right + len(LINKS) + 2 * len(MISNAMED)
    assert ingested.record.counts == {"in": right + wrong, "out": right, "rejected": wrong}
    expected = {source_uri(ingested.source, name) for name in CASES}
    expected |= {str(ingested.source / f"images/train/{name}.png") for name in LINKS}
    expected |= {misnamed(ingested.source, folder, stem) for folder in ("images", "labels") for stem in MISNAMED}
    assert ingested.rows.keys() | ingested.rejects.keys() == expected
    assert all(len(found) == 1 for found in (*ingested.rows.values(), *ingested.rejects.values()))
    ids = [item["image_id"] for found in ingested.rows.values() for item in found]
    assert len(ids) == len(set(ids)) == right
