"""Distances between samples of features against loops over samples and pairs."""

import math

import pytest
import torch
from torch import Tensor

from fishr.functional.alignment import KERNEL_GAMMAS, maximum_mean_discrepancy, mean_over_pairs, moment_distance
from oracles import relative_error


def sample(size: int, seed: int, features: int = 3) -> Tensor:
    return torch.randn(size, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_moment_distance(first: Tensor, second: Tensor) -> float:
    total = 0.0
    means = [[sum(row[j] for row in part) / len(part) for j in range(part.shape[1])] for part in (first, second)]
    covariances = [
        [
            [
                sum((row[j] - mean[j]) * (row[k] - mean[k]) for row in part) / (len(part) - 1)
                for k in range(part.shape[1])
            ]
            for j in range(part.shape[1])
        ]
        for part, mean in zip((first, second), means, strict=True)
    ]
    width = first.shape[1]
    for j in range(width):
        total += (means[0][j] - means[1][j]) ** 2 / width
        for k in range(width):
            total += (covariances[0][j][k] - covariances[1][j][k]) ** 2 / width**2
    return float(total)


def slow_discrepancy(first: Tensor, second: Tensor) -> float:
    def mean_kernel(a: Tensor, b: Tensor) -> float:
        values = [
            sum(math.exp(-gamma * float((x - y).square().sum())) for gamma in KERNEL_GAMMAS) for x in a for y in b
        ]
        return sum(values) / len(values)

    return mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)


@pytest.mark.parametrize("features", [1, 3])
def test_moment_distance_against_loops(features: int) -> None:
    first, second = sample(4, 0, features), 2 * sample(7, 1, features) + 1
    assert moment_distance(first, second).item() == pytest.approx(slow_moment_distance(first, second), rel=1e-10)


def test_discrepancy_against_loops() -> None:
    first, second = sample(4, 0), 2 * sample(7, 1) + 1
    assert maximum_mean_discrepancy(first, second).item() == pytest.approx(slow_discrepancy(first, second), rel=1e-10)


@pytest.mark.parametrize("distance", [moment_distance, maximum_mean_discrepancy])
def test_laws_of_a_distance(distance) -> None:
    first, second = sample(5, 0), sample(6, 1) + 1
    assert distance(first, second) > 0
    assert relative_error(distance(first, second), distance(second, first)) < 1e-12
    assert distance(first, first).abs() < 1e-12
    # The order of the samples does not matter.
    assert relative_error(distance(first.flip(0), second), distance(first, second)) < 1e-12


def test_equal_moments_are_told_apart_by_the_kernels_alone() -> None:
    """Three points against two: the same mean and variance, another distribution."""
    first = torch.tensor([[-2.0], [0.0], [2.0], [0.0], [0.0]], dtype=torch.float64)
    second = torch.tensor([[-1.0], [1.0], [-1.0], [1.0], [0.0]], dtype=torch.float64)
    second = second * first.std() / second.std()
    assert moment_distance(first, second) < 1e-20
    assert maximum_mean_discrepancy(first, second) > 0.01


@pytest.mark.parametrize("distance", [moment_distance, maximum_mean_discrepancy])
def test_half_precision_is_widened(distance) -> None:
    first, second = sample(5, 0).bfloat16(), sample(6, 1).bfloat16()
    assert distance(first, second).dtype == torch.float32
    assert torch.equal(distance(first, second), distance(first.float(), second.float()))


@pytest.mark.parametrize("distance", [moment_distance, maximum_mean_discrepancy])
def test_gradients(distance) -> None:
    first, second = sample(3, 0).requires_grad_(), sample(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(distance, (first, second))


def test_mean_over_pairs_sees_every_pair_once() -> None:
    parts = [torch.tensor(value) for value in (1.0, 10.0, 100.0)]
    assert mean_over_pairs(lambda a, b: a * b, parts).item() == pytest.approx((10 + 100 + 1000) / 3)
