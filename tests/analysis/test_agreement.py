"""Distances between domains, what sampling adds to them, and the outlier."""

import numpy as np
import pytest
import torch

from fishr.analysis.agreement import Distances, correlation, distances, outlier, outlier_sentence
from fishr.analysis.statistics import Statistics

NAMES = ("north", "south", "west")


def statistics(gradient, fisher=None, hessian=None, samples=10) -> Statistics:
    gradient = torch.as_tensor(gradient, dtype=torch.float64)
    others = (torch.zeros_like(gradient) if one is None else torch.as_tensor(one).double() for one in (fisher, hessian))
    return Statistics(samples, 0.0, 0.0, gradient, *others)


def apart(between, sampling=0.0) -> Distances:
    """Distances between three domains, of the pairs 01, 02 and 12."""
    matrix = np.zeros((3, 3))
    matrix[0, 1], matrix[0, 2], matrix[1, 2] = between
    matrix += matrix.T
    return Distances(matrix, sampling * (1 - np.eye(3)), matrix)


def test_distances():
    north = statistics([3.0, 0.0]), statistics([3.0, 2.0])  # mean (3, 1), halves 2 apart
    south = statistics([0.0, 1.0]), statistics([0.0, 1.0])
    found = distances([north, south], "gradient")
    np.testing.assert_allclose(found.distance, [[0, 3], [3, 0]])
    np.testing.assert_allclose(found.sampling, [[0, 1], [1, 0]])
    np.testing.assert_allclose(found.relative[0, 1], 3 / np.sqrt((10 + 1) / 2))
    np.testing.assert_allclose(found.between_domains[0, 1], np.sqrt(9 - 1))


def test_all_zero_has_no_relative_distance():
    zero = statistics([0.0]), statistics([0.0])
    np.testing.assert_array_equal(distances([zero, zero], "gradient").relative, np.zeros((2, 2)))


def test_the_variance_is_compared_after_pooling():
    """Halves with different means have a larger variance together than on average."""
    domain = statistics([1.0], [1.0]), statistics([-1.0], [1.0])
    other = statistics([0.0], [0.0]), statistics([0.0], [0.0])
    assert distances([domain, other], "variance").distance[0, 1] == 1


def test_sampling_is_what_domains_of_one_distribution_differ_by():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        halves = [tuple(statistics(generator.normal(size=(50, 8)).mean(0)) for _ in range(2)) for _ in range(2)]
        found.append(distances(halves, "gradient"))
    squares = [[one.distance[0, 1] ** 2, one.sampling[0, 1] ** 2] for one in found]
    distance, sampling = np.mean(squares, axis=0)
    assert distance == pytest.approx(2 * 8 / 100, rel=0.1)
    assert sampling == pytest.approx(2 * 8 / 100, rel=0.1)


def test_correlation():
    generator = np.random.default_rng(0)
    fisher, hessian = generator.random(20), generator.random(20)
    found = correlation(statistics(np.zeros(20), fisher, hessian))
    assert found == pytest.approx(np.corrcoef(fisher, hessian)[0, 1])
    assert correlation(statistics(np.zeros(20), fisher, np.ones(20))) is None


def test_the_outlier():
    found = outlier(NAMES, apart([3.0, 1.0, 3.0]))
    assert (found.domain, found.ratio, found.stands_out) == ("south", 3, True)
    assert outlier_sentence(NAMES, apart([3.0, 1.0, 3.0]), "variances") == (
        "'south' is the outlier: its variances lie 3.0 times as far from those of the other domains as those from each "
        "other."
    )


def test_sampling_does_not_make_an_outlier():
    """Squares 10, 2, 10 with 1 of them by sampling: 9, 1, 9 between domains."""
    assert outlier(NAMES, apart(np.sqrt([10, 2, 10]), sampling=1.0)).ratio == pytest.approx(3)
    assert outlier(NAMES, apart([1.5, 0.2, 1.5], sampling=1.0)) is None
    assert outlier_sentence(NAMES, apart([1.5, 0.2, 1.5], sampling=1.0), "variances") == (
        "No domain stands out: the variances of the domains differ no more than those of samples of one domain do."
    )


def test_nobody_is_far_enough():
    assert outlier_sentence(NAMES, apart([1.1, 1.0, 1.1]), "variances") == (
        "No domain stands out: the variances of 'south', which lie farthest from those of the others, are only 1.10 "
        "times as far as these from each other."
    )


def test_the_others_agree():
    assert outlier_sentence(NAMES, apart([1.0, 0.0, 1.0]), "variances") == (
        "'south' is the outlier: its variances differ from those of all others, which agree."
    )


def test_equal_domains_have_no_outlier():
    assert outlier(NAMES, apart([0.0, 0.0, 0.0])) is None


def test_two_domains_have_no_outlier():
    two = Distances(*[np.array([[0.0, 1.0], [1.0, 0.0]])] * 3)
    assert outlier(NAMES[:2], two) is None
    assert outlier_sentence(NAMES[:2], two, "variances") == (
        "Of 2 domains none can be told to be the outlier: that takes three."
    )
