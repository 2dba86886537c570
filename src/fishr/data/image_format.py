"""Image files to arrays ``[row, column, channel]`` of bytes, and those to the square form that a network takes."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.Image import Resampling, Transpose
from PIL.ImageFile import ImageFile

from fishr.errors import ConfigError, InputError, UnreadableImageError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
"""What is read, in PIL's names. Not all that PIL knows: for some formats it would start other programs."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels to PIL's name for them."""

UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""

LARGEST_16_BIT = 65535
REDUCING_GAP = 2.0
"""Large images are first reduced by a whole number, cheaply, to no less than this many times the size wanted."""


@dataclass(frozen=True)
class ImageFormat:
    """What a network takes: square images of ``size`` pixels, 1 (gray), 3 (RGB) or 4 (RGBA) channels.

    Raises:
        ConfigError: a size that is no whole number of pixels or below 1, or another number of channels.
    """

    size: int
    channels: int = 3

    def __post_init__(self) -> None:
        if type(self.size) is not int:
            raise ConfigError(f"image size must be a whole number of pixels, got {self.size!r}")
        if self.size < 1:
            raise ConfigError(f"image size must be at least 1 pixel, got {self.size}")
        if type(self.channels) is not int or self.channels not in MODES:
            raise ConfigError(f"images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, got {self.channels!r}")

    @property
    def shorter_side(self) -> int:
        """Largest shorter side of a decoded image, in pixels.

        At 1.4 times the size, the smallest training crop (70 % of the area, aspect ratio up to 4:3) is not enlarged:
        1.4 · √(0.7 · 3/4) > 1.
        """
        return math.ceil(1.4 * self.size)

    def decode(self, content: bytes) -> NDArray[np.uint8]:
        """The image in a file's content, upright and with its aspect ratio, shrunk to :attr:`shorter_side` if larger.

        Of several frames or pages it is the first. Gray of 16 bits is divided by 257, so that nothing is clipped.
        Alpha is dropped, not blended, unless the format has four channels.

        Returns:
            uint8 ``[row, column, channel]``, contiguous, read-only.

        Raises:
            UnreadableImageError: with the reason. Nothing else is raised, whatever the bytes are.
        """
        if not content:
            raise UnreadableImageError("the file is empty")
        kind = "image"
        try:
            with pil_warnings_off(), Image.open(BytesIO(content), formats=FORMATS) as image:
                kind = image.format or kind
                return _channels_last(self._decoded(image))
        except UnreadableImageError:
            raise
        except UnidentifiedImageError as error:
            raise UnreadableImageError(
                f"not an image, or damaged at its start ({', '.join(FORMATS)} are read)"
            ) from error
        except Image.DecompressionBombError as error:
            raise UnreadableImageError(f"too large: {error}") from error
        # What a reader raises is whatever the damaged bytes led it to: SyntaxError, struct.error, MemoryError, ...
        except Exception as error:
            if "truncated" in str(error).lower():
                raise UnreadableImageError(f"truncated {kind}") from error
            raise UnreadableImageError(f"damaged {kind} ({str(error) or type(error).__name__})") from error

    def fit(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The form for evaluation: the whole image, squashed to a square by PIL's antialiased bilinear resizing.

        It is what ``torchvision.transforms.Resize((size, size))`` makes of a PIL image, except that with four
        channels each is resized on its own; PIL would weigh colors by alpha, and augmentation does not.

        Args:
            image: uint8 ``[row, column, channel]``.

        Returns:
            uint8 ``[size, size, channel]``, contiguous, read-only.

        Raises:
            InputError: an array of another type, or with another number of channels.
        """
        self.check(image)
        pixels = Image.fromarray(image[..., 0] if self.channels == 1 else image)
        return _channels_last(_resized(pixels, (self.size, self.size), Resampling.BILINEAR))

    def check(self, image: NDArray[np.uint8]) -> None:
        """Raises InputError for what is no image of this format, of whatever size."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.channels or image.size == 0:
            raise InputError(
                f"an image must be uint8 [row, column, {self.channels}] with at least one pixel, "
                f"got {image.dtype} {list(image.shape)}"
            )

    def _decoded(self, image: ImageFile) -> Image.Image:
        least = round(REDUCING_GAP * self.shorter_side)
        # JPEG decodes to a half, quarter or eighth at a fraction of the cost; the box is what of it the image covers.
        draft = image.draft(None, (least, least))
        image.load()
        width, height = draft[1][2:] if draft else image.size
        pixels = _with_bytes(image)
        if pixels.mode != MODES[self.channels]:  # else convert would copy
            pixels = pixels.convert(MODES[self.channels])
        if (shrink := self.shorter_side / min(width, height)) < 1:
            size = round(shrink * width), round(shrink * height)
            # Bicubic, as it will be resized once more: two bilinear steps would blur.
            pixels = _resized(pixels, size, Resampling.BICUBIC, (0, 0, width, height), REDUCING_GAP)
        # After loading: some formats hold EXIF behind the pixels, and TIFF is turned upright by PIL itself.
        turn = UPRIGHT.get(_orientation(image))
        return pixels if turn is None else pixels.transpose(turn)


def read_image(path: Path, format: ImageFormat) -> NDArray[np.uint8]:
    """The image in a file, see :meth:`ImageFormat.decode`.

    Raises:
        UnreadableImageError: with the reason, also if there is no such file or it cannot be read.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableImageError(f"the file cannot be read ({reason or error})") from error
    return format.decode(content)


def _with_bytes(image: Image.Image) -> Image.Image:
    """The image itself, or its 8-bit form if it has wider pixels."""
    if image.mode == "F":
        raise UnreadableImageError("32-bit float pixels, whose range is unknown; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > LARGEST_16_BIT:
        raise UnreadableImageError(
            f"pixels from {values.min()} to {values.max()}, expected 0 to {LARGEST_16_BIT}; save it with 8 or 16 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # damaged EXIF: the pixels are fine, and there is no saying which way up
        return 1


def _resized(
    pixels: Image.Image,
    size: tuple[int, int],
    resampling: Resampling,
    box: tuple[float, float, float, float] | None = None,
    reducing_gap: float | None = None,
) -> Image.Image:
    if pixels.mode == "RGBA":
        return Image.merge("RGBA", [_resized(band, size, resampling, box, reducing_gap) for band in pixels.split()])
    return pixels.resize(size, resampling, box, reducing_gap)


def _channels_last(pixels: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(pixels)
    return array.reshape(*array.shape[:2], -1)


@contextmanager
def pil_warnings_off() -> Iterator[None]:
    """PIL warns of damage that it can read past, such as a broken EXIF tag; neither noise nor, as an error, a reason.

    Every thread adds and removes an entry of its own. ``warnings.catch_warnings`` is not for threads: it puts back the
    filters as it found them, and with them, for good, what another thread had set for a moment.
    """
    filters = cast(list[Any], warnings.filters)
    silent = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    filters.insert(0, silent)
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody emptied the filters meanwhile
            filters.remove(silent)
