import copy
import dataclasses
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms import ALGORITHMS, ERM, Algorithm, Losses
from fishr.data import DomainBatch, MultiDomainDataset, Samples, load_dataset, split_indices
from fishr.errors import ConfigError, DataError, NonFiniteLossError, RunError, RunInterruptedError
from fishr.models import FEATURIZERS, ModelConfig, load_model
from fishr.records import Metrics, RunRecord
from fishr.training import RunConfig, loop, train
from fishr.training.evaluation import evaluate
from fishr.training.loop import Silent
from fishr.training.ranks import Ranks
from small_runs import (
    CHECKPOINT_EVERY,
    STEPS,
    AtStep,
    Outcome,
    numbered,
    numbered_config,
    outcome,
    picture_config,
    registered,
    run_config,
    signal_at,
)

CPU = Ranks("cpu", "32")


# What is trained on


class Seeing(ERM):
    """ERM that keeps what it was trained on."""

    seen: list[DomainBatch]

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        self.seen.append(batch)
        return super().losses(batch, step)


@pytest.fixture
def seen() -> Iterator[list[DomainBatch]]:
    Seeing.seen = []
    with registered(ALGORITHMS, "seeing", Seeing):
        yield Seeing.seen


def samples_of(batches: list[DomainBatch]) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in batch.inputs.long().tolist()}


@pytest.mark.parametrize("batch_size", [64, None])
@pytest.mark.parametrize(("out_fraction", "trial"), [(0.2, 0), (0.2, 1), (0.0, 0)])
def test_trained_on_exactly_the_in_splits_of_the_training_domains(
    seen: list[DomainBatch], batch_size: int | None, out_fraction: float, trial: int, tmp_path: Path
) -> None:
    config = numbered_config(
        "seeing", out_fraction=out_fraction, trial=trial, hparams={"batch_size": batch_size}, steps=3
    )
    train(config, numbered(), tmp_path / "run", device="cpu")
    expected = {(d, i) for d in (0, 1) for i in split_indices(10, out_fraction, trial, d)[0].tolist()}
    assert samples_of(seen) == expected
    assert len(expected) == (16 if out_fraction else 20)
    assert all(batch.sizes == (batch_size or len(expected) // 2,) * 2 for batch in seen)


def test_another_domain_can_be_held_out(seen: list[DomainBatch], tmp_path: Path) -> None:
    train(numbered_config("seeing", test_domains=("a", "b")), numbered(), tmp_path / "run", device="cpu")
    assert {domain for domain, _ in samples_of(seen)} == {2}
    seen.clear()
    train(numbered_config("seeing", test_domains=()), numbered(), tmp_path / "all", device="cpu")
    assert {domain for domain, _ in samples_of(seen)} == {0, 1, 2}


# Records


def test_a_record_for_each_checkpoint_and_the_last_step(tmp_path: Path) -> None:
    result = train(numbered_config(steps=25), numbered(), tmp_path / "run", device="cpu")
    assert [record.step for record in result.records] == [10, 20, 25]
    assert all(record.seconds_per_step > 0 for record in result.records)


def test_a_record_has_the_splits_that_selection_needs(tmp_path: Path) -> None:
    *early, last = train(numbered_config(steps=25), numbered(), tmp_path / "run", device="cpu").records
    needed = {"a": ["out"], "b": ["out"], "c": ["in"], "extra": ["in"]}
    for record in early:
        assert {name: list(splits) for name, splits in record.domains.items()} == needed
    # The held-out domain's out-split at the last checkpoint only.
    assert {name: list(splits) for name, splits in last.domains.items()} == {**needed, "c": ["in", "out"]}


def test_splits_are_evaluated_once_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[int, ...]]] = []

    def watching(algorithm: Algorithm, samples: Samples, ranks: Ranks) -> Metrics:
        seen.append({tuple(row) for row in samples.inputs.long().tolist()})
        return evaluate(algorithm, samples, ranks)

    monkeypatch.setattr(loop, "evaluate", watching)
    train(numbered_config(steps=20, trial=1), numbered(), tmp_path / "run", device="cpu")
    splits = [split_indices(10, 0.2, 1, domain) for domain in range(4)]
    places = [splits[0][1], splits[1][1], splits[2][0], splits[3][0]]
    first = [{(domain, place) for place in part.tolist()} for domain, part in enumerate(places)]
    held_out = {(2, place) for place in splits[2][1].tolist()}
    assert seen == [*first, *first[:3], held_out, first[3]]


