"""GroupDRO and EQRM: how they weigh the risks of domains."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from fishr.algorithms import EQRM, GroupDRO
from fishr.algorithms.eqrm import risk_quantile
from fishr.data import DomainBatch
from fishr.errors import ConfigError


def batch() -> DomainBatch:
    """Of a head that returns 0: squared errors 1 and 4, the second domain twice as large."""
    return DomainBatch(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 2.0]), (1, 2))


def head() -> nn.Linear:
    head = nn.Linear(1, 1)
    nn.init.zeros_(head.bias)
    return head


def test_groupdro_moves_weight_to_the_worst_domain() -> None:
    algorithm = GroupDRO(nn.Identity(), head(), 2, GroupDRO.Config(eta=0.5), loss=nn.MSELoss())
    for step in (1, 2):
        losses = algorithm.losses(batch(), step)
        # q ∝ exp(η R) at each step: exp(0.5 t) and exp(2 t).
        q = math.exp(2 * step) / (math.exp(0.5 * step) + math.exp(2 * step))
        assert algorithm.domain_weights.tolist() == pytest.approx([1 - q, q])
        assert losses.total.item() == pytest.approx((1 - q) * 1 + q * 4)
        assert losses.terms["worst_risk"].item() == 4
    # Its weights are constants: the gradient is that of the weighted risk.
    (gradient,) = torch.autograd.grad(losses.total, algorithm.classifier.bias)
    assert gradient.item() == pytest.approx(-2 * ((1 - q) * 1 + q * 2))


def test_groupdro_without_a_step_size_is_the_mean_of_domains() -> None:
    algorithm = GroupDRO(nn.Identity(), head(), 2, GroupDRO.Config(eta=0.0), loss=nn.MSELoss())
    assert algorithm.losses(batch(), 0).total.item() == pytest.approx(2.5)


RISKS = torch.tensor([0.9, 0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.75, 0.99])
def test_the_quantile_of_the_kernel_density(quantile: float) -> None:
    value = risk_quantile(RISKS, quantile).item()
    width = 1.06 * RISKS.std().item() * 4 ** (-1 / 5)
    reached = sum(NormalDist(risk, width).cdf(value) for risk in RISKS.tolist()) / 4
    assert reached == pytest.approx(quantile, abs=1e-7)


def test_the_gradient_flows_through_the_ends() -> None:
    risks = RISKS.clone().requires_grad_()
    value = risk_quantile(risks, 0.75)
    (gradient,) = torch.autograd.grad(value, risks)
    width_of = 1.06 * 4**-0.2
    z = NormalDist().inv_cdf(0.75)
    ends = [
        min(RISKS.tolist()) + width_of * RISKS.std().item() * z,
        max(RISKS.tolist()) + width_of * RISKS.std().item() * z,
    ]
    share = (value.item() - ends[0]) / (ends[1] - ends[0])
    of_std = (RISKS - RISKS.mean()) / (3 * RISKS.std())  # the derivative of the unbiased standard deviation
    expected = width_of * z * of_std
    expected[1] += 1 - share
    expected[0] += share
    assert gradient.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_order_of_domains_does_not_matter() -> None:
    assert risk_quantile(RISKS.flip(0), 0.8).item() == pytest.approx(risk_quantile(RISKS, 0.8).item())


def test_a_high_quantile_lies_above_the_worst_domain_and_a_median_between() -> None:
    assert risk_quantile(RISKS, 0.99) > RISKS.max()
    assert RISKS.min() < risk_quantile(RISKS, 0.5) < RISKS.max()


def test_eqrm_after_its_burn_in_starts_the_optimizer_anew() -> None:
    algorithm = EQRM(
        nn.Identity(), head(), 2, EQRM.Config(burn_in=2, lr=0.1, lr_after=1e-3), loss=nn.MSELoss(), steps=10
    )
    assert algorithm.switch_on_step == 2
    optimizers = algorithm.configure_optimizers()
    for step in range(2):
        losses = algorithm.training_step(batch(), step, optimizers)
        assert losses.total.item() == pytest.approx(losses.terms["risk"].item())
    before = algorithm.classifier.bias.item()
    losses = algorithm.training_step(batch(), 2, optimizers)
    assert losses.total.item() > losses.terms["risk"].item()
    # Adam's first step is as long as its learning rate.
    assert algorithm.classifier.bias.item() - before == pytest.approx(1e-3, rel=1e-3)
    assert next(iter(optimizers["main"].state.values()))["step"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 1.0}, r"quantile must lie in \(0, 1\), got 1"),
        ({"burn_in": -1}, "burn_in must be at least 0, got -1"),
        ({"lr_after": 0.0}, "lr_after must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EQRM.Config(**settings)


def test_a_burn_in_as_a_share_needs_the_length_of_the_run() -> None:
    with pytest.raises(ConfigError, match=r"burn_in=0\.5 is a share of the run: give steps="):
        EQRM(nn.Identity(), head(), 2)
