"""SelfReg against a loop over samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from fishr.algorithms import selfreg
from fishr.algorithms.selfreg import SelfReg, same_class_partners
from fishr.data import DomainBatch
from oracles import relative_error

SIZES = (4, 1, 3)
TARGETS = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
P = torch.tensor([2, 3, 4, 5, 7, 6, 1, 0])
Q = torch.tensor([7, 1, 0, 6, 2, 3, 5, 4])
SHARE = 0.3


def random_batch(scale: float = 1.0) -> DomainBatch:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DomainBatch(scale * inputs, TARGETS, SIZES)


def build(num_outputs: int, **settings: float) -> SelfReg:
    torch.manual_seed(2)
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU()).double()
    return SelfReg(featurizer, nn.Linear(6, num_outputs).double(), len(SIZES), SelfReg.Config(**settings))


@pytest.fixture
def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    partners = iter([P, Q] * 10)
    monkeypatch.setattr(selfreg, "same_class_partners", lambda targets: next(partners))
    monkeypatch.setattr(Beta, "sample", lambda self: torch.tensor(SHARE, dtype=torch.float64))


def slow_total(algorithm: SelfReg, batch: DomainBatch) -> tuple[Tensor, Tensor]:
    """Objective and risk."""
    features = algorithm.featurizer(batch.inputs)
    logits, projected = algorithm.classifier(features), algorithm.projection(features)
    if logits.shape[1] == 1:
        risk = F.binary_cross_entropy_with_logits(logits[:, 0], batch.targets.double())
    else:
        risk = F.cross_entropy(logits, batch.targets)
    sums = {"ind_logit": 0.0, "ind_feature": 0.0, "hdl_logit": 0.0, "hdl_feature": 0.0}
    for i, (p, q) in enumerate(zip(P.tolist(), Q.tolist(), strict=True)):
        for name, own, others in (("logit", logits, logits), ("feature", features, projected)):
            sums[f"ind_{name}"] += ((own[i] - others[p]) ** 2).mean() / len(P)
            mixture = SHARE * others[p] + (1 - SHARE) * others[q]
            sums[f"hdl_{name}"] += ((own[i] - mixture) ** 2).mean() / len(P)
    individual = sums["ind_logit"] + 0.3 * sums["ind_feature"]
    heterogeneous = sums["hdl_logit"] + 0.3 * sums["hdl_feature"]
    return risk + min(risk.item(), 1.0) * (SHARE * individual + (1 - SHARE) * heterogeneous), risk


@pytest.mark.parametrize(("scale", "above_one"), [(1.0, False), (30.0, True)])
@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.usefixtures("fixed_draws")
def test_objective_and_gradient(num_outputs: int, scale: float, above_one: bool) -> None:
    algorithm, batch = build(num_outputs, l2=0.01), random_batch(scale)
    expected, risk = slow_total(algorithm, batch)
    assert (risk.item() > 1) == above_one
    expected = expected + algorithm.l2_term()
    losses = algorithm.losses(batch, 0)
    assert losses.terms.keys() == {"risk", "individual", "heterogeneous"}
    assert relative_error(losses.terms["risk"], risk) < 1e-10
    assert relative_error(losses.total, expected) < 1e-10
    weights = list(algorithm.parameters())
    slopes = [list(torch.autograd.grad(value, weights)) for value in (losses.total, expected)]
    assert relative_error(*slopes) < 1e-9


def test_partners_are_all_of_a_class_over_all_domains() -> None:
    targets = torch.tensor([5, 0, 5, 2, 0, 5])
    torch.manual_seed(0)
    drawn = torch.stack([same_class_partners(targets) for _ in range(600)])
    assert torch.equal(drawn.sort(1).values, torch.arange(6).expand(600, 6))
    for sample, members in enumerate(([0, 2, 5], [1, 4], [0, 2, 5], [3], [1, 4], [0, 2, 5])):
        counts = drawn[:, sample].bincount(minlength=6)
        assert counts.nonzero()[:, 0].tolist() == members
        assert counts[members].tolist() == pytest.approx([600 / len(members)] * len(members), rel=0.25)
    # One class does not tell the other: 3! · 2! permutations.
    assert len(drawn.unique(dim=0)) == 12


def test_partners_p_and_q_and_the_share_are_drawn_at_every_step() -> None:
    algorithm, batch = build(3), random_batch()
    torch.manual_seed(0)
    drawn = [algorithm.losses(batch, step).terms for step in range(20)]
    assert len({round(terms["individual"].item(), 9) for terms in drawn}) > 10
    assert len({round(terms["heterogeneous"].item(), 9) for terms in drawn}) == 20
    # A mixture of one and the same partner would be that partner.
    assert all(terms["individual"] != terms["heterogeneous"] for terms in drawn)


def test_the_projection_is_trained_and_no_part_of_the_prediction() -> None:
    algorithm, batch = build(3), random_batch()
    algorithm.losses(batch, 0).total.backward()
    assert algorithm.projection[0].weight.grad.abs().sum() > 0
    assert torch.equal(algorithm(batch.inputs), algorithm.classifier(algorithm.featurizer(batch.inputs)))


@pytest.mark.parametrize(("width", "hidden"), [(6, 12), (1024, 2048), (2048, 2048)])
def test_widths_of_the_projection(width: int, hidden: int) -> None:
    with torch.device("meta"):
        projection = SelfReg(nn.Identity(), nn.Linear(width, 2), 2).projection
    kinds = ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in projection] == kinds
    linear = [(layer.in_features, layer.out_features) for layer in projection if isinstance(layer, nn.Linear)]
    assert linear == [(width, hidden), (hidden, hidden), (hidden, width)]


def test_a_batch_of_one_sample_has_no_partner() -> None:
    algorithm = SelfReg(nn.Linear(5, 6).double(), nn.Linear(6, 3).double(), 1)
    batch = DomainBatch(torch.ones(1, 5, dtype=torch.float64), torch.tensor([2]), (1,))
    losses = algorithm.losses(batch, 0)
    assert losses.terms["individual"].item() == 0
    assert losses.total.item() == pytest.approx(losses.terms["risk"].item())
