"""Which weights a run keeps: its last, those of its best checkpoint, or an average over steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fishr.algorithms import ALGORITHMS, Algorithm
from fishr.data import MultiDomainDataset, Samples
from fishr.models import load_model
from fishr.records import Metrics
from fishr.training import AverageConfig, RunConfig, RunResult, loop, train
from fishr.training.evaluation import evaluate
from fishr.training.ranks import Ranks
from fishr.training.run_folder import RunFolder
from small_runs import Outcome, Recorded, numbered, numbered_config, outcome, registered, run_config

Weights = dict[str, Tensor]
CPU = Ranks("cpu", "32")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-7) for name in one)


def mean(weights: Sequence[Weights]) -> Weights:
    return {name: torch.stack([each[name] for each in weights]).double().mean(0).float() for name in weights[0]}


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model/model.safetensors")


class Script:
    """What is said about domains in place of evaluating them: at the i-th checkpoint, the i-th of their values.

    Attributes:
        weights: The weights that were evaluated at each checkpoint.
    """

    def __init__(self, accuracies: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]) -> None:
        self.accuracies, self.losses = accuracies, losses
        self.weights: list[Weights] = []

    def evaluate(self, algorithm: Algorithm, samples: Samples, ranks: Ranks) -> Metrics:
        domain = ("a", "b", "c", "extra")[int(samples.inputs[0, 0])]
        if domain == "a":
            self.weights.append({name: value.clone() for name, value in algorithm.state_dict().items()})
        checkpoint = len(self.weights) - 1
        return Metrics(*(said.get(domain, [0.5] * 99)[checkpoint] for said in (self.accuracies, self.losses)))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    def start(accuracies: Mapping[str, Sequence[float]] = {}, losses: Mapping[str, Sequence[float]] = {}) -> Script:
        script = Script(accuracies, losses)
        monkeypatch.setattr(loop, "evaluate", script.evaluate)
        return script

    return start


@pytest.fixture
def trajectory() -> Iterator[list[Weights]]:
    """The weights after each update of runs of the algorithm "recorded"."""
    Recorded.trajectory = []
    with registered(ALGORITHMS, "recorded", Recorded):
        yield Recorded.trajectory


def train_numbered(folder: Path, algorithm: str = "recorded", **changes: Any) -> RunResult:
    config = numbered_config(algorithm, **{"steps": 30, "checkpoint_every": 5, **changes})
    return train(config, numbered(), folder, device="cpu")


# The best checkpoint


@pytest.mark.parametrize(
    ("a", "b", "step"),
    [
        ([0.1, 0.2, 0.9, 0.3, 0.4, 0.5], [0.1, 0.2, 0.9, 0.3, 0.4, 0.5], 15),
        # The mean counts: 0.5, 0.55, 0.5, ...
        ([1.0, 0.6, 0.3, 0.0, 0.0, 0.0], [0.0, 0.5, 0.7, 0.9, 0.0, 0.0], 10),
        # The first of equals, also where the sums are made of other numbers.
        ([0.25, 0.5, 0.5, 0.75, 0.5, 0.5], [0.25, 0.5, 0.5, 0.25, 0.25, 0.5], 10),
        ([0.5] * 6, [0.5] * 6, 5),
        ([0.0] * 6, [0.0] * 6, 5),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0] * 6, 30),
    ],
)
def test_the_best_mean_over_the_training_domains_is_kept(
    a: list[float],
    b: list[float],
    step: int,
    scripted: Callable[..., Script],
    trajectory: list[Weights],
    tmp_path: Path,
) -> None:
    # The held-out domain and one for evaluation only would choose otherwise.
    script = scripted({"a": a, "b": b, "c": [0, 1, 0, 0, 1, 0], "extra": [0, 0, 0, 1, 0, 0]})
    result = train_numbered(tmp_path / "run", select=True)
    assert (result.kept.step, result.kept) == (step, result.records[step // 5 - 1])
    assert same(weights_of(tmp_path / "run"), trajectory[step - 1])
    assert same(script.weights[step // 5 - 1], trajectory[step - 1])
    assert [record.step for record in result.records] == [5, 10, 15, 20, 25, 30]
    provenance = load_model(tmp_path / "run").card.provenance
    assert provenance["step"] == step
    assert provenance["accuracy"]["a"] == {"out": a[step // 5 - 1]}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "model", "DONE"}


def test_without_selection_the_last_is_kept(
    scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path
) -> None:
    scripted({"a": [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]})
    result = train_numbered(tmp_path / "run")
    assert result.kept == result.records[-1]
    assert same(weights_of(tmp_path / "run"), trajectory[-1])


def test_selection_changes_nothing_in_training(
    scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path
) -> None:
    for name, select in (("selected", True), ("last", False)):
        scripted({"a": [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]})
        train_numbered(tmp_path / name, select=select)
    assert len(trajectory) == 60
    assert all(same(one, other) for one, other in zip(trajectory[:30], trajectory[30:], strict=True))


@pytest.mark.parametrize(
    ("switch_on", "step"),
    [
        (0, 5),
        (4, 5),
        # Five updates are made with the steps 0 to 4: at the switch-on step 5 none of them had the penalty.
        (5, 10),
        (9, 10),
        (10, 15),
        (0.5, 20),
        (24, 25),
        (25, 30),
        # Never on, or after the last checkpoint: the last.
        (30, 30),
        (31, 30),
        (3.0, 30),
    ],
)
def test_never_a_checkpoint_before_the_switch_on(
    switch_on: float, step: int, scripted: Callable[..., Script], tmp_path: Path
) -> None:
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    scripted({"a": falling, "b": falling})
    hparams = {"penalty_weight": 1.0, "switch_on": switch_on}
    result = train_numbered(tmp_path / "run", "fishr", select=True, hparams=hparams)
    assert result.kept.step == step
    assert load_model(tmp_path / "run").card.provenance["step"] == step


@pytest.mark.parametrize(("switch_on", "step"), [(7, 10), (8, 15), (9, 15), (28, 30), (29, 30)])
def test_nor_one_before_the_end_of_the_ramp(
    switch_on: int, step: int, scripted: Callable[..., Script], tmp_path: Path
) -> None:
    """Which takes a twentieth of 30 steps, rounded up."""
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    scripted({"a": falling, "b": falling})
    hparams = {"strength": 1.0, "switch_on": switch_on}
    assert train_numbered(tmp_path / "run", "fishr", select=True, hparams=hparams).kept.step == step


@pytest.mark.parametrize("name", ["erm", "fishr"])
def test_the_kept_model_is_that_of_a_run_that_ended_there(
    name: str, digits: MultiDomainDataset, tmp_path: Path
) -> None:
    """With metrics as they are."""
    config = run_config(name, select=True, checkpoint_every=1, trial=5)
    selected = train(config, digits, tmp_path / "selected", device="cpu")
    means = {
        record.step: fmean(record.domains[domain]["out"].accuracy for domain in ("+80%", "+90%"))
        for record in selected.records
        if name == "erm" or record.step > 6
    }
    assert selected.kept.step == max(means, key=means.__getitem__)
    assert means[selected.kept.step] > means[12]
    train(run_config(name, steps=selected.kept.step, trial=5), digits, tmp_path / "ended", device="cpu")
    assert same(weights_of(tmp_path / "selected"), weights_of(tmp_path / "ended"))


class KilledError(BaseException):
    """In place of a signal that cannot be caught."""


def killed_at(place: str, checkpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die in front of that function, when it is called for the so-manieth time."""
    seen = 0
    owner: Any = loop if place == "save_checkpoint" else RunFolder
    original = getattr(owner, place)

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == checkpoint:
            raise KilledError
        return original(*arguments, **options)

    monkeypatch.setattr(owner, place, dying)


