"""SagNet: styles and contents exchanged, and three updates."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from fishr.algorithms.sagnet import (
    SagNet,
    SagNetConfig,
    cross_entropy_to_uniform,
    randomize_content,
    randomize_style,
)
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from fishr.space import LogUniform
from oracles import relative_error

SIZES = (4, 7, 3)
SHARE = 0.25


@pytest.fixture
def reversed_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partner of the first sample is the last, and α = 1/4."""
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.arange(n).flip(0))
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: torch.full(shape, SHARE, dtype=dtype))


def random_batch(num_outputs: int) -> DomainBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 5, generator=generator, dtype=torch.float64)
    return DomainBatch(inputs, torch.randint(max(num_outputs, 2), (sum(SIZES),), generator=generator), SIZES)


def build(num_outputs: int = 4, **settings: float) -> SagNet:
    torch.manual_seed(2)
    featurizer = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    return SagNet(featurizer, nn.Linear(6, num_outputs).double(), len(SIZES), SagNetConfig(**settings))


# Exchanges, on paper: means 1 and 20, standard deviations 1 and 10, contents (−1, 1) and (1, −1)

FEATURES = torch.tensor([[0.0, 2.0], [30.0, 10.0]])


@pytest.mark.usefixtures("reversed_partners")
def test_style_is_interpolated_and_content_kept() -> None:
    """Means 1/4 · 1 + 3/4 · 20 and 1/4 · 20 + 3/4 · 1; deviations 7.75 and 3.25."""
    expected = torch.tensor([[15.25 - 7.75, 15.25 + 7.75], [5.75 + 3.25, 5.75 - 3.25]])
    assert torch.allclose(randomize_style(FEATURES), expected, atol=1e-3)


@pytest.mark.usefixtures("reversed_partners")
def test_content_is_exchanged_and_style_kept() -> None:
    assert torch.allclose(randomize_content(FEATURES), torch.tensor([[2.0, 0.0], [10.0, 30.0]]), atol=1e-3)


@pytest.mark.usefixtures("reversed_partners")
def test_exchanged_content_is_a_constant() -> None:
    """Of h = c_j σ + μ only μ and σ carry a gradient: 1/d + c_j · c/d for each feature."""
    features = FEATURES.double().requires_grad_()
    (slopes,) = torch.autograd.grad(randomize_content(features)[0, 0], features)
    assert torch.allclose(slopes, torch.tensor([[1 / 2 - 1 / 2, 1 / 2 + 1 / 2], [0.0, 0.0]]).double(), atol=1e-4)


def test_partners_and_shares_are_random() -> None:
    """With contents of ±1 and no spread of deviations the mean of each sample tells α and partner."""
    torch.manual_seed(0)
    means = torch.tensor([0.0, 1.0, 10.0, 100.0])
    features = means.unsqueeze(1) + torch.tensor([[-1.0, 1.0]])
    drawn = torch.stack([randomize_style(features).mean(1) for _ in range(300)])
    of_first = drawn[:, 0]
    assert {int(value > 1) + int(value > 10) for value in of_first.tolist()} == {0, 1, 2}
    # E of α · 0 + (1 − α) · μ_j, over four partners.
    assert of_first.mean().item() == pytest.approx(111 / 8, rel=0.2)
    assert torch.stack([randomize_content(features)[0] for _ in range(20)]).std(0).max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 6), (5, 1), (1, 1)])
def test_one_sample_and_one_feature_are_exchanged_with_themselves(shape: tuple[int, int]) -> None:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for randomized in (randomize_style(features), randomize_content(features)):
        if shape[0] == 1:
            assert torch.allclose(randomized, features)
        (slopes,) = torch.autograd.grad(randomized.sum(), features)
        assert slopes.isfinite().all()


# The adversary's target


def test_cross_entropy_to_uniform() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
    log_p = logits.softmax(1).log()
    assert torch.allclose(cross_entropy_to_uniform(logits), -(log_p[:, 0] + log_p[:, 1] + log_p[:, 2]) / 3)
    assert cross_entropy_to_uniform(logits)[1].item() == pytest.approx(math.log(3))


def test_a_single_logit_is_of_two_classes() -> None:
    logits = torch.tensor([[2.0], [-2.0], [0.0]], requires_grad=True)
    values = cross_entropy_to_uniform(logits)
    p = torch.sigmoid(torch.tensor(2.0))
    expected = -(p.log() + (1 - p).log()).item() / 2
    assert values.tolist() == pytest.approx([expected, expected, math.log(2)])
    (slopes,) = torch.autograd.grad(values.sum(), logits)
    assert slopes[:, 0].tolist() == pytest.approx([p.item() - 0.5, 0.5 - p.item(), 0.0])


