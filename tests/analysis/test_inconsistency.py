"""Inconsistency of domains, against a search over directions."""

import numpy as np
import pytest
import torch

from fishr.analysis.inconsistency import DAMPING, diagonal_inconsistency, exact_inconsistency

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)


def searched(first, second, epsilon):
    """The largest ½ θᵀ H_B θ with ½ θᵀ H_A θ = ε, over directions of θ."""
    angles = np.linspace(0, np.pi, 100_001)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    lengths = np.sqrt(2 * epsilon / np.einsum("id,ij,jd->d", directions, first, directions))
    steps = directions * lengths
    return np.einsum("id,ij,jd->d", steps, second, steps).max() / 2


def damped(matrix):
    return matrix.numpy() + DAMPING * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def test_exact_against_a_search():
    found = exact_inconsistency([0.3, 0.5], [A, B], epsilon=0.01)
    assert found.scores[0, 1] == pytest.approx(0.2 + searched(damped(A), B.numpy(), 0.01), rel=1e-6)
    assert found.scores[1, 0] == pytest.approx(-0.2 + searched(damped(B), A.numpy(), 0.01), rel=1e-6)


def test_diagonal_against_a_search():
    first, second = A.diagonal(), B.diagonal()
    found = diagonal_inconsistency([0.3, 0.5], [first, second], epsilon=0.01)
    matrices = first.diag(), second.diag()
    expected = searched(damped(matrices[0]), matrices[1].numpy(), 0.01)
    assert found.scores[0, 1] == pytest.approx(0.2 + expected, rel=1e-6)


def test_both_agree_on_diagonal_hessians():
    diagonals = [torch.tensor([1.0, 4.0, 2.0]).double(), torch.tensor([3.0, 1.0, 1.0]).double()]
    one = diagonal_inconsistency([0, 0], diagonals, 0.1)
    other = exact_inconsistency([0, 0], [diagonal.diag() for diagonal in diagonals], 0.1)
    np.testing.assert_allclose(one.ratios, other.ratios, rtol=1e-12)
    np.testing.assert_allclose(one.ratios[0, 1], 3, rtol=0.01)
    np.testing.assert_allclose(one.ratios[1, 0], 4, rtol=0.01)


@pytest.mark.parametrize("make", [diagonal_inconsistency, exact_inconsistency])
def test_directions_that_are_flat_in_both_domains_do_not_count(make):
    flat = [torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double()]
    given = flat if make is diagonal_inconsistency else [diagonal.diag() for diagonal in flat]
    np.testing.assert_allclose(make([0, 0], given, 1.0).ratios, [[1, 2], [0.5, 1]], rtol=2e-3)


@pytest.mark.parametrize("make", [diagonal_inconsistency, exact_inconsistency])
def test_a_direction_that_is_flat_in_one_domain_is_bounded_by_the_damping(make):
    diagonals = [torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 2.0]).double()]
    given = diagonals if make is diagonal_inconsistency else [diagonal.diag() for diagonal in diagonals]
    assert make([0, 0], given, 1.0).ratios[0, 1] == pytest.approx(2 / (DAMPING * 0.5), rel=1e-6)


@pytest.mark.parametrize("make", [diagonal_inconsistency, exact_inconsistency])
def test_hessians_that_vanish(make):
    given = [torch.zeros(2).double(), torch.zeros(2).double()]
    given = given if make is diagonal_inconsistency else [diagonal.diag() for diagonal in given]
    np.testing.assert_array_equal(make([0.0, 1.0], given, 1.0).scores, [[1, 1], [-1, 1]])


@pytest.mark.parametrize("make", [diagonal_inconsistency, exact_inconsistency])
def test_other_domains_change_nothing(make):
    diagonals = [
        torch.tensor([1.0, 0.01]).double(),
        torch.tensor([2.0, 1.0]).double(),
        torch.tensor([9.0, 9.0]).double(),
    ]
    given = diagonals if make is diagonal_inconsistency else [diagonal.diag() for diagonal in diagonals]
    two, three = make([0, 1], given[:2], 1.0), make([0, 1, 2], given, 1.0)
    np.testing.assert_array_equal(two.scores, three.scores[:2, :2])