@pytest.mark.parametrize("average", [None, AverageConfig("sma", {"start": 4})], ids=["plain", "sma"])
@pytest.mark.parametrize(
    ("place", "checkpoint"),
    [
        ("append", 1),
        ("append", 2),
        ("append", 3),
        ("append", 6),
        ("save_checkpoint", 1),
        ("save_checkpoint", 2),
        ("save_checkpoint", 3),
        ("save_checkpoint", 6),
        ("finish", 1),
    ],
)
def test_killed_around_a_checkpoint(
    place: str,
    checkpoint: int,
    average: AverageConfig | None,
    digits: MultiDomainDataset,
    selected: Callable[[RunConfig], Outcome],
    tmp_path: Path,
) -> None:
    config = run_config(select=True, checkpoint_every=2, average=average, trial=1)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(place, checkpoint, patch)
        with pytest.raises(KilledError):
            train(config, digits, tmp_path / "run", device="cpu")
    train(config, digits, tmp_path / "run", device="cpu")
    assert outcome(tmp_path / "run") == selected(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "model", "DONE"}


@pytest.fixture(scope="module")
def selected(digits: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Outcome]:
    """What a run leaves when nothing disturbs it."""
    known: dict[str, Outcome] = {}

    def outcome_of(config: RunConfig) -> Outcome:
        if config.hash not in known:
            folder = tmp_path_factory.mktemp("selected") / "run"
            # Three checkpoints are the best so far, and the last of them is not the last checkpoint.
            assert train(config, digits, folder, device="cpu").kept.step == 6
            known[config.hash] = outcome(folder)
        return known[config.hash]

    return outcome_of


