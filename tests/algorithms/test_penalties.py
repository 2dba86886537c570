"""Risk, penalty and their gradients against plain autograd."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.algorithms import ALGORITHMS, ERM, IRM, Algorithm, Fishr, VREx
from fishr.algorithms.base import domain_means
from fishr.data import DomainBatch
from fishr.errors import ConfigError
from oracles import head_gradients, penalty, relative_error, variances

SIZES = (4, 7, 3)


def batch(num_outputs: int, sizes: tuple[int, ...] = SIZES) -> DomainBatch:
    generator = torch.Generator().manual_seed(1)
    num_classes = max(num_outputs, 2)
    domains = [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(num_classes, (size,), generator=generator),
        )
        for size in sizes
    ]
    return DomainBatch.of([inputs for inputs, _ in domains], [targets for _, targets in domains])


def network(num_outputs: int) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double(), nn.Linear(6, num_outputs).double()


def build(cls: type[Algorithm], num_outputs: int, **settings: Any) -> Algorithm:
    return cls(*network(num_outputs), len(SIZES), cls.Config(**settings), steps=100)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))
    return F.cross_entropy(logits, targets)


def parts(algorithm: Algorithm, data: DomainBatch) -> list[tuple[Tensor, Tensor]]:
    """Logits and targets of each domain."""
    logits = algorithm(data.inputs)
    return list(zip(logits.split(data.sizes), data.targets.split(data.sizes), strict=True))


def irm_slope(logits: Tensor, targets: Tensor) -> Tensor:
    """Derivative of the mean loss with respect to a multiplier of the logits, at one."""
    scale = torch.ones((), dtype=logits.dtype, requires_grad=True)
    return torch.autograd.grad(mean_loss(logits * scale, targets), scale, create_graph=True)[0]


def irm_full(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    return torch.stack([irm_slope(*part) ** 2 for part in parts(algorithm, data)]).mean()


def irm_split(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    products = [
        irm_slope(logits[::2], targets[::2]) * irm_slope(logits[1::2], targets[1::2])
        for logits, targets in parts(algorithm, data)
    ]
    return torch.stack(products).mean()


def vrex_mean(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    risks = [mean_loss(*part) for part in parts(algorithm, data)]
    mean = sum(risks) / len(risks)
    return sum((risk - mean) ** 2 for risk in risks) / len(risks)


def vrex_sum(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    risks = [mean_loss(*part) for part in parts(algorithm, data)]
    return sum((risks[i] - risks[j]) ** 2 for i in range(len(risks)) for j in range(i))


def fishr(reduction: str) -> Callable[[Algorithm, DomainBatch], Tensor]:
    def of(algorithm: Algorithm, data: DomainBatch) -> Tensor:
        head = algorithm.classifier
        loss = nn.BCEWithLogitsLoss() if head.out_features == 1 else nn.CrossEntropyLoss()
        targets = data.targets.double() if head.out_features == 1 else data.targets
        gradients = head_gradients(loss, algorithm.featurizer(data.inputs), head.weight, head.bias, targets)
        return penalty(variances(gradients, data.domains, len(data.sizes)), reduction)

    return of


def mean_of_domains(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    return torch.stack([mean_loss(*part) for part in parts(algorithm, data)]).mean()


def mean_of_samples(algorithm: Algorithm, data: DomainBatch) -> Tensor:
    return mean_loss(algorithm(data.inputs), data.targets)


OBJECTIVES: dict[str, tuple[type[Algorithm], dict[str, Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "irm, full": (IRM, {"estimator": "full"}, mean_of_domains, irm_full),
    "irm, split": (IRM, {"estimator": "split"}, mean_of_domains, irm_split),
    "vrex, mean": (VREx, {"reduction": "mean"}, mean_of_domains, vrex_mean),
    "vrex, sum": (VREx, {"reduction": "sum"}, mean_of_domains, vrex_sum),
    "fishr, mean": (Fishr, {"ema": 0.0, "reduction": "mean"}, mean_of_samples, fishr("mean")),
    "fishr, sum": (Fishr, {"ema": 0.0, "reduction": "sum"}, mean_of_samples, fishr("sum")),
}


def gradients_of(value: Tensor, algorithm: Algorithm) -> list[Tensor]:
    weights = [*algorithm.featurizer.parameters(), *algorithm.classifier.parameters()]
    return list(torch.autograd.grad(value, weights))


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_risk_and_penalty_agree_with_autograd(name: str, num_outputs: int) -> None:
    cls, settings, slow_risk, slow_penalty = OBJECTIVES[name]
    algorithm, data = build(cls, num_outputs, **settings), batch(num_outputs)
    risk, value = algorithm.risk_and_penalty(algorithm.features(data), data)
    assert relative_error(risk, slow_risk(algorithm, data)) < 1e-10
    assert relative_error(value, slow_penalty(algorithm, data)) < 1e-10


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize("convention", ["DomainBed", "Colored MNIST script"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_published_conventions(name: str, convention: str, num_outputs: int) -> None:
    """The whole objective and its gradient, before and after the switch-on."""
    cls, settings, slow_risk, slow_penalty = OBJECTIVES[name]
    l2, weight = 0.01, 50.0
    before = (1.0 if cls is not Fishr else 0.0) if convention == "DomainBed" else 1.0
    script = {} if convention == "DomainBed" else {"weight_before": 1.0, "rescale": True, "reset_optimizer": False}
    algorithm = build(cls, num_outputs, **settings, **script, penalty_weight=weight, switch_on=10, l2=l2)
    data = batch(num_outputs)
    for step, factor in ((9, before), (10, weight)):
        norm = sum(parameter.square().sum() for parameter in algorithm.parameters())
        expected = slow_risk(algorithm, data) + l2 * norm + factor * slow_penalty(algorithm, data)
        if convention != "DomainBed":
            expected = expected / max(factor, 1.0)
        total = algorithm.losses(data, step).total
        assert relative_error(total, expected) < 1e-10
        assert relative_error(gradients_of(total, algorithm), gradients_of(expected, algorithm)) < 1e-9


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_erm_is_the_mean_over_all_samples(num_outputs: int) -> None:
    algorithm, data = build(ERM, num_outputs), batch(num_outputs)
    losses = algorithm.losses(data, 0)
    assert relative_error(losses.total, mean_of_samples(algorithm, data)) < 1e-12
    assert relative_error(losses.total, mean_of_domains(algorithm, data)) > 1e-5
    assert losses.terms.keys() == {"risk"}


def test_vrex_sum_of_two_domains_is_the_squared_difference() -> None:
    """The script's penalty: (R_1 − R_2)²."""
    data = batch(1, (6, 3))
    algorithm = VREx(*network(1), 2, VREx.Config(reduction="sum"), steps=100)
    one, two = (mean_loss(*part) for part in parts(algorithm, data))
    assert relative_error(algorithm.risk_and_penalty(algorithm.features(data), data)[1], (one - two) ** 2) < 1e-10


