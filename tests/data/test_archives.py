"""Archives that are honest, damaged or hostile."""

import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fishr.data import archives
from fishr.data.archives import DamagedArchiveError, Member, list_members, read_members, unpack
from fishr.errors import DataError
from small_archives import NOISE, folder_of, tar_of, zip_of

FILES = {"data/photo/dog/1.jpg": b"first", "data/photo/cat/[bold]ü.jpg": b"second" * 1000, "data/readme.txt": b""}


ARCHIVES = pytest.mark.parametrize(
    ("make", "name"),
    [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz"), (tar_of, "a.tar.xz"), (folder_of, "a"), (zip_of, "a")],
)


@ARCHIVES
def test_members_are_listed_read_and_unpacked(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, FILES)
    assert sorted(list_members(archive)) == sorted(Member(file, len(content)) for file, content in FILES.items())
    assert read_members(archive, ["data/photo/dog/1.jpg"]) == {"data/photo/dog/1.jpg": b"first"}
    done: list[None] = []
    out = tmp_path / "out"
    places = {"data/photo/dog/1.jpg": [out / "a" / "1.jpg", out / "b" / "1.jpg"], "data/readme.txt": [out / "c"]}
    unpack(archive, places, lambda: done.append(None))
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {"a/1.jpg": b"first", "b/1.jpg": b"first", "c": b""}
    assert len(done) == 2


def test_detours_and_folders_are_no_members(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", {"./data//photo/./1.jpg": b"1"})
    with tarfile.open(archive, "a") as opened:
        folder = tarfile.TarInfo("./data")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
    assert list_members(archive) == [Member("data/photo/1.jpg", 1)]
    assert read_members(archive, ["data/photo/1.jpg"]) == {"data/photo/1.jpg": b"1"}


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/cron.d/job", "has an absolute path"),
        ("//host/share/1.jpg", "has an absolute path"),
        ("C:/windows/1.jpg", "has an absolute path"),
        ("c:1.jpg", "has an absolute path"),
        ("../1.jpg", "leads out of its folder"),
        ("data/photo/../../../1.jpg", "leads out of its folder"),
        ("data/../photo/1.jpg", "leads out of its folder"),
        ("data\\..\\1.jpg", "has a backslash in its path"),
    ],
)
def test_hostile_paths_are_refused(make: Callable[..., Path], name: str, reason: str, tmp_path: Path) -> None:
    archive = make(tmp_path / "a.archive", {**FILES, name: b"hostile"})
    with pytest.raises(DataError) as caught:
        list_members(archive)
    assert str(caught.value).startswith(
        f"{archive} is refused and nothing of it unpacked, its member {name!r} {reason}: get"
    )


def _typed(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo("data/photo/dog/2.jpg")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (_typed(tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (_typed(tarfile.SYMTYPE, "1.jpg"), "is a link"),
        (_typed(tarfile.LNKTYPE, "../../../etc/passwd"), "is a link"),
        (_typed(tarfile.CHRTYPE), "is a device"),
        (_typed(tarfile.BLKTYPE), "is a device"),
        (_typed(tarfile.FIFOTYPE), "is a device"),
    ],
)
def test_links_and_devices_in_tars_are_refused(info: tarfile.TarInfo, reason: str, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", FILES)
    with tarfile.open(archive, "a") as opened:
        opened.addfile(info)
    with pytest.raises(DataError, match=rf"its member 'data/photo/dog/2\.jpg' {reason}: get the archive from where"):
        list_members(archive)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(stat.S_IFLNK, "is a link"), (stat.S_IFCHR, "is a device"), (stat.S_IFIFO, "is a pipe")],
)
def test_links_and_devices_in_zips_are_refused(kind: int, reason: str, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("data/photo/dog/2.jpg")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=f"its member 'data/photo/dog/2.jpg' {reason}"):
        list_members(tmp_path / "a.zip")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"1.jpg": b"1"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # general purpose flags in the central directory
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"its member '1\.jpg' is encrypted: .* a folder that you have unpacked it to"):
        list_members(archive)


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", {"caf\udce9.jpg": b"1"})
    with pytest.raises(DataError, match=r"its member 'caf\\udce9\.jpg' has a name that is no UTF-8"):
        list_members(archive)


