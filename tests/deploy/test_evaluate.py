import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from fishr.data import MultiDomainDataset, Samples, load_dataset
from fishr.data.image_format import ImageFormat
from fishr.deploy.evaluate import calibration_error, evaluate_model, load_data_for
from fishr.errors import ConfigError, DataError, InputError
from fishr.models import ModelCard, ModelConfig, SavedModel, load_model
from fishr.training import train
from small_runs import noisy_registered, run_config, small_digits

COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
SCALE = 2.0
CONFIDENCE = np.exp(SCALE) / (np.exp(SCALE) + 2)
"""Of the model of colors, for every image."""


class MeanColor(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean((2, 3)).flip(1)  # blue, green, red


def colors_model(provenance: Mapping[str, Any] | None = None) -> SavedModel:
    """Tells apart blue, green and red images without a mistake, each with the same confidence."""
    head = nn.Linear(3, 3)
    head.load_state_dict({"weight": SCALE * torch.eye(3), "bias": torch.zeros(3)})
    card = ModelCard(ModelConfig("mean-color"), (3, 8, 8), tuple(COLORS), False, provenance or {}, ImageFormat(8))
    return SavedModel(MeanColor(), head, card)


def write_images(root: Path, images: Mapping[str, list[str]]) -> Path:
    """Images named by DOMAIN/CLASS, each in one color."""
    for folder, colors in images.items():
        (root / folder).mkdir(parents=True)
        for index, color in enumerate(colors):
            Image.new("RGB", (12, 10), COLORS[color]).save(root / folder / f"{index}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """One mistake in the first domain, none in the second; blue is missing from the first."""
    return write_images(
        tmp_path / "toys",
        {
            "attic/green": ["green"] * 2,
            "attic/red": ["red"] * 3 + ["green"],
            "cellar/blue": ["blue"],
            "cellar/green": ["green"],
            "cellar/red": ["red"],
        },
    )


# Calibration error


@pytest.mark.parametrize(
    ("confidences", "correct", "expected"),
    [
        ([0.9, 0.9, 0.6, 0.6], [1, 1, 1, 0], 0.1),
        ([0.8] * 5, [1, 1, 1, 1, 0], 0.0),
        ([1.0, 1.0], [1, 0], 0.5),
        ([1.0], [1], 0.0),
        # In one bin, over- and underconfidence even out; in two they add up.
        ([0.61, 0.65], [1, 0], abs(1 - 0.61 - 0.65) / 2),
        ([0.61, 0.75], [1, 0], (0.39 + 0.75) / 2),
        # The upper edge 9/15 belongs to the bin below it.
        ([0.6, 0.61], [1, 0], (0.4 + 0.61) / 2),
        ([0.6, 0.59], [1, 0], abs(0.4 - 0.59) / 2),
        # A sum of rounded probabilities may be above 1.
        ([1.0000001, 0.99], [1, 1], 0.01 / 2),
    ],
)
def test_calibration_error_by_hand(confidences, correct, expected):
    assert calibration_error(confidences, correct) == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_min=True), st.booleans()), min_size=1, max_size=40))
def test_calibration_error_is_the_formula(samples):
    edges = np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = [(confidence, hit) for confidence, hit in samples if low < confidence <= high]
        if inside:
            gap = np.mean([hit for _, hit in inside]) - np.mean([confidence for confidence, _ in inside])
            expected += len(inside) / len(samples) * abs(gap)
    found = calibration_error([confidence for confidence, _ in samples], [hit for _, hit in samples])
    assert found == pytest.approx(expected, abs=1e-12)


def test_other_bins():
    assert calibration_error([0.3, 0.8], [1, 0], num_bins=1) == pytest.approx(0.1 / 2)
    assert calibration_error([0.3, 0.8], [1, 0], num_bins=2) == pytest.approx((0.7 + 0.8) / 2)


@pytest.mark.parametrize(("confidences", "correct"), [([], []), ([0.5], [1, 0]), ([[0.5]], [[1]])])
def test_what_cannot_be_calibrated(confidences, correct):
    with pytest.raises(InputError, match=r"must have the same shape \[sample\] with at least one sample, got \["):
        calibration_error(confidences, correct)


# Evaluation


def test_an_evaluation_by_hand(images):
    model = colors_model()
    evaluation = evaluate_model(model, load_data_for(model.card, str(images)))

    assert list(evaluation.domains) == ["attic", "cellar"]
    attic, cellar = evaluation.domains.values()
    assert (attic.samples, cellar.samples) == (6, 3)
    assert attic.accuracy == pytest.approx(5 / 6)
    assert attic.macro_f1 == pytest.approx((6 / 7 + 4 / 5) / 2)  # red and green; blue occurs nowhere
    assert attic.calibration_error == pytest.approx(abs(5 / 6 - CONFIDENCE), abs=1e-6)
    assert attic.confusion.tolist() == [[0, 0, 0], [0, 2, 0], [0, 1, 3]]
    assert (cellar.accuracy, cellar.macro_f1) == (1, 1)
    assert cellar.calibration_error == pytest.approx(1 - CONFIDENCE, abs=1e-6)

    assert evaluation.worst == "attic"
    assert evaluation.mean.accuracy == pytest.approx((5 / 6 + 1) / 2)
    assert evaluation.mean.macro_f1 == pytest.approx((attic.macro_f1 + 1) / 2)
    assert evaluation.mean.calibration_error == pytest.approx((attic.calibration_error + cellar.calibration_error) / 2)
    assert evaluation.confusion.tolist() == [[1, 0, 0], [0, 3, 0], [0, 1, 4]]
    assert evaluation.classes == ("blue", "green", "red")


def test_a_class_that_is_only_predicted_counts_in_macro_f1(tmp_path):
    data = write_images(tmp_path / "toys", {"attic/green": ["green", "blue"], "attic/red": ["red"]})
    model = colors_model()
    attic = evaluate_model(model, load_data_for(model.card, str(data))).domains["attic"]
    assert attic.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert attic.confusion.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_the_batch_size_changes_nothing_and_progress_is_told(images):
    model, told = colors_model(), []
    dataset = load_data_for(model.card, str(images))
    whole = evaluate_model(model, dataset)
    in_fours = evaluate_model(model, dataset, batch_size=4, progress=lambda *counts: told.append(counts))
    assert told == [(4, 9), (6, 9), (9, 9)]
    assert in_fours.mean == whole.mean
    assert (in_fours.confusion == whole.confusion).all()


def test_batches_do_not_mix_domains(images):
    batches = []

    class Watching(MeanColor):
        def forward(self, inputs: Tensor) -> Tensor:
            batches.append(len(inputs))
            return super().forward(inputs)

    model = colors_model()
    model.featurizer = Watching()
    evaluate_model(model, load_data_for(model.card, str(images)), batch_size=5)
    assert batches == [5, 1, 3]


def test_the_model_is_put_into_eval_mode(images):
    model = colors_model()
    model.featurizer = nn.Sequential(nn.Dropout(1.0), MeanColor())
    assert evaluate_model(model, load_data_for(model.card, str(images))).domains["cellar"].accuracy == 1


def test_classes_that_the_model_does_not_know(images):
    (images / "cellar/blue").rename(images / "cellar/gren")
    write_images(images, {"cellar/violet": ["blue"]})
    model = colors_model()
    with pytest.raises(
        DataError,
        match=r"^classes of 'toys' are not all among the model's: unknown class 'gren'; did you mean 'green'\? "
        r"\(known: blue, green, red\) \(as are 1 others: 'violet'\); rename the classes, or leave them out$",
    ):
        evaluate_model(model, load_data_for(model.card, str(images)))


def test_inputs_of_another_shape():
    with pytest.raises(
        DataError, match=r"^inputs of 'colored-digits' have shape 128, but the model takes 3 x 8 x 8: use data like"
    ):
        evaluate_model(colors_model(), small_digits())


def test_probabilities_that_are_not_finite(images):
    model = colors_model()
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(DataError, match="probabilities on domain 'attic' of 'toys' are not finite"):
        evaluate_model(model, load_data_for(model.card, str(images)))


def test_an_image_that_cannot_be_read_is_named(images):
    (images / "cellar/red/0.png").write_bytes(b"no image")
    model = colors_model()
    with pytest.raises(DataError, match=r"cellar/red/0\.png cannot be read \(not an image"):
        evaluate_model(model, load_data_for(model.card, str(images)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"device": "cdua"}, "unknown device 'cdua'; did you mean 'cuda'?"),
    ],
)
def test_values_that_cannot_be(images, options, message):
    model = colors_model()
    with pytest.raises(ConfigError, match=f"^{message.replace('?', '.')}"):
        evaluate_model(model, load_data_for(model.card, str(images)), **options)


# Data for a model


def test_images_come_in_the_models_format_and_are_not_cached(images, tmp_path, monkeypatch):
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    card = replace(colors_model().card, image_format=ImageFormat(5, 1), input_shape=(1, 5, 5))
    dataset = load_data_for(card, str(images), subset=2)
    assert dataset.input_shape == (1, 5, 5)
    assert [len(samples.targets) for samples in dataset.domains.values()] == [2, 2]
    assert len(dataset.domains["attic"].inputs[:]) == 2
    assert not (tmp_path / "cache").exists()


def test_images_for_a_model_that_takes_none(images):
    card = replace(colors_model().card, image_format=None, input_shape=(128,))
    with pytest.raises(
        DataError, match=r"toys holds images, but the model takes float32 inputs of shape 128: use data"
    ):
        load_data_for(card, str(images))


def test_no_such_data():
    with pytest.raises(ConfigError, match=r"unknown dataset 'colored-digit'; did you mean 'colored-digits'.*no folder"):
        load_data_for(colors_model().card, "colored-digit")


# What the domains were in training


def provenance(dataset: MultiDomainDataset, train_domains: list[str], test_domains: list[str]) -> dict[str, Any]:
    config = {"data": dataset.name, "data_options": dict(dataset.options), "test_domains": test_domains}
    return {"config": config, "train_domains": train_domains}


def roles(model: SavedModel, dataset: MultiDomainDataset) -> dict[str, str | None]:
    return {name: domain.role for name, domain in evaluate_model(model, dataset).domains.items()}


def test_images_that_were_trained_on_are_known_wherever_they_lie(images, tmp_path):
    trained_with = load_dataset(str(images), image_size=8, subset=2)
    model = colors_model(provenance(trained_with, ["attic"], ["cellar"]))
    moved = Path(shutil.copytree(images, tmp_path / "copy"))
    for data in (images, moved):
        assert roles(model, load_data_for(model.card, str(data))) == {"attic": "trained on", "cellar": "held out"}
    write_images(moved, {"loft/red": ["red"]})
    assert set(roles(model, load_data_for(model.card, str(moved))).values()) == {None}
    assert set(roles(colors_model(), load_data_for(model.card, str(images))).values()) == {None}


def test_a_run_of_the_loop_is_evaluated_as_it_was_in_training(tmp_path):
    config = run_config("erm", test_domains=("-90%",), data_options=small_digits().options)
    with noisy_registered():
        result = train(config, small_digits(), tmp_path / "run")
        model = load_model(tmp_path / "run")
    evaluation = evaluate_model(model, load_data_for(model.card, "colored-digits", subset=60), batch_size=7)
    assert {name: domain.role for name, domain in evaluation.domains.items()} == {
        "+80%": "trained on",
        "+90%": "trained on",
        "-90%": "held out",
        "gray": "evaluation only",
    }
    in_split, out_split = (result.kept.domains["-90%"][split].accuracy for split in ("in", "out"))
    assert evaluation.domains["-90%"].accuracy == pytest.approx(0.8 * in_split + 0.2 * out_split)
    assert evaluation.confusion.sum() == 240


def test_a_dataset_is_loaded_as_for_the_training_but_for_its_subset():
    trained_with = load_dataset("colored-digits", seed=5, subset=30, label_flip=0.0)
    card = replace(
        colors_model().card,
        input_shape=(128,),
        image_format=None,
        provenance=provenance(trained_with, ["+80%", "+90%"], ["-90%"]),
    )
    again = load_data_for(card, "colored-digits", subset=50)
    expected = load_dataset("colored-digits", seed=5, subset=50, label_flip=0.0)
    assert again.options == expected.options
    assert all(torch.equal(samples.targets, expected.domains[name].targets) for name, samples in again.domains.items())
    other = replace(card, provenance=provenance(replace(trained_with, name="colored-mnist"), ["+80%"], []))
    assert load_data_for(other, "colored-digits", subset=50).options["seed"] == 0


def test_a_dataset_with_other_options_is_another_one():
    data = MultiDomainDataset(
        "points", "vectors", {"one": Samples(torch.zeros(4, 2), torch.arange(4) % 2)}, ("low", "high"), options={"x": 1}
    )
    head = nn.Linear(2, 2)
    card = ModelCard(ModelConfig("mlp"), (2,), ("low", "high"), False, provenance(data, ["one"], []))
    model = SavedModel(nn.Identity(), head, card)
    assert roles(model, data) == {"one": "trained on"}
    assert roles(model, replace(data, options={"x": 1, "subset": 2})) == {"one": "trained on"}
    assert roles(model, replace(data, options={"x": 2})) == {"one": None}
    assert roles(model, replace(data, name="others")) == {"one": None}
