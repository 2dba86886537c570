"""``fishr evaluate`` and ``fishr export`` as their users meet them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fishr.cli import main
from fishr.data import MultiDomainDataset, load_dataset
from fishr.data.image_format import ImageFormat
from fishr.deploy import export
from fishr.models import ModelCard, ModelConfig, SavedModel, build_model, save_model
from fishr.training import RunConfig

CLASSES = ("blue", "green", "red")
DOMAINS = {"attic": (0, 1, 2, 2), "cellar": (0, 1, 2)}
"""Name to the classes of its images."""


def save(
    folder: Path,
    classes: tuple[str, ...] = CLASSES,
    provenance: dict[str, Any] | None = None,
    favorite: int | None = None,
) -> Path:
    card = ModelCard(ModelConfig("mnist-cnn"), (3, 32, 32), classes, False, provenance or {}, ImageFormat(32))
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    featurizer, classifier = build_model(card.model, card.input_shape, len(classes))
    if favorite is not None:
        torch.nn.init.constant_(classifier.bias[favorite], 10.0)
    save_model(folder, SavedModel(featurizer, classifier, card))
    return folder


def provenance(dataset: MultiDomainDataset, test_domain: str) -> dict[str, Any]:
    """What the card of a model says that was trained on a dataset."""
    config = RunConfig.for_dataset(dataset, "erm", steps=1, test_domains=(test_domain,), model=ModelConfig("mnist-cnn"))
    train_domains = [name for name in dataset.domains if name != test_domain]
    return {"config": config.as_dict(), "step": 1, "train_domains": train_domains, "accuracy": {}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "run" / "model")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "toys"
    numbers = np.random.default_rng(0)
    for domain, labels in DOMAINS.items():
        for index, label in enumerate(labels):
            folder = root / domain / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a dataset that is not made of image files."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    arguments = ["train", "--data", "colored-digits", "--subset", "40", "--steps", "4", "--output", str(folder)]
    assert main([*arguments, "--quiet"]) == 0
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail with exit code 2 and one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must succeed without a word on stderr prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_help_shows_examples(command, capsys):
    shown = output_of(capsys, command, "--help")
    assert "Usage" in shown
    assert "Examples" in shown


# Evaluate


def test_evaluate_prints_tables(model, images, capsys):
    shown = output_of(capsys, "evaluate", model.parent, images)
    table, confusion = shown.split("Confusions in all domains (rows: true class, columns: predicted class):")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["attic", "4"], ["cellar", "3"], ["mean", ""], [rows[-1][0], ""]]
    accuracies = [float(row[2]) for row in rows]
    assert rows[-1][0] == f"worst: {'attic' if accuracies[0] <= accuracies[1] else 'cellar'}"
    assert accuracies[2] == pytest.approx((accuracies[0] + accuracies[1]) / 2, abs=0.1)
    assert accuracies[3] == min(accuracies[:2])
    assert "in training" not in table
    assert "each counts the same" in table
    lines = [line.split("|")[1:-1] for line in confusion.split("\n") if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]] == ["", *CLASSES]
    counts = {line[0].strip(): [int(cell) for cell in line[1:]] for line in lines[2:]}
    assert {name: sum(row) for name, row in counts.items()} == {"blue": 2, "green": 2, "red": 3}


def test_evaluate_prints_json(model, images, capsys):
    content = json.loads(output_of(capsys, "evaluate", model, images, "--json"))
    assert content["model"] == str(model)
    assert content["data"] == "toys"
    assert content["classes"] == list(CLASSES)
    for name, labels in DOMAINS.items():
        domain = content["domains"][name]
        assert domain["samples"] == len(labels)
        assert domain["role"] is None
        assert [sum(row) for row in domain["confusion"]] == np.bincount(labels).tolist()
        assert domain["accuracy"] == pytest.approx(np.trace(domain["confusion"]) / len(labels))
        assert all(0 <= domain[measure] <= 1 for measure in ("accuracy", "macro_f1", "calibration_error"))
    for measure in ("accuracy", "macro_f1", "calibration_error"):
        values = [domain[measure] for domain in content["domains"].values()]
        assert content["mean"][measure] == pytest.approx(sum(values) / 2)
    assert content["worst"] == {
        "domain": content["worst"]["domain"],
        **{name: content["domains"][content["worst"]["domain"]][name] for name in content["mean"]},
    }
    pooled = np.add(*(domain["confusion"] for domain in content["domains"].values()))
    assert content["confusion"] == pooled.tolist()


def test_evaluate_says_what_was_trained_on(tmp_path, images, capsys):
    model = save(tmp_path / "model", provenance=provenance(load_dataset(str(images)), "cellar"))
    shown = output_of(capsys, "evaluate", model, images)
    assert "in training" in shown
    assert "trained on" in shown
    assert "held out" in shown
    assert "was trained on samples of attic: what is measured there is no estimate for new ones." in shown
    content = json.loads(output_of(capsys, "evaluate", model, images, "--json"))
    assert [domain["role"] for domain in content["domains"].values()] == ["trained on", "held out"]


def test_evaluate_of_many_classes_prints_the_largest_confusions(tmp_path, images, capsys):
    model = save(tmp_path / "model", (*CLASSES, *(f"class-{index}" for index in range(18))), favorite=0)
    shown = output_of(capsys, "evaluate", model, images)
    assert "Largest of 2 confusions in all domains (true → predicted):" in shown
    assert shown.endswith("predicted):\n  red → blue: 3\n  green → blue: 2\n")


def test_evaluate_of_a_dataset_by_name(digits, capsys):
    content = json.loads(output_of(capsys, "evaluate", digits, "colored-digits", "--subset", "40", "--json"))
    assert {name: domain["role"] for name, domain in content["domains"].items()} == {
        "+80%": "trained on",
        "+90%": "trained on",
        "-90%": "held out",
        "gray": "evaluation only",
    }
    assert {domain["samples"] for domain in content["domains"].values()} == {40}


def test_names_are_shown_as_they_are(model, images, tmp_path, capsys):
    strange = Path(shutil.copytree(images, tmp_path / "toys"))
    (strange / "attic").rename(strange / "[bold]")
    assert "│ [bold]" in output_of(capsys, "evaluate", model, strange)


def test_mistakes_of_evaluate(model, images, digits, tmp_path, capsys):
    assert "'--batch-size'" in error_of(capsys, "evaluate", model, images, "--batch-size", "many")
    assert "Missing argument 'DATA'" in error_of(capsys, "evaluate", model)
    assert "is not a saved model" in error_of(capsys, "evaluate", images, images)
    assert "unknown dataset 'pasc'; did you mean 'pacs'?" in error_of(capsys, "evaluate", model, "pasc")
    assert "but the model takes float32 inputs of shape 128" in error_of(capsys, "evaluate", digits, images)
    assert "have shape 128, but the model takes 3 x 32 x 32" in error_of(capsys, "evaluate", model, "colored-digits")
    other = save(tmp_path / "other", ("blue", "green", "yellow"))
    assert "classes of 'toys' are not all among the model's: unknown class 'red'" in error_of(
        capsys, "evaluate", other, images
    )


# Export


def test_export_writes_into_the_models_folder_and_says_what_it_did(model, images, capfd):
    assert main(["export", str(model.parent), "--format", "onnx", "--images", str(images)]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    comparison, written = shown.out.splitlines()
    assert comparison.startswith("Compared with the original in onnxruntime on 7 images: max difference of a probab")
    assert comparison.endswith("labels equal.")
    file = model / "model.onnx"
    size = f"{file.stat().st_size / 1e6:.1f} MB"
    assert written == f"Written: {file} ({size}), {model / 'model.preprocessing.json'}"
    assert file.stat().st_size > 1e6


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is not made, which spares its seconds."""
    monkeypatch.setattr(export, "_write_onnx", lambda model, inputs, name, file: file.write_bytes(b"onnx"))
    monkeypatch.setattr(export, "_compare", lambda *_: (3e-7, True))