def test_the_best_weights_are_averaged_ones(
    scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path
) -> None:
    script = scripted({"a": [0.1, 0.2, 0.9, 0.3, 0.4, 0.5]})
    result = train_numbered(tmp_path / "run", select=True, average=AverageConfig("sma", {"start": 8}))
    assert result.kept.step == 15
    assert close(weights_of(tmp_path / "run"), mean(trajectory[7:15]))
    assert same(weights_of(tmp_path / "run"), script.weights[2])


# Averages


@pytest.mark.parametrize(
    "average",
    [
        AverageConfig("sma", {"start": 1}),
        AverageConfig("ema", {"decay": 0.8}),
        AverageConfig("swad", {"n_converge": 1, "n_tolerance": 2, "tolerance": 1.0}),
    ],
    ids=lambda average: average.name,
)
def test_the_plain_weights_go_on_as_if_there_were_no_average(
    average: AverageConfig, digits: MultiDomainDataset, trajectory: list[Weights], tmp_path: Path
) -> None:
    """With batch statistics too, that evaluation with other weights must not leave behind."""
    config = run_config(average=average, algorithm="recorded", checkpoint_every=2)
    train(config, digits, tmp_path / "averaged", device="cpu")
    averaged = trajectory.copy()
    trajectory.clear()
    train(run_config(algorithm="recorded"), digits, tmp_path / "plain", device="cpu")
    assert len(averaged) == 12
    assert all(same(one, other) for one, other in zip(averaged, trajectory, strict=True))
    assert not close(weights_of(tmp_path / "averaged"), trajectory[-1])


