from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data import DomainBatch
from fishr.errors import ConfigError

BATCH = DomainBatch(torch.ones(2, 1), torch.tensor([0, 1]), (1, 1))
RISK, PENALTY = 2.0, 5.0


class Fixed(PenalizedAlgorithm):
    """Risk and penalty are 2 and 5 at weights of one."""

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        weight = self.classifier.weight.sum()
        return RISK * weight, PENALTY * weight


def algorithm(*, steps: int | None = None, **settings: Any) -> Fixed:
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    return Fixed(nn.Identity(), head, 2, PenalizedConfig(**settings), steps=steps)


def total(algorithm: Fixed, step: int) -> float:
    return algorithm.losses(BATCH, step).total.item()


# The weight


@pytest.mark.parametrize("before", [0.0, 0.5, 1.0, 4.0])
def test_the_weight_before_at_and_after_the_switch_on(before: float) -> None:
    fixed = algorithm(penalty_weight=3.0, switch_on=7, weight_before=before)
    for step, weight in ((0, before), (6, before), (7, 3.0), (8, 3.0), (1000, 3.0)):
        assert total(fixed, step) == pytest.approx(RISK + weight * PENALTY)


def test_a_switch_on_of_zero_is_from_the_start() -> None:
    assert total(algorithm(penalty_weight=3.0, switch_on=0), 0) == RISK + 3 * PENALTY


def test_terms_are_unweighted() -> None:
    terms = algorithm(penalty_weight=3.0, switch_on=0, rescale=True).losses(BATCH, 0).terms
    assert {name: value.item() for name, value in terms.items()} == {
        "risk": RISK,
        "penalty": PENALTY,
        "penalty_weight": 3.0,
    }


@pytest.mark.parametrize("penalty", [float("nan"), float("inf")])
def test_a_penalty_of_weight_zero_stays_out_of_the_loss(penalty: float) -> None:
    """Zero times infinity is not a number."""
    fixed = algorithm(penalty_weight=3.0, switch_on=5)
    fixed.risk_and_penalty = lambda features, batch: (torch.tensor(RISK), torch.tensor(penalty))
    assert total(fixed, 4) == RISK


@pytest.mark.parametrize(
    ("weight", "divided_by"), [(0.0, 1), (0.5, 1), (1.0, 1), (1.5, 1.5), (91257.18613115903, 91257.18613115903)]
)
def test_rescale_divides_the_whole_loss_by_a_weight_above_one(weight: float, divided_by: float) -> None:
    fixed = algorithm(penalty_weight=weight, switch_on=0, rescale=True, l2=0.25)
    assert total(fixed, 0) == pytest.approx((RISK + weight * PENALTY + 0.25) / divided_by)


def test_without_rescale_nothing_is_divided() -> None:
    assert total(algorithm(penalty_weight=10.0, switch_on=0), 0) == RISK + 10 * PENALTY


def test_the_colored_mnist_convention() -> None:
    """Weight 1 before, then λ, and the loss divided by it."""
    fixed = algorithm(penalty_weight=9e4, switch_on=190, weight_before=1.0, rescale=True)
    assert total(fixed, 189) == pytest.approx(RISK + PENALTY)
    assert total(fixed, 190) == pytest.approx(RISK / 9e4 + PENALTY)


# The measured weight


class Scaled(PenalizedAlgorithm):
    """The gradient of the risk with respect to the features is 3 / scale times the penalty's."""

    scale = 1.0

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        values = self.classifier(features).square().sum()
        return 3 * values, self.scale * values


def scaled(*, steps: int | None = 100, scale: float = 1.0, **settings: Any) -> Scaled:
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    made = Scaled(nn.Identity(), head, 2, PenalizedConfig(**settings), steps=steps)
    made.scale = scale
    return made


def weights(algorithm: PenalizedAlgorithm, first: int, last: int) -> list[float]:
    return [algorithm.losses(BATCH, step).terms["penalty_weight"].item() for step in range(first, last + 1)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 500.0])
