import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fishr.algorithms import ALGORITHMS, ERM
from fishr.data import MultiDomainDataset, load_dataset
from fishr.errors import ConfigError
from fishr.models import ModelConfig
from fishr.training import AverageConfig, RunConfig
from small_runs import numbered, run_config, write_pictures


def config(**changes: Any) -> RunConfig:
    return dataclasses.replace(run_config("fishr"), **changes)


CHANGES: dict[str, Any] = {
    "data": "colored-mnist",
    "test_domains": ("+80%",),
    "algorithm": "erm",
    "hparams": run_config("fishr").hparams.updated({"lr": 2e-2}),
    "model": ModelConfig("noisy", init="xavier"),
    "steps": 13,
    "checkpoint_every": 3,
    "data_options": {"subset": 61},
    "seed": 4,
    "trial": 1,
    "out_fraction": 0.1,
    "precision": "bf16-mixed",
    "average": AverageConfig("sma"),
    "select": True,
    "class_balanced": True,
}


def test_the_hash_is_that_of_every_equal_config() -> None:
    assert config().hash == run_config("fishr").hash
    assert config(data_options={"subset": 60, "label_flip": 0.0}).hash == (
        config(data_options={"label_flip": 0.0, "subset": 60}).hash
    )
    assert len(config().hash) == 16


def test_every_field_that_decides_what_a_run_computes_is_in_the_hash() -> None:
    assert {*CHANGES, "draw"} == {field.name for field in dataclasses.fields(RunConfig)}
    assert config(draw=3).hash == config().hash
    hashes = {config(**{name: value}).hash for name, value in CHANGES.items()}
    assert len(hashes | {config().hash}) == len(CHANGES) + 1


@pytest.mark.parametrize(
    "hparams", [{"ema": 0.8}, {"switch_on": 5}, {"reset_optimizer": False}, {"batch_size": None}, {"l2": 1e-9}]
)
def test_every_hyperparameter_is_in_the_hash(hparams: dict[str, Any]) -> None:
    assert config(hparams=config().hparams.updated(hparams)).hash != config().hash


def test_a_number_written_as_whole_is_the_same_number() -> None:
    """``--set penalty_weight=8089`` and ``penalty_weight=8089.0`` are one run."""
    whole, decimal = (config(hparams=config().hparams.updated({"penalty_weight": value})) for value in (8089, 8089.0))
    assert whole.hash == decimal.hash


def test_a_step_is_not_a_share() -> None:
    """``switch_on=1`` is the second step, ``switch_on=1.0`` is never."""
    step, share = (config(hparams=config().hparams.updated({"switch_on": value})) for value in (1, 1.0))
    assert step.hash != share.hash
    assert step.differences(share) == ["hparams.switch_on: 1 → 1.0"]


def test_the_order_of_held_out_domains_does_not_matter() -> None:
    assert config(test_domains=("+80%", "-90%")).hash == config(test_domains=("-90%", "+80%")).hash


def test_reads_back_from_json() -> None:
    original = config(
        model=ModelConfig("mlp", {"width": 3}, "xavier", "sha256:0123"),
        test_domains=("+80%", "-90%"),
        average=AverageConfig("ema", {"decay": 0.5}),
        select=True,
    )
    content = json.loads(json.dumps(original.as_dict()))
    assert RunConfig.from_dict(content) == original
    assert RunConfig.from_dict(content).hash == original.hash
    assert type(RunConfig.from_dict(content).hparams) is type(original.hparams)
    plain = config()
    assert RunConfig.from_dict(json.loads(json.dumps(plain.as_dict()))) == plain


def test_the_config_names_what_the_dataset_was_loaded_with() -> None:
    assert run_config().data_options == {"seed": 0, "subset": 60}


def test_differences_are_listed_one_by_one() -> None:
    other = config(
        steps=20,
        data_options={"label_flip": 0.0},
        hparams=config().hparams.updated({"ema": 0.5, "batch_size": None}),
        model=ModelConfig("mlp", {"width": 3}),
    )
    assert config().differences(other) == [
        "hparams.batch_size: 8 → None",
        "hparams.ema: 0.9 → 0.5",
        "model.featurizer: noisy → mlp",
        "steps: 12 → 20",
        "data_options.seed: 0 → not set",
        "data_options.subset: 60 → not set",
        "model.options.width: not set → 3",
        "data_options.label_flip: not set → 0.0",
    ]
    assert config().differences(config()) == []


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        config(steps=0, checkpoint_every=-1, seed=-2, trial=-3, precision="16", out_fraction=1.0)
    assert str(caught.value).split("; ") == [
        "steps must be at least 1, got 0",
        "checkpoint_every must be at least 1, got -1",
        "seed must be at least 0, got -2",
        "trial must be at least 0, got -3",
        "precision must be one of 32, bf16-mixed, got '16'",
        "out_fraction must lie in [0, 1), got 1.0",
    ]


SWAD = AverageConfig("swad")


@pytest.mark.parametrize(
    ("average", "needed"),
    [(None, False), (AverageConfig("sma"), False), (AverageConfig("ema"), False), (SWAD, True)],
    ids=str,
)
def test_only_swad_follows_the_validation_loss(average: AverageConfig | None, needed: bool) -> None:
    assert config(average=average).needs_validation_loss is needed


