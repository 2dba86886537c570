"""Fishr on the gradients of other layers than the classifier."""

import pytest
import torch
from torch import nn

import oracles
from cases import indices_of
from fishr.algorithms.fishr import Fishr, FishrConfig
from fishr.cli import main
from fishr.data.base import DomainBatch
from fishr.errors import ConfigError
from fishr.models.build import ModelConfig, build_model
from fishr.records import read_records
from fishr.testing import check_algorithm

SIZES = (4, 3)


def learner(**settings):
    torch.manual_seed(0)
    featurizer, classifier = build_model(ModelConfig("mlp", {"width": 5}), (6,), 3)
    config = FishrConfig(ema=0.0, switch_on=0, penalty_weight=2.0, **settings)
    return Fishr(featurizer.double(), classifier.double(), len(SIZES), config).double()


def draw_batch():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (sum(SIZES),), generator=generator)
    return DomainBatch.of(list(inputs.split(SIZES)), list(targets.split(SIZES)))


@pytest.mark.parametrize("layers", ["classifier", "featurizer", "all"])
def test_the_objective(layers):
    algorithm, batch = learner(layers=layers), draw_batch()
    parts = {"classifier": algorithm.classifier, "featurizer": algorithm.featurizer, "all": algorithm}
    losses = algorithm.losses(batch, 0)
    gradients = oracles.network_gradients(
        nn.CrossEntropyLoss(), algorithm, list(parts[layers].parameters()), batch.inputs, batch.targets
    )
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    penalty = oracles.penalty(oracles.variances(flat, indices_of(SIZES), 2), "mean")
    total = nn.functional.cross_entropy(algorithm(batch.inputs), batch.targets) + 2 * penalty
    assert oracles.relative_error(losses.terms["penalty"], penalty) <= 1e-10
    weights = algorithm.network_parameters
    ours, theirs = (torch.autograd.grad(value, weights) for value in (losses.total, total))
    assert oracles.relative_error(ours, theirs) <= 1e-10


def test_strength_and_dropout():
    algorithm = learner(layers="all", strength=0.5, dropout=0.5, reset_optimizer=False)
    optimizers = algorithm.configure_optimizers()
    for step in range(60):
        losses = algorithm.training_step(draw_batch(), step, optimizers)
    assert losses.terms["penalty_weight"] > 0
    assert losses.total.isfinite()


def test_the_contract_of_all_algorithms():
    check_algorithm(Fishr, FishrConfig.recommended("vectors").updated({"layers": "all"}))


def test_a_frozen_featurizer_has_no_gradients_to_compare():
    algorithm = learner(layers="featurizer")
    algorithm.featurizer.requires_grad_(False)
    with pytest.raises(ConfigError, match="all weights of the network are frozen"):
        algorithm.losses(draw_batch(), 0)


def test_covariances_are_of_the_classifier():
    message = "variant 'covariance' is for the layers 'classifier' alone, got layers 'all'"
    with pytest.raises(ConfigError, match=message):
        FishrConfig(variant="covariance", layers="all")
    with pytest.raises(ConfigError, match="layers must be one of 'classifier', 'featurizer', 'all', got 'head'"):
        FishrConfig(layers="head")


def test_several_devices_are_refused_at_construction(monkeypatch):
    monkeypatch.setattr("fishr.nn.network_penalty.is_distributed", lambda: True)
    learner(layers="classifier")
    with pytest.raises(ConfigError, match="train on one device"):
        learner(layers="all")


@pytest.mark.parametrize("layers", ["featurizer", "all"])
def test_from_the_command_line(layers, tmp_path, capsys):
    train = ["train", "--data", "colored-digits", "--subset", "40", "--steps", "12", "--quiet", "--algorithm", "fishr"]
    run = ["--output", str(tmp_path / "run"), "--set", f"layers={layers}", "penalty_weight=10"]
    assert main([*train, *run]) == 0
    *_, last = read_records(tmp_path / "run" / "metrics.jsonl")
    assert last.losses["penalty"] > 0
    assert main(["algorithms", "show", "fishr"]) == 0
    assert "layers" in capsys.readouterr().out