def test_sma_is_evaluated_and_kept(scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path) -> None:
    script = scripted({"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]})
    result = train_numbered(tmp_path / "run", average=AverageConfig("sma", {"start": 8}))
    assert same(script.weights[0], trajectory[4])
    for checkpoint in range(1, 6):
        assert close(script.weights[checkpoint], mean(trajectory[7 : 5 * (checkpoint + 1)]))
    assert len(script.weights) == 6
    assert close(weights_of(tmp_path / "run"), mean(trajectory[7:]))
    assert same(weights_of(tmp_path / "run"), script.weights[-1])
    assert result.kept == result.records[-1]


def test_ema_is_evaluated_and_kept(scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path) -> None:
    script = scripted()
    train_numbered(tmp_path / "run", average=AverageConfig("ema", {"decay": 0.75}))
    expected, at_checkpoints = trajectory[0], []
    for step, weights in enumerate(trajectory, start=1):
        expected = {name: 0.75 * value + 0.25 * weights[name] for name, value in expected.items()}
        if step % 5 == 0:
            at_checkpoints.append(expected)
    assert all(close(one, other) for one, other in zip(script.weights, at_checkpoints, strict=True))
    assert close(weights_of(tmp_path / "run"), at_checkpoints[-1])


@pytest.mark.parametrize("name", ["sma", "ema"])
def test_records_are_those_of_the_averaged_weights(name: str, digits: MultiDomainDataset, tmp_path: Path) -> None:
    options = {"sma": {"start": 1}, "ema": {"decay": 0.5}}[name]
    config = run_config("erm", average=AverageConfig(name, options))
    result = train(config, digits, tmp_path / "run", device="cpu")
    model = load_model(tmp_path / "run")
    algorithm = ALGORITHMS["erm"](model.featurizer, model.classifier, 2, config.hparams)
    splits = loop._split_all(digits, config)
    for domain, metrics in result.kept.domains.items():
        assert {split: evaluate(algorithm, splits[domain][split], CPU) for split in metrics} == metrics


def test_an_average_that_never_starts_leaves_the_last_weights(
    digits: MultiDomainDataset, trajectory: list[Weights], tmp_path: Path, warnings_logged: Callable[[], list[str]]
) -> None:
    config = run_config(algorithm="recorded", average=AverageConfig("sma", {"start": 13}))
    result = train(config, digits, tmp_path / "run", device="cpu")
    assert same(weights_of(tmp_path / "run"), trajectory[-1])
    assert result.kept == result.records[-1]
    assert [warning.split(":")[0] for warning in warnings_logged()] == [
        "no weights were averaged, the run's last weights are kept"
    ]


# SWAD

SWAD = AverageConfig("swad", {"n_converge": 2, "n_tolerance": 2, "tolerance": 1.25})


def test_swad_averages_every_step_of_the_valley(
    scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path
) -> None:
    # Mean losses over a and b: 3, 1, 1, 1.2, 2, 2, 0.1, 0.1; the domains for evaluation say something else.
    # The valley begins with the second checkpoint, its threshold is 1.25, and it ends before the fifth.
    a, b = [2, 0, 1, 1.4, 3, 2, 0.1, 0.1], [4, 2, 1, 1.0, 1, 2, 0.1, 0.1]
    script = scripted(
        {"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95]},
        {"a": [*a, 0.25], "b": [*b, 0.75], "c": [5.0] * 9, "extra": [0.0] * 9},
    )
    result = train_numbered(tmp_path / "run", steps=40, average=SWAD)
    assert close(weights_of(tmp_path / "run"), mean(trajectory[5:20]))

    # Validation is of the plain weights, and so are the records.
    assert len(script.weights) == 9
    for checkpoint, weights in enumerate(script.weights[:8]):
        assert same(weights, trajectory[5 * checkpoint + 4]), f"checkpoint {checkpoint}"
    assert [record.domains["a"]["out"].accuracy for record in result.records] == [
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
    ]
    # What is kept was evaluated once more.
    assert same(script.weights[8], weights_of(tmp_path / "run"))
    assert result.kept.step == 40
    assert result.kept.domains["a"] == {"out": Metrics(0.95, 0.25)}
    assert set(result.kept.domains["c"]) == {"in", "out"}
    assert result.kept.losses == {}
    assert load_model(tmp_path / "run").card.provenance["accuracy"]["a"] == {"out": 0.95}

    again = train_numbered(tmp_path / "run", steps=40, average=SWAD)
    assert (again.trained, again.kept) == (False, result.kept)


def test_swad_of_a_valley_that_does_not_end(
    scripted: Callable[..., Script], trajectory: list[Weights], tmp_path: Path
) -> None:
    losses = [3, 2, 1, 1, 1.1, 2]
    scripted({}, {"a": [*losses, 0], "b": [*losses, 0]})
    train_numbered(tmp_path / "run", average=SWAD)
    assert close(weights_of(tmp_path / "run"), mean(trajectory[10:25]))


def test_swad_without_a_valley_leaves_the_last_weights(
    scripted: Callable[..., Script],
    trajectory: list[Weights],
    tmp_path: Path,
    warnings_logged: Callable[[], list[str]],
) -> None:
    falling = [6, 5, 4, 3, 2, 1]
    script = scripted({}, {"a": falling, "b": falling})
    result = train_numbered(tmp_path / "run", average=SWAD)
    assert same(weights_of(tmp_path / "run"), trajectory[-1])
    assert result.kept == result.records[-1]
    assert len(script.weights) == 6
    (warning,) = warnings_logged()
    assert warning.startswith("no weights were averaged, the run's last weights are kept: swad found no checkpoint")
