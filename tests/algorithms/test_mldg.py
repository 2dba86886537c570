"""MLDG against a copy of the network that torch's Adam steps."""

import copy
from itertools import cycle, permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.algorithms.mldg import MLDG, MLDGConfig
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from fishr.space import Choice, LogUniform
from oracles import relative_error

SIZES = (4, 7, 3)


def random_batch(num_outputs: int, sizes: tuple[int, ...] = SIZES) -> DomainBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    return DomainBatch(inputs, torch.randint(max(num_outputs, 2), (sum(sizes),), generator=generator), sizes)


def build(num_outputs: int = 4, num_domains: int = 3, *, featurizer: nn.Module | None = None, **settings: Any) -> MLDG:
    torch.manual_seed(2)
    featurizer = featurizer or nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return MLDG(featurizer.double(), nn.Linear(6, num_outputs).double(), num_domains, MLDGConfig(**settings))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))
    return F.cross_entropy(logits, targets)


def slow_gradients(algorithm: MLDG, batch: DomainBatch, order: tuple[int, ...]) -> list[Tensor]:
    config = algorithm.config
    network = nn.Sequential(algorithm.featurizer, algorithm.classifier)
    inputs, targets = batch.inputs.split(batch.sizes), batch.targets.split(batch.sizes)
    num_meta_test = min(config.num_meta_test, len(batch.sizes) - 1)
    gradients = [torch.zeros_like(weight) for weight in network.parameters()]
    for a, b in zip(order[:-num_meta_test], cycle(order[-num_meta_test:]), strict=False):
        inner = copy.deepcopy(network)
        optimizer = torch.optim.Adam(inner.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        optimizer.zero_grad()
        mean_loss(inner(inputs[a]), targets[a]).backward()
        of_inner = [weight.grad.clone() for weight in inner.parameters()]
        optimizer.step()
        of_test = torch.autograd.grad(mean_loss(inner(inputs[b]), targets[b]), list(inner.parameters()))
        for total, train, test in zip(gradients, of_inner, of_test, strict=True):
            total += (train + config.beta * test) / len(batch.sizes)
    return gradients


@pytest.mark.parametrize(
    ("sizes", "num_meta_test", "num_outputs", "num_cases"),
    [
        (SIZES, 1, 4, 3),  # each domain in turn is the one that both others are tested on
        (SIZES, 2, 1, 6),  # a pair in each order
        ((4, 3), 2, 4, 2),  # of two domains only one can be held out
        ((2, 3, 2, 4), 2, 4, 12),  # two pairs, in either order
    ],
)
def test_gradients_are_those_of_a_stepped_copy(
    sizes: tuple[int, ...], num_meta_test: int, num_outputs: int, num_cases: int
) -> None:
    settings = {"beta": 0.7, "lr": 0.05, "weight_decay": 0.1}
    algorithm = build(num_outputs, len(sizes), num_meta_test=num_meta_test, **settings)
    batch = random_batch(num_outputs, sizes)
    cases: list[list[Tensor]] = []
    for order in permutations(range(len(sizes))):
        gradients = slow_gradients(algorithm, batch, order)
        if all(relative_error(gradients, case) > 1e-9 for case in cases):
            cases.append(gradients)
    assert len(cases) == num_cases
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        algorithm.zero_grad()
        algorithm.losses(batch, 0).total.backward()
        gradients = [weight.grad for weight in algorithm.parameters()]
        seen.add(next(i for i, case in enumerate(cases) if relative_error(gradients, case) < 1e-10))
    assert len(seen) == num_cases


def test_pencil_and_paper() -> None:
    """Loss (w x)² at w = 1; Adam's first step is lr, to w = 1/2; x = 1 and x = 2, β = 3.

    Held out x = 2: gradient (2 + 3 · 4) / 2, loss (1 + 3 · 1) / 2; held out x = 1: (8 + 3 · 1) / 2, (4 + 3/4) / 2.
    """
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    config = MLDGConfig(lr=0.5, beta=3.0, num_meta_test=1)
    algorithm = MLDG(nn.Identity(), head, 2, config, loss=lambda logits, targets: logits[:, 0] ** 2)
    batch = DomainBatch(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]), (1, 1))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        algorithm.zero_grad()
        losses = algorithm.losses(batch, 0)
        losses.total.backward()
        seen.add((round(head.weight.grad.item(), 5), round(losses.total.item(), 5)))
        assert losses.terms.keys() == {"risk", "meta_risk"}
        assert head.weight.item() == 1
    assert seen == {(7.0, 2.0), (5.5, 2.375)}


def test_batch_norm_counts_both_passes_and_keeps_its_buffers() -> None:
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
    algorithm = build(featurizer=featurizer, num_meta_test=1)
    norm = featurizer[1]
    buffers = [norm.running_mean, norm.running_var]
    algorithm.training_step(random_batch(4), 0, algorithm.configure_optimizers())
    assert norm.num_batches_tracked.item() == 4
    assert buffers[0] is norm.running_mean
    assert not any(buffer.requires_grad for buffer in buffers)
    assert all(buffer.isfinite().all() for buffer in buffers)
    assert isinstance(norm.weight, nn.Parameter)


def test_frozen_and_unused_weights() -> None:
    """The one stays as it is, the other has no gradient to be stepped by."""
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    featurizer.unused = nn.Linear(2, 2)
    featurizer.forward = lambda inputs: featurizer[1](featurizer[0](inputs))  # type: ignore[method-assign]
    algorithm = build(featurizer=featurizer)
    frozen = featurizer[0].weight.requires_grad_(False)
    before = frozen.clone()
    algorithm.training_step(random_batch(4), 0, algorithm.configure_optimizers())
    assert frozen.grad is None
    assert torch.equal(frozen, before)
    assert algorithm.classifier.weight.grad is not None


def test_the_l2_term_is_added_once() -> None:
    batch = random_batch(4)
    totals = []
    for l2 in (0.0, 0.1):
        algorithm = build(l2=l2)
        torch.manual_seed(0)
        totals.append(algorithm.losses(batch, 0).total)
    assert relative_error(totals[1] - totals[0], algorithm.l2_term()) < 1e-10


def test_hyperparameters() -> None:
    assert (MLDGConfig().beta, MLDGConfig().num_meta_test) == (1, 2)
    space = MLDGConfig.space("images")
    assert (space["beta"], space["num_meta_test"]) == (LogUniform(0.1, 10.0), Choice((1, 2)))
    with pytest.raises(
        ConfigError, match=r"^beta must be at least 0, got -1.0; num_meta_test must be at least 1, got 0$"
    ):
        MLDGConfig(beta=-1.0, num_meta_test=0)
    with pytest.raises(ConfigError, match="MLDG compares domains and needs at least 2 to train on, got 1"):
        build(num_domains=1)
