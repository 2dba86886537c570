"""Dropout between featurizer and head."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms import ALGORITHMS, ERM, Algorithm
from fishr.algorithms.base import AlgorithmConfig
from fishr.data import DomainBatch

FEATURES = torch.arange(1.0, 6.0).repeat(4000, 1)
BATCH = DomainBatch(FEATURES, torch.arange(4000) % 3, (2000, 2000))


def algorithm(dropout: float, cls: type[Algorithm] = ERM, **settings: Any) -> Algorithm:
    """Features are the inputs."""
    torch.manual_seed(0)
    return cls(nn.Identity(), nn.Linear(5, 3), 2, cls.Config(dropout=dropout, **settings), steps=100)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_features_are_dropped_with_that_probability_and_the_rest_scaled(dropout: float) -> None:
    features = algorithm(dropout).features(BATCH)
    dropped = features == 0
    standard_error = (dropout * (1 - dropout) / dropped.numel()) ** 0.5
    assert dropped.double().mean().item() == pytest.approx(dropout, abs=4 * standard_error)
    assert torch.allclose(features[~dropped], FEATURES[~dropped] / (1 - dropout))
    # Each feature of each sample on its own.
    assert dropped.any(1).any()
    assert not torch.equal(dropped[0:2000], dropped[2000:])
    assert all(0 < column < len(FEATURES) for column in dropped.sum(0).tolist())


def test_only_in_training() -> None:
    dropping = algorithm(0.5)
    dropping.eval()
    assert torch.equal(dropping.features(BATCH), FEATURES)
    assert torch.equal(dropping(FEATURES), dropping.classifier(FEATURES))
    dropping.train()
    assert not torch.equal(dropping.features(BATCH), FEATURES)


def test_without_dropout_nothing_is_drawn() -> None:
    """A run without it has the random numbers that it always had."""
    plain = algorithm(0.0)
    before = torch.get_rng_state()
    assert torch.equal(plain.features(BATCH), FEATURES)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_a_function_of_torchs_random_numbers() -> None:
    dropping = algorithm(0.5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropping.features(BATCH))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"arm", "mtl", "rsc", "sagnet"}))
def test_every_algorithm_drops_features_before_its_head(name: str) -> None:
    """What reaches the head is what was dropped, so that penalties see the same features as the risk.

    Not here: those whose head sees more or less than the features.
    """
    seen: list[Tensor] = []
    dropping = algorithm(0.5, ALGORITHMS[name])
    dropping.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    batch = DomainBatch(FEATURES[:40], torch.arange(40) % 3, (20, 20))
    assert dropping.training_step(batch, 0, dropping.configure_optimizers()).total.isfinite()
    assert seen
    for features in seen:
        assert (features == 0).double().mean().item() == pytest.approx(0.5, abs=0.2)


def test_default_is_none() -> None:
    assert AlgorithmConfig().dropout == 0
