"""Runs trained together by stacked models are the runs trained alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fishr.algorithms import ALGORITHMS, ERM, Algorithm
from fishr.data import DomainBatch, MultiDomainDataset, load_dataset
from fishr.errors import ConfigError, NonFiniteLossError, RunInterruptedError
from fishr.models import ModelConfig
from fishr.models.build import build_model
from fishr.records import RunRecord
from fishr.training import RunConfig, loop, stacked, train
from fishr.training.loop import PlannedRun, train_together
from fishr.training.stacked import Stack
from small_runs import AtStep, outcome, signal_at

SEEDS = (0, 1, 5)
STEPS, SWITCH_ON, CHECKPOINT_EVERY = 24, 9, 8
PENALTY: dict[str, Any] = {
    "penalty_weight": 50.0,
    "weight_before": 1.0,
    "switch_on": SWITCH_ON,
    "rescale": True,
    "reset_optimizer": False,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "erm": ("erm", {}),
    "irm": ("irm", {**PENALTY, "estimator": "full"}),
    "irm-split": ("irm", {**PENALTY, "estimator": "split"}),
    "vrex": ("vrex", PENALTY),
    "fishr": ("fishr", {**PENALTY, "ema": 0.0, "reduction": "sum"}),
    "fishr-second-moment": ("fishr", {**PENALTY, "ema": 0.0, "variant": "second_moment"}),
    "fishr-covariance": ("fishr", {**PENALTY, "variant": "covariance"}),
}


def dataset_of(seed: int) -> MultiDomainDataset:
    return load_dataset("colored-digits", seed=seed, subset=60)


def config_of(method: str, seed: int, **changes: Any) -> RunConfig:
    algorithm, hparams = METHODS[method]
    settings: dict[str, Any] = {
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "model": ModelConfig("mlp", {"width": 12}),
        "out_fraction": 0.0,
        **changes,
    }
    hparams = {"batch_size": None, "lr": 1e-2, "l2": 1e-3, **hparams, **settings.pop("hparams", {})}
    return RunConfig.for_dataset(dataset_of(seed), algorithm, seed=seed, hparams=hparams, **settings)


def planned(folder: Path, method: str, seeds: Sequence[int] = SEEDS, **changes: Any) -> list[PlannedRun]:
    return [
        PlannedRun(config_of(method, seed, **changes), dataset_of(seed), folder / f"{method}-{seed}") for seed in seeds
    ]


def one_by_one(folder: Path, method: str, seeds: Sequence[int] = SEEDS, **changes: Any) -> list[Path]:
    for run in planned(folder, method, seeds, **changes):
        train(run.config, run.dataset, run.output, device="cpu")
    return [folder / f"{method}-{seed}" for seed in seeds]


def numbers(records: Sequence[RunRecord]) -> torch.Tensor:
    """All losses of the records of a run."""
    losses = [value for record in records for value in record.losses.values()]
    evaluations = [
        metrics.loss for record in records for splits in record.domains.values() for metrics in splits.values()
    ]
    return torch.tensor([*losses, *evaluations], dtype=torch.float64)


def assert_same(ours: Path, theirs: Path, tolerance: float) -> None:
    """Files of the same names, the same config, records and weights but for rounding."""
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    (_, our_model, our_records), (_, their_model, their_records) = outcome(ours), outcome(theirs)
    assert [record.step for record in our_records] == [record.step for record in their_records]
    torch.testing.assert_close(numbers(our_records), numbers(their_records), rtol=tolerance, atol=tolerance)
    provenance = [json.loads(model)["provenance"] for model in (our_model, their_model)]
    assert provenance[0]["config"] == provenance[1]["config"]


# One step of the models, in float64


def stack_of(method: str, *, seeds: Sequence[int] = SEEDS) -> tuple[list[Algorithm], list[DomainBatch]]:
    algorithms, batches = [], []
    name, hparams = METHODS[method]
    for seed in seeds:
        torch.manual_seed(seed)
        dataset = dataset_of(seed)
        config = ALGORITHMS[name].Config(batch_size=None, lr=1e-2, l2=1e-3, **hparams)
        network = build_model(ModelConfig("mlp", {"width": 12}), dataset.input_shape, dataset.num_outputs)
        algorithms.append(ALGORITHMS[name](*network, 2, config, steps=STEPS).double())
        samples = [dataset.domains[domain] for domain in ("+80%", "+90%")]
        batches.append(DomainBatch.of([inputs.double() for inputs, _ in samples], [targets for _, targets in samples]))
    return algorithms, batches


@pytest.mark.parametrize("method", METHODS)
def test_stacked_models_follow_the_trajectory_of_each_alone(method: str) -> None:
    (alone, batches), (together, _) = stack_of(method), stack_of(method)
    stack = Stack(together, batches)
    optimizers = [[algorithm.configure_optimizers() for algorithm in algorithms] for algorithms in (alone, together)]
    for step in range(STEPS):
        expected = [
            algorithm.training_step(batch, step, optimizer)
            for algorithm, batch, optimizer in zip(alone, batches, optimizers[0], strict=True)
        ]
        actual = stack.backward(step)
        for optimizer in optimizers[1]:
            optimizer["main"].step()
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.terms.keys() == theirs.terms.keys()
            assert not ours.total.requires_grad
            torch.testing.assert_close(ours.total, theirs.total, rtol=1e-9, atol=1e-12)
            for name, value in ours.terms.items():
                torch.testing.assert_close(value, theirs.terms[name], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(together, alone, strict=True):
        for weights, expected_weights in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weights, expected_weights, rtol=1e-7, atol=1e-10)


def test_models_do_not_learn_from_each_other() -> None:
    """Another model's data change nothing."""
    gradients = []
    for scale in (1.0, 3.0):
        algorithms, batches = stack_of("fishr")
        batches[1] = replace(batches[1], inputs=scale * batches[1].inputs)
        Stack(algorithms, batches).backward(0)
        gradients.append([algorithm.featurizer[1].weight.grad for algorithm in algorithms])
    for index, same in enumerate((True, False, True)):
        assert torch.allclose(gradients[0][index], gradients[1][index], rtol=1e-9, atol=1e-15) is same


