"""Mixup: mixtures of domains, against a loop over pairs and samples."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from fishr.algorithms.mixup import Mixup, MixupConfig
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from fishr.space import LogUniform
from oracles import relative_error

SIZES = (4, 7, 3)
SHARE = 0.3


def random_batch(num_outputs: int) -> DomainBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 5, generator=generator, dtype=torch.float64)
    return DomainBatch(inputs, torch.randint(max(num_outputs, 2), (sum(SIZES),), generator=generator), SIZES)


def build(num_outputs: int, num_domains: int = 3, **settings: float) -> Mixup:
    torch.manual_seed(2)
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    return Mixup(featurizer, nn.Linear(6, num_outputs).double(), num_domains, MixupConfig(**settings))


@pytest.fixture
def fixed_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beta, "sample", lambda self: torch.tensor(SHARE, dtype=torch.float64))


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    if len(logits) == 1:
        return F.binary_cross_entropy_with_logits(logits[0], target.to(logits.dtype))
    return F.cross_entropy(logits, target)


def slow_risk(algorithm: Mixup, batch: DomainBatch, order: tuple[int, ...]) -> Tensor:
    inputs, targets = batch.inputs.split(batch.sizes), batch.targets.split(batch.sizes)
    of_pairs = []
    for a, b in pairwise([*order, order[0]]):
        of_samples = []
        for x_a, y_a, x_b, y_b in zip(inputs[a], targets[a], inputs[b], targets[b], strict=False):
            logits = algorithm((SHARE * x_a + (1 - SHARE) * x_b).unsqueeze(0))[0]
            of_samples.append(SHARE * loss_of(logits, y_a) + (1 - SHARE) * loss_of(logits, y_b))
        of_pairs.append(torch.stack(of_samples).mean())
    return torch.stack(of_pairs).mean()


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.usefixtures("fixed_share")
def test_every_domain_is_mixed_with_the_next_in_a_random_cycle(num_outputs: int) -> None:
    algorithm, batch = build(num_outputs), random_batch(num_outputs)
    cycles = [slow_risk(algorithm, batch, order) for order in ((0, 1, 2), (0, 2, 1))]
    assert relative_error(*cycles) > 1e-4
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        risk = algorithm.losses(batch, 0).total
        seen.add(next(i for i, cycle in enumerate(cycles) if relative_error(risk, cycle) < 1e-10))
    assert seen == {0, 1}


def test_pencil_and_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs 0 and 10 with labels 0 and 1, λ = 1/4, squared loss of the identity; the second sample of a has no match.

    x = 7.5: 1/4 · 7.5² + 3/4 · 6.5² = 45.75; x = 2.5: 1/4 · 1.5² + 3/4 · 2.5² = 5.25.
    """
    monkeypatch.setattr(Beta, "sample", lambda self: torch.tensor(0.25))
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    algorithm = Mixup(nn.Identity(), head, 2, loss=lambda logits, targets: (logits[:, 0] - targets) ** 2)
    batch = DomainBatch(torch.tensor([[0.0], [4.0], [10.0]]), torch.tensor([0, 1, 1]), (2, 1))
    assert algorithm.losses(batch, 0).total.item() == pytest.approx((45.75 + 5.25) / 2)


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_shares_are_beta_distributed_and_every_pairs_own(alpha: float) -> None:
    """Of two domains of zeros and ones a mixture is the share itself; its variance is 1 / (4 (2α + 1))."""
    seen: list[Tensor] = []
    algorithm = Mixup(nn.Identity(), nn.Linear(1, 2), 2, MixupConfig(alpha=alpha))
    algorithm.featurizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = DomainBatch(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.zeros(4, dtype=torch.int64), (2, 2))
    torch.manual_seed(0)
    for step in range(400):
        algorithm.losses(batch, step)
    shares = torch.stack(seen).view(-1, 2, 2)
    assert torch.equal(shares[..., 0], shares[..., 1])
    # With one λ for both pairs the second would be 1 − the first.
    assert ((shares[:, 0, 0] + shares[:, 1, 0] - 1).abs() > 0.1).any()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares[..., 0].var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_images_are_mixed_too() -> None:
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    batch = DomainBatch(torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 1, 0, 1]), (2, 3))
    assert Mixup(featurizer, nn.Linear(4, 2), 2).losses(batch, 0).total.isfinite()


def test_the_l2_term_is_added_once() -> None:
    algorithm, batch = build(4, l2=0.1), random_batch(4)
    losses = algorithm.losses(batch, 0)
    assert relative_error(losses.total - losses.terms["risk"], algorithm.l2_term()) < 1e-10
    assert losses.terms.keys() == {"risk"}


def test_hyperparameters() -> None:
    assert MixupConfig().alpha == 0.2
    assert MixupConfig.space("images")["alpha"] == LogUniform(0.1, 10.0)
    with pytest.raises(ConfigError, match=r"^alpha must be above 0, got 0$"):
        MixupConfig(alpha=0)
    with pytest.raises(ConfigError, match="Mixup compares domains and needs at least 2 to train on, got 1"):
        build(4, num_domains=1)