@pytest.mark.usefixtures("converted")
def test_export_of_named_images_to_a_file(model, images, tmp_path, capsys):
    first, second = sorted(images.glob("*/*/*.png"))[:2]
    file = tmp_path / "deploy" / "toys.onnx"
    shown = output_of(capsys, "export", model, "--images", first, second, "--output", file, "--json")
    assert json.loads(shown) == {
        "file": str(file),
        "preprocessing": str(tmp_path / "deploy" / "toys.preprocessing.json"),
        "bytes": 4,
        "samples": 2,
        "max_difference": 3e-7,
        "labels_equal": True,
    }
    assert not (model / "model.onnx").exists()


@pytest.mark.usefixtures("converted")
def test_export_of_a_model_without_images(digits, capsys):
    shown = output_of(capsys, "export", digits)
    assert "on 64 samples" in shown
    assert (digits / "model" / "model.onnx").exists()


def test_export_on_the_benchmark_of_the_training(tmp_path, data_root, converted, capsys):
    model = save(tmp_path / "model", provenance=provenance(load_dataset("pacs", root=data_root), "sketch"))
    assert "on 64 images" in output_of(capsys, "export", model, "--data-root", data_root)


@pytest.mark.usefixtures("converted")
def test_images_that_cannot_be_read_are_told(model, images, tmp_path, capsys):
    some = Path(shutil.copytree(images / "attic", tmp_path / "some"))
    (some / "red" / "bad.png").write_bytes(b"")
    assert main(["export", str(model), "--images", str(some)]) == 0
    captured = capsys.readouterr()
    assert "on 4 images" in captured.out
    assert captured.err == f"fishr: warning: left out {some / 'red' / 'bad.png'}: the file is empty\n"


def test_mistakes_of_export(model, images, digits, tmp_path, capsys):
    assert "unknown format 'onx'; did you mean 'onnx'?" in error_of(capsys, "export", model, "--format", "onx")
    assert "name real images to compare the export on: --images" in error_of(capsys, "export", model)
    assert "there is no file or folder" in error_of(capsys, "export", model, "--images", tmp_path / "none")
    assert "leave --images out" in error_of(capsys, "export", digits, "--images", images)
    assert "is a folder" in error_of(capsys, "export", model, "--images", images, "--output", tmp_path)
    assert not list(model.glob("*.onnx"))


def test_an_export_that_differs_is_an_error(model, images, capsys, converted, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *_: (0.25, False))
    message = error_of(capsys, "export", model, "--images", images)
    assert "differs from the original: probabilities of 7 samples by up to 0.25 in onnxruntime" in message
    assert sorted(path.name for path in model.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "model.json",
        "model.safetensors",
    ]