# Whole runs


@pytest.mark.parametrize("method", METHODS)
def test_each_run_is_what_it_is_alone(method: str, tmp_path: Path) -> None:
    expected = one_by_one(tmp_path / "alone", method)
    results = train_together(planned(tmp_path / "together", method), device="cpu")
    for result, alone in zip(results, expected, strict=True):
        assert result.trained
        assert_same(result.folder, alone, tolerance=1e-3)
    # Training did something, and not the same in each.
    weights = [outcome(result.folder)[0] for result in results]
    assert len(set(weights)) == len(SEEDS)


def test_in_bfloat16_too(tmp_path: Path) -> None:
    expected = one_by_one(tmp_path / "alone", "fishr", precision="bf16-mixed", steps=8)
    results = train_together(planned(tmp_path / "together", "fishr", precision="bf16-mixed", steps=8), device="cpu")
    for result, alone in zip(results, expected, strict=True):
        assert_same(result.folder, alone, tolerance=3e-2)


def test_inputs_halved_once_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network would round them at every step itself; an algorithm that looks at them is left to it."""
    seen = []
    featurized = ERM._featurized

    def looking(self: ERM, inputs: Tensor) -> Tensor:
        seen.append(inputs.dtype)
        return featurized(self, inputs)

    monkeypatch.setattr(ERM, "_featurized", looking)
    outcomes = []
    for folder, for_ranks in (("halved", True), ("not", False)):
        monkeypatch.setattr(ERM, "for_ranks", for_ranks)
        (run,) = one_by_one(tmp_path / folder, "erm", seeds=(0,), precision="bf16-mixed", steps=8)
        outcomes.append(outcome(run))
        assert (torch.bfloat16 in seen) is for_ranks
        seen.clear()
    assert outcomes[0] == outcomes[1]


def test_the_models_were_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare the same with itself."""
    steps = []
    backward = Stack.backward
    monkeypatch.setattr(
        Stack, "backward", lambda self, step: steps.append(len(self.algorithms)) or backward(self, step)
    )
    train_together(planned(tmp_path, "erm"), device="cpu")
    assert steps == [len(SEEDS)] * STEPS


def test_large_models_on_a_cpu_take_turns_and_are_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = one_by_one(tmp_path / "alone", "fishr")
    monkeypatch.setattr(stacked, "LARGEST_ON_CPU", 0)
    results = train_together(planned(tmp_path / "together", "fishr"), device="cpu")
    assert [outcome(result.folder) for result in results] == [outcome(folder) for folder in expected]


def test_seconds_of_the_runs_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of all is shared out: hours of a job are the sum over its runs."""
    clock = SimpleNamespace(perf_counter=partial(next, count()))  # each look is a second after the one before
    monkeypatch.setattr(loop, "time", clock)
    results = train_together(planned(tmp_path, "erm", seeds=(0, 1), steps=8), device="cpu")
    assert [record.seconds_per_step for result in results for record in result.records] == [0.5, 0.5]


# Done, cut, continued


def test_a_run_that_is_done_is_not_made_again(tmp_path: Path) -> None:
    expected = one_by_one(tmp_path / "alone", "erm")
    (done,) = one_by_one(tmp_path / "together", "erm", seeds=SEEDS[:1])
    before = outcome(done)
    results = train_together(planned(tmp_path / "together", "erm"), device="cpu")
    assert [result.trained for result in results] == [False, True, True]
    assert outcome(done) == before
    assert_same(results[2].folder, expected[2], tolerance=1e-3)
    assert [result.trained for result in train_together(planned(tmp_path / "together", "erm"))] == [False] * 3


@pytest.mark.parametrize("alone_first", [True, False], ids=["cut alone", "cut together"])
def test_runs_that_are_not_at_the_same_step_continue_together(tmp_path: Path, alone_first: bool) -> None:
    """Whichever is behind goes first."""
    expected = one_by_one(tmp_path / "alone", "vrex")
    runs = planned(tmp_path / "together", "vrex")
    if alone_first:  # one is at step 11, the others have not begun
        with pytest.raises(RunInterruptedError):
            train(runs[1].config, runs[1].dataset, runs[1].output, device="cpu", observer=signal_at(11))
    else:  # all are at step 11, then one goes on to step 16 alone
        with pytest.raises(RunInterruptedError):
            train_together([replace(runs[0], observer=signal_at(11)), *runs[1:]], device="cpu")
        with pytest.raises(RunInterruptedError):
            train(runs[1].config, runs[1].dataset, runs[1].output, device="cpu", observer=signal_at(16))
    started: list[int] = []
    results = train_together([replace(runs[0], observer=Starting(started)), *runs[1:]], device="cpu")
    assert started == [0 if alone_first else 11]
    for result, alone in zip(results, expected, strict=True):
        assert_same(result.folder, alone, tolerance=1e-3)


class Starting(AtStep):
    """Notes where a run starts."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(0, lambda: None)
        self.steps = steps

    def on_start(self, config: RunConfig, step: int) -> None:
        self.steps.append(step)