def test_irm_split_can_be_negative() -> None:
    """It is unbiased, not a square."""
    algorithm = IRM(nn.Identity(), nn.Linear(1, 1, bias=False), 1, IRM.Config(estimator="split"), steps=100)
    nn.init.ones_(algorithm.classifier.weight)
    data = DomainBatch(torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1]), (2,))
    assert algorithm.risk_and_penalty(algorithm.features(data), data)[1] < 0


def test_domain_means() -> None:
    data = DomainBatch(torch.empty(6), torch.empty(6), (3, 1, 2))
    assert domain_means(torch.tensor([1.0, 2, 3, 10, 7, 8]), data).tolist() == [2, 10, 7.5]
    assert domain_means(torch.tensor([1.0, 2, 3, 10, 7, 8]).unsqueeze(1), data).tolist() == [[2], [10], [7.5]]


# The L2 term


def test_l2_covers_weights_and_biases_of_featurizer_and_head() -> None:
    algorithm = build(ERM, 4, l2=0.5)
    expected = 0.5 * sum((parameter**2).sum() for parameter in [*algorithm.featurizer.parameters()])
    expected = expected + 0.5 * ((algorithm.classifier.weight**2).sum() + (algorithm.classifier.bias**2).sum())
    assert relative_error(algorithm.l2_term(), expected) < 1e-12
    plain = build(ERM, 4)
    assert plain.l2_term() == 0
    data = batch(4)
    difference = algorithm.losses(data, 0).total - plain.losses(data, 0).total
    assert relative_error(difference, expected) < 1e-12


def test_fishrs_history_is_no_weight() -> None:
    algorithm = build(Fishr, 4, l2=0.5)
    before = algorithm.l2_term()
    data = batch(4)
    algorithm.risk_and_penalty(algorithm.features(data), data)
    assert algorithm.penalty.average.history.abs().sum() > 0
    assert torch.equal(algorithm.l2_term(), before)


# Fishr's moving average


def test_the_moving_average_runs_from_the_first_step() -> None:
    """It is warm when the penalty switches on, though the loss before is the risk alone."""
    algorithm, data = build(Fishr, 4, ema=0.9, switch_on=50), batch(4)
    first = algorithm.losses(data, 0)
    assert relative_error(first.total, first.terms["risk"]) == 0
    second = algorithm.losses(data, 1)
    # The same variances again: ema/(1 − γ) is v, then γ v + v, and the penalty is quadratic in it.
    assert relative_error(second.terms["penalty"], 1.9**2 * first.terms["penalty"]) < 1e-9


def test_evaluation_leaves_the_history() -> None:
    algorithm, data = build(Fishr, 4), batch(4)
    algorithm.risk_and_penalty(algorithm.features(data), data)
    history = algorithm.penalty.average.history.clone()
    algorithm.eval()
    algorithm(data.inputs)
    algorithm.risk_and_penalty(algorithm.features(data), data)
    assert torch.equal(algorithm.penalty.average.history, history)


# Precision


@pytest.mark.parametrize("cls", [ERM, IRM, VREx, Fishr])
def test_logits_are_computed_outside_autocast(cls: type[Algorithm]) -> None:
    featurizer, classifier = (part.float() for part in network(4))
    algorithm = cls(featurizer, classifier, len(SIZES), steps=100)
    algorithm.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    data = replace(batch(4), inputs=batch(4).inputs.float())
    features = algorithm.features(data)
    assert features.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = algorithm(data.inputs)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(features.float(), classifier.weight, classifier.bias))


@pytest.mark.parametrize("name", ["fishr", "vrex"])
def test_what_compares_domains_needs_two(name: str) -> None:
    with pytest.raises(ConfigError, match="compares domains and needs at least 2 to train on, got 1: hold out fewer"):
        ALGORITHMS[name](nn.Identity(), nn.Linear(2, 2), 1)


@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_measured_weight_balances_the_gradients(name: str, num_outputs: int) -> None:
    cls, settings, *_ = OBJECTIVES[name]
    algorithm, data = build(cls, num_outputs, **settings, strength=0.25, switch_on=5), batch(num_outputs)
    algorithm.losses(data, 4)
    weight = algorithm.losses(data, 50).terms["penalty_weight"]
    features = algorithm.features(data)
    values = algorithm.risk_and_penalty(features, data)
    of_risk, of_penalty = (torch.autograd.grad(value, features, retain_graph=True)[0].norm() for value in values)
    assert (weight * of_penalty / of_risk).item() == pytest.approx(0.25, rel=1e-5)
