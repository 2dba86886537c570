"""The distance of the domains' statistics to their mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from fishr.errors import ConfigError, InputError
from fishr.functional import variance_penalty


def statistics(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_by_hand():
    variances = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 6.0]])  # deviations 1, 0, 3 in both domains
    assert variance_penalty(variances).item() == pytest.approx(10 / 3)
    assert variance_penalty(variances, reduction="sum").item() == pytest.approx(20)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 9)),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(shape, reduction, dtype, seed):
    variances = statistics(*shape, seed=seed, dtype=dtype).requires_grad_()
    actual = variance_penalty(variances, reduction=reduction)
    expected = oracles.penalty(variances.double(), reduction)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert actual.dtype == dtype
    assert oracles.relative_error(actual, expected) <= tolerance
    gradients = [torch.autograd.grad(value, variances)[0] for value in (actual, expected)]
    assert oracles.relative_error(*gradients) <= tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction):
    variances = statistics(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: variance_penalty(v, reduction=reduction), variances)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_models_at_once_are_each_alone(reduction):
    variances = statistics(4, 3, 2, 5).requires_grad_()
    together = torch.vmap(lambda of_one: variance_penalty(of_one, reduction=reduction))(variances)
    alone = torch.stack([variance_penalty(of_one, reduction=reduction) for of_one in variances])
    assert oracles.relative_error(together, alone) <= 1e-12
    weights = statistics(4, seed=1)
    gradients = [torch.autograd.grad((value * weights).sum(), variances)[0] for value in (together, alone)]
    assert oracles.relative_error(*gradients) <= 1e-12


def test_sum_is_mean_times_domains_times_parameters():
    variances = statistics(3, 4, 6)
    expected = variance_penalty(variances, reduction="mean") * 3 * (4 * 6)
    assert oracles.relative_error(variance_penalty(variances, reduction="sum"), expected) <= 1e-12


def test_equal_domains_have_no_distance():
    variances = statistics(1, 4, 6).expand(3, 4, 6)
    assert variance_penalty(variances).item() < 1e-30


def test_a_shift_common_to_all_domains_changes_nothing():
    variances = statistics(3, 4, 6)
    shifted = variance_penalty(variances + statistics(1, 4, 6, seed=1))
    assert oracles.relative_error(shifted, variance_penalty(variances)) <= 1e-12


@pytest.mark.parametrize("shape", [(), (1, 4, 6), (0, 4, 6)])
def test_fewer_than_two_domains(shape):
    message = rf"at least 2 domains, got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(InputError, match=message):
        variance_penalty(torch.zeros(shape))


def test_unknown_reduction():
    with pytest.raises(ConfigError, match="reduction must be 'mean' or 'sum', got 'none'"):
        variance_penalty(torch.zeros(2, 3), reduction="none")