# The three updates


def slow_style(features: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    means = [row.mean() for row in features]
    deviations = [(((row - row.mean()) ** 2).mean() + 1e-5).sqrt() for row in features]
    contents = [(row - m) / s for row, m, s in zip(features, means, deviations, strict=True)]
    return contents, means, deviations


def slow_step(algorithm: SagNet, batch: DomainBatch, optimizers: list[Adam]) -> dict[str, float]:
    """Update featurizer, head and style head in place, by the formulas, sample by sample."""
    featurizer, head, style_head = algorithm.featurizer, algorithm.classifier, algorithm.style_head
    of_featurizer, of_head, of_style = optimizers

    def loss(logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], batch.targets.double())
        return F.cross_entropy(logits, batch.targets)

    def content_randomized() -> Tensor:
        contents, means, deviations = slow_style(featurizer(batch.inputs))
        rows = zip(reversed(contents), means, deviations, strict=True)
        return torch.stack([content.detach() * deviation + mean for content, mean, deviation in rows])

    contents, means, deviations = slow_style(featurizer(batch.inputs))
    rows = []
    for i, content in enumerate(contents):
        deviation = SHARE * deviations[i] + (1 - SHARE) * deviations[-1 - i]
        rows.append(content * deviation + SHARE * means[i] + (1 - SHARE) * means[-1 - i])
    risk = loss(head(torch.stack(rows)))
    algorithm.zero_grad()
    (risk + algorithm.l2_term()).backward()
    of_featurizer.step()
    of_head.step()

    style_loss = loss(style_head(content_randomized()))
    algorithm.zero_grad()
    style_loss.backward()
    of_style.step()

    logits = style_head(content_randomized())
    log_p = F.logsigmoid(torch.cat([logits, -logits], 1)) if logits.shape[1] == 1 else logits.softmax(1).log()
    adversarial_loss = -log_p.mean()
    algorithm.zero_grad()
    (algorithm.config.adversary_weight * adversarial_loss).backward()
    of_featurizer.step()
    return {"risk": risk.item(), "style_loss": style_loss.item(), "adversarial_loss": adversarial_loss.item()}


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.usefixtures("reversed_partners")
def test_each_loss_updates_its_own_part(num_outputs: int) -> None:
    settings = {"adversary_weight": 0.7, "lr": 0.01, "weight_decay": 0.1, "l2": 0.02}
    fast, batch = build(num_outputs, **settings), random_batch(num_outputs)
    slow = copy.deepcopy(fast)
    optimizers = fast.configure_optimizers()
    assert optimizers.keys() == {"featurizer", "classifier", "style"}
    slow_optimizers = [
        Adam(part.parameters(), lr=0.01, weight_decay=0.1)
        for part in (slow.featurizer, slow.classifier, slow.style_head)
    ]
    for step in range(3):
        l2 = slow.l2_term()
        expected = slow_step(slow, batch, slow_optimizers)
        losses = fast.training_step(batch, step, optimizers)
        assert {name: value.item() for name, value in losses.terms.items()} == pytest.approx(expected, rel=1e-9)
        total = expected["risk"] + l2.item() + 0.7 * expected["adversarial_loss"] if step == 0 else None
        assert total is None or losses.total.item() == pytest.approx(total, rel=1e-9)
    assert fast.state_dict().keys() == slow.state_dict().keys()
    for name, weights in fast.state_dict().items():
        assert relative_error(weights, slow.state_dict()[name]) < 1e-8, name


def test_predictions_are_those_of_featurizer_and_head() -> None:
    algorithm, batch = build(), random_batch(4)
    assert torch.equal(algorithm(batch.inputs), algorithm.classifier(algorithm.featurizer(batch.inputs)))


def test_a_featurizer_without_weights() -> None:
    algorithm = SagNet(nn.Identity(), nn.Linear(5, 3), 1)
    batch = DomainBatch(torch.randn(1, 5), torch.tensor([2]), (1,))
    assert algorithm.training_step(batch, 0, algorithm.configure_optimizers()).total.isfinite()


def test_hyperparameters() -> None:
    assert SagNetConfig().adversary_weight == 0.1
    assert SagNetConfig.space("images")["adversary_weight"] == LogUniform(1e-2, 1e1)
    with pytest.raises(ConfigError, match=r"^adversary_weight must be at least 0, got -1$"):
        SagNetConfig(adversary_weight=-1)
