"""Whether images are fit for training and for an honest test: what cannot be read, leaks or contradicts itself.

A held-out domain measures nothing new where its images were trained on, so copies across domains are what matters
most. Those of the same bytes have the same SHA-256. Others, such as re-encoded, resized or brightened ones, are found
in steps that get dearer as fewer pairs are left:

1. Every image becomes 256 bits: which of the lowest frequencies of its 64 x 64 gray thumbnail are positive (a
   perceptual hash, after Zauner, Implementation and benchmarking of perceptual image hash functions, 2010). A pair goes
   on if it differs in at most 7 of the lowest 64 bits and 32 of all. Such pairs agree in one of four bands of 16 bits
   but for one bit, by the pigeonhole principle, so they are looked up and not all pairs are compared.
2. The files of such a pair are read once more. They are copies if their thumbnails correlate to at least 0.94, as a
   whole and in their details, which is what a blur takes away.

Measured with 800 images of PACS, saved anew as JPEG of quality 30, at half the size, 10 % brighter, and all three at
once: of these 3,200 copies 3,198 are found, and all of them correlate to 0.95 or more. The most alike of different
drawings correlate to 0.92 in their details, the most alike images of two domains to 0.73.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from fishr.data.cache import PATHS_PER_TASK, Progress
from fishr.data.image_format import FORMATS, ImageFormat, pil_warnings_off
from fishr.data.listing import ImageListing
from fishr.devices import num_cpus
from fishr.errors import UnreadableImageError

Kind = Literal[
    "unreadable",
    "missing-class",
    "duplicate-across-domains",
    "duplicate-across-splits",
    "group-across-splits",
    "contradictory-labels",
    "duplicate-in-domain",
    "few-images",
]
Severity = Literal["wrong", "note"]

SEVERITY: Mapping[Kind, Severity] = {
    "unreadable": "wrong",
    "missing-class": "wrong",
    "duplicate-across-domains": "wrong",
    "duplicate-across-splits": "wrong",
    "group-across-splits": "wrong",
    "contradictory-labels": "wrong",
    "duplicate-in-domain": "note",
    "few-images": "note",
}
"""What can be found, in the order of reports, and whether it makes data unfit."""

FEW = 5
"""Images of a class in a domain, below which there is a note."""

THUMBNAIL = ImageFormat(64)
HASH_SIDE, LOW_SIDE = 16, 8
WORD_BITS, BANDS = 16, 4
MOST_BITS, MOST_LOW_BITS = 32, 7
FAINT = 8.0
"""Coefficient up to which a frequency counts as absent: the sign of one that is, as in a symmetric image, is noise."""

BLUR = (9, 9)
LEAST_CORRELATION = 0.94

LEAST_DETAIL = 2.0
"""Standard deviation of an image's details, of 255; below it, as on a blank page, only equal bytes make copies."""

MOST_REFUTED = 64
"""Alike images that turned out to be no copies, after which an image is compared with no more."""

MOST_OF_A_HASH = 32
"""Images of one hash that are compared, of those in a domain and split: thousands may look the same."""

PAIRS_AT_A_TIME = 2**20
IMAGES_AT_A_TIME = 4096
"""What bounds the memory taken, beyond about 70 bytes for each image."""

SHOWN = 4
"""Paths that a message names."""

ONES = np.array([number.bit_count() for number in range(2**WORD_BITS)], np.uint8)

