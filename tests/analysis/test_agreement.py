"""Distances between domains, what sampling adds to them, and the outlier."""

import numpy as np
import pytest
import torch

from fishr.analysis.agreement import Distances, correlation, distances, farthest, outlier_sentence
from fishr.analysis.statistics import Statistics

NAMES = ("north", "south", "west")


def statistics(gradient, fisher=None, hessian=None, spread=0.0, **options) -> Statistics:
    gradient = torch.as_tensor(gradient, dtype=torch.float64)
    others = (torch.zeros_like(gradient) if one is None else torch.as_tensor(one).double() for one in (fisher, hessian))
    return Statistics(10, 0.0, 0.0, gradient, *others, {"gradient": spread}, **options)


def apart(between, sampling=0.0) -> Distances:
    """Distances between domains, of the pairs 01, 02, ..., 12, ..."""
    size = round((1 + np.sqrt(1 + 8 * len(between))) / 2)
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size, 1)] = between
    matrix += matrix.T
    return Distances(matrix, sampling * (1 - np.eye(size)), matrix)


def test_distances():
    found = distances([statistics([3.0, 1.0], spread=3.0), statistics([0.0, 1.0], spread=1.0)], "gradient")
    np.testing.assert_allclose(found.distance, [[0, 3], [3, 0]])
    np.testing.assert_allclose(found.sampling, [[0, 2], [2, 0]])
    np.testing.assert_allclose(found.relative[0, 1], 3 / np.sqrt((10 + 1) / 2))


def test_all_zero_has_no_relative_distance():
    np.testing.assert_array_equal(distances([statistics([0.0])] * 2, "gradient").relative, np.zeros((2, 2)))


def test_what_sampling_gives_is_not_known_of_estimates():
    assert distances([statistics([1.0])] * 2, "hessian").sampling is None


def test_correlation():
    generator = np.random.default_rng(0)
    fisher, hessian = generator.random(20), generator.random(20)
    found = correlation(statistics(np.zeros(20), fisher, hessian))
    assert found == pytest.approx(np.corrcoef(fisher, hessian)[0, 1])
    assert correlation(statistics(np.zeros(20), fisher, np.ones(20))) is None
    assert correlation(statistics(np.zeros(20), fisher, hessian, hessian_error=0.1)) is None


def test_the_outlier():
    found = farthest(NAMES, apart([3.0, 1.0, 3.0]))
    assert (found.domain, found.ratio, found.lead) == ("south", 3, pytest.approx(3 / np.sqrt(5)))
    assert outlier_sentence(NAMES, apart([3.0, 1.0, 3.0]), "variances") == (
        "'south' is the outlier: its variances lie 3.0 times as far from those of the other domains as those from each "
        "other."
    )


def test_what_sampling_adds_is_left_out():
    """Squares 10, 2, 10 with 1 of them by sampling: 9, 1, 9 between domains."""
    assert farthest(NAMES, apart(np.sqrt([10, 2, 10]), sampling=1.0)).ratio == pytest.approx(3)


def test_no_outlier_within_sampling():
    assert farthest(NAMES, apart([2.9, 0.2, 2.9], sampling=1.0)) is None
    assert farthest(NAMES, apart([9.0, 0.2, 2.9], sampling=1.0)) is None  # from one of the others it may be sampling
    assert outlier_sentence(NAMES, apart([2.9, 0.2, 2.9], sampling=1.0), "variances") == (
        "No domain stands out: none has variances that differ from those of all others beyond doubt."
    )


def test_a_domain_far_out_by_chance_is_none():
    """'west' lies as far out, but its samples are so few that this may be chance."""
    found = apart([3.0, 4.0, 4.5])
    found.sampling[2] = found.sampling[:, 2] = 2.0
    found.sampling[2, 2] = 0
    assert farthest(NAMES, found) is None


@pytest.mark.parametrize("count", [3, 4, 6])
def test_evenly_spaced_domains_have_none(count):
    """Such as rotations by 0, 15, ..., 75 degrees: the first is as far out as the last."""
    names = [str(index) for index in range(count)]
    places = np.arange(count)
    found = apart(np.abs(places[:, None] - places)[np.triu_indices(count, 1)].astype(float))
    assert farthest(names, found).lead == pytest.approx(1)
    assert "No domain stands out: the variances of '0' lie farthest" in outlier_sentence(names, found, "variances")


def test_domains_of_one_distribution_have_none():
    generator, named = np.random.default_rng(0), 0
    for _ in range(300):
        domains = []
        for _ in range(5):
            samples = torch.from_numpy(generator.normal(size=(50, 4)))
            domains.append(statistics(samples.mean(0), spread=samples.var(0).sum().item() / 50))
        named += farthest("abcde", distances(domains, "gradient")) is not None
    assert named <= 3


def test_the_others_agree():
    assert outlier_sentence(NAMES, apart([1.0, 0.0, 1.0]), "variances") == (
        "'south' is the outlier: its variances differ from those of all others, which agree."
    )


def test_equal_domains_have_no_outlier():
    assert farthest(NAMES, apart([0.0, 0.0, 0.0])) is None


def test_two_domains_have_no_outlier():
    assert farthest(NAMES[:2], apart([1.0])) is None
    assert outlier_sentence(NAMES[:2], apart([1.0]), "variances") == (
        "Of 2 domains none can be told to be the outlier: that takes three."
    )
