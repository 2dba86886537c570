"""``fishr data check``: what it prints, and its exit codes."""

import json
import shutil
from pathlib import Path

import pytest

from fishr.cli import main
from small_runs import picture, write_pictures


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder() -> Path:
    return write_pictures(Path("animals"), each=5)


def tables(shown: str) -> list[list[str]]:
    """The cells of all rows of all tables."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]


def test_tables_of_data_that_are_fit(folder, capsys):
    picture("large").resize((300, 200)).save(folder / "lab" / "cat" / "large.png")
    assert main(["data", "check", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    size = "{} x {}".format(*picture("any").size)
    assert tables(shown.out) == [
        ["lab", "11", "0", size, size, "300 x 200"],
        ["shop", "10", "0", size, size, size],
        ["street", "10", "0", size, size, size],
        ["cat", "6", "5", "5"],
        ["dog", "5", "5", "5"],
    ]
    assert shown.out.splitlines()[-1] == "31 images of animals: nothing is wrong."


def test_what_is_wrong_is_named_and_the_exit_code_1(folder, capsys):
    (folder / "lab" / "cat" / "00.png").write_bytes(b"")
    shutil.copy(folder / "lab" / "dog" / "01.png", folder / "shop" / "dog" / "copy.png")
    shutil.copy(folder / "street" / "dog" / "01.png", folder / "street" / "dog" / "copy.png")
    assert main(["data", "check", str(folder)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" not in line]
    assert lines[-10:] == [
        "wrong: 1 image cannot be read",
        "  'lab/cat/00.png' (the file is empty)",
        "",
        "wrong: 1 image is in several domains",
        "  the same bytes in the domains 'lab' and 'shop': 'lab/dog/01.png', 'shop/dog/copy.png'",
        "",
        "note: 1 image is several times in a domain, and may fall into both splits",
        "  the same bytes in the domain 'street': 'street/dog/01.png', 'street/dog/copy.png'",
        "",
        "32 images of animals: something is wrong, see above.",
    ]


def test_notes_alone_are_exit_code_0(folder, capsys):
    (folder / "lab" / "cat" / "00.png").unlink()
    assert main(["data", "check", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "note: 1 class has fewer than 5 images in a domain" in shown
    assert "nothing is wrong" in shown


def test_json_has_it_all(folder, capsys):
    for index in range(25):
        (folder / "lab" / "cat" / f"spoilt {index}.png").write_bytes(b"")
    assert main(["data", "check", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "wrong: 25 images cannot be read" in shown
    assert "  and 5 more: --json has them all" in shown
    assert shown.count("the file is empty") == 20

    assert main(["data", "check", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["data", "root", "fit", "classes", "domains", "findings"]
    assert (report["data"], report["root"], report["fit"]) == ("animals", str(folder.absolute()), False)
    assert report["classes"] == ["cat", "dog"]
    size = list(picture("any").size)
    assert report["domains"]["lab"] == {
        "images": 35,
        "unreadable": 25,
        "images_per_class": {"cat": 30, "dog": 5},
        "smallest": size,
        "median": size,
        "largest": size,
    }
    assert len(report["findings"]) == 25
    assert report["findings"][0] == {
        "kind": "unreadable",
        "severity": "wrong",
        "message": "'lab/cat/spoilt 0.png' (the file is empty)",
        "paths": ["lab/cat/spoilt 0.png"],
    }


def test_many_classes_are_summed_up(capsys):
    folder = write_pictures(Path("many"), ("a", "b"), tuple(f"class {index:02}" for index in range(21)), each=1)
    for index in range(4):
        picture(f"more {index}").save(folder / "a" / "class 03" / f"more {index}.png")
    shutil.rmtree(folder / "b" / "class 20")
    assert main(["data", "check", str(folder)]) == 1
    shown = capsys.readouterr()
    assert tables(shown.out)[2:] == [["a", "21", "1", "1", "5"], ["b", "20", "1", "1", "1"]]
    assert "Images of a class, over the 21 classes." in shown.out
    assert "no image of class 'class 20' in domain 'b'" in shown.out


def test_names_are_shown_as_they_are(capsys):
    folder = write_pictures(Path("names"), ("[bold]lab", "shop"), ("[red]", "dog"), each=5)
    shutil.copy(folder / "shop" / "dog" / "00.png", folder / "[bold]lab" / "dog" / "a\n\x1b[31mcopy.png")
    assert main(["data", "check", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert r"'[bold]lab/dog/a\n\x1b[31mcopy.png'" in shown
    assert "\x1b[31m" not in shown
    assert "│ [red]" in shown


def test_a_benchmark_that_is_incomplete_is_an_error(tmp_path, capsys):
    write_pictures(tmp_path / "PACS")
    assert main(["data", "check", "pacs", "--data-root", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fishr: error: ")
    assert "is not pacs as published" in shown.err


def test_what_is_not_there_is_an_error(capsys):
    assert main(["data", "check", "colored-digits"]) == 2
    shown = capsys.readouterr()
    assert "there is no folder or manifest 'colored-digits'" in shown.err
    assert len(shown.err.splitlines()) == 1


def test_an_interrupt_is_exit_code_130(folder, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fishr.data.check._thumbnail", interrupted)
    assert main(["data", "check", str(folder)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fishr: interrupted"