_Size = tuple[int, int]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        kind: What it is.
        message: It all in a line.
        paths: The images concerned, as the listing has them.
    """

    kind: Kind
    message: str
    paths: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        """Whether it makes the data unfit."""
        return SEVERITY[self.kind]


@dataclass(frozen=True)
class DomainSummary:
    """One domain in numbers.

    Attributes:
        images: Number of its images, unreadable ones included.
        unreadable: Number of those that cannot be read.
        images_per_class: Number of images of each class, unreadable ones included.
        smallest: Width and height, as stored, of the image with the fewest pixels; None if none can be read.
        median: Likewise of the one in the middle.
        largest: Likewise of the one with the most.
    """

    images: int
    unreadable: int
    images_per_class: tuple[int, ...]
    smallest: _Size | None
    median: _Size | None
    largest: _Size | None


@dataclass(frozen=True)
class DataReport:
    """What :func:`check_images` found.

    Attributes:
        name: Name of the data.
        root: The folder that relative paths start from.
        classes: Names of the classes.
        domains: Name of each domain to its numbers.
        findings: All that was found, in the order of :data:`SEVERITY`.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    domains: Mapping[str, DomainSummary]
    findings: tuple[Finding, ...]

    @property
    def fit(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.severity == "note" for finding in self.findings)


def check_images(listing: ImageListing, *, progress: Progress | None = None) -> DataReport:
    """Decode all images as training does, and look for what makes them unfit.

    Copies are looked for between domains, and where a manifest fixes the splits, between these as well. Within a domain
    and split only images of the same bytes are found.

    Args:
        listing: The images.
        progress: Called as images were read.
    """
    samples = _Samples(listing)
    contents = _Contents(listing.root, samples.paths)
    contents.read(progress)
    same, alike = _copies(samples, contents)
    findings = [
        *_unreadable(samples, contents),
        *_class_balance(samples),
        *_duplicates(samples, same, alike),
        *_torn_groups(samples),
        *_contradictions(samples, same),
    ]
    order = list(SEVERITY)
    return DataReport(
        listing.name,
        listing.root,
        listing.classes,
        {name: _summary(samples, contents, index) for index, name in enumerate(listing.domains)},
        tuple(sorted(findings, key=lambda finding: order.index(finding.kind))),
    )


class _Samples:
    """The images of all domains one after the other.

    Attributes:
        paths: Path of each image.
        labels: Index of its class.
        domains: Index of its domain.
        out: Whether it is in the out-split; nowhere if nothing says so.
        groups: Code of its group; None without groups.
    """

    def __init__(self, listing: ImageListing) -> None:
        parts = listing.domains.values()
        self.listing, self.names = listing, tuple(listing.domains)
        self.paths = pa.chunked_array([part.paths for part in parts])
        self.labels = np.concatenate([part.labels for part in parts])
        self.domains = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
        self.out = np.concatenate(
            [np.zeros(len(part.labels), bool) if part.out is None else part.out for part in parts]
        )
        groups = [part.groups for part in parts if part.groups is not None]
        self.groups = np.concatenate(groups) if len(groups) == len(parts) else None

    @property
    def places(self) -> NDArray[np.int64]:
        """Index of each image's domain and split, between which nothing may leak."""
        places: NDArray[np.int64] = 2 * self.domains + self.out
        return places

    def paths_of(self, indices: NDArray[np.intp]) -> tuple[str, ...]:
        return tuple(self.paths[index].as_py() for index in indices.tolist())


