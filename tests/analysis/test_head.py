"""Statistics of the head in closed form, against autograd sample by sample."""

import pytest
import torch

from fishr.analysis import head
from fishr.analysis.head import head_statistics
from fishr.analysis.statistics import QUANTITIES, pooled
from oracles import relative_error
from small_models import hessian, risk_of, sample_gradients, small_model, small_samples

NAMES = ["classifier.weight", "classifier.bias"]
MODELS = pytest.mark.parametrize("options", [{}, {"num_classes": 2}, {"num_classes": 2, "binary": True}], ids=str)


@MODELS
def test_against_autograd(options):
    model = small_model(**options)
    samples = small_samples(model, 17)
    statistics = head_statistics(model, samples, batch_size=5)
    gradients = sample_gradients(model, NAMES, samples)
    assert relative_error(statistics.gradient, gradients.mean(0)) < 1e-12
    assert relative_error(statistics.fisher, gradients.square().mean(0)) < 1e-12
    assert relative_error(statistics.variance, gradients.var(0, unbiased=False)) < 1e-12
    expected = hessian(model, NAMES, samples)
    assert relative_error(statistics.hessian, expected.diagonal()) < 1e-12
    assert relative_error(statistics.whole_hessian, expected) < 1e-12
    risk, point = risk_of(model, NAMES, samples)
    assert statistics.risk == pytest.approx(risk(point).item(), rel=1e-12)
    assert statistics.samples == 17


@MODELS
def test_accuracy(options):
    model = small_model(**options)
    samples = small_samples(model, 40)
    predictions = model.predict_proba(samples.inputs).argmax(1)
    expected = (predictions == samples.targets).double().mean().item()
    assert head_statistics(model, samples, batch_size=7).accuracy == pytest.approx(expected)


def test_batches_and_parts_make_no_difference():
    model = small_model()
    samples = small_samples(model, 20)
    whole = head_statistics(model, samples, batch_size=20)
    parts = [samples.subset(torch.arange(3)), samples.subset(torch.arange(3, 20))]
    for other in (
        head_statistics(model, samples, batch_size=6),
        pooled([head_statistics(model, part, batch_size=20) for part in parts]),
    ):
        assert (other.samples, other.accuracy) == (20, pytest.approx(whole.accuracy))
        assert other.risk == pytest.approx(whole.risk, rel=1e-12)
        assert relative_error(other.whole_hessian, whole.whole_hessian) < 1e-12
        for quantity in QUANTITIES:
            assert relative_error(other.of(quantity), whole.of(quantity)) < 1e-12


def test_large_hessians_are_not_formed(monkeypatch):
    model = small_model(3, width=5)  # 3 · (5 + 1) = 18 weights
    samples = small_samples(model, 4)
    monkeypatch.setattr(head, "LARGEST_WHOLE", 17)
    statistics = head_statistics(model, samples, batch_size=4)
    assert statistics.whole_hessian is None
    assert pooled([statistics, statistics]).whole_hessian is None
    monkeypatch.setattr(head, "LARGEST_WHOLE", 18)
    assert head_statistics(model, samples, batch_size=4).whole_hessian.shape == (18, 18)
