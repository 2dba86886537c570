import pytest
import torch
from fishr_example.mean_matching import MeanMatching
from fishr_example.two_moons import two_moons
from torch import nn

from fishr.data import DomainBatch
from fishr.testing import check_algorithm, check_dataset


def test_the_algorithm_keeps_the_contract():
    check_algorithm(MeanMatching)


def test_the_dataset_keeps_the_contract():
    check_dataset(two_moons)


def test_the_penalty_by_hand():
    """Means (1, 0) and (3, 4), their mean (2, 2): each lies at a squared distance of 1 + 4."""
    algorithm = MeanMatching(nn.Identity(), nn.Linear(2, 3), num_domains=2, steps=10)
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
    _, penalty = algorithm.risk_and_penalty(features, DomainBatch(features, torch.tensor([0, 1, 2]), sizes=(2, 1)))
    assert penalty.item() == pytest.approx(10.0)


def test_moons_move_from_domain_to_domain():
    dataset = two_moons(seed=3)
    for index, (inputs, targets) in enumerate(dataset.domains.values()):
        moved = inputs - torch.tensor([0.5 * index, 0.0])
        radii = (moved - torch.tensor([[0.0, 0.0], [1.0, 0.5]])[targets]).norm(dim=1)
        assert radii.mean() == pytest.approx(1.0, abs=0.03)
        assert radii.std() == pytest.approx(0.1, abs=0.02)
    assert not torch.equal(two_moons(seed=4).domains["left"].inputs, dataset.domains["left"].inputs)
