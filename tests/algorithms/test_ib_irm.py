"""IB-ERM and IB-IRM: the bottleneck, its schedule beside IRM's, and its strength."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fishr.algorithms import IBERM, IBIRM
from fishr.data import DomainBatch, MultiDomainDataset, Samples
from fishr.errors import ConfigError
from fishr.training import RunConfig, train

FEATURES = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0], [0.0, 3.0], [0.0, 6.0]])
BATCH = DomainBatch(FEATURES, torch.tensor([0, 1, 0, 1, 1]), (2, 3))


def test_the_bottleneck_is_the_variance_of_features_in_a_domain() -> None:
    algorithm = IBERM(nn.Identity(), nn.Linear(2, 2), 2, IBERM.Config(switch_on=0))
    # Unbiased variances 2 and 0 in the first domain, 0 and 9 in the second.
    _, penalty = algorithm.risk_and_penalty(FEATURES, BATCH)
    assert penalty.item() == pytest.approx((1 + 4.5) / 2)


def ib_irm(**settings: object) -> IBIRM:
    torch.manual_seed(0)
    return IBIRM(nn.Linear(2, 2), nn.Linear(2, 2), 2, IBIRM.Config(**settings), steps=100)


def test_each_penalty_has_its_own_switch() -> None:
    algorithm = ib_irm(switch_on=10, ib_switch_on=20, penalty_weight=3.0, ib_weight=5.0)
    for step, irm, bottleneck in ((9, 1, 0), (10, 3, 0), (19, 3, 0), (20, 3, 5)):
        losses = algorithm.losses(BATCH, step)
        terms = losses.terms
        expected = terms["risk"] + irm * terms["penalty"] + bottleneck * terms["bottleneck"]
        assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert algorithm.reset_steps == {10, 20}


def test_a_checkpoint_counts_from_the_later_switch() -> None:
    assert ib_irm(switch_on=10, ib_switch_on=20).switch_on_step == 20
    assert ib_irm(switch_on=30, ib_switch_on=20).switch_on_step == 30


def test_a_bottleneck_that_never_acts_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ib_irm(ib_switch_on=1.5)
    assert "the bottleneck never switches on: ib_switch_on=1.5 is step 150 of a run of 100 steps" in caplog.text


def test_with_a_strength_both_gradients_are_that_share_of_the_risks() -> None:
    algorithm = ib_irm(strength=0.25, switch_on=5, ib_switch_on=5)
    for step in range(60):
        losses = algorithm.losses(BATCH, step)
    features = algorithm.features(BATCH)
    risk, penalty = algorithm.risk_and_penalty(features, BATCH)
    bottleneck = algorithm.losses_of(features, BATCH, 60).terms["bottleneck"]
    norms = [torch.autograd.grad(each, features, retain_graph=True)[0].norm() for each in (risk, penalty, bottleneck)]
    assert (algorithm.weight(60) * norms[1] / norms[0]).item() == pytest.approx(0.25, rel=1e-4)
    assert (algorithm.ib_weight(60) * norms[2] / norms[0]).item() == pytest.approx(0.25, rel=1e-4)
    assert losses.total.isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1, "estimator": "full"}, "batch_size must be at least 2, or null for all samples, got 1"),
        ({"rescale": True}, "rescale divides by the one weight of a penalty, and IB-IRM has two"),
        ({"ib_weight": -1.0}, "ib_weight must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IBIRM.Config(**settings)


def test_a_domain_that_is_too_small_for_a_batch_of_all_its_samples(tmp_path: Path) -> None:
    """Its variance would not be a number."""
    domains = {name: Samples(torch.randn(size, 2), torch.arange(size) % 2) for name, size in (("a", 9), ("b", 1))}
    dataset = MultiDomainDataset("points", "vectors", {**domains, "c": domains["a"]}, ("even", "odd"))
    hparams = {"batch_size": None}
    config = RunConfig.for_dataset(dataset, "ib-erm", steps=2, test_domains=("c",), hparams=hparams, out_fraction=0.0)
    with pytest.raises(
        ConfigError, match="ib-erm needs 2 samples of each domain in a batch, the in-split of 'b' has 1"
    ):
        train(config, dataset, tmp_path / "run", device="cpu")
