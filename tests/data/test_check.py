"""Reports on pictures with planted defects; pairs of hashes are compared with a search of all pairs."""

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance

from fishr.data import check as check_module
from fishr.data.check import DataReport, Finding, candidate_pairs, check_images, perceptual_hash
from fishr.data.image_dataset import listing_of
from fishr.data.image_format import ImageFormat
from fishr.errors import ConfigError, DataError, UnreadableImageError

DOMAINS, CLASSES, EACH = ("art", "photo", "sketch"), ("cat", "dog"), 5


def picture(seed: int) -> Image.Image:
    """Smooth colors with some shapes on them."""
    random = np.random.default_rng(seed)
    colors = random.integers(256, size=(6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((120, 90), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = random.integers(100), random.integers(70)
        draw.ellipse(
            [x, y, x + random.integers(5, 30), y + random.integers(5, 30)], fill=tuple(random.integers(256, size=3))
        )
    return image


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "clean"
    seed = 0
    for domain in DOMAINS:
        for name in CLASSES:
            (root / domain / name).mkdir(parents=True)
            for index in range(EACH):
                picture(seed).save(root / domain / name / f"{index}.png")
                seed += 1
    return root


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    """A copy to plant defects in."""
    return shutil.copytree(clean, tmp_path / "copy")


def report_of(path: Path) -> DataReport:
    return check_images(listing_of(str(path)))


def kinds(report: DataReport) -> list[str]:
    return [finding.kind for finding in report.findings]


def only_finding(report: DataReport) -> Finding:
    (finding,) = report.findings
    return finding


def manifest(folder: Path, columns: dict[str, dict[str, str]], default: dict[str, str]) -> Path:
    """A manifest of a folder's images, with further columns that differ from the default for some paths."""
    path = folder / "images.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "domain", *columns])
        for image in sorted(folder.rglob("*.*")):
            if image != path:
                name = image.relative_to(folder).as_posix()
                more = [values.get(name, default[column]) for column, values in columns.items()]
                writer.writerow([name, image.parent.name, image.parent.parent.name, *more])
    return path


# What is fit


def test_nothing_is_found_where_nothing_is_wrong(clean):
    report = report_of(clean)
    assert report.fit
    assert report.findings == ()
    assert report.classes == CLASSES
    assert list(report.domains) == list(DOMAINS)
    for domain in report.domains.values():
        assert (domain.images, domain.unreadable, domain.images_per_class) == (2 * EACH, 0, (EACH, EACH))
        assert domain.smallest == domain.median == domain.largest == (120, 90)


def test_progress_counts_to_the_number_of_images(clean):
    calls = []
    check_images(listing_of(str(clean)), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (30, 30)
    assert calls == sorted(calls)


def test_sizes_are_those_stored_by_area(folder):
    for index, size in enumerate([(10, 400), (30, 20), (50, 50)]):
        picture(100 + index).resize(size).save(folder / "art" / "cat" / f"{index}.png")
    art = report_of(folder).domains["art"]
    assert (art.smallest, art.median, art.largest) == ((30, 20), (120, 90), (120, 90))
    turned = folder / "photo" / "cat" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture(0).resize((300, 200)).save(turned, exif=exif)
    assert report_of(folder).domains["photo"].largest == (300, 200)


# What cannot be read


def truncated(path: Path) -> None:
    file = io.BytesIO()
    picture(200).save(file, "JPEG")
    path.write_bytes(file.getvalue()[:-300])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "truncated JPEG"),
        (lambda path: path.write_text("a text"), "not an image, or damaged at its start"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (os.mkfifo, "no such file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
    ids=["truncated", "text", "empty", "pipe", "broken link"],
)
def test_what_cannot_be_read_is_named(folder, spoil, reason):
    spoil(folder / "art" / "dog" / "spoilt.jpg")
    report = report_of(folder)
    finding = only_finding(report)
    assert (finding.kind, finding.severity, finding.paths) == ("unreadable", "wrong", ("art/dog/spoilt.jpg",))
    assert f"'art/dog/spoilt.jpg' ({reason}" in finding.message
    assert not report.fit
    assert (report.domains["art"].images, report.domains["art"].unreadable) == (11, 1)


def test_missing_files_of_a_manifest_cannot_be_read(folder):
    path = manifest(folder, {}, {})
    (folder / "photo" / "cat" / "2.png").unlink()
    assert only_finding(report_of(path)).message == "'photo/cat/2.png' (no such file)"


@pytest.mark.parametrize("size", [1, 64, 224, 600])
def test_what_is_unreadable_is_what_training_cannot_read(folder, size):
    """Files cut at every length and with other modes: readable here as they are for any format."""
    file = io.BytesIO()
    picture(300).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    contents = [content[:length] for length in range(0, len(content) + 1, 97)]
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F"):
        file = io.BytesIO()
        if mode == "I;16":
            Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(file, "TIFF")
        else:
            picture(301).convert("L" if mode in "IF" else "RGB").convert(mode).save(file, "TIFF")
        contents.append(file.getvalue())
    expected = set()
    for index, content in enumerate(contents):
        name = f"art/cat/cut {index:03}.jpg"
        (folder / name).write_bytes(content)
        try:
            ImageFormat(size).decode(content)
        except UnreadableImageError:
            expected.add(name)
    found = {path for finding in report_of(folder).findings if finding.kind == "unreadable" for path in finding.paths}
    assert found == expected
    assert 0 < len(expected) < len(contents)


def test_nothing_readable_at_all_is_reported_too(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    assert kinds(report_of(folder)) == ["unreadable"] * 30


def test_nothing_readable_in_a_domain_is_reported_too(folder):
    for path in (folder / "sketch").rglob("*.png"):
        path.write_bytes(b"")
    report = report_of(folder)
    sketch = report.domains["sketch"]
    assert (sketch.unreadable, sketch.smallest, sketch.median, sketch.largest) == (10, None, None, None)
    assert kinds(report) == ["unreadable"] * 10


# Classes


def test_a_class_missing_from_a_domain_is_wrong(folder):
    shutil.rmtree(folder / "photo" / "dog")
    report = report_of(folder)
    finding = only_finding(report)
    assert finding.kind == "missing-class"
    assert finding.message == "no image of class 'dog' in domain 'photo'"
    assert not report.fit
    assert report.domains["photo"].images_per_class == (EACH, 0)


def test_few_images_of_a_class_are_a_note(folder):
    (folder / "photo" / "dog" / "0.png").unlink()
    report = report_of(folder)
    assert report.fit
    assert only_finding(report).message == "4 images of class 'dog' in domain 'photo'"


# Copies


def test_the_same_bytes_in_two_domains_are_wrong(folder):
    shutil.copy(folder / "art" / "cat" / "1.png", folder / "sketch" / "cat" / "copy.png")
    report = report_of(folder)
    finding = only_finding(report)
    assert (finding.kind, finding.severity) == ("duplicate-across-domains", "wrong")
    assert finding.message == (
        "the same bytes in the domains 'art' and 'sketch': 'art/cat/1.png', 'sketch/cat/copy.png'"
    )
    assert not report.fit


COPIES = {
    "quality 30": lambda image: (image, {"quality": 30}),
    "quality 95": lambda image: (image, {"quality": 95}),
    "half the size": lambda image: (image.resize((60, 45)), {}),
    "squashed": lambda image: (image.resize((100, 100)), {}),
    "brighter": lambda image: (ImageEnhance.Brightness(image).enhance(1.1), {}),
    "all": lambda image: (ImageEnhance.Brightness(image.resize((60, 45))).enhance(1.1), {"quality": 30}),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_changed_copies_in_two_domains_are_wrong(folder, change):
    image, options = change(picture(7))
    image.save(folder / "photo" / "dog" / "copy.jpg", **options)
    finding = only_finding(report_of(folder))
    assert finding.kind == "duplicate-across-domains"
    assert finding.message == (
        "nearly the same image in the domains 'art' and 'photo': 'art/dog/2.png', 'photo/dog/copy.jpg'"
    )


def test_all_copies_of_an_image_make_one_finding(folder):
    original = folder / "art" / "cat" / "0.png"
    picture(0).save(folder / "photo" / "cat" / "a.jpg", quality=40)
    picture(0).save(folder / "sketch" / "dog" / "b.jpg", quality=60)
    shutil.copy(original, folder / "art" / "cat" / "again.png")
    shutil.copy(original, folder / "sketch" / "cat" / "same.png")
    finding = only_finding(report_of(folder))
    assert finding.kind == "duplicate-across-domains"
    copies = ("photo/cat/a.jpg", "sketch/cat/same.png", "sketch/dog/b.jpg")
    assert finding.paths == ("art/cat/0.png", "art/cat/again.png", *copies)
    assert "nearly the same image in the domains 'art' and 'photo' and 'sketch'" in finding.message
    assert finding.message.endswith("'sketch/cat/same.png' and 1 more")


def test_the_same_bytes_in_one_domain_are_a_note(folder):
    shutil.copy(folder / "art" / "cat" / "1.png", folder / "art" / "cat" / "copy.png")
    report = report_of(folder)
    assert report.fit
    finding = only_finding(report)
    assert (finding.kind, finding.severity) == ("duplicate-in-domain", "note")
    assert finding.paths == ("art/cat/1.png", "art/cat/copy.png")


def test_changed_copies_in_one_domain_are_no_finding(folder):
    picture(0).save(folder / "art" / "cat" / "copy.jpg", quality=40)
    assert report_of(folder).findings == ()


def test_the_same_bytes_with_different_labels_are_wrong(folder):
    shutil.copy(folder / "art" / "cat" / "1.png", folder / "art" / "dog" / "copy.png")
    report = report_of(folder)
    assert not report.fit
    finding = only_finding(report)
    assert finding.kind == "contradictory-labels"
    assert finding.message == "the same bytes in the classes 'cat' and 'dog': 'art/cat/1.png', 'art/dog/copy.png'"


def drawing(shift: int) -> Image.Image:
    """A few lines on white paper; such drawings have much in common."""
    image = Image.new("L", (120, 120), 255)
    draw = ImageDraw.Draw(image)
    draw.ellipse([30, 60, 90, 110], outline=0, width=2)
    draw.line([60, 5, 60, 60], width=3)
    draw.line([30 + shift, 20, 90 - shift, 40 + shift], width=2)
    draw.ellipse([50, 70 + shift // 2, 60 + shift, 90], outline=0, width=2)
    return image


def test_drawings_that_are_alike_are_no_copies(folder):
    drawing(0).save(folder / "art" / "cat" / "drawing.png")
    drawing(24).save(folder / "sketch" / "cat" / "drawing.png")
    assert report_of(folder).findings == ()
    drawing(0).save(folder / "photo" / "cat" / "drawing.jpg", quality=30)
    assert only_finding(report_of(folder)).paths == ("art/cat/drawing.png", "photo/cat/drawing.jpg")


def lit_page(seed: int) -> Image.Image:
    """A page in the light of a lamp, with dots."""
    light = np.hypot(*np.mgrid[-1:1:120j, -1:1:120j]).clip(0, 1)
    image = Image.fromarray((230 - 140 * light).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y in np.random.default_rng(seed).integers(20, 100, size=(6, 2)).tolist():
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=100)
    return image


def test_images_that_differ_in_their_details_are_no_copies(folder, monkeypatch):
    """Even where they are much alike as a whole, and whatever their hashes are."""
    monkeypatch.setattr(check_module, "candidate_pairs", lambda hashes, places: [np.triu_indices(len(hashes), 1)])
    one, other = (np.asarray(lit_page(seed), float) for seed in (0, 1))
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.94
    for seed, domain in enumerate(DOMAINS):
        lit_page(seed).save(folder / domain / "cat" / "page.png")
    assert report_of(folder).findings == ()


def test_copies_of_symmetric_images_are_found(folder):
    """Three quarters of their frequencies are absent, and what is left of them in a copy is noise."""
    for half in range(4, 40, 4):
        image = Image.new("L", (200, 200), 255)
        draw = ImageDraw.Draw(image)
        draw.ellipse([99 - 2 * half, 99 - 2 * half, 100 + 2 * half, 100 + 2 * half], outline=0, width=4)
        draw.rectangle([100 - half, 90, 99 + half, 109], fill=90)
        image.save(folder / "art" / "cat" / f"{half}.png")
        image.resize((100, 100)).save(folder / "photo" / "cat" / f"{half}.jpg", quality=30)
    report = report_of(folder)
    assert kinds(report) == ["duplicate-across-domains"] * 9
    assert all(len(finding.paths) == 2 for finding in report.findings)


def test_blank_pages_are_copies_only_with_the_same_bytes(folder):
    for index, domain in enumerate(DOMAINS):
        Image.new("RGB", (64, 64), (250 - index,) * 3).save(folder / domain / "cat" / "blank.png")
    assert report_of(folder).findings == ()
    shutil.copy(folder / "art" / "cat" / "blank.png", folder / "photo" / "cat" / "blank.png")
    assert kinds(report_of(folder)) == ["duplicate-across-domains"]


def test_many_images_of_one_hash_are_compared_in_bounded_time(folder, monkeypatch):
    """No more than a few of a hash in a domain, and copies that are known to be are not compared again."""
    for domain in ("art", "photo"):
        for quality in range(30, 90):
            picture(400).save(folder / domain / "cat" / f"{quality} {domain}.jpg", quality=quality, comment=domain)
    compared = []
    monkeypatch.setattr(check_module, "MOST_OF_A_HASH", 3)
    right = check_module._comparison

    def counting(contents):
        are_copies = right(contents)
        return lambda one, other: compared.append((one, other)) or are_copies(one, other)

    monkeypatch.setattr(check_module, "_comparison", counting)
    finding = only_finding(report_of(folder))
    assert finding.kind == "duplicate-across-domains"
    assert len(compared) == len(finding.paths) - 1 < 119


def test_an_image_with_many_that_are_alike_is_given_up(folder, monkeypatch):
    picture(7).save(folder / "photo" / "dog" / "copy.jpg")
    monkeypatch.setattr(check_module, "LEAST_CORRELATION", 1.1)
    assert report_of(folder).findings == ()
    calls = []
    monkeypatch.setattr(check_module, "_comparison", lambda _: lambda one, other: bool(calls.append((one, other))))
    for index in range(6):
        picture(7).save(folder / "photo" / "dog" / f"copy {index}.jpg", quality=90 + index)
    monkeypatch.setattr(check_module, "MOST_REFUTED", 3)
    report_of(folder)
    assert len(calls) == 3


# Splits and groups of a manifest


def test_copies_in_both_splits_are_wrong(folder):
    picture(0).save(folder / "art" / "cat" / "copy.jpg", quality=50)
    path = manifest(folder, {"split": {"art/cat/copy.jpg": "val"}}, {"split": "train"})
    report = report_of(path)
    assert not report.fit
    finding = only_finding(report)
    assert finding.kind == "duplicate-across-splits"
    assert finding.message == "nearly the same image in both splits of 'art': 'art/cat/0.png', 'art/cat/copy.jpg'"
    assert report_of(manifest(folder, {"split": {}}, {"split": "train"})).findings == ()


def test_groups_in_both_splits_are_all_reported(folder):
    groups = {"art/cat/0.png": "a", "photo/dog/1.png": "a", "art/cat/1.png": "b", "art/dog/0.png": "b"}
    groups |= {"art/cat/2.png": "fine", "art/cat/3.png": "fine"}
    splits = {"photo/dog/1.png": "val", "art/cat/1.png": "val"}
    path = manifest(folder, {"split": splits, "group": groups}, {"split": "train", "group": ""})
    report = report_of(path)
    assert not report.fit
    assert kinds(report) == ["group-across-splits"] * 2
    assert [finding.paths for finding in report.findings] == [
        ("art/cat/0.png", "photo/dog/1.png"),
        ("art/cat/1.png", "art/dog/0.png"),
    ]
    assert report.findings[1].message == (
        "a group of 2 images is in both splits: 'art/dog/0.png' in the in-split, 'art/cat/1.png' in the out-split"
    )


def test_groups_without_a_split_are_no_finding(folder):
    groups = {"art/cat/0.png": "a", "photo/dog/1.png": "a"}
    assert report_of(manifest(folder, {"group": groups}, {"group": ""})).findings == ()


# The search for pairs


def all_pairs(hashes: NDArray[np.uint16], places: Sequence[int]) -> set[tuple[int, int]]:
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    return {
        (left, right)
        for left in range(len(hashes))
        for right in range(left + 1, len(hashes))
        if places[left] != places[right]
        and (bits[left, :64] != bits[right, :64]).sum() <= 7
        and (bits[left] != bits[right]).sum() <= 32
    }


@pytest.mark.parametrize("at_a_time", [2**20, 7])
def test_candidates_are_all_pairs_that_differ_little_each_once(monkeypatch, at_a_time):
    monkeypatch.setattr(check_module, "PAIRS_AT_A_TIME", at_a_time)
    random = np.random.default_rng(0)
    bits = random.integers(2, size=(12, 256), dtype=np.uint8).repeat(15, axis=0)
    flips = random.random((180, 256)) < random.choice([0.0, 0.02, 0.06, 0.1], size=(180, 1))
    hashes = np.packbits(bits ^ flips, axis=1).view(np.uint16)
    places = random.integers(3, size=180)
    found = [
        (min(pair), max(pair))
        for left, right in candidate_pairs(hashes, places)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = all_pairs(hashes, places.tolist())
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) > 100


def test_a_hash_changes_little_with_light_and_noise():
    thumbnail = 40 * np.random.default_rng(0).normal(size=(16, 16)).repeat(4, axis=0).repeat(4, axis=1).astype(
        np.float32
    )
    noise = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    bits = np.unpackbits(perceptual_hash(thumbnail).view(np.uint8))
    changed = np.unpackbits(perceptual_hash(1.2 * thumbnail + 50 + noise).view(np.uint8))
    other = np.unpackbits(perceptual_hash(40 * noise).view(np.uint8))
    assert len(bits) == 256
    assert (bits[:64] != changed[:64]).sum() <= 3
    assert (bits[:64] != other[:64]).sum() >= 16


# What can be checked


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"image dataset 'pac'.*pacs.*there is no folder or manifest 'pac'"):
        listing_of("pac")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes\.txt is neither a folder nor a manifest \(\.csv or \.parquet\)"):
        listing_of(str(tmp_path / "notes.txt"))


# Real images


def test_planted_defects_among_real_images(data_root, tmp_path):
    """A part of PACS, with sketches that are much alike: nothing is found in it but what is planted."""
    source, copy = data_root / "PACS", tmp_path / "PACS"
    for domain in sorted(path.name for path in source.iterdir()):
        for name in ("dog", "guitar", "house"):
            (copy / domain / name).mkdir(parents=True)
            for path in sorted((source / domain / name).iterdir())[:25]:
                shutil.copy(path, copy / domain / name)
    assert report_of(copy).findings == ()

    def pick(domain: str, name: str) -> Path:
        return min((copy / domain / name).iterdir())

    shutil.copy(pick("photo", "dog"), copy / "art_painting" / "dog" / "same.jpg")
    Image.open(pick("sketch", "guitar")).convert("RGB").save(copy / "cartoon" / "guitar" / "changed.jpg", quality=30)
    cut = pick("cartoon", "house")
    cut.write_bytes(cut.read_bytes()[:-2000])
    shutil.rmtree(copy / "photo" / "guitar")
    report = report_of(copy)
    assert kinds(report) == ["unreadable", "missing-class", "duplicate-across-domains", "duplicate-across-domains"]
    unreadable, missing, *copies = report.findings
    assert unreadable.paths == (cut.relative_to(copy).as_posix(),)
    assert missing.message == "no image of class 'guitar' in domain 'photo'"
    assert {finding.paths for finding in copies} == {
        ("art_painting/dog/same.jpg", pick("photo", "dog").relative_to(copy).as_posix()),
        ("cartoon/guitar/changed.jpg", pick("sketch", "guitar").relative_to(copy).as_posix()),
    }
