"""MNIST as raw arrays: found on disk or downloaded, and checked.

The four files lie in ``ROOT/MNIST/raw``, gzipped or not, as torchvision lays them out. What is checked is the md5 of
the decompressed content: a gzip made anew has other bytes and the same images.
"""

import gzip
import hashlib
import http.client
import logging
import os
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fishr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

RAW_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The four files and the md5 of their decompressed content."""

IMAGES_HEADER_BYTES, LABELS_HEADER_BYTES = 16, 8
"""IDX headers: a magic number and one size for each dimension, four bytes each."""

GZIP_MAGIC = b"\x1f\x8b"
TIMEOUT_SECONDS = 30


class LabeledImages(NamedTuple):
    """Images uint8 ``[sample, 28, 28]``, 0 to 255, and labels int64 ``[sample]``, the digits 0 to 9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Mnist(NamedTuple):
    """The 60,000 training and the 10,000 test images, in the order of the files."""

    train: LabeledImages
    test: LabeledImages

    def pooled(self) -> LabeledImages:
        """All 70,000, the training images first."""
        return LabeledImages(
            np.concatenate([self.train.images, self.test.images]), np.concatenate([self.train.labels, self.test.labels])
        )


class _DamagedError(Exception):
    """What is wrong with a file's content, as the end of a sentence about the file."""


def mnist_images(root: Path | None = None) -> Mnist:
    """MNIST (LeCun, Bottou, Bengio, Haffner, 1998) from ``ROOT/MNIST/raw``; files that are not there are downloaded.

    Args:
        root: The data root; see :func:`data_root` for the default.

    Returns:
        Training and test images, read-only, with their labels.

    Raises:
        DataError: a file that is damaged, cannot be read, or is missing and cannot be downloaded.
    """
    folder = data_root(root) / "MNIST" / "raw"
    return Mnist(_labeled_images(folder, "train"), _labeled_images(folder, "t10k"))


def data_root(root: Path | None = None) -> Path:
    """The folder that datasets lie in: ``root``, else ``$FISHR_DATA``, else ``fishr`` in the user's cache folder."""
    if root is None and (named := os.environ.get("FISHR_DATA")):
        root = Path(named)
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME")
        root = Path(cache or "~/.cache") / "fishr"
    return Path(root).expanduser()


def check_seed_and_subset(seed: int, subset: int | None) -> None:
    """Raises ConfigError for what no dataset can be drawn with: a seed below 0, a subset below 1."""
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, got {seed}")
    if subset is not None and subset < 1:
        raise ConfigError(f"subset must be at least 1 sample of each domain (or None for all), got {subset}")


def _labeled_images(folder: Path, part: str) -> LabeledImages:
    # The md5 vouches for the header too, so it is skipped instead of parsed.
    images = np.frombuffer(_raw_content(folder, f"{part}-images-idx3-ubyte"), np.uint8, offset=IMAGES_HEADER_BYTES)
    labels = np.frombuffer(_raw_content(folder, f"{part}-labels-idx1-ubyte"), np.uint8, offset=LABELS_HEADER_BYTES)
    return LabeledImages(images.reshape(-1, 28, 28), labels.astype(np.int64))


def _raw_content(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / f"{name}.gz"):
        try:
            return _checked(path.read_bytes(), name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): make it a readable file") from error
        except _DamagedError as damage:
            raise DataError(
                f"{path} {damage}: delete it to have it downloaded, or put the original file there"
            ) from damage
    return _download(folder, name)


def _checked(content: bytes, name: str) -> bytes:
    """The decompressed content of a file, once its md5 is found to be the canonical one."""
    expected = RAW_MD5[name]
    # By its first bytes and not by its name: browsers unpack a .gz and keep the name.
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _DamagedError(
                f"is a damaged gzip file of {len(content)} bytes ({error}), its content should have md5 {expected}"
            ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise _DamagedError(f"has content with md5 {found}, expected {expected}")
    return content


def _download(folder: Path, name: str) -> bytes:
    from torchvision.datasets import MNIST

    file = f"{name}.gz"
    cure = (
        f"put the four MNIST files ({', '.join(RAW_MD5)}, gzipped or not) there, "
        "or name a folder with MNIST/raw in it by --data-root or FISHR_DATA"
    )
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed, so that an interrupted download leaves no half file under the name.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as aside:
            for mirror in MNIST.mirrors:
                url = mirror + file
                logger.info("downloading %s to %s", url, folder)
                try:
                    content = _fetch(url)
                    raw = _checked(content, name)
                except _DamagedError as damage:
                    failures.append(f"{url} {damage}")
                    continue
                part = Path(aside) / file
                part.write_bytes(content)
                part.replace(folder / file)
                return raw
    except OSError as error:
        raise DataError(
            f"{file} is not in {folder}, and it cannot be downloaded to there ({error.strerror}): {cure}"
        ) from error
    raise DataError(f"{file} is not in {folder} and could not be downloaded ({'; '.join(failures)}): {cure}")


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
            return content
    except (OSError, http.client.HTTPException) as error:
        raise _DamagedError(f"gave no file ({error})") from error