def test_names_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("data/1.jpg"))
        archive.addfile(tarfile.TarInfo("./data/1.jpg"))
    with pytest.raises(DataError, match=r"its member '\./data/1\.jpg' stands there twice"):
        list_members(tmp_path / "a.tar")


class TestBombs:
    @pytest.fixture(autouse=True)
    def small_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 100_000)

    @pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar.gz")])
    def test_what_unpacks_to_too_much_is_refused(self, make: Callable[..., Path], name: str, tmp_path: Path) -> None:
        archive = make(tmp_path / name, {"1.jpg": bytes(5_000_000)})
        limit = max(100_000, 100 * archive.stat().st_size)
        with pytest.raises(DataError, match=f"'1.jpg' brings the unpacked size to more than {limit:,} bytes: get"):
            list_members(archive)

    def test_a_declared_size_is_enough(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("1.jpg")
        info.size = 10**15
        (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(10_240))
        with pytest.raises(DataError, match="brings the unpacked size to more than"):
            list_members(tmp_path / "a.tar")

    def test_empty_members_count(self, tmp_path: Path) -> None:
        archive = tar_of(tmp_path / "a.tar.gz", {f"{number}.jpg": b"" for number in range(1_000)})
        with pytest.raises(DataError, match="brings the unpacked size to more than"):
            list_members(archive)

    def test_what_is_compressed_already_passes(self, tmp_path: Path) -> None:
        archive = zip_of(tmp_path / "a.zip", {"1.jpg": NOISE})
        assert list_members(archive) == [Member("1.jpg", len(NOISE))]


class TestDamage:
    @pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz")])
    def test_what_is_cut_off_is_damaged(self, make: Callable[..., Path], name: str, tmp_path: Path) -> None:
        archive = make(tmp_path / name, {"1.jpg": NOISE, "2.jpg": NOISE})
        archive.write_bytes(archive.read_bytes()[:-320_000])
        with pytest.raises(
            DamagedArchiveError, match=r"is cut off, damaged or no archive \(.+\): expected a zip or tar"
        ):
            list_members(archive)

    @pytest.mark.parametrize(("make", "name"), [(zip_of, "a.zip"), (tar_of, "a.tar.gz")])
    def test_changed_bytes_are_found(self, make: Callable[..., Path], name: str, tmp_path: Path) -> None:
        archive = make(tmp_path / name, {"1.jpg": b"text " * 100_000})
        content = bytearray(archive.read_bytes())
        content[len(content) // 2] ^= 0xFF
        archive.write_bytes(content)
        with pytest.raises(DamagedArchiveError, match="is cut off, damaged or no archive"):
            unpack(archive, {member.name: [tmp_path / "out"] for member in list_members(archive)}, lambda: None)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "neither zip nor tar|empty file"),
            (b"no archive at all", "neither zip nor tar"),
            (b"PK\x03\x04", "a zip without its end"),
            (b"\x1f\x8b\x08\x00", ".*"),
        ],
    )
    def test_other_files_are_no_archives(self, content: bytes, reason: str, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(DamagedArchiveError, match=rf"is cut off, damaged or no archive \(({reason})\): expected"):
            list_members(tmp_path / "a.zip")

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"^no such file: {tmp_path / 'a.zip'}$"):
            list_members(tmp_path / "a.zip")


def test_files_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"1.jpg": b"new"})
    (tmp_path / "1.jpg").write_bytes(b"old")
    with pytest.raises(DataError, match=r"'1\.jpg' of .*a\.zip cannot be copied to .*1\.jpg \(File exists\)"):
        unpack(archive, {"1.jpg": [tmp_path / "1.jpg"]}, lambda: None)
    assert (tmp_path / "1.jpg").read_bytes() == b"old"


def test_links_in_folders_to_files_are_followed_and_others_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", {"1.jpg": b"1"})
    (folder / "2.jpg").symlink_to("1.jpg")
    (folder / "3.jpg").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    assert list_members(folder) == [Member("1.jpg", 1), Member("2.jpg", 1)]
