"""The card of a model for a reader."""

from dataclasses import replace
from typing import Any

import pytest

from fishr.data.image_format import ImageFormat
from fishr.models import ModelCard, ModelConfig
from fishr.models.backbone import backbone_config
from fishr.models.card import card_as_markdown

CONFIG: dict[str, Any] = {
    "data": "animals",
    "data_options": {"subset": None, "image_size": 8, "augmentation": "light"},
    "test_domains": ["street"],
    "algorithm": "fishr",
    "hparams": {"lr": 5e-05, "penalty_weight": 1000.0, "ema": None},
    "steps": 300,
    "seed": 4,
    "trial": 2,
    "average": None,
    "select": False,
    "out_fraction": 0.2,
}
PROVENANCE: dict[str, Any] = {
    "config": CONFIG,
    "step": 300,
    "train_domains": ["lab", "shop"],
    "accuracy": {
        "lab": {"out": 0.97449},
        "shop": {"out": 1.0},
        "street": {"in": 0.8125, "out": 0.75},
        "gray": {"in": 0},
    },
    "versions": {"fishr": "0.3.0", "torch": "2.6.0", "timm": "1.0.12"},
}
CARD = ModelCard(ModelConfig("mlp"), (2, 4), ("cat", "dog"), False, PROVENANCE)


def rows(card: ModelCard) -> list[list[str]]:
    """Cells of all rows of all tables, as Markdown shows them."""
    lines = [line for line in card_as_markdown(card).splitlines() if line.startswith("|")]
    cells = [line.replace("\\|", "\0").strip("|").split("|") for line in lines]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in cells]


def facts(card: ModelCard) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(card) if len(row) == 2}


def provenance(**config: Any) -> dict[str, Any]:
    return {**PROVENANCE, "config": {**CONFIG, **config}}


def test_it_says_what_a_reader_wants_to_know() -> None:
    text = card_as_markdown(CARD)
    assert text.startswith("# Model card\n\nTells apart 2 classes: cat, dog.\n")
    known = facts(CARD)
    assert known["network"] == "mlp, not pre-trained"
    assert known["input"] == "float32 of shape 2 x 4"
    assert known["data"] == "animals (image_size 8, augmentation light)"
    assert known["trained on the domains"] == "lab, shop"
    assert known["held out"] == "street"
    assert known["algorithm"] == "fishr (lr 5e-05, penalty_weight 1000.0)"
    assert known["updates"] == "300 of 300, seed 4, trial 2"
    assert known["averaged weights"] == "no"
    assert known["model kept"] == "end of the run"
    assert "Made with fishr 0.3.0, torch 2.6.0, timm 1.0.12." in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_accuracies_are_in_percent_with_the_role_of_each_domain() -> None:
    assert [row for row in rows(CARD) if len(row) == 4] == [
        ["domain", "role", "split", "accuracy"],
        [":--", ":--", ":--", "--:"],
        ["lab", "trained on", "out", "97.4"],
        ["shop", "trained on", "out", "100.0"],
        ["street", "held out", "in", "81.2"],
        ["street", "held out", "out", "75.0"],
        ["gray", "evaluation only", "in", "0.0"],
    ]


@pytest.mark.parametrize(("channels", "name"), [(1, "gray"), (3, "RGB"), (4, "RGBA")])
def test_images_are_described(channels: int, name: str) -> None:
    card = replace(CARD, input_shape=(channels, 96, 96), image_format=ImageFormat(96, channels))
    assert facts(card)["input"] == f"{name} images, resized to 96 x 96"


def test_a_backbone_is_named_with_its_weights() -> None:
    config = replace(backbone_config("test_resnet", weights=None), weights="sha256:0123")
    assert facts(replace(CARD, model=config))["network"] == "test_resnet, sha256:0123"


def test_averages_and_selection_are_said() -> None:
    averaged = facts(replace(CARD, provenance=provenance(average={"name": "sma", "options": {"start": 50}})))
    assert averaged["averaged weights"] == "sma (start 50)"
    selected = replace(CARD, provenance=provenance(select=True))
    assert facts(selected)["model kept"] == "best checkpoint by validation on the training domains"
    assert "chose which weights were kept" in card_as_markdown(selected)
    assert "chose which weights were kept" not in card_as_markdown(CARD)


def test_without_a_held_out_domain_it_says_what_is_not_known() -> None:
    known = facts(replace(CARD, provenance=provenance(test_domains=[])))
    assert known["held out"] == "none: nothing is known about a domain it has not seen"


@pytest.mark.parametrize("known", [{}, {"config": {"seed": 3}}, {"versions": {"fishr": "0.3.0"}}])
def test_a_model_that_no_run_made_has_a_shorter_card(known: dict[str, Any]) -> None:
    card = replace(CARD, provenance=known)
    assert set(facts(card)) == {"", ":--", "network", "input"}
    assert ("Made with fishr 0.3.0." in card_as_markdown(card)) == ("versions" in known)


def named(name: str) -> ModelCard:
    """A card in which everything has that name."""
    return replace(
        CARD,
        classes=(name, "dog"),
        provenance={
            **provenance(data=name, test_domains=[name], data_options={"note": name}),
            "train_domains": [f"{name}2"],
            "accuracy": {name: {"in": 0.5}, f"{name}2": {"out": 0.25}},
        },
    )


@pytest.mark.parametrize(
    "name",
    ["a|b", "new\nline", "tab\tand  spaces", "| --- |", "\n\n# Heading", "carriage\r\nreturn", "\u2028separator"],
    ids=repr,
)
def test_names_break_neither_tables_nor_paragraphs(name: str) -> None:
    """Folders and classes are called whatever somebody calls them."""
    shown = " ".join(name.split())
    assert rows(named(name)) == [[cell.replace("NAME", shown) for cell in row] for row in rows(named("NAME"))]
    expected = card_as_markdown(named("NAME")).replace("NAME", shown.replace("|", "\\|"))
    assert card_as_markdown(named(name)) == expected
    assert len(expected.splitlines()) == len(card_as_markdown(CARD).splitlines()) - 3
