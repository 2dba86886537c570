import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fishr.files import new_folder, write_text


class FullDiskError(OSError):
    pass


def fail(*_: Any, **__: Any) -> None:
    raise FullDiskError(errno.ENOSPC, "No space left on device")


# A file


@pytest.mark.parametrize("text", ["", "one line\n", "Größe ∅\r\nzwei", "x" * 1_000_000])
@pytest.mark.parametrize("before", [None, "what was there before, longer than some"])
def test_a_file_is_written(tmp_path: Path, text: str, before: str | None) -> None:
    file = tmp_path / "file.json"
    if before is not None:
        file.write_text(before)
    write_text(file, text)
    assert file.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")
    monkeypatch.setattr(failing, fail)
    with pytest.raises(FullDiskError, match="No space left"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_content_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")
    seen = []

    def fsync(descriptor: int) -> None:
        asides = set(tmp_path.iterdir()) - {file}
        seen.append((file.read_text(), [aside.read_text() for aside in asides]))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(file, "new")
    assert seen == [("old", ["new"]), ("new", [])]


# A folder


def fill(folder: Path, *, content: str) -> None:
    with new_folder(folder) as aside:
        (aside / "one").write_text(content)
        (aside / "two").write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with new_folder(folder) as aside:
        assert aside.is_dir()
        (aside / "one").write_text("1")
        assert not folder.exists()
    assert contents(folder) == {"one": "1"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    fill(tmp_path / "model", content="old")
    (tmp_path / "model/three").write_text("old")
    fill(tmp_path / "model", content="new")
    assert contents(tmp_path / "model") == {"one": "new", "two": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_while_filling_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fail_half_way() -> None:
        with new_folder(tmp_path / "model") as aside:
            (aside / "one").write_text("new")
            raise error

    fill(tmp_path / "model", content="old")
    with pytest.raises(error):
        fail_half_way()
    assert contents(tmp_path / "model") == {"one": "old", "two": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_to_reach_the_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model", content="old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FullDiskError):
        fill(tmp_path / "model", content="new")
    assert contents(tmp_path / "model") == {"one": "old", "two": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_to_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model", content="old")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(FullDiskError):
        fill(tmp_path / "model", content="new")
    assert contents(tmp_path / "model") == {"one": "old", "two": "old"}


def test_what_the_same_process_left_before_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / f".model.{socket.gethostname()}.{os.getpid()}"
    left.mkdir()
    (left / "stale").touch()
    fill(tmp_path / "model", content="new")
    assert contents(tmp_path / "model") == {"one": "new", "two": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_file_is_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    fill(tmp_path / "model", content="new")
    assert set(forced) >= {(tmp_path / "model" / name).stat().st_ino for name in ("one", "two")}