def test_without_an_out_split_only_the_in_split_is_recorded(tmp_path: Path) -> None:
    result = train(numbered_config(out_fraction=0.0, steps=1), numbered(), tmp_path / "run", device="cpu")
    assert [set(splits) for splits in result.records[0].domains.values()] == [{"in"}] * 4
    assert result.kept == result.records[0]


def test_the_last_record_is_what_the_saved_model_does(digits: MultiDomainDataset, tmp_path: Path) -> None:
    result = train(run_config("fishr"), digits, tmp_path / "run", device="cpu")
    model = load_model(tmp_path / "run/model")
    as_algorithm = ERM(model.featurizer, model.classifier, 2)
    config = run_config("fishr")
    compared = []
    for index, (name, samples) in enumerate(digits.domains.items()):
        splits = dict(zip(("in", "out"), split_indices(len(samples.targets), 0.2, config.trial, index), strict=True))
        for split, metrics in result.records[-1].domains[name].items():
            assert evaluate(as_algorithm, samples.subset(splits[split]), CPU) == metrics
            compared.append((name, split))
    assert compared == [("+80%", "out"), ("+90%", "out"), ("-90%", "in"), ("-90%", "out"), ("gray", "in")]
    assert result.kept == result.records[-1]
    assert model.card.provenance["step"] == STEPS
    assert model.card.provenance["train_domains"] == ["+80%", "+90%"]
    assert model.card.provenance["config"] == config.as_dict()
    assert model.card.provenance["versions"]["torch"] == version("torch")
    last = result.records[-1].domains
    assert model.card.provenance["accuracy"] == {
        name: {split: metrics.accuracy for split, metrics in splits.items()} for name, splits in last.items()
    }
    assert (model.card.classes, model.card.binary, model.card.input_shape) == (digits.classes, True, (128,))


class Listening(Silent):
    """Keeps all that an observer is told."""

    def __init__(self) -> None:
        self.started: list[tuple[RunConfig, int]] = []
        self.steps: dict[int, dict[str, float]] = {}
        self.records: list[RunRecord] = []

    def on_start(self, config: RunConfig, step: int) -> None:
        assert not self.steps
        self.started.append((config, step))

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        self.steps[step] = dict(losses)

    def on_record(self, record: RunRecord) -> None:
        assert max(self.steps) == record.step
        self.records.append(record)


def test_the_observer_is_told_of_start_steps_and_records(digits: MultiDomainDataset, tmp_path: Path) -> None:
    told = Listening()
    result = train(run_config("fishr"), digits, tmp_path / "run", device="cpu", observer=told)
    assert told.started == [(run_config("fishr"), 0)]
    assert list(told.steps) == list(range(1, STEPS + 1))
    assert told.records == result.records


