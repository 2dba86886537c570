"""RSC's mask on a case computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from fishr.algorithms import RSC
from fishr.algorithms.rsc import _largest


def rsc(weight: list[list[float]], **settings: float) -> RSC:
    head = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(weight))
    return RSC(nn.Identity(), head, 1, RSC.Config(**settings))


def test_muted_are_the_features_of_the_largest_slope_in_the_samples_that_lose_most() -> None:
    # The slope of a class's logit is its row. Of three features each sample may lose one: the third of class 0, the
    # first of class 1.
    algorithm = rsc([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]], feature_drop=1 / 3, batch_drop=0.5)
    features = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    targets = torch.tensor([0, 0, 1])
    # Class 0 rests on the third feature: the first sample loses by muting it, the second, which has none, does not;
    # the third sample loses its class 1 by the first feature.
    assert algorithm.mask(features, targets).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


def test_a_single_logit_points_to_the_class() -> None:
    """Towards class 0 the slope of the logit is reversed."""
    algorithm = rsc([[2.0, -1.0]], feature_drop=0.5, batch_drop=1.0)
    features = torch.ones(2, 2)
    assert algorithm.mask(features, torch.tensor([1, 0])).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 4, 7, 19])
def test_the_largest_share_is_numpys_percentile(size: int, share: float) -> None:
    values = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    # Rounded down by an ulp where the percentile falls on a value, which numpy may miss either way.
    threshold = np.percentile(values.numpy(), 100 * (1 - share)) - 1e-12
    assert _largest(values, share).tolist() == (values.numpy() >= threshold).tolist()


def test_no_feature_of_other_samples_is_touched() -> None:
    algorithm = rsc([[1.0, 2.0], [0.0, 1.0]], feature_drop=0.0, batch_drop=0.0)
    features = torch.tensor([[1.0, 1.0], [2.0, -1.0], [0.5, 3.0]])
    # A share of zero still mutes the very largest, as a percentile of 100 does.
    assert (algorithm.mask(features, torch.tensor([0, 1, 0])) == 0).sum() == 1
