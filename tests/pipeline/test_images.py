"""From a file's bytes to pixels: every kind of image as it is meant to be seen, every bad file one sentence."""

import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline import images
from pipeline.images import BadImage, decode_label, decode_photograph, encode_png
from tests.pipeline.image_files import encoded

ORIENTATION = 0x0112
CORNERS = np.zeros((40, 60, 3), np.uint8)  # red top left, green top right, blue bottom left, black bottom right
CORNERS[:20, :30, 0] = CORNERS[:20, 30:, 1] = CORNERS[20:, :30, 2] = 255


def noise(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_colour_image_keeps_its_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_photograph(encoded(noise(), kind, **options))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(noise()))


# How the pixels are stored -> what turns them upright (TIFF 6.0, tag 274), by numpy alone.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_photograph_is_turned_as_its_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = decode_photograph(encoded(Image.fromarray(CORNERS), kind, exif=exif))
    expected = UPRIGHT[orientation](CORNERS)
    assert pixels.shape == expected.shape
    assert (
        np.abs(pixels.astype(int) - expected).mean() < 10
    )  # JPEG blurs the borders of colours; turned wrongly it is 85


def test_grey_palette_and_bilevel_images_become_rgb() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode_photograph(encoded(Image.fromarray(grey))), grey[..., None].repeat(3, 2))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(decode_photograph(encoded(palette)), [[[10, 20, 30], [40, 50, 60]]])
    bilevel = Image.fromarray(np.array([[False, True]]))
    np.testing.assert_array_equal(decode_photograph(encoded(bilevel)), [[[0] * 3, [255] * 3]])


def test_cmyk_is_converted() -> None:
    pixels = decode_photograph(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"))
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_to_eight_and_eight_in_sixteen_are_kept() -> None:
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    assert decode_photograph(encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 100, 255]
    shallow = np.array([[0, 100, 255]], np.uint16)
    assert decode_photograph(encoded(Image.fromarray(shallow)))[0, :, 0].tolist() == [0, 100, 255]


def test_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8), "RGBA")
    np.testing.assert_array_equal(decode_photograph(encoded(image)), [[[10, 20, 30], [255, 255, 255]]])
    key = encoded(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode_photograph(key), [[[255, 255, 255], [4, 5, 6]]])


BAD_FILES = {
    "empty": (b"", "the file has no bytes"),
    "not_an_image": (b"<html>404</html>", "no image format"),
    "damaged": (encoded(noise())[:-200], "damaged or truncated"),
}


@pytest.mark.parametrize("decode", [decode_photograph, decode_label])
@pytest.mark.parametrize("reason", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_a_reason_to_count_by(decode, reason: str) -> None:
    data, says = BAD_FILES[reason]
    with pytest.raises(BadImage, match=says) as bad:
        decode(data)
    assert bad.value.reason == reason
    assert bad.value.detail == str(bad.value)
    assert "\n" not in bad.value.detail
    restored = pickle.loads(pickle.dumps(bad.value))
    assert (type(restored), restored.reason, str(restored)) == (BadImage, reason, str(bad.value))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_damaged_and_never_half_an_image(kind: str) -> None:
    whole = encoded(noise(), kind)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(BadImage) as bad:
            decode_photograph(whole[: int(share * len(whole))])
        assert bad.value.reason in ("damaged", "not_an_image")


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_a_file_escapes_as_another_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
    damaged = bytearray(encoded(noise(6, 7), kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_photograph(bytes(damaged)).shape[2] == 3
    except BadImage as bad:
        assert bad.reason in ("damaged", "not_an_image", "too_large")  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_unreadable_exif_block_is_damage_and_no_crash(kind: str) -> None:
    with pytest.raises(BadImage, match="damaged or truncated") as bad:
        decode_photograph(encoded(noise(), kind, exif=b"Exif\0\0no TIFF header"))
    assert bad.value.reason == "damaged"


def test_an_image_of_more_pixels_than_accepted_is_refused_before_it_is_decoded(monkeypatch) -> None:
    data = encoded(noise(40, 60))
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60)
    assert decode_photograph(data).shape == (40, 60, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    with pytest.raises(BadImage, match="60 x 40 pixels are more than the 2399 accepted") as bad:
        decode_photograph(data[:200])  # the header alone
    assert bad.value.reason == "too_large"


def test_a_label_is_its_grey_levels_or_its_palette_indices() -> None:
    values = np.array([[0, 1, 11], [254, 255, 7]], np.uint8)
    np.testing.assert_array_equal(decode_label(encoded(Image.fromarray(values))), values)
    palette = Image.fromarray(values, "P")
    palette.putpalette([(7 * index) % 256 for index in range(768)])
    np.testing.assert_array_equal(decode_label(encoded(palette)), values)


def test_a_label_of_sixteen_bits_keeps_values_above_255() -> None:
    values = np.array([[0, 300], [65535, 7]], np.uint16)
    label = decode_label(encoded(Image.fromarray(values)))
    assert np.issubdtype(label.dtype, np.integer)
    np.testing.assert_array_equal(label, values)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_label_of_few_bits_has_the_values_that_were_stored(bits: int) -> None:
    values = np.arange(2**bits, dtype=np.uint8).repeat(8)[None]
    packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].ravel())
    header = values.shape[1].to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"\0" + packed.tobytes()), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks.items()
    )
    np.testing.assert_array_equal(decode_label(png), values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_label_of_colours_is_refused(mode: str) -> None:
    with pytest.raises(BadImage, match="has colours, class ids need a grey or palette image") as bad:
        decode_label(encoded(Image.new(mode, (4, 4))))
    assert bad.value.reason == "label_mode"


SMALL = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None)
@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16]), SMALL))
def test_an_encoded_label_comes_back(values: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_label(encode_png(values)), values)


@settings(deadline=None)
@given(arrays.arrays(np.uint8, SMALL, elements=st.integers(0, 1)))
def test_a_palette_shows_the_classes_and_keeps_their_ids(values: np.ndarray) -> None:
    palette = [(255, 0, 0), (0, 0, 255)]
    data = encode_png(values, palette)
    np.testing.assert_array_equal(decode_label(data), values)
    np.testing.assert_array_equal(decode_photograph(data), np.array(palette)[values])
