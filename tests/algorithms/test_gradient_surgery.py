"""AND-mask, SAND-mask, IGA and Fish: what they do to the domains' gradients, on cases computed by hand."""

import pytest
import torch
from torch import nn

from fishr.algorithms import IGA, Algorithm, ANDMask, Fish, SANDMask
from fishr.algorithms.andmask import agreement
from fishr.algorithms.base import domain_gradients
from fishr.data import DomainBatch
from fishr.errors import ConfigError


def linear(cls: type[Algorithm], **settings: object) -> Algorithm:
    """Features are the inputs; regression of one output, so that gradients are simple: R_e = mean (w·x − y)²."""
    head = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(head.weight)
    return cls(nn.Identity(), head, 2, cls.Config(**settings), loss=nn.MSELoss(), steps=10)


def batch() -> DomainBatch:
    """With w = 0 the gradients of R_e are −2 mean y x: (−2, −4) and (−6, 4)."""
    inputs = torch.tensor([[1.0, 2.0], [3.0, -2.0]], dtype=torch.float64)
    return DomainBatch(inputs, torch.tensor([1.0, 1.0], dtype=torch.float64), (1, 1))


def step(algorithm: Algorithm, lr: float = 0.5) -> torch.Tensor:
    """The change of the weights by plain gradient descent."""
    algorithm.training_step(batch(), 0, {"main": torch.optim.SGD(algorithm.parameters(), lr=lr)})
    return algorithm.classifier.weight.detach()[0] / -lr


def test_gradients_of_domains() -> None:
    algorithm = linear(ANDMask)
    risks = algorithm.domain_risks(algorithm(batch().inputs), batch())
    (gradients,) = domain_gradients(risks, algorithm.network_parameters, batch())
    assert gradients.tolist() == [[[-2.0, -4.0]], [[-6.0, 4.0]]]
    assert agreement(gradients).tolist() == [[1.0, 0.0]]


def test_andmask_follows_what_the_domains_agree_on() -> None:
    # Mean (−4, 0); the first entry agrees. Half of the tensor is kept, so the step is doubled.
    assert step(linear(ANDMask, tau=1.0)).tolist() == pytest.approx([-8.0, 0.0])
    assert step(linear(ANDMask, tau=0.0)).tolist() == pytest.approx([-4.0, 0.0])


def test_sandmask_weighs_by_agreement_over_variance() -> None:
    # Unbiased variances 8 and 32; agreement 1 and 0; tau = 0.5, k = 4: masks tanh(0.25) and 0.
    mask = torch.tanh(torch.tensor(0.25)).item()
    assert step(linear(SANDMask, tau=0.5, k=4.0)).tolist() == pytest.approx([-4 * mask / (mask / 2), 0.0])


def test_sandmask_where_domains_agree_to_the_last_bit() -> None:
    """No variance: k / 0 · 0 is not a number at τ = 1, and must not reach the weights."""
    algorithm = linear(SANDMask, tau=1.0)
    assert algorithm.mask(torch.ones(3, 2, 2)).tolist() == torch.full((2, 2), 1e-17).tolist()
    assert algorithm.config.tau == 1.0
    assert linear(SANDMask, tau=0.5).mask(torch.ones(3, 2, 2)).tolist() == torch.ones(2, 2).tolist()


def test_iga_measures_the_distance_of_gradients() -> None:
    # Mean (−4, 0): distances (2, −4) and (−2, 4): 20 each.
    algorithm = linear(IGA)
    risk, penalty = algorithm.risk_and_penalty(batch().inputs, batch())
    assert risk.item() == pytest.approx(1.0)
    assert penalty.item() == pytest.approx(40.0)
    # g_e = −2 (y − w·x) x, so ∂g_e/∂w = 2 x xᵀ; the mean gradient is a constant.
    (gradient,) = torch.autograd.grad(penalty, algorithm.classifier.weight)
    x1, x2 = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, -2.0]).double()
    d1, d2 = torch.tensor([2.0, -4.0]).double(), torch.tensor([-2.0, 4.0]).double()
    assert gradient[0].tolist() == pytest.approx((2 * (2 * (x1 @ d1) * x1 + 2 * (x2 @ d2) * x2)).tolist())


def test_fish_goes_through_the_domains_and_part_of_the_way() -> None:
    # w = 0 → −lr (−2, −4) = (0.2, 0.4), where w·x₂ = −0.2 and the gradient of R_2 is −2 (1.2) (3, −2).
    stepped = torch.tensor([0.2 + 0.1 * 7.2, 0.4 - 0.1 * 4.8])
    change = step(linear(Fish, meta_lr=0.25), lr=0.1) * -0.1
    assert change.tolist() == pytest.approx((0.25 * stepped).tolist())


def test_fish_all_the_way_is_sequential_training() -> None:
    change = step(linear(Fish, meta_lr=1.0), lr=0.1) * -0.1
    assert change.tolist() == pytest.approx([0.92, -0.08])


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (ANDMask, {"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        (SANDMask, {"k": 0.0}, "k must be above 0, got 0"),
        (Fish, {"meta_lr": 0.0}, r"meta_lr must lie in \(0, 1\], got 0"),
    ],
)
def test_settings_that_cannot_be(cls: type[Algorithm], settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.Config(**settings)
