import pytest
import torch
from torch import Tensor

from fishr.errors import ConfigError
from fishr.nn import GradientBalance


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype, requires_grad=True)


def test_norms_are_averaged_before_they_are_divided() -> None:
    """Gradients of the risk: 5 and 13, of the penalty: 1 and 2; what came before counts for 0.95 of what comes now."""
    balance, features = GradientBalance(strength=0.5), leaf(1.0, 1.0)
    first, second = features.unbind(1)
    balance.observe(features, (3 * first + 4 * second).sum(), first.sum())
    balance.observe(features, (5 * first - 12 * second).sum(), 2 * second.sum())
    assert balance.weight().item() == pytest.approx(0.5 * (0.95 * 5 + 13) / (0.95 * 1 + 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms_are_float32_whatever_the_features_are(dtype: torch.dtype) -> None:
    balance, features = GradientBalance(strength=1.0), leaf(1.0, dtype=dtype)
    balance.observe(features, 512 * features.sum(), features.sum())
    balance.observe(features, features.sum(), features.sum())
    assert balance.weight().dtype == torch.float32
    assert balance.weight().item() == pytest.approx((0.95 * 512 + 1) / (0.95 + 1))


def test_no_gradient_no_weight() -> None:
    balance, features = GradientBalance(strength=1.0), leaf(1.0)
    assert balance.weight() == 0
    balance.observe(features, features.sum(), 0 * features.sum())
    assert balance.weight() == 0


def test_the_graph_and_the_gradients_are_left_as_they_are() -> None:
    balance, features = GradientBalance(strength=1.0), leaf(2.0)
    risk, penalty = features.square().sum(), features.pow(3).sum()
    balance.observe(features, risk, penalty)
    assert features.grad is None
    (risk + penalty).backward()
    assert features.grad.item() == 2 * 2 + 3 * 4
    assert not balance.weight().requires_grad


def test_a_strength_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^strength must be above 0, got 0.0$"):
        GradientBalance(0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_passed_over(bad: float) -> None:
    """Else λ would be 0 ever after, and the run ERM's without a word."""
    balance, features = GradientBalance(strength=1.0), leaf(1.0)
    balance.observe(features, features.sum(), bad * features.sum())
    balance.observe(features, features.sum(), features.sum())
    assert balance.weight().isnan()


def test_a_penalty_that_does_not_depend_on_the_features_has_no_weight() -> None:
    balance, features, other = GradientBalance(strength=1.0), leaf(1.0), leaf(1.0)
    balance.observe(features, features.sum(), other.sum())
    assert balance.weight() == 0
