"""What somebody's own images can be like: one line that says what to do and exit code 2, or they are converted."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishr.cli import main
from small_runs import write_pictures

BACKBONE = ["--no-pretrained", "--backbone", "test_resnet", "--image-size", "16"]
RUN = [*BACKBONE, "--batch-size", "2", "--steps", "1", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "my pictures ü")


def train(data: Path | str, *more: str) -> int:
    return main(["train", "--data", str(data), "--output", "run", *RUN, *more])


def first_image(folder: Path) -> Path:
    return min(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``fishr train``, which must fail with exit code 2 and leave no run; returns its last line, the error."""

    def error(data: Path | str, *more: str) -> str:
        assert train(data, *more) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        *warnings, line = captured.err.splitlines()
        assert all(warning.startswith("fishr: warning: ") for warning in warnings)
        assert line.startswith("fishr: error: ")
        assert not Path("run").exists()
        return line

    return error


def test_an_empty_folder(tmp_path, error_of):
    (tmp_path / "empty").mkdir()
    assert "expected DOMAIN/CLASS/image" in error_of("empty")


def test_one_domain_only(pictures, error_of):
    for domain in sorted(pictures.iterdir())[1:]:
        domain.rename(pictures.parent / domain.name)
    assert "1 domain to train on or hold out" in error_of(pictures)


def test_a_class_missing_from_a_domain_is_a_warning_and_with_strict_an_error(pictures, error_of, capsys):
    domain, missing = first_image(pictures).parts[-3:-1]
    (pictures / domain / missing).rename(pictures.parent / "elsewhere")
    assert train(pictures) == 0
    warning = capsys.readouterr().err
    assert "warning" in warning
    assert missing in warning
    assert domain in warning
    Path("run").rename("done")
    message = error_of(pictures, "--strict")
    assert missing in message
    assert domain in message


def truncate(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "truncated JPEG"),
        (lambda path: path.write_text("a text"), "not an image"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
    ],
    ids=["truncated", "text", "zero bytes"],
)
@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_unreadable_images_are_named(pictures, spoil, reason, cache, error_of):
    path = first_image(pictures).with_name("a first.jpg")
    spoil(path)
    message = error_of(pictures, "--cache", cache)
    assert f"1 of 73 images cannot be read: {path} ({reason}" in message
    assert "repair or remove" in message


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "P", "LA", "1", "animated"])
def test_other_kinds_of_images_are_converted(pictures, mode):
    path = first_image(pictures)
    colors = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
    if mode == "I;16":
        Image.fromarray(colors[..., 0].astype(np.uint16) * 257).save(path.with_name("other.png"))
    elif mode == "CMYK":
        Image.fromarray(colors).convert("CMYK").save(path.with_name("other.jpg"))
    elif mode == "animated":
        frames = [Image.fromarray(np.roll(colors, shift, 0)) for shift in range(3)]
        frames[0].save(path.with_name("other.gif"), save_all=True, append_images=frames[1:])
    else:
        Image.fromarray(colors).convert(mode).save(path.with_name("other.png"))
    assert train(pictures) == 0


def test_a_cache_folder_that_cannot_be_written(pictures, tmp_path, error_of):
    (tmp_path / "cache").write_text("a file in its place")
    message = error_of(pictures)
    assert str(tmp_path / "cache") in message
    assert "--cache ram" in message
    assert train(pictures, "--cache", "ram") == 0


@contextmanager
def full_disk(beginning: str) -> Iterator[None]:
    """Inside the block, nothing whose path begins like this can be forced to disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(beginning):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield


def test_a_full_disk_while_caching(pictures, tmp_path, error_of):
    with full_disk(f"{tmp_path}/cache"):
        message = error_of(pictures)
        assert "no space" in message
        assert "$FISHR_CACHE" in message
        assert train(pictures, "--cache", "none") == 0


@pytest.mark.parametrize("place", ["run/", "run/checkpoints/", "run/.model"])
def test_a_full_disk_while_saving_loses_nothing(pictures, tmp_path, place, capsys):
    more = ("--cache", "none", "--steps", "4", "--checkpoint-every", "1", "--select")
    assert train(pictures, *more) == 0
    undisturbed = (tmp_path / "run").rename(tmp_path / "undisturbed")
    capsys.readouterr()
    with full_disk(f"{tmp_path}/{place}"):
        assert train(pictures, *more) == 2
    assert "No space left on device; what was saved before is intact" in capsys.readouterr().err
    assert train(pictures, *more) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_an_image_size_the_backbone_cannot_take(pictures, error_of):
    message = error_of(pictures, "--backbone", "vit_tiny_patch16_224")
    assert "cannot take images of 16" in message
    assert "--image-size" in message


def test_an_unknown_test_domain(pictures, error_of):
    domain = sorted(path.name for path in pictures.iterdir())[0]
    assert f"did you mean {domain!r}?" in error_of(pictures, "--test-domain", f"{domain}x")


# Manifests


def manifest(pictures: Path, change: Callable[[list[str]], list[str]] = lambda rows: rows) -> Path:
    rows = [
        f"{path.relative_to(pictures).as_posix()},{path.parent.name},{path.parent.parent.name}"
        for path in sorted(pictures.rglob("*"))
        if path.is_file()
    ]
    file = pictures / "list.csv"
    file.write_text("\n".join(change(["path,label,domain", *rows])) + "\n", encoding="utf-8")
    return file


def test_a_good_manifest(pictures):
    assert train(manifest(pictures)) == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [row.rpartition(",")[0] for row in rows], "domain"),
        (lambda rows: [*rows, "nowhere.png,cat,street"], "1 of 73 images of 'list' are missing"),
        (lambda rows: [*rows, rows[-1]], "rows 73 and 74"),
    ],
    ids=["missing column", "missing file", "duplicate row"],
)
def test_a_bad_manifest(pictures, change, expected, error_of):
    assert expected in error_of(manifest(pictures, change))


def test_nothing_is_lost_when_the_images_are_repaired(pictures):
    path = first_image(pictures).with_name("a first.jpg")
    path.write_bytes(b"")
    assert train(pictures) == 2
    path.unlink()
    assert train(pictures) == 0