@pytest.mark.parametrize("changes", [{"select": True}, {"average": SWAD}], ids=str)
def test_what_validates_needs_out_splits(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^selection and SWAD need out-splits of the training domains: out_fraction must be above 0$",
    ):
        config(out_fraction=0.0, **changes)
    config(**changes)


def test_what_does_not_validate_needs_none() -> None:
    assert config(out_fraction=0.0, average=AverageConfig("sma")).out_fraction == 0


def test_swad_and_selection_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^SWAD chooses .*: select and average='swad' exclude each other$"):
        config(select=True, average=SWAD)
    config(select=True, average=AverageConfig("sma"))


def test_options_of_the_average_are_in_the_hash() -> None:
    """Written out or left to their defaults, they are the same options."""
    assert config(average=AverageConfig("sma")).hash == config(average=AverageConfig("sma", {"start": 100})).hash
    hashes = {config(average=AverageConfig("sma", {"start": start})).hash for start in (1, 2, 3)}
    assert len(hashes) == 3
    other = config(average=AverageConfig("sma", {"start": 3}))
    assert config(average=AverageConfig("sma")).differences(other) == ["average.options.start: 100 → 3"]


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps must be a whole number, got '12'"):
        config(steps="12")


@pytest.mark.parametrize("name", ["seed", "trial", "out_fraction"])
def test_zero_is_allowed(name: str) -> None:
    assert getattr(config(**{name: 0}), name) == 0


def test_the_customary_choices_of_a_dataset(digits: MultiDomainDataset) -> None:
    chosen = RunConfig.for_dataset(digits, "fishr", steps=500)
    assert (chosen.data, chosen.test_domains, chosen.checkpoint_every) == ("colored-digits", ("-90%",), 50)
    assert (chosen.model, chosen.hparams) == (ModelConfig("mlp"), ALGORITHMS["fishr"].Config())
    assert RunConfig.for_dataset(digits, "erm", steps=5).checkpoint_every == 1
    images = dataclasses.replace(digits, kind="small_images")
    assert RunConfig.for_dataset(images, "erm", steps=5).model == ModelConfig("mnist-cnn")
    large = dataclasses.replace(digits, kind="images")
    assert RunConfig.for_dataset(large, "erm", steps=5).hparams.lr == 5e-5


def test_given_choices_are_taken(digits: MultiDomainDataset) -> None:
    chosen = RunConfig.for_dataset(
        digits, "erm", steps=500, test_domains=("+80%",), hparams={"lr": 1}, checkpoint_every=7, trial=2
    )
    assert (chosen.test_domains, chosen.checkpoint_every, chosen.trial) == (("+80%",), 7, 2)
    assert (chosen.hparams.lr, chosen.hparams.batch_size) == (1, 64)


def test_an_unknown_algorithm_suggests_the_nearest(digits: MultiDomainDataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown algorithm 'fisher'; did you mean 'fishr'\? \(known: andmask, "):
        RunConfig.for_dataset(digits, "fisher", steps=5)


def test_data_with_a_fingerprint_may_have_any_name() -> None:
    """A copy of a folder under another name is the same data."""
    options = {"image_size": 16, "fingerprint": "0123456789abcdef"}
    one = replace(run_config(), data="mine", data_options=options)
    other = replace(one, data="a copy")
    assert one.hash == other.hash
    assert one.differences(other) == []
    assert one.hash != replace(one, data_options={**options, "fingerprint": "another"}).hash
    assert run_config().hash != replace(run_config(), data="other").hash


def test_a_text_for_names_and_for_an_average_is_refused() -> None:
    with pytest.raises(ConfigError, match="test_domains must be a tuple of names, got the text 'sketch'"):
        replace(run_config(), test_domains="sketch")
    with pytest.raises(ConfigError, match="average must be an AverageConfig or None, got 'sma'"):
        replace(run_config(), average="sma")


# Data of one's own


def test_data_of_ones_own_get_the_recommended_strength_and_benchmarks_the_published_weight() -> None:
    own, published = numbered(), replace(numbered(), published=True)
    assert RunConfig.for_dataset(own, "fishr", steps=10).hparams.strength == 0.5
    assert RunConfig.for_dataset(published, "fishr", steps=10).hparams.strength is None
    assert RunConfig.for_dataset(published, "fishr", steps=10).hparams.penalty_weight == 1000.0
    assert RunConfig.for_dataset(own, "erm", steps=10).hparams == ERM.Config()


def test_a_given_weight_takes_the_place_of_the_recommended_strength() -> None:
    config = RunConfig.for_dataset(numbered(), "fishr", steps=10, hparams={"penalty_weight": 3.0})
    assert (config.hparams.penalty_weight, config.hparams.strength) == (3.0, None)
    both = RunConfig.for_dataset(numbered(), "fishr", steps=10, hparams={"penalty_weight": 3.0, "strength": 0.5})
    assert both.hparams.strength == 0.5


def test_named_datasets_are_published_and_folders_are_not(tmp_path: Path) -> None:
    assert load_dataset("colored-digits", subset=10).published
    assert not load_dataset(write_pictures(tmp_path / "pictures", each=2), image_size=32).published
