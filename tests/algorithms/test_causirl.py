"""CausIRL: domains cut in two, and the distance between the parts."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.algorithms.causirl import CausIRLConfig, CausIRLCORAL, CausIRLMMD
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from fishr.space import LogUniform
from oracles import relative_error

SIZES = (4, 7, 3)
FIRST, SECOND = [0, 4, 5, 6, 7, 8], [1, 2, 3, 9, 10, 11, 12, 13]
"""Cut before sample 1 of the first domain, 5 of the second and 0 of the third."""

CLASSES = (CausIRLCORAL, CausIRLMMD)


def cuts(monkeypatch: pytest.MonkeyPatch, *values: int) -> None:
    remaining = iter(values)
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.tensor(next(remaining)))


def random_batch(num_outputs: int) -> DomainBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 5, generator=generator, dtype=torch.float64)
    return DomainBatch(inputs, torch.randint(max(num_outputs, 2), (sum(SIZES),), generator=generator), SIZES)


def build(cls: type[CausIRLCORAL | CausIRLMMD], num_outputs: int = 4, **settings: float) -> CausIRLCORAL | CausIRLMMD:
    torch.manual_seed(2)
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    return cls(featurizer, nn.Linear(6, num_outputs).double(), len(SIZES), CausIRLConfig(**settings), steps=100)


def slow_moments(first: Tensor, second: Tensor) -> Tensor:
    def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = sum(rows) / len(rows)
        return mean, sum(torch.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)

    return sum(((a - b) ** 2).mean() for a, b in zip(moments(first), moments(second), strict=True))


def slow_mmd(first: Tensor, second: Tensor) -> Tensor:
    def mean_kernel(ours: Tensor, theirs: Tensor) -> Tensor:
        pairs = [((a - b) ** 2).sum() for a in ours for b in theirs]
        return sum(torch.exp(-(10.0**power) * d) for d in pairs for power in range(-3, 4)) / len(pairs)

    return mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize(("cls", "distance"), [(CausIRLCORAL, slow_moments), (CausIRLMMD, slow_mmd)])
def test_the_parts_of_all_domains_are_compared(
    cls: type[CausIRLCORAL | CausIRLMMD],
    distance: Callable[[Tensor, Tensor], Tensor],
    num_outputs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    algorithm, batch = build(cls, num_outputs, penalty_weight=3.0, l2=0.01), random_batch(num_outputs)
    cuts(monkeypatch, 1, 5, 0)
    losses = algorithm.losses(batch, 0)
    features = algorithm.featurizer(batch.inputs)
    penalty = distance(features[FIRST], features[SECOND])
    logits = algorithm.classifier(features).split(SIZES)
    risks = [
        F.binary_cross_entropy_with_logits(part[:, 0], targets.double())
        if num_outputs == 1
        else F.cross_entropy(part, targets)
        for part, targets in zip(logits, batch.targets.split(SIZES), strict=True)
    ]
    expected = sum(risks) / 3 + 3 * penalty + algorithm.l2_term()
    assert relative_error(losses.terms["penalty"], penalty) < 1e-8
    assert relative_error(losses.total, expected) < 1e-8
    weights = list(algorithm.parameters())
    slopes = [list(torch.autograd.grad(value, weights)) for value in (losses.total, expected)]
    assert relative_error(*slopes) < 1e-7


def test_a_cut_leaves_at_least_the_last_sample_to_the_second_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    algorithm, batch = build(CausIRLCORAL), random_batch(4)
    features = torch.arange(14.0).unsqueeze(1).expand(14, 6).double()
    monkeypatch.setattr(algorithm, "distance", lambda first, second: seen.append((first, second)) or first.sum())
    torch.manual_seed(0)
    for _ in range(200):
        algorithm.risk_and_penalty(features, batch)
    sizes = []
    for first, second in seen:
        first, second = first[:, 0].tolist(), second[:, 0].tolist()
        assert sorted(first + second) == list(range(14))
        assert {3, 10, 13} <= set(second)
        sizes.append(tuple(sum(low <= sample < high for sample in first) for low, high in ((0, 4), (4, 11), (11, 14))))
    for domain, size in enumerate(SIZES):
        assert {each[domain] for each in sizes} == set(range(size))
    assert len(set(sizes)) > 50


@pytest.mark.parametrize("cut", [(0, 0, 0), (1, 0, 0)])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_part_too_small_to_compare_has_penalty_0(
    cls: type[CausIRLCORAL | CausIRLMMD], cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, batch = build(cls), random_batch(4)
    cuts(monkeypatch, *cut)
    features = algorithm.features(batch)
    risk, penalty = algorithm.risk_and_penalty(features, batch)
    assert penalty.item() == 0
    assert penalty.dtype == risk.dtype
    (slopes,) = torch.autograd.grad(penalty, features)
    assert torch.equal(slopes, torch.zeros_like(features))


@pytest.mark.parametrize("cls", CLASSES)
def test_hyperparameters(cls: type[CausIRLCORAL | CausIRLMMD]) -> None:
    config = cls.Config()
    assert (config.penalty_weight, config.switch_on_step(None)) == (1, 0)
    assert cls.Config.space("images")["penalty_weight"] == LogUniform(0.1, 10.0)
    with pytest.raises(ConfigError, match=r"^batch_size must be at least 2, or null for all samples, got 1$"):
        cls.Config(batch_size=1)
    with pytest.raises(ConfigError, match=f"{cls.__name__} compares domains and needs at least 2 to train on, got 1"):
        cls(nn.Identity(), nn.Linear(2, 2), 1)