def test_the_measured_weight_undoes_the_scale_of_the_penalty(scale: float) -> None:
    fixed = scaled(strength=0.5, switch_on=20, scale=scale)
    assert weights(fixed, 15, 19) == [0.0] * 5
    target = 0.5 * 3 / scale
    assert weights(fixed, 20, 26) == pytest.approx([target * share for share in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0)])


def test_measuring_begins_shortly_before_the_switch_on() -> None:
    fixed = scaled(strength=0.5, switch_on=20)
    fixed.scale = 100.0
    weights(fixed, 0, 14)
    fixed.scale = 1.0
    weights(fixed, 15, 19)
    assert weights(fixed, 20, 30)[-1] == pytest.approx(1.5)


def test_the_weight_follows_the_gradients() -> None:
    fixed = scaled(strength=0.5, switch_on=20)
    weights(fixed, 15, 29)
    fixed.scale = 100.0
    followed = weights(fixed, 30, 229)
    assert 1.5 > followed[0] > followed[1] > followed[-1] == pytest.approx(0.015, rel=0.01)


def test_the_ramp_starts_at_the_weight_before() -> None:
    fixed = scaled(strength=2.0, switch_on=20, weight_before=1.0)
    weights(fixed, 15, 19)
    assert weights(fixed, 20, 25) == pytest.approx([2.0, 3.0, 4.0, 5.0, 6.0, 6.0])


@pytest.mark.parametrize(
    ("switch_on", "steps", "ramp", "expected"), [(0, 100, 5, 5), (3, 100, 5, 5), (0, None, 50, 50)]
)
def test_a_switch_on_before_there_are_measurements_is_put_off(
    switch_on: int, steps: int | None, ramp: int, expected: int
) -> None:
    fixed = scaled(strength=1.0, switch_on=switch_on, steps=steps)
    assert (fixed.switch_on_step, fixed.ramp) == (expected, ramp)
    assert weights(fixed, 0, expected)[-2:] == pytest.approx([0.0, 3.0 / ramp])


def test_what_was_measured_is_in_the_state() -> None:
    fixed, fresh = scaled(strength=0.5, switch_on=20), scaled(strength=0.5, switch_on=20)
    weights(fixed, 15, 19)
    fresh.load_state_dict(fixed.state_dict())
    assert weights(fresh, 20, 20) == weights(fixed, 20, 20) == pytest.approx([0.3])


def test_the_reset_is_at_the_switch_on_step_that_was_put_off() -> None:
    fixed = scaled(strength=0.5, switch_on=0)
    optimizers = fixed.configure_optimizers()
    updates = []
    for step in range(7):
        fixed.training_step(BATCH, step, optimizers)
        updates.append(int(optimizers["main"].state[fixed.classifier.weight]["step"]))
    assert updates == [1, 2, 3, 4, 5, 1, 2]


def test_settings_of_the_strength_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^strength must be above 0, or null for the given penalty_weight, got 0.0$"):
        PenalizedConfig(strength=0.0)
    with pytest.raises(ConfigError, match=r"^rescale is for a large penalty_weight: give one, and strength null$"):
        PenalizedConfig(strength=1.0, rescale=True)


# The switch-on step


@pytest.mark.parametrize(
    ("switch_on", "steps", "expected"),
    [
        (0.3, 5000, 1500),
        (0.3, 10, 3),
        (0.38, 500, 190),
        (0.0, 500, 0),
        (1.0, 500, 500),
        (0.25, 10, 3),
        (0.24, 10, 2),
        (2.0, 7, 14),
        (0.1, 501, 50),
        (190, 500, 190),
        (190, None, 190),
        (1, 500, 1),
        (0, None, 0),
    ],
)
def test_a_share_is_of_the_run_and_a_whole_number_is_a_step(switch_on: float, steps: int | None, expected: int) -> None:
    assert PenalizedConfig(switch_on=switch_on).switch_on_step(steps) == expected
    assert algorithm(switch_on=switch_on, steps=steps).switch_on_step == expected


