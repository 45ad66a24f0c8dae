"""Encoded images to pixels: photographs and label images, with every way in which a file can be bad as one sentence."""

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator
from typing import cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def _heif() -> tuple[str, ...]:
    """HEIC among Pillow's formats, where its plug-in is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return ("HEIF",)


# What Pillow itself decodes, and safely: for EPS, say, it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", *_heif())
MAX_PIXELS = 500_000_000  # a 22,000 x 22,000 image; above it a file is taken for a decompression bomb

_PNG, _PNG_BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
_PIXELS_AT_ONCE = 2**20  # converted; of a large image only the decoded and the final pixels are in memory
_PACKED_COLOURS = 16
_GREY_STEP = {2: 85, 4: 17}  # Pillow stretches grey levels of so many bits to the whole range

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns at its limit; `_opened` refuses at ours


class BadImage(ValueError):
    """An image file that cannot be used. `reason` is a short constant to count by, the message says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


def decode_photograph(data: bytes) -> np.ndarray:
    """The pixels of a photograph: (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Greyscale, palette, CMYK and 16-bit images are converted; an alpha channel is laid over white. Of an animation or a
    file of several pages it is the first picture. Takes 7 bytes per pixel beside `data`, and 8 while one is turned.

    Raises:
        BadImage: empty, not an image, truncated, or larger than `MAX_PIXELS`.
    """
    image = _opened(data)
    with _damage_refused():
        ImageOps.exif_transpose(image, in_place=True)
        # Whether 16 bits hold more than 8 shows only in the whole image.
        deep = image.mode.startswith("I") or image.mode == "F"
        scale = 255.0 / 65535.0 if deep and _highest(image) > 255 else 1.0
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        rows_at_once = max(1, _PIXELS_AT_ONCE // image.width)
        for top in range(0, image.height, rows_at_once):
            bottom = min(top + rows_at_once, image.height)
            pixels[top:bottom] = np.asarray(_rgb(image.crop((0, top, image.width, bottom)), scale))
        return pixels


def _highest(image: Image.Image) -> float:
    """The highest value of an image of one channel."""
    _, highest = cast(tuple[float, float], image.getextrema())
    return highest


def _rgb(image: Image.Image, scale: float) -> Image.Image:
    """An image of any mode as RGB; `scale` brings the values of 16 bits and of floats to 0 to 255."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")


def decode_label(data: bytes) -> np.ndarray:
    """The values of a label image, (H, W) integers: grey levels, or palette indices where it has a palette.

    Raises:
        BadImage: as `decode_photograph`; also for colour images, whose values are not class ids.
    """
    values = decode_published_label(data)
    if values.ndim == 3:
        raise BadImage("label_mode", "the label image has colours, class ids need a grey or palette image")
    return values


def decode_published_label(data: bytes) -> np.ndarray:
    """A label image's values as `decode_label`, or where it is drawn in colours, these: (H, W, 3) uint8.

    Raises:
        BadImage: as `decode_photograph`; also for modes that are neither.
    """
    image = _opened(data)
    with _damage_refused():
        if image.mode in ("RGB", "RGBA"):
            return np.asarray(image.convert("RGB"))
        if image.mode == "LA":
            return np.asarray(image.getchannel("L"))
        if image.mode == "L" and data.startswith(_PNG):
            return np.asarray(image) // _GREY_STEP.get(data[_PNG_BIT_DEPTH], 1)
        if image.mode in ("L", "P", "1", "I") or image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.int64 if image.mode.startswith("I") else np.uint8)
    raise BadImage("label_mode", f"label image has mode {image.mode}, class ids need a grey or palette image")


def encode_png(values: np.ndarray, palette: list[tuple[int, int, int]] | None = None) -> bytes:
    """A PNG of an (H, W) array of uint8 or uint16, with a palette inside for uint8 if one is given.

    Of maps of up to 16 classes, which Pillow packs into 4 bits per pixel, run lengths alone are the smallest and take
    half the time of zlib's level 6; of others that is the smallest (tests/benchmarks/results/masks-cpu.md).
    """
    image = Image.fromarray(values)
    options: dict[str, int] = {"compress_level": 6}
    if palette is not None and values.dtype == np.uint8:
        image.putpalette([channel for colour in palette for channel in colour])
        if len(palette) <= _PACKED_COLOURS:
            options = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty", "the file has no bytes")
    with _damage_refused():
        if "HEIF" not in FORMATS and data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise BadImage(
                "no_decoder", "HEIC is decoded where pillow-heif is installed, the extra heif of this package"
            )
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(
                "too_large", f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} accepted"
            )
        image.load()
    return image


@contextlib.contextmanager
def _damage_refused() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF blocks are no reason to refuse
            yield
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many classes on damaged data
        if isinstance(error, UnidentifiedImageError):
            raise BadImage("not_an_image", "the bytes are of no image format that Pillow knows") from error
        raise BadImage("damaged", f"damaged or truncated ({type(error).__name__}: {str(error)[:120]})") from error
