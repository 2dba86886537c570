import errno
import gzip
import hashlib
import http.server
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision

from fishr.data import mnist
from fishr.data.mnist import data_root as default_data_root
from fishr.data.mnist import mnist_images
from fishr.errors import DataError

TRAIN, TEST = 12, 5
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLOSED_PORT = "http://127.0.0.1:9/"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The content of four small files that stand for MNIST's, their md5s taken for the canonical ones."""
    generator = np.random.default_rng(0)
    contents = {}
    for part, size in (("train", TRAIN), ("t10k", TEST)):
        contents[f"{part}-images-idx3-ubyte"] = idx(generator.integers(256, size=(size, 28, 28)))
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.arange(size) % 10)
    monkeypatch.setattr(mnist, "RAW_MD5", {name: md5(content) for name, content in contents.items()})
    return contents


def write(root: Path, contents: dict[str, bytes], *, zipped: bool = True) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


class Mirror:
    """A web server on this machine: path to content, and the paths it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.withheld_bytes = 0
        self.asked: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                content = mirror.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - mirror.withheld_bytes])

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, small_mnist: dict[str, bytes]) -> Iterator[Mirror]:
    """A mirror that has the small files, the only one that is known."""
    mirror = Mirror()
    mirror.files = {f"/mnist/{name}.gz": gzip.compress(content) for name, content in small_mnist.items()}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{mirror.url}/mnist/"])
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_the_files_hold(tmp_path: Path, small_mnist: dict[str, bytes], zipped: bool) -> None:
    write(tmp_path, small_mnist, zipped=zipped)
    train, test = mnist_images(tmp_path)
    assert train.images.shape == (TRAIN, 28, 28)
    assert train.images.dtype == np.uint8
    assert train.images.tobytes() == small_mnist["train-images-idx3-ubyte"][16:]
    assert test.images.tobytes() == small_mnist["t10k-images-idx3-ubyte"][16:]
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert test.labels.tolist() == [0, 1, 2, 3, 4]


def test_pooled_is_train_then_test(tmp_path: Path, small_mnist: dict[str, bytes]) -> None:
    write(tmp_path, small_mnist)
    both = mnist_images(tmp_path)
    images, labels = both.pooled()
    assert np.array_equal(images[:TRAIN], both.train.images)
    assert np.array_equal(images[TRAIN:], both.test.images)
    assert labels.tolist() == [*both.train.labels, *both.test.labels]


def test_a_gz_that_the_browser_unpacked_is_read(tmp_path: Path, small_mnist: dict[str, bytes]) -> None:
    folder = write(tmp_path, small_mnist)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(small_mnist["train-labels-idx1-ubyte"])
    assert len(mnist_images(tmp_path).train.labels) == TRAIN


def test_real_mnist(data_root: Path) -> None:
    train, test = mnist_images(data_root)
    assert (train.images.shape, test.images.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    # Images of each digit, as LeCun's files are known to have.
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # The mean gray level that everybody normalises MNIST by.
    assert train.images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)


def test_root_is_the_argument_then_the_variable_then_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FISHR_DATA", str(tmp_path / "named"))
    assert default_data_root(tmp_path / "given") == tmp_path / "given"
    assert default_data_root(Path("~/given")) == tmp_path / "home" / "given"
    assert default_data_root() == tmp_path / "named"
    monkeypatch.setenv("FISHR_DATA", "")
    assert default_data_root() == tmp_path / "cache" / "fishr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_data_root() == tmp_path / "home" / ".cache" / "fishr"


def test_reads_from_the_variable(
    tmp_path: Path, small_mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, small_mnist)
    monkeypatch.setenv("FISHR_DATA", str(tmp_path))
    assert len(mnist_images().train.labels) == TRAIN


@pytest.mark.parametrize("change", ["pixel", "header", "cut short", "web page"])
@pytest.mark.parametrize("zipped", [True, False])
def test_wrong_content_is_refused(tmp_path: Path, small_mnist: dict[str, bytes], change: str, zipped: bool) -> None:
    folder = write(tmp_path, small_mnist, zipped=zipped)
    name = "t10k-images-idx3-ubyte"
    right = small_mnist[name]
    wrong = {
        "pixel": right[:-1] + bytes([right[-1] ^ 1]),
        "header": b"\xff" + right[1:],
        "cut short": right[:-1],
        "web page": b"<!DOCTYPE html><title>Sign in</title>",
    }[change]
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(wrong) if zipped else wrong)
    message = f"{path} has content with md5 {md5(wrong)}, expected {md5(right)}: delete it to have it downloaded"
    with pytest.raises(DataError, match=re.escape(message)):
        mnist_images(tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("cut short", "ended before"), ("end garbled", "CRC check failed"), ("beginning garbled", "invalid block type")],
)
def test_damaged_gzip_is_refused(tmp_path: Path, small_mnist: dict[str, bytes], damage: str, reason: str) -> None:
    folder = write(tmp_path, small_mnist)
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        content = content[:-100]
    else:
        content[-8 if damage == "end garbled" else 10] ^= 0xFF
    path.write_bytes(content)
    expected = md5(small_mnist["train-images-idx3-ubyte"])
    with pytest.raises(
        DataError,
        match=rf"{re.escape(str(path))} is a damaged gzip file of \d+ bytes \(.*{reason}.*\), "
        rf"its content should have md5 {expected}: delete it",
    ):
        mnist_images(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path, small_mnist: dict[str, bytes]) -> None:
    folder = write(tmp_path, {name: small_mnist[name] for name in NAMES[1:]})
    (folder / NAMES[0]).mkdir()
    with pytest.raises(DataError, match=rf"{NAMES[0]} cannot be read \(Is a directory\): make it a readable file"):
        mnist_images(tmp_path)


def test_missing_files_are_downloaded_once(tmp_path: Path, mirror: Mirror, small_mnist: dict[str, bytes]) -> None:
    folder = write(tmp_path / "root", {NAMES[0]: small_mnist[NAMES[0]]})
    first = mnist_images(tmp_path / "root")
    assert mirror.asked == [f"/mnist/{name}.gz" for name in NAMES[1:]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in NAMES)
    second = mnist_images(tmp_path / "root")
    assert len(mirror.asked) == 3
    assert np.array_equal(first.test.images, second.test.images)
    assert first.test.images.tobytes() == small_mnist["t10k-images-idx3-ubyte"][16:]


def test_downloaded_files_can_be_read_by_others(tmp_path: Path, mirror: Mirror) -> None:
    """A temporary file made for one user alone would stay so after it is renamed."""
    mnist_images(tmp_path)
    usual = tmp_path / "usual"
    usual.touch()
    downloaded = tmp_path / "MNIST" / "raw" / f"{NAMES[0]}.gz"
    assert downloaded.stat().st_mode == usual.stat().st_mode


def test_the_next_mirror_is_asked_when_one_fails(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.files |= {f"/wrong/{name}.gz": b"not MNIST" for name in NAMES}
    monkeypatch.setattr(
        torchvision.datasets.MNIST,
        "mirrors",
        [CLOSED_PORT, f"{mirror.url}/gone/", f"{mirror.url}/wrong/", f"{mirror.url}/mnist/"],
    )
    assert len(mnist_images(tmp_path).train.labels) == TRAIN
    assert mirror.asked[:3] == [f"/{place}/{NAMES[0]}.gz" for place in ("gone", "wrong", "mnist")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("connection lost", r"gave no file \(IncompleteRead\(\d+ bytes read, 10 more expected\)\)"),
        (
            "gzip cut short",
            r"is a damaged gzip file of \d+ bytes \(Compressed file ended .+\), its content should have",
        ),
        ("other content", r"has content with md5 [0-9a-f]{32}, expected [0-9a-f]{32}"),
        ("not there", r"gave no file \(HTTP Error 404: Not Found\)"),
    ],
)
def test_a_bad_download_leaves_nothing(tmp_path: Path, mirror: Mirror, fault: str, reason: str) -> None:
    path = f"/mnist/{NAMES[0]}.gz"
    if fault == "connection lost":
        mirror.withheld_bytes = 10
    elif fault == "gzip cut short":
        mirror.files[path] = mirror.files[path][:-100]
    elif fault == "other content":
        mirror.files[path] = gzip.compress(b"other content")
    else:
        del mirror.files[path]
    folder = tmp_path / "MNIST" / "raw"
    message = re.escape(f"{NAMES[0]}.gz is not in {folder} and could not be downloaded ({mirror.url}{path} ")
    with pytest.raises(DataError, match=message + reason):
        mnist_images(tmp_path)
    assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(
        DataError, match=r"cannot be downloaded to there \(No space left on device\): put the four MNIST"
    ):
        mnist_images(tmp_path)
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []


def test_without_network_the_error_tells_the_cure(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [CLOSED_PORT])
    with pytest.raises(DataError) as caught:
        mnist_images(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{NAMES[0]}.gz is not in {tmp_path / 'MNIST' / 'raw'} and could not be downloaded")
    assert "Connection refused" in message
    assert f"put the four MNIST files ({', '.join(NAMES)}, gzipped or not) there" in message
    assert message.endswith("or name a folder with MNIST/raw in it by --data-root or FISHR_DATA")
    assert "\n" not in message


def test_a_root_that_is_a_file_is_refused(tmp_path: Path, mirror: Mirror) -> None:
    (tmp_path / "root").touch()
    with pytest.raises(
        DataError,
        match=rf"{NAMES[0]}.gz is not in .*, and it cannot be downloaded to there \(.+\): put the four MNIST files",
    ):
        mnist_images(tmp_path / "root")
    assert mirror.asked == []


def test_a_read_only_root_is_refused_before_anything_is_downloaded(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(DataError, match=r"cannot be downloaded to there \(Read-only file system\): put the four MNIST"):
        mnist_images(tmp_path)
    assert mirror.asked == []
