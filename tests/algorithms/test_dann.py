"""DANN and CDANN: whose turn it is, what they hold, and the weights of classes."""

import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms import CDANN, DANN
from fishr.data import DomainBatch
from fishr.errors import ConfigError

BATCH = DomainBatch(torch.randn(7, 4), torch.tensor([0, 0, 1, 2, 0, 2, 1]), (3, 4))


def adversarial(cls: type[DANN], **settings: float) -> DANN:
    torch.manual_seed(0)
    featurizer = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    return cls(featurizer, nn.Linear(5, 3), 2, cls.Config(discriminator_width=8, **settings))


def weights_of(module: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.parameters()]


def moved(before: list[Tensor], module: nn.Module) -> bool:
    return not all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize(("turns", "expected"), [(1, "fdfdfd"), (2, "dfddfd"), (3, "ddfddd")])
def test_turns(turns: int, expected: str) -> None:
    """Step t = 1, 2, ... is the discriminator's where t mod (1 + turns) < turns."""
    algorithm = adversarial(DANN, discriminator_steps=turns)
    optimizers = algorithm.configure_optimizers()
    seen = ""
    for step in range(len(expected)):
        before = [weights_of(part) for part in (algorithm.discriminator, algorithm.featurizer, algorithm.classifier)]
        algorithm.training_step(BATCH, step, optimizers)
        discriminator, featurizer, classifier = map(
            moved, before, (algorithm.discriminator, algorithm.featurizer, algorithm.classifier)
        )
        assert discriminator != featurizer == classifier
        seen += "d" if discriminator else "f"
    assert seen == expected


def test_a_turn_of_the_discriminator_keeps_no_graph_of_the_featurizer() -> None:
    algorithm = adversarial(DANN, discriminator_steps=2)
    losses = algorithm.training_step(BATCH, 2, algorithm.configure_optimizers())  # t = 3, 3 mod 3 < 2
    assert not losses.terms["risk"].requires_grad


@pytest.mark.parametrize("cls", [DANN, CDANN])
def test_the_gradient_penalty_with_a_frozen_featurizer(cls: type[DANN]) -> None:
    algorithm = adversarial(cls, gradient_penalty=1.0)
    algorithm.featurizer.requires_grad_(False)
    optimizers = algorithm.configure_optimizers()
    for step in range(4):
        assert algorithm.training_step(BATCH, step, optimizers).total.isfinite()


def test_the_gradient_penalty_is_the_mean_squared_slope() -> None:
    plain, penalised = adversarial(DANN), adversarial(DANN, gradient_penalty=3.0)
    features = torch.randn(7, 5, requires_grad=True)
    losses = nn.functional.cross_entropy(plain.discriminator(features), BATCH.domains, reduction="none")
    slopes = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0].square().sum() for loss in losses])
    difference = penalised.discriminator_loss(features, BATCH) - plain.discriminator_loss(features, BATCH)
    assert difference.item() == pytest.approx(3 * slopes.mean().item(), rel=1e-5)


def test_cdann_makes_each_class_count_as_much() -> None:
    # Three samples of class 0, two of each other, three classes.
    weights = adversarial(CDANN).sample_weights(BATCH.targets)
    assert weights.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 6, 1 / 6, 1 / 9, 1 / 6, 1 / 6])
    # As published, classes above the largest label of the batch don't count.
    assert adversarial(CDANN).sample_weights(torch.tensor([0, 1, 1])).tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="discriminator_steps must be at least 1, got 0"):
        DANN.Config(discriminator_steps=0)
    with pytest.raises(ConfigError, match=r"beta1 must lie in \[0, 1\), got 1"):
        DANN.Config(beta1=1.0)
    with pytest.raises(ConfigError, match="discriminator_lr must be above 0, or null for lr, got 0"):
        DANN.Config(discriminator_lr=0.0)