def test_a_share_of_an_unknown_length_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^switch_on=0.3 is a share of the run: give steps=, the length of the run, or a whole number, the step",
    ):
        algorithm(switch_on=0.3)


@pytest.mark.parametrize(
    ("switch_on", "steps", "step"), [(100, 100, 100), (1.0, 100, 100), (1500, 300, 1500), (1.5, 10, 15)]
)
def test_a_switch_on_that_is_never_reached_is_a_warning(
    switch_on: float, steps: int, step: int, warnings_logged: Callable[[], list[str]]
) -> None:
    algorithm(switch_on=switch_on, steps=steps)
    assert warnings_logged() == [
        f"the penalty never switches on: switch_on={switch_on} is step {step} of a run of {steps} steps"
    ]


@pytest.mark.parametrize(("switch_on", "steps"), [(99, 100), (0.99, 100), (0, 1), (1500, None)])
def test_a_switch_on_that_is_reached_is_none(
    switch_on: float, steps: int | None, warnings_logged: Callable[[], list[str]]
) -> None:
    algorithm(switch_on=switch_on, steps=steps)
    assert warnings_logged() == []


# The optimizer


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("switch_on", [0, 2])
def test_the_optimizer_forgets_in_place_at_the_switch_on_step_only(reset: bool, switch_on: int) -> None:
    fixed = algorithm(switch_on=switch_on, reset_optimizer=reset, lr=0.01)
    optimizers = fixed.configure_optimizers()
    (name, optimizer), *others = optimizers.items()
    assert (name, others) == ("main", [])
    state = optimizer.state
    updates = []
    for step in range(5):
        fixed.training_step(BATCH, step, optimizers)
        updates.append(int(optimizer.state[fixed.classifier.weight]["step"]))
    assert updates == ([1, 2, 1, 2, 3] if reset and switch_on else [1, 2, 3, 4, 5])
    assert optimizers["main"] is optimizer
    assert optimizer.state is state
    assert optimizer.param_groups[0]["params"][0] is fixed.classifier.weight


def test_a_reset_makes_the_next_update_adams_first() -> None:
    """Adam's first update is lr · sign(gradient), whatever came before."""
    fixed = algorithm(penalty_weight=3.0, switch_on=2, lr=0.01)
    optimizers = fixed.configure_optimizers()
    # Gradients of the other sign before.
    fixed.risk_and_penalty = lambda features, batch: (-fixed.classifier.weight.sum(), fixed.classifier.weight.sum())
    for step in range(2):
        fixed.training_step(BATCH, step, optimizers)
    before = fixed.classifier.weight.item()
    fixed.training_step(BATCH, 2, optimizers)
    assert fixed.classifier.weight.item() - before == pytest.approx(-0.01, rel=1e-4)


def test_a_step_returns_the_losses_before_it_and_changes_the_weights() -> None:
    fixed = algorithm(switch_on=0, penalty_weight=1.0, lr=0.5)
    losses = fixed.training_step(BATCH, 0, fixed.configure_optimizers())
    assert losses.total.item() == RISK + PENALTY
    assert fixed.classifier.weight.item() == pytest.approx(0.5)


def test_gradients_of_the_step_before_are_dropped() -> None:
    fixed = algorithm(switch_on=0, penalty_weight=1.0)
    optimizers = fixed.configure_optimizers()
    for step in range(2):
        fixed.training_step(BATCH, step, optimizers)
        assert fixed.classifier.weight.grad.item() == RISK + PENALTY


def test_the_optimizer_is_adam_with_the_configs_settings() -> None:
    (group,) = algorithm(switch_on=0, lr=0.5, weight_decay=0.25).configure_optimizers()["main"].param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.25, (0.9, 0.999), 1e-8)
