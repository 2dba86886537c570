"""HGP and Hutchinson, against torch's double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.algorithms.hessian_alignment import HessianAlignment, HessianGradientProduct, Hutchinson
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from oracles import relative_error

SIZES = (2, 5, 4)
BOTH = pytest.mark.parametrize("cls", [HessianGradientProduct, Hutchinson])


def build(
    cls: type[HessianAlignment],
    num_outputs: int,
    *,
    bias: bool = True,
    sizes: tuple[int, ...] = SIZES,
    loss: nn.Module | None = None,
    **settings: float,
) -> tuple[HessianAlignment, DomainBatch]:
    torch.manual_seed(0)
    featurizer, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, num_outputs, bias=bias)
    algorithm = cls(featurizer.double(), head.double(), len(sizes), cls.Config(**settings), loss=loss, steps=100)
    targets = torch.randint(max(num_outputs, 2), (sum(sizes),))
    return algorithm, DomainBatch(torch.randn(sum(sizes), 3, dtype=torch.float64), targets, sizes)


def mean_loss(algorithm: HessianAlignment, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = algorithm(inputs)
    return algorithm.loss(logits[:, 0], targets.double()) if logits.shape[1] == 1 else algorithm.loss(logits, targets)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def domains(algorithm: HessianAlignment, data: DomainBatch) -> list[tuple[Tensor, Tensor]]:
    """Mean loss, and gradient with respect to the head, of each domain."""
    pairs = []
    for inputs, targets in zip(data.split(data.inputs), data.split(data.targets), strict=True):
        risk = mean_loss(algorithm, inputs, targets)
        head = list(algorithm.classifier.parameters())
        pairs.append((risk, flat(torch.autograd.grad(risk, head, create_graph=True))))
    return pairs


def product_with_hessian(algorithm: HessianAlignment, gradient: Tensor, vector: Tensor) -> Tensor:
    """The Hessian row by row, times a vector."""
    head = list(algorithm.classifier.parameters())
    rows = [flat(torch.autograd.grad(entry, head, create_graph=True)) for entry in gradient]
    return torch.stack(rows) @ vector


def spread(values: list[Tensor]) -> Tensor:
    mean = sum(values) / len(values)
    return sum((value - mean).square().sum() for value in values) / len(values)


def gradients_of(value: Tensor, algorithm: HessianAlignment) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(algorithm.parameters())))


@pytest.mark.parametrize(
    ("num_outputs", "bias", "loss"),
    [
        (1, True, None),
        (1, False, None),
        (3, True, None),
        (3, False, None),
        (3, True, nn.CrossEntropyLoss(label_smoothing=0.2)),
    ],
    ids=["binary", "binary, no bias", "classes", "classes, no bias", "smoothed labels"],
)
def test_objective_of_hgp(num_outputs: int, bias: bool, loss: nn.Module | None) -> None:
    algorithm, data = build(
        HessianGradientProduct, num_outputs, bias=bias, loss=loss, gradient_weight=3.0, hessian_weight=7.0
    )
    pairs = domains(algorithm, data)
    products = [product_with_hessian(algorithm, gradient, gradient) for _, gradient in pairs]
    expected = sum(risk for risk, _ in pairs) / 3
    expected = expected + 3.0 * spread([gradient for _, gradient in pairs]) + 7.0 * spread(products)
    total = algorithm.losses(data, 0).total
    assert relative_error(total, expected) < 1e-12
    assert relative_error(gradients_of(total, algorithm), gradients_of(expected, algorithm)) < 1e-11


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_objective_of_hutchinson(num_outputs: int, bias: bool) -> None:
    algorithm, data = build(Hutchinson, num_outputs, bias=bias, gradient_weight=3.0, hessian_weight=7.0, num_draws=4)
    torch.manual_seed(5)
    total = algorithm.losses(data, 0).total
    torch.manual_seed(5)
    signs = torch.randint(2, (4, num_outputs, 4 + bias), dtype=torch.float64) * 2 - 1
    # As the parameters lie: all weights, then all biases.
    vectors = [flat((v[:, :4], v[:, 4:])) for v in signs]
    pairs = domains(algorithm, data)
    diagonals = [
        sum(v * product_with_hessian(algorithm, gradient, v) for v in vectors) / len(vectors) for _, gradient in pairs
    ]
    expected = sum(risk for risk, _ in pairs) / 3
    expected = expected + 3.0 * spread([gradient for _, gradient in pairs]) + 7.0 * spread(diagonals)
    assert relative_error(total, expected) < 1e-12
    assert relative_error(gradients_of(total, algorithm), gradients_of(expected, algorithm)) < 1e-11


@BOTH
def test_copies_of_a_domain_have_no_penalty(cls: type[HessianAlignment]) -> None:
    algorithm, data = build(cls, 3, sizes=(4, 4))
    data = DomainBatch(data.inputs[:4].repeat(2, 1), data.targets[:4].repeat(2), (4, 4))
    assert algorithm.losses(data, 0).terms["penalty"] == 0


@BOTH
def test_the_penalty_acts_from_the_first_step_unless_told_otherwise(cls: type[HessianAlignment]) -> None:
    algorithm, data = build(cls, 3)
    assert algorithm.losses(data, 0).terms["penalty_weight"] == 1
    algorithm, data = build(cls, 3, switch_on=10, penalty_weight=2.0)
    losses = algorithm.losses(data, 9)
    assert losses.total == losses.terms["risk"]
    losses = algorithm.losses(data, 10)
    assert relative_error(losses.total, losses.terms["risk"] + 2 * losses.terms["penalty"]) < 1e-12


@BOTH
@pytest.mark.parametrize(
    ("num_outputs", "loss", "came"),
    [
        (3, nn.MSELoss(), "MSELoss"),
        (3, nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss"),
        (1, nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (3, F.cross_entropy, "cross_entropy"),
        (3, nn.CrossEntropyLoss(torch.ones(3)), "CrossEntropyLoss with weights"),
        (3, nn.CrossEntropyLoss(ignore_index=0), "CrossEntropyLoss with an ignored class"),
        (1, nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), "BCEWithLogitsLoss with weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_losses_are_refused(cls: type[HessianAlignment], num_outputs: int, loss: nn.Module, came: str) -> None:
    with pytest.raises(ConfigError, match=f"{cls.title} takes the Hessian in closed form, .*, got {came}: take"):
        cls(nn.Identity(), nn.Linear(2, num_outputs), 2, loss=loss)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (HessianGradientProduct.Config, {"gradient_weight": -1.0}, "gradient_weight must be at least 0, got -1.0"),
        (Hutchinson.Config, {"hessian_weight": -1.0}, "hessian_weight must be at least 0, got -1.0"),
        (Hutchinson.Config, {"num_draws": 0}, "num_draws must be at least 1, got 0"),
    ],
)
def test_hyperparameters_out_of_range(config: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
