"""What a saved model says about image files: one row for each. Memory holds a few batches and one folder's names."""

import logging
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fishr.data.image_format import ImageFormat, read_image
from fishr.data.listing import IMAGE_SUFFIXES, JUNK
from fishr.devices import num_cpus, torch_device
from fishr.errors import ConfigError, DataError, UnreadableImageError
from fishr.models.saved import SavedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        path: The file, as it was given or found.
        top: The most probable classes and their probabilities, the most probable first; empty if there is no answer.
        abstain: Whether the label is not to be relied on: there is none, or it is less probable than was asked for.
        error: Why there is no answer; None if there is one.
    """

    path: Path
    top: tuple[tuple[str, float], ...]
    abstain: bool
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Its probability."""
        return self.top[0][1] if self.top else None

    @property
    def printable_path(self) -> str:
        r"""The path as text that can be encoded: bytes that are no UTF-8 become escapes such as ``\udcff``."""
        return printable(self.path)


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as they are given, and the images in folders and below, sorted by path.

    Folders are listed when the iterator gets to them, and no more is held than the names in one and in those above it.
    Images there are told by their ending (:data:`~fishr.data.listing.IMAGE_SUFFIXES`); files that are given are taken
    whatever their names. Hidden names and what operating systems leave are passed over. Links are followed, but not
    back to a folder they lie in. A folder that cannot be listed stands in the place of its images, and what reads it
    finds that it is none. What else is left out is logged at the end.

    Raises:
        DataError: at the call, for a path that does not exist, or a folder that has no images or cannot be listed.
    """
    missing = [printable(path) for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"there is no file or folder {', '.join(missing[:3])}{more}")
    for path in paths:
        try:
            if path.is_dir() and next(_walk(path, _LeftOut()), None) is None:
                raise DataError(
                    f"there are no images in {printable(path)}: expected files that end in "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}; others can be named one by one"
                )
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be listed ({error.strerror})") from error
    return _all_images(paths)


def predict_images(
    model: SavedModel,
    paths: Iterable[Path],
    *,
    top_k: int = 1,
    abstain_below: float | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> Generator[Prediction, None, None]:
    """Predict image files in their order; one that cannot be read gets a prediction that says why.

    Several threads decode a batch ahead of the network, as for evaluation in training. At most three batches of decoded
    images are held, and paths are taken from the iterable only as they are needed.

    Args:
        model: A model of images; it is moved to the device and put into ``eval()`` mode.
        paths: The files.
        top_k: Classes in a prediction.
        abstain_below: The probability, in [0, 1], below which a prediction abstains; None: none does.
        batch_size: Images that go through the network together.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        ConfigError: at the call, for a value that an argument cannot take.
        DataError: at the call, for a model that does not take images.
    """
    card = model.card
    if card.image_format is None:
        raise DataError(
            f"the model takes float32 inputs of shape {' x '.join(map(str, card.input_shape))}, not image files: "
            "expected a model that was trained on a folder, a manifest or a benchmark of images"
        )
    if not 1 <= top_k <= len(card.classes):
        raise ConfigError(f"top-k must be from 1 to {len(card.classes)}, the model's number of classes, got {top_k}")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise ConfigError(f"the probability to abstain below must be in [0, 1], got {abstain_below}")
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size}")
    model.to(torch_device(device)).eval()
    return _predictions(model, card.image_format, paths, top_k, abstain_below or 0.0, batch_size)


def printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _all_images(paths: Sequence[Path]) -> Iterator[Path]:
    left_out = _LeftOut()
    for path in paths:
        if path.is_dir():
            yield from _walk(path, left_out)
        else:
            yield path
    left_out.warn()


class _LeftOut:
    """Counts what in folders is not predicted, and remembers the first of each kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, Path]] = {}

    def add(self, kind: str, path: Path) -> None:
        number, first = self._kinds.get(kind, (0, path))
        self._kinds[kind] = number + 1, first

    def warn(self) -> None:
        for kind, (number, first) in self._kinds.items():
            logger.warning("left out %s: %d, such as %s", kind, number, printable(first))


def _walk(folder: Path, left_out: _LeftOut, chain: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """The images below a folder; ``chain`` identifies the folders it lies in. Raises OSError if it cannot be listed."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in chain:  # a link that leads back
        return
    for name in _names(folder, left_out):
        path = folder / name
        if not name.endswith("/"):
            yield path
            continue
        try:
            yield from _walk(path, left_out, chain | {identity})
        except OSError as error:
            left_out.add(f"folders that cannot be listed ({error.strerror})", path)
            yield path


def _names(folder: Path, left_out: _LeftOut) -> list[str]:
    """Names of images and folders in the order of their paths; those of folders end in a slash."""
    names: list[str] = []
    suffixes = tuple(IMAGE_SUFFIXES)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in JUNK:
                continue
            if _is_folder(entry):
                names.append(f"{entry.name}/")
            elif not entry.name.lower().endswith(suffixes):
                left_out.add("files without the ending of an image", folder / entry.name)
            elif entry.is_symlink() or entry.is_file():
                names.append(entry.name)
            else:  # reading a pipe may never end
                left_out.add("pipes and devices", folder / entry.name)
    names.sort()
    return names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _predictions(
    model: SavedModel, format: ImageFormat, paths: Iterable[Path], top_k: int, threshold: float, batch_size: int
) -> Generator[Prediction, None, None]:
    with closing(_read_ahead(paths, format, batch_size)) as images:
        while batch := list(islice(images, batch_size)):
            readable = [image for _, image in batch if not isinstance(image, str)]
            tops = iter(_top_classes(model, readable, top_k) if readable else ())
            for path, image in batch:
                if isinstance(image, str):
                    yield Prediction(path, (), abstain=True, error=image)
                    continue
                top = next(tops)
                probability = top[0][1]
                if math.isfinite(probability):
                    yield Prediction(path, top, abstain=probability < threshold)
                else:
                    yield Prediction(path, (), abstain=True, error=f"the network's probabilities are {probability}")


def _read_ahead(
    paths: Iterable[Path], format: ImageFormat, ahead: int
) -> Generator[tuple[Path, NDArray[np.uint8] | str], None, None]:
    """Each path with its image in evaluation form, or with the reason why there is none."""
    threads = ThreadPoolExecutor(num_cpus(), thread_name_prefix="fishr-predict")
    pending: deque[tuple[Path, Future[NDArray[np.uint8] | str]]] = deque()
    try:
        for next_path in paths:
            pending.append((next_path, threads.submit(_read, next_path, format)))
            if len(pending) > ahead:
                path, image = pending.popleft()
                yield path, image.result()
        while pending:
            path, image = pending.popleft()
            yield path, image.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _read(path: Path, format: ImageFormat) -> NDArray[np.uint8] | str:
    try:
        return format.fit(read_image(path, format))
    except UnreadableImageError as error:
        return str(error)


@torch.inference_mode()
def _top_classes(
    model: SavedModel, images: Sequence[NDArray[np.uint8]], top_k: int
) -> list[tuple[tuple[str, float], ...]]:
    inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    # Stable: of equally probable classes the first comes first, as with argmax.
    probabilities, labels = model.predict_proba(inputs).sort(dim=1, descending=True, stable=True)
    classes = model.card.classes
    return [
        # The decimals that float32 has: what is compared with a threshold is what is written.
        tuple((classes[label], float(str(value))) for label, value in zip(*row, strict=True))
        for row in zip(labels[:, :top_k].tolist(), probabilities[:, :top_k].float().cpu().numpy(), strict=True)
    ]