class _Contents:
    """What is kept of the images' files.

    Attributes:
        reasons: Index of each image that cannot be read, and the reason.
        digests: Half of the SHA-256 of each file, uint64 ``[sample, 2]``.
        sizes: Width and height as stored, int32 ``[sample, 2]``.
        hashes: Perceptual hashes, uint16 ``[sample, word]``; the lowest frequencies are the first words.
        has_detail: Whether there is enough to see for copies to be recognised by it.
    """

    def __init__(self, root: Path, paths: pa.ChunkedArray) -> None:
        self.root, self.paths = root, paths
        self.reasons: dict[int, str] = {}
        self.digests = np.zeros((len(paths), 2), np.uint64)
        self.sizes = np.zeros((len(paths), 2), np.int32)
        self.hashes = np.zeros((len(paths), HASH_SIDE**2 // WORD_BITS), np.uint16)
        self.has_detail = np.zeros(len(paths), bool)

    @property
    def readable(self) -> NDArray[np.bool_]:
        readable = np.ones(len(self.paths), bool)
        readable[list(self.reasons)] = False
        return readable

    def read(self, progress: Progress | None) -> None:
        """Read every file once, in as many threads as there are CPUs."""
        done = 0
        with ThreadPoolExecutor(num_cpus(), thread_name_prefix="fishr-check") as pool:
            for start in range(0, len(self.paths), IMAGES_AT_A_TIME):
                # Few at a time, and map cancels what has not begun: an interrupt then need not wait.
                for count in pool.map(self._read_some, *self._tasks(start)):
                    done += count
                    if progress:
                        progress(done, len(self.paths))

    def _tasks(self, start: int) -> tuple[Sequence[int], Sequence[Sequence[str]]]:
        paths = self.paths.slice(start, IMAGES_AT_A_TIME).to_pylist()
        firsts = range(0, len(paths), PATHS_PER_TASK)
        return [start + first for first in firsts], [paths[first : first + PATHS_PER_TASK] for first in firsts]

    def _read_some(self, start: int, paths: Sequence[str]) -> int:
        for index, path in enumerate(paths, start):
            try:
                self._read_one(index, self.root / path)
            except UnreadableImageError as error:
                self.reasons[index] = str(error)
        return len(paths)

    def _read_one(self, index: int, path: Path) -> None:
        content = _file_content(path)
        thumbnail = _thumbnail(content)
        self.digests[index] = np.frombuffer(hashlib.sha256(content).digest()[:16], np.uint64)
        self.sizes[index] = _stored_size(content)
        self.hashes[index] = perceptual_hash(thumbnail)
        self.has_detail[index] = _details(thumbnail).std() >= LEAST_DETAIL


def _file_content(path: Path) -> bytes:
    try:
        if not path.is_file():  # reading anything else, such as a pipe, might never end
            raise UnreadableImageError("no such file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error


def _stored_size(content: bytes) -> _Size:
    with pil_warnings_off(), Image.open(BytesIO(content), formats=FORMATS) as image:
        return image.size


def _thumbnail(content: bytes) -> NDArray[np.float32]:
    """Gray, float32 ``[row, column]``."""
    pixels = THUMBNAIL.fit(THUMBNAIL.decode(content))
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _details(thumbnail: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a blur takes away."""
    return np.asarray(thumbnail - cv2.blur(thumbnail, BLUR))


def perceptual_hash(thumbnail: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Which of the lowest frequencies of a gray image are positive, those of no change along a side left out.

    Args:
        thumbnail: float32 ``[row, column]``.

    Returns:
        uint16 ``[word]``; the first 4 words are the lowest 8 x 8 frequencies.
    """
    bits = cv2.dct(thumbnail)[1 : HASH_SIDE + 1, 1 : HASH_SIDE + 1] > FAINT
    low = bits[:LOW_SIDE, :LOW_SIDE].reshape(-1, BANDS).T  # every word has frequencies of all heights
    parts = low, bits[:LOW_SIDE, LOW_SIDE:], bits[LOW_SIDE:]
    return np.packbits(np.concatenate([part.ravel() for part in parts])).view(np.uint16)


def candidate_pairs(
    hashes: NDArray[np.uint16], places: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """All pairs of images from two places whose hashes differ in few bits, each once.

    Args:
        hashes: From :func:`perceptual_hash`, uint16 ``[sample, word]``.
        places: Index of each image's place, int64 ``[sample]``.

    Yields:
        Indices of the first and of the second images.
    """
    words = np.ascontiguousarray(hashes.T)
    for band in range(BANDS):
        keys = words[band]
        order = np.argsort(keys, kind="stable")
        keys = keys[order].astype(np.int64)
        starts = np.searchsorted(keys, np.arange(2**WORD_BITS + 1))
        for flipped in (0, *(1 << bit for bit in range(WORD_BITS))):
            # Positions in the order that go with each position: all of a key, or what follows in the same.
            if flipped:
                rows = np.flatnonzero(keys & flipped == 0)
                first = starts[keys[rows] | flipped]
            else:
                rows = np.arange(len(keys))
                first = rows + 1
            last = starts[(keys[rows] | flipped) + 1]
            for left, right in _ranges(rows, first, last):
                left, right = order[left], order[right]
                apart = places[left] != places[right]
                left, right = left[apart], right[apart]
                distances = [ONES[word[left] ^ word[right]] for word in words[:BANDS]]
                near = sum(distances) <= MOST_LOW_BITS
                for earlier in distances[:band]:
                    near &= earlier > 1  # else the earlier band has found the pair
                left, right = left[near], right[near]
                near = sum(ONES[word[left] ^ word[right]] for word in words) <= MOST_BITS
                yield left[near], right[near]


def _ranges(
    rows: NDArray[np.intp], first: NDArray[np.intp], last: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Each row with each number from its first to before its last, some pairs at a time."""
    counts = last - first
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(rows):
        before = ends[begin] - counts[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + PAIRS_AT_A_TIME, "right")))
        count = counts[begin:end]
        offsets = np.arange(count.sum()) - np.repeat(ends[begin:end] - count - before, count)
        yield np.repeat(rows[begin:end], count), np.repeat(first[begin:end], count) + offsets
        begin = end


def _copies(samples: _Samples, contents: _Contents) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each image the first one with the same bytes, and a code that it shares with copies of whatever bytes."""
    same = np.arange(len(samples.paths))
    readable = np.flatnonzero(contents.readable)
    _, first, inverse = np.unique(contents.digests[readable], axis=0, return_index=True, return_inverse=True)
    same[readable] = readable[first[inverse.ravel()]]

    alike = same.copy()
    places = samples.places
    seen = np.flatnonzero(contents.has_detail)
    seen = seen[_first_of_each(np.stack([same[seen], places[seen]], axis=1), 1)]
    seen = seen[_first_of_each(np.column_stack([contents.hashes[seen].view(np.int64), places[seen]]), MOST_OF_A_HASH)]
    are_copies = _comparison(contents)
    refuted: Counter[int] = Counter()
    for lefts, rights in candidate_pairs(contents.hashes[seen], places[seen]):
        lefts, rights = seen[lefts], seen[rights]
        open_yet = alike[lefts] != alike[rights]
        for left, right in zip(lefts[open_yet].tolist(), rights[open_yet].tolist(), strict=True):
            if alike[left] == alike[right] or max(refuted[left], refuted[right]) >= MOST_REFUTED:
                continue
            if are_copies(left, right):
                alike[alike == alike[right]] = alike[left]
            else:
                refuted.update((left, right))
    return same, alike


def _first_of_each(rows: NDArray[np.int64], most: int) -> NDArray[np.intp]:
    """Indices of the rows, without those that are equal to ``most`` rows before."""
    _, codes = np.unique(rows, axis=0, return_inverse=True)
    codes = codes.ravel()
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept: NDArray[np.intp] = np.sort(order[rank < most])
    return kept


def _comparison(contents: _Contents) -> Callable[[int, int], bool]:
    """Whether two images are copies, by a second look at their files."""

    @lru_cache(maxsize=1024)
    def views(index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        try:
            thumbnail = _thumbnail(_file_content(contents.root / contents.paths[index].as_py()))
        except UnreadableImageError:  # it was changed meanwhile
            return None
        return thumbnail, _details(thumbnail)

    def are_copies(left: int, right: int) -> bool:
        pairs = zip(views(left) or (), views(right) or (), strict=False)
        correlations = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs]
        return len(correlations) > 0 and min(correlations) >= LEAST_CORRELATION

    return are_copies


def _unreadable(samples: _Samples, contents: _Contents) -> Iterator[Finding]:
    for index in sorted(contents.reasons):
        path = samples.paths[index].as_py()
        yield Finding("unreadable", f"{path!r} ({contents.reasons[index]})", (path,))


def _class_balance(samples: _Samples) -> Iterator[Finding]:
    for index, domain in enumerate(samples.names):
        for name, images in zip(samples.listing.classes, _images_per_class(samples, index), strict=True):
            if images == 0:
                yield Finding("missing-class", f"no image of class {name!r} in domain {domain!r}")
            elif images < FEW:
                counted = f"{images} {'image' if images == 1 else 'images'}"
                yield Finding("few-images", f"{counted} of class {name!r} in domain {domain!r}")


def _images_per_class(samples: _Samples, domain: int) -> tuple[int, ...]:
    counts = np.bincount(samples.labels[samples.domains == domain], minlength=len(samples.listing.classes))
    return tuple(counts.tolist())


def _duplicates(samples: _Samples, same: NDArray[np.intp], alike: NDArray[np.intp]) -> Iterator[Finding]:
    for members in _shared(alike):
        paths = samples.paths_of(members)
        how = "the same bytes" if len(np.unique(same[members])) == 1 else "nearly the same image"
        domains = [samples.names[index] for index in np.unique(samples.domains[members])]
        if len(domains) > 1:
            where = " and ".join(map(repr, domains))
            yield Finding("duplicate-across-domains", f"{how} in the domains {where}: {_few(paths)}", paths)
        elif len(np.unique(samples.out[members])) > 1:
            yield Finding("duplicate-across-splits", f"{how} in both splits of {domains[0]!r}: {_few(paths)}", paths)
        elif len(np.unique(samples.labels[members])) == 1:  # else they contradict each other
            yield Finding("duplicate-in-domain", f"{how} in the domain {domains[0]!r}: {_few(paths)}", paths)


def _contradictions(samples: _Samples, same: NDArray[np.intp]) -> Iterator[Finding]:
    for members in _shared(same):
        labels = samples.labels[members]
        if len(np.unique(labels)) > 1:
            paths = samples.paths_of(members)
            classes = " and ".join(repr(samples.listing.classes[label]) for label in np.unique(labels))
            yield Finding("contradictory-labels", f"the same bytes in the classes {classes}: {_few(paths)}", paths)


def _torn_groups(samples: _Samples) -> Iterator[Finding]:
    if samples.groups is None:
        return
    torn = np.intersect1d(samples.groups[samples.out], samples.groups[~samples.out])
    in_torn = np.flatnonzero(np.isin(samples.groups, torn))
    for positions in _shared(samples.groups[in_torn]):
        members = in_torn[positions]
        paths = samples.paths_of(members)
        inside, outside = (paths[np.flatnonzero(samples.out[members] == is_out)[0]] for is_out in (False, True))
        yield Finding(
            "group-across-splits",
            f"a group of {len(paths):,} images is in both splits: {inside!r} in the in-split, {outside!r} in the "
            "out-split",
            paths,
        )


def _shared(codes: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """The indices that have a code, for every code that several have."""
    order = np.argsort(codes, kind="stable")
    _, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        yield order[start : start + count]


def _few(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    return f"{', '.join(map(repr, paths[:SHOWN]))}{more}"


def _summary(samples: _Samples, contents: _Contents, domain: int) -> DomainSummary:
    of_domain = samples.domains == domain
    sizes = contents.sizes[of_domain & contents.readable]
    sizes = sizes[np.argsort(sizes.prod(axis=1, dtype=np.int64), kind="stable")]
    images = int(of_domain.sum())
    smallest, median, largest = (
        (int(sizes[index, 0]), int(sizes[index, 1])) if len(sizes) else None for index in (0, len(sizes) // 2, -1)
    )
    return DomainSummary(images, images - len(sizes), _images_per_class(samples, domain), smallest, median, largest)