def test_runs_cut_together_are_continued_one_by_one(tmp_path: Path) -> None:
    expected = one_by_one(tmp_path / "alone", "irm")
    runs = planned(tmp_path / "together", "irm")
    with pytest.raises(
        RunInterruptedError, match=r"^stopped after step 11 of 24, saved in .*/irm-0 and 2 more: run the"
    ):
        train_together([*runs[:2], replace(runs[2], observer=signal_at(11))], device="cpu")
    for run, alone in zip(runs, expected, strict=True):
        assert [path.name for path in sorted((run.output / "checkpoints").iterdir())][-1] == "step-00000011"
        train(run.config, run.dataset, run.output, device="cpu")
        assert_same(run.output, alone, tolerance=1e-3)


def test_a_signal_in_the_last_step_leaves_all_runs_done(tmp_path: Path) -> None:
    runs = planned(tmp_path, "erm", steps=8)
    with pytest.raises(RunInterruptedError, match=r"^stopped; the run in .*/erm-0 and 2 more is done$"):
        train_together([replace(runs[0], observer=signal_at(8)), *runs[1:]], device="cpu")
    assert all((run.output / "DONE").exists() for run in runs)


# What is wrong


def test_the_run_whose_loss_is_not_finite_is_named(tmp_path: Path) -> None:
    runs = planned(tmp_path, "fishr")
    samples = runs[1].dataset.domains["+80%"]
    spoiled = samples._replace(inputs=samples.inputs.fill_(torch.nan))
    runs[1] = replace(runs[1], dataset=replace(runs[1].dataset, domains={**runs[1].dataset.domains, "+80%": spoiled}))
    with pytest.raises(
        NonFiniteLossError, match=r"^at step 1 loss is nan and .*; .*/fishr-1 has no checkpoint yet; try"
    ):
        train_together(runs, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"the same but for their seeds, got hparams\.lr: 0\.01 → 0\.001$"),
        ({"batch_size": 8}, "the same but for their seeds, got hparams.batch_size: None → 8$"),
    ],
)
def test_runs_that_differ_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    runs = [*planned(tmp_path, "erm", seeds=(0,)), *planned(tmp_path, "erm", seeds=(1,), hparams=changes)]
    with pytest.raises(ConfigError, match=message):
        train_together(runs, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "hparams", "message"),
    [
        ("erm", {"batch_size": 8}, "take all samples at each step: batch_size must be null, got 8$"),
        (
            "erm",
            {"dropout": 0.1},
            r"ERM cannot be stacked, as it draws random numbers \(dropout\): train its runs one by",
        ),
        ("vrex", {"reset_optimizer": True}, r"V-REx cannot be stacked, as it starts its optimizer anew"),
        ("fishr", {"ema": 0.5}, r"Fishr cannot be stacked, as it has state besides weights, such as a moving average"),
        ("irm", {"strength": 0.5, "rescale": False}, r"IRM cannot be stacked, as it has state besides weights"),
    ],
)
def test_what_cannot_be_stacked_is_refused(method: str, hparams: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_together(planned(tmp_path, method, hparams=hparams), device="cpu")


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("andmask", 1, "AND-mask cannot be stacked, as a step of it is more than one gradient"),
        ("erm", 2, "ERM cannot be stacked, as its loss is not binary cross-entropy"),
    ],
)
def test_algorithms_that_cannot_be_stacked_are_refused(name: str, outputs: int, message: str) -> None:
    network = build_model(ModelConfig("mlp", {"width": 4}), (128,), outputs)
    algorithm = ALGORITHMS[name](*network, 2)
    with pytest.raises(ConfigError, match=message):
        Stack([algorithm, algorithm], [])


def test_a_tracker_that_follows_one_run_at_a_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wandb follows one run of a process at a time: take another tracker, or"):
        train_together(planned(tmp_path, "erm"), device="cpu", track="wandb")
