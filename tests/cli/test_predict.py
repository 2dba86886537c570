import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fishr.cli import main
from fishr.data.image_format import ImageFormat
from fishr.models import ModelCard, ModelConfig, SavedModel, build_model, save_model

COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
SURE = "0.57611"  # e / (e + 2), or how it begins


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Folder of a model whose logits are the mean of blue, green and red, in [0, 1]."""
    return str(save(tmp_path / "model", (3, 16, 16), ImageFormat(16)))


def save(folder: Path, input_shape: tuple[int, ...], image_format: ImageFormat | None) -> Path:
    config = ModelConfig("mlp", {"width": 3, "depth": 1})
    card = ModelCard(config, input_shape, tuple(COLORS), binary=False, image_format=image_format)
    featurizer, classifier = build_model(config, card.input_shape, card.num_outputs)
    if image_format is not None:
        means = torch.eye(3).flip(0).repeat_interleave(16 * 16, dim=1) / (16 * 16)
        featurizer.load_state_dict({"1.weight": means, "1.bias": torch.zeros(3)})
        classifier.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    folder.mkdir(parents=True)
    save_model(folder, SavedModel(featurizer, classifier, card))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of one color, in the order blue, green, red."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (12, 10), color).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (4, 4), COLORS["red"]).save(folder / f"{index:02}.png")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What a command that must leave with this exit code writes on stdout and stderr."""
    assert main(["predict", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail with exit code 2 and one line."""
    out, err = printed(capsys, *arguments, code=2)
    assert out == ""
    (line,) = err.splitlines()
    return line


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Rows


def test_csv_goes_to_stdout_and_nothing_else(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, model, images)
    header, *lines = out.splitlines()
    assert header == "path,label,probability,error"
    assert len(lines) == len(COLORS)
    for name, line in zip(COLORS, lines, strict=True):
        assert re.fullmatch(rf"{images / name}\.png,{name},{SURE}\d+,", line)
    assert err == "fishr: 3 images predicted\n"


def test_files_and_folders_in_the_order_they_are_named(
    model: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "red.png").rename(images.parent / "photo.of-a-kind")
    out, _ = printed(capsys, model, images.parent / "photo.of-a-kind", images)
    assert [row["label"] for row in csv.DictReader(out.splitlines())] == ["red", "blue", "green"]


def test_a_runs_folder_is_the_model_in_it(
    model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    Path(model).rename(tmp_path / "run" / "model")
    out, _ = printed(capsys, tmp_path / "run", images / "red.png")
    assert f"red.png,red,{SURE}" in out


def test_one_image(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = printed(capsys, model, images / "red.png")
    assert err == "fishr: 1 image predicted\n"


def test_json_lines_on_stdout(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, model, images / "red.png", "--json", "--top-k", 2)
    (row,) = map(json.loads, out.splitlines())
    assert list(row) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert (row["label"], row["error"]) == ("red", None)
    assert str(row["probability"]).startswith(SURE)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_each_format(
    suffix: str, model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"predictions{suffix}"
    output.write_text("old")
    arguments = (model, images, "--output", output, "--top-k", 3, "--abstain-below", 0.9, "--batch-size", 2)
    out, err = printed(capsys, *arguments)
    assert out == ""
    assert err == f"fishr: 3 images predicted, 3 abstained; written to {output}\n"
    rows: list[dict[str, Any]]
    if suffix == ".csv":
        rows = [{**row, "abstain": row["abstain"] == "true"} for row in read_csv(output)]
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = pyarrow.parquet.read_table(output).to_pylist()
    names = "path label probability label_2 probability_2 label_3 probability_3 abstain error"
    assert list(rows[0]) == names.split()
    assert [(row["label"], row["abstain"], row["error"] or None) for row in rows] == [
        (name, True, None) for name in COLORS
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "images", output.name}


def test_abstaining_is_asked_for(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(images / "black.png")
    out, err = printed(capsys, model, images, "--abstain-below", "0.5")
    assert [row["abstain"] for row in csv.DictReader(out.splitlines())] == ["true", "false", "false", "false"]
    assert err == "fishr: 4 images predicted, 1 abstained\n"


def test_names_that_are_hard_to_write(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4), COLORS["red"]).save(tmp_path / "red.png")
    for name in (b"a,b.png", b'"c".png', b"d\ne.png", b"f\xff.png", "g\u00e9.png".encode()):
        os.rename(tmp_path / "red.png", os.path.join(os.fsencode(folder), name))  # noqa: PTH104, PTH118
        Image.new("RGB", (4, 4), COLORS["red"]).save(tmp_path / "red.png")
    (folder / os.fsdecode(b"0\xff.png")).touch()
    out, err = printed(capsys, model, folder)
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert {Path(row["path"]).name: row["label"] for row in rows} == {
        '"c".png': "red",
        "0\\udcff.png": "",
        "a,b.png": "red",
        "d\ne.png": "red",
        "f\\udcff.png": "red",
        "gé.png": "red",
    }
    assert f"1 could not be read (first: {folder}/0\\udcff.png: the file is empty)" in err


# What cannot be read


def test_what_cannot_be_read_is_in_its_row_and_at_the_end(
    model: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (images / "red.png").read_bytes()
    (images / "empty.jpg").touch()
    (images / "half.png").write_bytes(content[: len(content) // 2])
    out, err = printed(capsys, model, images, "--abstain-below", 0.3, "--quiet")
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["label"] for row in rows] == ["blue", "", "green", "", "red"]
    assert rows[1]["error"] == "the file is empty"
    assert [row["abstain"] for row in rows] == ["false", "true", "false", "true", "false"]
    assert err == (
        f"fishr: 3 images predicted, 2 could not be read (first: {images / 'empty.jpg'}: the file is empty), "
        "0 abstained\n"
    )


def test_exit_code_2_if_none_can_be_read(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path in texts:
        path.write_text("no image")
    message = error_of(capsys, model, *texts, "--output", tmp_path / "rows.csv", "--quiet")
    assert message.startswith(f"fishr: error: 0 images predicted, 2 could not be read (first: {texts[0]}: not an image")
    assert len(read_csv(tmp_path / "rows.csv")) == 2


def test_quiet_says_nothing_when_all_is_well(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, model, images, "-q")
    assert len(out.splitlines()) == 4
    assert err == ""


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'PATH'"),
        (["IMAGES/nothing.png"], "there is no file or folder IMAGES/nothing.png"),
        (["IMAGES", "IMAGES/no", "IMAGES/where"], "there is no file or folder IMAGES/no, IMAGES/where"),
        (["IMAGES", "EMPTY"], "there are no images in EMPTY: expected files that end in .bmp, "),
        (["IMAGES", "--top-k", "4"], "top-k must be from 1 to 3, the model's number of classes, got 4"),
        (["IMAGES", "--top-k", "0"], "top-k must be from 1 to 3"),
        (["IMAGES", "--abstain-below", "90"], "the probability to abstain below must be in [0, 1], got 90.0"),
        (["IMAGES", "--batch-size", "0"], "batch size must be at least 1, got 0"),
        (["IMAGES", "--device", "gpu"], "unknown device 'gpu'"),
        (["IMAGES", "--output", "EMPTY"], "EMPTY is a folder: name the file to write, such as EMPTY/predictions.csv"),
        (["IMAGES", "--output", "rows.xlsx"], "rows.xlsx ends in '.xlsx': expected one of .csv, .jsonl, .parquet"),
        (["IMAGES", "--output", "no/rows.csv"], "no/rows.csv cannot be written (No such file or directory)"),
        (["IMAGES", "--output", "rows.csv", "--json"], "--json is for rows on stdout"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_any_work(
    arguments: list[str],
    message: str,
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    images.rename("IMAGES")
    Path("EMPTY").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(capsys, model, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_output_is_looked_at_first(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one of .csv, .jsonl, .parquet" in error_of(capsys, "no/model", images, "--output", "rows.xlsx")
    assert "no/model is not a saved model" in error_of(capsys, "no/model", images, "--output", "rows.csv")


def test_a_folder_that_is_no_model(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, images, images) == f"fishr: error: {images} is not a saved model: model.json is missing"


def test_a_model_of_something_else_than_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "digits", (2, 28, 28), None)
    assert "the model takes float32 inputs of shape 2 x 28 x 28, not image files" in error_of(capsys, folder, images)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, "--help")
    assert "Examples" in out
    assert "fishr predict runs/first photo.jpg" in out


# Ends before the end


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Something is done when the network gets a certain batch."""

    def act_at(number: int, act: Callable[[], None]) -> None:
        batches = 0
        predict_proba = SavedModel.predict_proba

        def acting(self: SavedModel, inputs: torch.Tensor) -> torch.Tensor:
            nonlocal batches
            batches += 1
            if batches == number:
                act()
            return predict_proba(self, inputs)

        monkeypatch.setattr(SavedModel, "predict_proba", acting)

    return act_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_signal_keeps_the_rows_so_far(
    number: int,
    suffix: str,
    model: str,
    many: Path,
    tmp_path: Path,
    at_batch: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, partial = tmp_path / f"rows{suffix}", tmp_path / f"rows.partial{suffix}"
    output.write_text("old")
    at_batch(3, lambda: signal.raise_signal(number))
    arguments = (model, many, "--output", output, "--batch-size", 4)
    out, err = printed(capsys, *arguments, code=128 + number)
    assert out == ""
    assert err == f"fishr: stopped after 8 images: 8 rows are kept in {partial}\n"
    rows = read_csv(partial) if suffix == ".csv" else pyarrow.parquet.read_table(partial).to_pylist()
    assert [row["path"] for row in rows] == [str(many / f"{index:02}.png") for index in range(8)]
    assert output.read_text() == "old"

    _, err = printed(capsys, *arguments)
    assert err.startswith("fishr: 20 images predicted")
    assert output.read_text(errors="replace") != "old"
    assert not partial.exists()


def test_a_signal_without_a_file(
    model: str,
    many: Path,
    at_batch: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_batch(3, lambda: signal.raise_signal(signal.SIGINT))
    out, err = printed(capsys, model, many, "--batch-size", 4, code=130)
    assert len(out.splitlines()) == 1 + 8
    assert err == "fishr: stopped after 8 images\n"


def test_a_signal_when_the_file_is_nearly_done_lets_it_be_done(
    model: str, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        signal.raise_signal(signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    _, err = printed(capsys, model, many, "--output", tmp_path / "rows.csv")
    assert err.startswith("fishr: 20 images predicted")
    assert len(read_csv(tmp_path / "rows.csv")) == 20


def test_a_second_signal_does_not_wait(
    model: str,
    many: Path,
    tmp_path: Path,
    at_batch: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_batch(3, twice)
    _, err = printed(capsys, model, many, "--output", tmp_path / "rows.csv", "--batch-size", 4, code=130)
    partial = tmp_path / "rows.partial.csv"
    assert err.splitlines()[0] == f"fishr: warning: 8 rows are kept in {partial}"
    assert len(read_csv(partial)) == 8


def test_a_full_disk_is_one_line_and_keeps_the_rows_so_far(
    model: str,
    many: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            room = 500 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content[:room])

    partial = tmp_path / "rows.partial.csv"
    on_disk = Path.open

    def opened(path: Path, *arguments: Any, **keywords: Any) -> Any:
        return FullDisk(path, "w") if path == partial else on_disk(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", opened)
    message = error_of(capsys, model, many, "--output", tmp_path / "rows.csv")
    monkeypatch.undo()
    rows = read_csv(partial)
    assert message == (
        f"fishr: error: {tmp_path / 'rows.csv'} cannot be written (No space left on device): free some space; "
        f"{len(rows)} rows are kept in {partial}"
    )
    assert 1 < len(rows) < 20
    assert all(row["label"] == "red" and row["error"] == "" for row in rows)


def test_a_reader_that_leaves(model: str, many: Path) -> None:
    command = [sys.executable, "-m", "fishr.cli", "predict", model, str(many)]
    reading, writing = os.pipe()
    os.close(reading)
    left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert left.returncode in (1, 141)  # typer's, in versions that notice it first, and ours
    assert left.stderr == b""


@pytest.mark.parametrize("arguments", [[], ["--quiet"]])
def test_progress_is_drawn_in_a_terminal(
    arguments: list[str],
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fishr.cli import predict

    monkeypatch.setattr(predict.stderr, "_force_terminal", True)
    _, err = printed(capsys, model, images, "--output", tmp_path / "rows.csv", *arguments)
    assert ("3 images predicted 0:00" in err) == (not arguments)
    _, err = printed(capsys, model, images)
    assert "0:00" not in err
