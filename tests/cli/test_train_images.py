"""``fishr train`` on somebody's own images."""

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fishr.cli import main
from fishr.models import load_model
from fishr.records import read_records
from small_runs import write_pictures

TINY = ["--image-size", "16", "--cache", "none", "--batch-size", "4", "--device", "cpu", "--quiet"]
BACKBONE = ["--backbone", "test_resnet", "--no-pretrained"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "animals")


def arguments(data: Path | str, *more: str, steps: int = 2, backbone: list[str] = BACKBONE) -> list[str]:
    return ["train", "--data", str(data), "--steps", str(steps), *TINY, *backbone, *more]


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def error_of(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The message of a command that must fail with exit code 2 and one line."""
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


# What is said and written


def test_a_table_tells_how_well_it_did(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(folder, "--test-domain", "street", "--output", str(run))
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if "│" in line]
    (kept,) = read_records(run / "DONE")
    percent = {
        (domain, split): f"{metrics.accuracy * 100:.1f}"
        for domain, splits in kept.domains.items()
        for split, metrics in splits.items()
    }
    assert cells == [
        ["lab", "trained on", "", percent["lab", "out"]],
        ["shop", "trained on", "", percent["shop", "out"]],
        ["street", "held out", percent["street", "in"], percent["street", "out"]],
    ]
    assert shown.out.splitlines()[-2:] == [
        f"Trained: accuracy in % of the model kept (step 2 of 2); model in {run / 'model'}.",
        f"Report: {run / 'report.html'}",
    ]
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "model", "DONE"),
        *("mistakes.json", "made_by.json", "report.html"),
    }
    card = (run / "model/README.md").read_text()
    assert "| trained on the domains | lab, shop |" in card
    assert "| input | RGB images, resized to 16 x 16 |" in card
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert load_model(run)(images).shape == (2, 2)

    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:-2] == shown.out.splitlines()[:-2]
    assert again.splitlines()[-2].startswith(
        "Done before, nothing to do: accuracy in % of the model kept (step 2 of 2)"
    )
    assert again.splitlines()[-1] == f"Report: {run / 'report.html'}"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--algorithm", "erm", "--test-domain", "street", "lab", "--json", "--select"]
    assert main(arguments(folder, "--output", str(run), *more)) == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    (kept,) = read_records(run / "DONE")
    assert content == {
        "folder": str(run),
        "model": str(run / "model"),
        "trained": True,
        "step": kept.step,
        "held_out": ["lab", "street"],
        "accuracy": {
            domain: {split: metrics.accuracy for split, metrics in splits.items()}
            for domain, splits in kept.domains.items()
        },
        "hints": [],
    }
    assert shown.err == ""


def test_without_a_held_out_domain_it_trains_on_all(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert main(arguments(folder, "--output", str(tmp_path / "run"), "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["held_out"] == []
    assert {domain: list(splits) for domain, splits in content["accuracy"].items()} == {
        domain: ["out"] for domain in ("lab", "shop", "street")
    }


def test_a_manifest_with_its_own_split(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "domain", "split"])
        for image in sorted(folder.rglob("*.png")):
            domain, label, name = image.relative_to(folder).parts
            rows.writerow([image, label, domain, "val" if name == "00.png" else "train"])
    assert main(arguments(tmp_path / "list.csv", "--test-domain", "street", "--output", str(tmp_path / "run"))) == 0
    (kept,) = read_records(tmp_path / "run/DONE")
    # Two images in each out-split.
    assert {kept.domains[domain]["out"].accuracy for domain in ("lab", "shop")} <= {0.0, 0.5, 1.0}
    assert config_of(tmp_path / "run")["data"] == "list"
    assert capsys.readouterr().err == ""


def test_options_are_in_the_config(folder: Path, tmp_path: Path) -> None:
    more = ["--channels", "1", "--augment", "light", "--average", "sma", "--average-arg", "start=2", "--select"]
    more += ["--class-balanced", "--algorithm", "erm", "--set", "dropout=0.1", "lr=0.01", "--seed", "4", "--trial", "2"]
    more += ["--mean", "0.25", "--std", "0.5", "--train-batch-norm", "--backbone-arg", "drop_path_rate=0.1"]
    # With 16 pixels the last feature maps have one, and torch 2.15 takes bfloat16 gradients there from memory that
    # nobody has written, on CPUs with AMX.
    more += ["--checkpoint-every", "2", "--subset", "20", "--precision", "bf16-mixed", "--image-size", "32"]
    assert main(arguments(folder, "--test-domain", "lab", "--output", str(tmp_path / "run"), *more)) == 0
    config = config_of(tmp_path / "run")
    fingerprint = config["data_options"].pop("fingerprint")
    assert len(fingerprint) == 16
    assert config == {
        "format": 2,
        "data": "animals",
        "data_options": {"subset": 20, "image_size": 32, "channels": 1, "augmentation": "light"},
        "test_domains": ["lab"],
        "algorithm": "erm",
        "hparams": {"lr": 0.01, "weight_decay": 0.0, "batch_size": 4, "l2": 0.0, "dropout": 0.1},
        "model": {
            "featurizer": "timm",
            "options": {
                "name": "test_resnet",
                "arguments": {"drop_path_rate": 0.1},
                "mean": [0.25],
                "std": [0.5],
                "frozen_batch_norm": False,
            },
            "init": "default",
            "weights": None,
        },
        "steps": 2,
        "checkpoint_every": 2,
        "seed": 4,
        "trial": 2,
        "out_fraction": 0.2,
        "precision": "bf16-mixed",
        "average": {"name": "sma", "options": {"start": 2}},
        "select": True,
        "class_balanced": True,
        "draw": None,
    }


def test_images_have_the_published_defaults(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, "--test-domain", "lab", "--output", str(tmp_path / "run"), steps=1)) == 0
    config = config_of(tmp_path / "run")
    assert config["algorithm"] == "fishr"
    assert config["hparams"]["lr"] == 5e-5
    assert (config["data_options"]["channels"], config["data_options"]["augmentation"]) == (3, "domainbed")
    assert (config["average"], config["select"], config["class_balanced"]) == (None, False, False)


def test_where_images_are_kept_is_no_part_of_the_run(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    command = arguments(folder, "--test-domain", "lab", "--output", str(tmp_path / "run"), "--json", steps=1)
    assert main([*command, "--cache", "disk"]) == 0
    assert list((tmp_path / "cache").iterdir())
    assert json.loads(capsys.readouterr().out)["trained"] is True
    moved = shutil.copytree(folder, tmp_path / "elsewhere/animals")
    assert main([*command, "--cache", "ram", "--data", str(moved)]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] is False


def test_weights_from_a_file(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "weights.safetensors")
    given = ["--backbone", "test_resnet", "--weights", str(tmp_path / "weights.safetensors"), "--mean", "0.5"]
    command = arguments(
        folder, "--output", str(tmp_path / "run"), "--set", "lr=1e-9", "--test-domain", "lab", backbone=given, steps=1
    )
    assert main(command) == 0
    options = config_of(tmp_path / "run")["model"]
    assert options["weights"].startswith("sha256:")
    assert (options["options"]["mean"], options["options"]["frozen_batch_norm"]) == ([0.5] * 3, True)
    trained = load_file(tmp_path / "run/model/model.safetensors")
    name = "layer1.0.conv1.weight"
    assert torch.allclose(trained[f"featurizer.network.{name}"], state[name], atol=1e-7)


# Mistakes


@pytest.fixture
def one_domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("one") / "animals", ("lab",))


MISTAKES: Mapping[str, tuple[list[str], str]] = {
    "image size": (["--image-size", "0"], "image size must be at least 1 pixel, got 0"),
    "channels": (["--channels", "2"], "images have 1 (gray), 3 (RGB) or 4 (RGBA) channels, got 2"),
    "augmentation": (["--augment", "domainbad"], "unknown augmentation 'domainbad'; did you mean 'domainbed'?"),
    "cache": (["--cache", "disc"], "unknown cache 'disc'; did you mean 'disk'?"),
    "subset": (["--subset", "0"], "subset must be at least 1, got 0"),
    "test domain": (["--test-domain", "steet"], "unknown test domain of 'animals' 'steet'; did you mean 'street'?"),
    "all held out": (["--test-domain", "lab", "shop", "street"], "leaves no domain of 'animals' to train on"),
    "backbone": (["--backbone", "resnet5"], "unknown backbone 'resnet5'; did you mean "),
    "backbone elsewhere": (["--backbone", "hf_hub:a/b"], "unknown backbone 'hf_hub:a/b'"),
    "backbone argument": (["--backbone-arg", "pad_type"], "--backbone-arg takes KEY=VALUE, got 'pad_type'"),
    "argument unknown": (["--backbone-arg", "wide=3"], "backbone 'test_resnet' cannot be built for 3 channels"),
    "argument refused": (["--backbone-arg", "pretrained=true"], "a backbone's arguments cannot have pretrained"),
    "mean": (["--mean", "0.5", "0.5"], "mean must be 3 numbers, one per channel, got [0.5, 0.5]"),
    "std": (["--std", "0"], "std must be 3 positive numbers, one per channel"),
    "weights twice": (["--weights", "w.pth"], "--weights and --no-pretrained exclude each other"),
    "average": (["--average", "swat"], "unknown average 'swat'; did you mean 'swad'?"),
    "average argument alone": (["--average-arg", "start=3"], "--average-arg needs --average sma, ema or swad"),
    "average argument": (["--average", "sma", "--average-arg", "strat=3"], "did you mean 'start'?"),
    "average value": (["--average", "sma", "--average-arg", "start=0"], "start must be at least 1, got 0"),
    "select and swad": (["--select", "--average", "swad"], "select and average='swad' exclude each other"),
    "precision": (["--precision", "16"], "precision must be one of 32, bf16-mixed, got '16'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more, message = MISTAKES[name]
    assert message in error_of(capsys, arguments(folder, *more))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (BACKBONE, "a backbone takes images; inputs of 'colored-digits' have shape [128]"),
        (["--weights", "w.pth"], "a backbone takes images"),
        (["--no-pretrained"], "a backbone takes images"),
        (["--train-batch-norm"], "a backbone takes images"),
        (["--image-size", "8"], "dataset 'colored-digits' takes no image options ('image_size')"),
        (["--strict", "--cache", "ram"], "dataset 'colored-digits' takes no image options ('cache', 'strict')"),
        (["--average-arg", "start=3"], "--average-arg needs --average sma, ema or swad"),
    ],
    ids=str,
)
def test_options_of_images_are_not_for_vectors(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "colored-digits", "--subset", "40", "--steps", "2", "--quiet", *more]
    assert message in error_of(capsys, command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", ["animls", "./animls", "pasc", ""])
def test_data_that_are_not_there(
    data: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, arguments(data))
    assert f"unknown dataset {data!r}" in message
    assert f"and there is no folder or manifest {data}".strip() in message
    assert ("did you mean 'pacs'?" in message) == (data == "pasc")


def test_all_images_at_once(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    command = arguments(folder, "--output", str(tmp_path / "run"), "--set", "batch_size=null")
    command.remove("--batch-size")
    command.remove("4")
    assert "batch_size must be a number for images and for class-balanced batches" in error_of(capsys, command)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_of_weights(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "gone.pth"
    message = error_of(capsys, arguments(folder, backbone=["--backbone", "test_resnet", "--weights", str(missing)]))
    assert message.endswith(f"the weights {missing} cannot be read: No such file or directory")


def test_one_domain(capsys: pytest.CaptureFixture[str], one_domain: Path, tmp_path: Path) -> None:
    message = error_of(capsys, arguments(one_domain, "--output", str(tmp_path / "run")))
    assert "dataset 'animals' has 1 domain to train on or hold out (lab); at least 2 are needed" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_layout(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "expected DOMAIN/CLASS/image" in error_of(capsys, arguments(folder / "lab"))


def test_a_file_that_is_no_manifest(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    message = error_of(capsys, arguments(folder / "lab/cat/00.png"))
    assert message.endswith("00.png is neither a folder nor a manifest (.csv or .parquet)")


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_an_image_that_cannot_be_read(
    cache: str, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "animals")
    for image in (copy / "street").rglob("*.png"):
        image.write_bytes(b"no image")
    message = error_of(capsys, arguments(copy, "--output", str(tmp_path / "run"), "--cache", cache, steps=2))
    assert "cannot be read" in message
    assert "not an image" in message
    assert "repair or remove" in message


def test_a_class_missing_from_a_domain(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "animals")
    shutil.rmtree(copy / "shop/dog")
    message = error_of(capsys, arguments(copy, "--strict", "--output", str(tmp_path / "run")))
    assert "'animals' has no image of class 'dog' in domain 'shop'" in message
    assert main(arguments(copy, "--algorithm", "erm", "--output", str(tmp_path / "run"))) == 0
    assert capsys.readouterr().err == "fishr: warning: 'animals' has no image of class 'dog' in domain 'shop'\n"


def test_brackets_in_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "brackets", domains=("[bold]x", "site [a]", "c"))
    assert main(arguments(folder, "--output", str(tmp_path / "o[x]"))) == 0
    shown = capsys.readouterr().out
    for text in ("[bold]x", "site [a]", "o[x]/model"):
        assert text in shown