def test_the_observer_is_told_of_images_as_they_are_decoded(pictures_folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    class Counting(Silent):
        def on_images(self, done: int, total: int) -> None:
            told.append((done, total))

    for run in ("first", "second"):
        dataset = load_dataset(str(pictures_folder), image_size=16, cache_folder=tmp_path / "cache")
        train(picture_config(dataset), dataset, tmp_path / run, device="cpu", observer=Counting())
        # The second finds them in the cache.
        assert (told[-1], told.count((72, 72))) == ((72, 72), 1)


def test_a_run_that_is_done_reads_no_image(pictures: MultiDomainDataset, pictures_folder: Path, tmp_path: Path) -> None:
    first = train(picture_config(pictures), pictures, tmp_path / "run", device="cpu")
    copy = shutil.copytree(pictures_folder, tmp_path / "pictures")
    for image in copy.rglob("*.png"):
        image.write_bytes(bytes(image.stat().st_size))
    again = load_dataset(str(copy), image_size=16, cache="ram")
    result = train(picture_config(again), again, tmp_path / "run", device="cpu")
    assert (result.trained, result.records, result.kept) == (False, first.records, first.kept)


def test_recorded_losses_are_means_since_the_last_record(digits: MultiDomainDataset, tmp_path: Path) -> None:
    told = Listening()
    result = train(run_config("fishr"), digits, tmp_path / "run", device="cpu", observer=told)
    for record in result.records:
        steps = [told.steps[step] for step in range(record.step - CHECKPOINT_EVERY + 1, record.step + 1)]
        assert record.losses.keys() == {"loss", "risk", "penalty", "penalty_weight"}
        for name, value in record.losses.items():
            assert value == pytest.approx(sum(step[name] for step in steps) / len(steps))
    # Before the switch-on the loss is the risk, from then on the weighted penalty is added.
    for step, losses in told.steps.items():
        weight = 3.0 if step > 6 else 0.0
        assert losses["penalty_weight"] == weight
        assert losses["loss"] == pytest.approx(losses["risk"] + weight * losses["penalty"])
    assert all(losses["penalty"] > 0 for losses in told.steps.values())


def test_an_accelerators_losses_are_read_in_groups(
    digits: MultiDomainDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded is the same."""
    monitor = loop._LossMonitor
    expected = train(run_config("fishr"), digits, tmp_path / "each", device="cpu").records
    monkeypatch.setattr(loop, "_LossMonitor", lambda folder, looks_every: monitor(folder, looks_every=3))
    folder = tmp_path / "groups"
    told = Listening()
    with pytest.raises(RunInterruptedError):
        train(run_config("fishr"), digits, folder, device="cpu", observer=signal_at(5))
    records = train(run_config("fishr"), digits, folder, device="cpu", observer=told).records
    assert [record.losses for record in records] == [record.losses for record in expected]
    assert told.steps[6] == {}
    assert told.steps[8].keys() == {"loss", "risk", "penalty", "penalty_weight"}


# Losses that are not finite


class Breaking(ERM):
    """ERM with two more terms, one of which breaks at a step index."""

    at: int
    value = math.nan

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        risk = super().losses(batch, step).total
        wild = risk.new_tensor(self.value if step == self.at else 1.0)
        return Losses(risk, {"tame": risk.detach(), "wild": wild})


@pytest.mark.parametrize(("index", "checkpoint"), [(7, 4), (8, 8), (4, 4)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(
    index: int, checkpoint: int, value: float, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    Breaking.at, Breaking.value = index, value
    config = dataclasses.replace(run_config(), algorithm="breaking")
    with (
        registered(ALGORITHMS, "breaking", Breaking),
        pytest.raises(
            NonFiniteLossError,
            match=rf"^at step {index + 1} wild is {value}; the last good checkpoint is "
            rf"{tmp_path}/run/checkpoints/step-{checkpoint:08d}; try a smaller lr or penalty weight$",
        ),
    ):
        train(config, digits, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/DONE").exists()


def test_without_a_checkpoint_before_it_says_so(digits: MultiDomainDataset, tmp_path: Path) -> None:
    Breaking.at, Breaking.value = 0, math.nan
    config = dataclasses.replace(run_config(), algorithm="breaking")
    with (
        registered(ALGORITHMS, "breaking", Breaking),
        pytest.raises(NonFiniteLossError, match=rf"^at step 1 wild is nan; {tmp_path}/run has no checkpoint yet; try"),
    ):
        train(config, digits, tmp_path / "run", device="cpu")


def test_a_huge_learning_rate_stops_the_run(digits: MultiDomainDataset, tmp_path: Path) -> None:
    config = run_config("fishr", hparams={"lr": 1e30, "penalty_weight": 1e30}, model=ModelConfig("mlp"))
    with pytest.raises(NonFiniteLossError, match=r"^at step \d+ loss is (nan|inf)( and \w+ is (nan|inf))*; .* has no"):
        train(config, digits, tmp_path / "run", device="cpu")


# The switch-on step


@pytest.mark.parametrize("switch_on", [STEPS, 40, 1.0, 3.5])
def test_a_penalty_that_never_acts_is_a_warning_at_the_start(
    switch_on: float, digits: MultiDomainDataset, tmp_path: Path, warnings_logged: Callable[[], list[str]]
) -> None:
    at_first_step: list[str] = []
    observer = AtStep(1, lambda: at_first_step.extend(warnings_logged()))
    train(
        run_config("fishr", hparams={"switch_on": switch_on}), digits, tmp_path / "run", device="cpu", observer=observer
    )
    step = switch_on if isinstance(switch_on, int) else round(switch_on * STEPS)
    assert at_first_step == [
        f"the penalty never switches on: switch_on={switch_on} is step {step} of a run of {STEPS} steps"
    ]


@pytest.mark.parametrize("switch_on", [0, STEPS - 1, 0.5])
def test_a_penalty_that_acts_is_none(
    switch_on: float, digits: MultiDomainDataset, tmp_path: Path, warnings_logged: Callable[[], list[str]]
) -> None:
    train(run_config("fishr", hparams={"switch_on": switch_on}), digits, tmp_path / "run", device="cpu")
    assert warnings_logged() == []


# Configs and data that do not go together


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"test_domains": ("-80%",)}, ConfigError, r"unknown test domain of 'colored-digits' '-80%'; did you mean "),
        ({"test_domains": ("gray",)}, ConfigError, r"unknown test domain .* \(known: \+80%, \+90%, -90%\)"),
        ({"test_domains": ("+80%", "+90%", "-90%")}, DataError, r"leaves no domain of 'colored-digits' to train on"),
        ({"model": ModelConfig("nosy")}, ConfigError, "unknown featurizer 'nosy'; did you mean 'noisy'"),
        ({"model": ModelConfig("mlp", {"height": 3})}, ConfigError, "featurizer 'mlp' cannot be built: .*'height'"),
        ({"model": ModelConfig("mlp", init="zeros")}, ConfigError, "init must be 'default' or 'xavier', got 'zeros'"),
    ],
)
def test_what_does_not_fit_is_said(
    changes: dict[str, Any], error: type[Exception], message: str, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(run_config(**changes), digits, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_hyperparameters_of_another_algorithm_are_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(run_config("irm"), algorithm="fishr")
    with pytest.raises(ConfigError, match="Fishr takes a FishrConfig, got a IRMConfig"):
        train(config, digits, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_another_dataset_than_the_configs_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(numbered_config(), data="colored-digits")
    with pytest.raises(ConfigError, match=r"'colored-digits'.*'numbered'"):
        train(config, numbered(), tmp_path / "run", device="cpu")


def test_a_domain_too_small_for_an_out_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="domain 'a' has 4 samples, too few for an out-split of 20%"):
        train(numbered_config(), numbered(4), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    train(numbered_config(steps=1), numbered(5), tmp_path / "run", device="cpu")


def test_an_unknown_device_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'cud'; did you mean 'cuda'\? \(known: auto, cpu, cuda, mps"):
        train(run_config(), digits, tmp_path / "run", device="cud")


# Random numbers


def test_random_states_outside_are_left_alone(digits: MultiDomainDataset, tmp_path: Path) -> None:
    torch.manual_seed(11)
    np.random.seed(12)  # noqa: NPY002
    random.seed(13)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    train(run_config("fishr"), digits, tmp_path / "run", device="cpu")
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][1], after[1][1])
    assert before[1][2:] == after[1][2:]
    assert before[2] == after[2]


def test_random_states_outside_change_nothing(
    digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    expected = undisturbed("erm")
    torch.manual_seed(1234)
    train(run_config(), digits, tmp_path / "run", device="cpu", observer=AtStep(3, lambda: torch.manual_seed(5)))
    assert outcome(tmp_path / "run") == expected


class Drawing(nn.Module):
    """A featurizer that keeps the random numbers it was built and trained with."""

    numbers: list[Tensor]

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = input_shape[0]
        self.numbers.append(torch.rand(4))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.numbers.append(torch.rand(4))
        return inputs


def numbers_drawn(config: RunConfig, digits: MultiDomainDataset, folder: Path) -> list[Tensor]:
    Drawing.numbers = []
    with registered(FEATURIZERS, "drawing", Drawing):
        train(config, digits, folder, device="cpu")
    return Drawing.numbers


def differ(numbers: list[Tensor]) -> bool:
    return len({tuple(draw.tolist()) for draw in numbers}) == len(numbers)


def test_every_step_has_random_numbers_of_its_own(digits: MultiDomainDataset, tmp_path: Path) -> None:
    config = run_config(model=ModelConfig("drawing"))
    first = numbers_drawn(config, digits, tmp_path / "first")
    assert len(first) == 1 + STEPS
    assert differ(first[1:])
    other_seed = numbers_drawn(dataclasses.replace(config, seed=4), digits, tmp_path / "second")
    assert differ(first[1:] + other_seed[1:])


def test_initial_weights_and_the_first_step_do_not_share_random_numbers(
    digits: MultiDomainDataset, tmp_path: Path
) -> None:
    assert differ(numbers_drawn(run_config(model=ModelConfig("drawing")), digits, tmp_path / "run"))


# Precision


class Typing(nn.Module):
    """A featurizer that keeps the types it computes in."""

    types: set[torch.dtype]

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = 4
        self.layer = nn.Linear(*input_shape, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layer(inputs)
        self.types.add(features.dtype)
        return features


@pytest.mark.parametrize(("precision", "expected"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_the_featurizer_runs_in_the_precision_of_the_run(
    precision: str, expected: torch.dtype, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    Typing.types = set()
    config = run_config("fishr", model=ModelConfig("typing"), precision=precision)
    with registered(FEATURIZERS, "typing", Typing):
        train(config, digits, tmp_path / "run", device="cpu")
        weights = load_model(tmp_path / "run/model").state_dict()
    assert Typing.types == {expected}
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_precision_changes_the_bits(undisturbed: Callable[[str], Outcome]) -> None:
    assert undisturbed("fishr")[0] != undisturbed("fishr-bf16")[0]


# Learning


def test_it_learns(digits: MultiDomainDataset, tmp_path: Path) -> None:
    """Color tells the label in the training domains and misleads in the one held out: ERM relies on it."""
    config = run_config(steps=100, model=ModelConfig("mlp"), hparams={"batch_size": None}, out_fraction=0.0)
    records = train(config, digits, tmp_path / "run", device="cpu").records
    first, last = records[0], records[-1]
    assert last.losses["loss"] < 0.5 * first.losses["loss"]
    assert last.domains["+90%"]["in"].accuracy > 0.9
    assert last.domains["-90%"]["in"].accuracy < 0.5


def test_the_data_are_not_changed(digits: MultiDomainDataset, tmp_path: Path) -> None:
    before = copy.deepcopy(dict(digits.domains))
    train(run_config("fishr"), digits, tmp_path / "run", device="cpu")
    for name, samples in before.items():
        assert torch.equal(samples.inputs, digits.domains[name].inputs)
        assert torch.equal(samples.targets, digits.domains[name].targets)


def test_a_dataset_other_than_the_config_names_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    other = load_dataset("colored-digits", subset=60, seed=9)
    with pytest.raises(ConfigError, match=r"names the dataset 'colored-digits' with .*'seed': 0.* with .*'seed': 9"):
        train(run_config(), other, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_done_run_without_records_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    train(run_config(), digits, str(tmp_path / "run"), device="cpu")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics.jsonl is missing or empty: delete the run's folder"):
        train(run_config(), digits, tmp_path / "run", device="cpu")
