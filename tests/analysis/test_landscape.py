"""Risks along a line between networks, and in a plane through one."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fishr.analysis import landscape
from fishr.analysis.landscape import LINE, PLANE, are_comparable, line_between, plane_around
from small_models import risk_of, small_model, small_samples


def risk(model, samples) -> float:
    of, point = risk_of(model, ["classifier.bias"], samples)
    return of(point).item()


@pytest.fixture
def domains():
    return {name: small_samples(small_model(), 12, seed, shift=seed) for seed, name in enumerate(("north", "south"))}


def test_the_line_runs_from_one_network_to_the_other(domains):
    first, second = small_model(seed=0), small_model(seed=1)
    line = line_between(first, second, domains, batch_size=5)
    middle = deepcopy(first)
    middle.load_state_dict(
        {name: (value + second.state_dict()[name]) / 2 for name, value in first.state_dict().items()}
    )
    for name, samples in domains.items():
        for position, model in ((0.0, first), (1.0, second), (0.5, middle)):
            index = np.flatnonzero(np.isclose(LINE, position))[0]
            assert line.risks[name][index] == pytest.approx(risk(model, samples), rel=1e-5)
    assert line.positions.tolist() == LINE.tolist()


def test_running_statistics_move_and_counts_stay(domains):
    first, second = (small_model(seed=seed) for seed in (0, 1))
    for model, mean in ((first, 0.0), (second, 2.0)):
        norm = torch.nn.BatchNorm1d(6).double().eval()
        norm.running_mean.fill_(mean)
        model.featurizer.insert(1, norm)
    line = line_between(first, second, domains, batch_size=5)
    second.featurizer[1].num_batches_tracked.fill_(10)
    assert line_between(first, second, domains, batch_size=5).risks["north"].tolist() == line.risks["north"].tolist()
    end = np.flatnonzero(np.isclose(LINE, 1.0))[0]
    assert line.risks["north"][end] == pytest.approx(risk(second, domains["north"]), rel=1e-5)


@pytest.mark.parametrize("other", [{"width": 6}, {"depth": 1}, {"num_classes": 2}])
def test_networks_that_no_line_joins(other):
    assert not are_comparable(small_model(), small_model(**other))
    assert are_comparable(small_model(seed=0), small_model(seed=1))


def test_no_line_joins_networks_with_their_classes_in_another_order():
    one, other = small_model(), small_model()
    other.card = replace(other.card, classes=("b", "a", "c"))
    assert not are_comparable(one, other)


def test_variances_do_not_become_negative(domains):
    first, second = (small_model(seed=seed) for seed in (0, 1))
    for model, variance in ((first, 1.0), (second, 4.0)):
        norm = torch.nn.BatchNorm1d(6).double().eval()
        norm.running_var.fill_(variance)
        model.featurizer.insert(1, norm)
    assert np.isfinite(line_between(first, second, domains, batch_size=5).risks["north"]).all()


def plane_of(model, domains, seed=0):
    return plane_around(model, domains, torch.Generator().manual_seed(seed), batch_size=5)


def test_the_network_is_in_the_middle_of_its_plane(domains):
    model = small_model()
    plane = plane_of(model, domains)
    assert plane.positions.tolist() == PLANE.tolist()
    for name, samples in domains.items():
        assert plane.risks[name].shape == (len(PLANE), len(PLANE))
        assert plane.risks[name][5, 5] == pytest.approx(risk(model, samples), rel=1e-5)


def test_the_first_direction_is_that_of_the_rows(domains):
    model = small_model()
    plane = plane_of(model, domains)
    generator = torch.Generator().manual_seed(0)
    first, second = (landscape._filter_normalised(model, generator) for _ in range(2))
    moved = deepcopy(model)
    with torch.no_grad():
        for name, direction in first.items():
            moved.get_parameter(name).add_(PLANE[8] * direction)
        assert plane.risks["north"][8, 5] == pytest.approx(risk(moved, domains["north"]), rel=1e-5)
        for name, direction in second.items():
            moved.get_parameter(name).add_(PLANE[1] * direction)
        assert plane.risks["north"][8, 1] == pytest.approx(risk(moved, domains["north"]), rel=1e-5)


def test_planes_depend_on_the_seed_alone(domains):
    model = small_model()
    one, again, other = (plane_of(model, domains, seed).risks["north"] for seed in (0, 0, 1))
    assert one.tolist() == again.tolist()
    assert one.tolist() != other.tolist()


def test_directions_have_the_length_of_each_filter():
    model = small_model()
    direction = landscape._filter_normalised(model, torch.Generator().manual_seed(0))
    assert list(direction) == ["featurizer.1.weight", "featurizer.3.weight", "classifier.weight"]
    for name, value in direction.items():
        torch.testing.assert_close(value.double().norm(dim=1), model.get_parameter(name).norm(dim=1), rtol=1e-6, atol=0)
