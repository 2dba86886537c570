"""Statistics of the head in closed form, against autograd sample by sample."""

import pytest
import torch

from fishr.analysis import head
from fishr.analysis.head import head_statistics
from fishr.analysis.statistics import QUANTITIES
from fishr.errors import DataError
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


def test_batches_make_no_difference():
    model = small_model()
    samples = small_samples(model, 20)
    whole, other = (head_statistics(model, samples, batch_size) for batch_size in (20, 6))
    assert (other.samples, other.accuracy) == (20, pytest.approx(whole.accuracy))
    assert other.risk == pytest.approx(whole.risk, rel=1e-12)
    assert other.spreads == pytest.approx(whole.spreads, rel=1e-12)
    for quantity in QUANTITIES:
        assert relative_error(other.of(quantity), whole.of(quantity)) < 1e-12


@MODELS
def test_spreads_against_every_sample(options):
    model, n = small_model(**options), 9
    samples = small_samples(model, n)
    statistics = head_statistics(model, samples, batch_size=4)
    g = sample_gradients(model, NAMES, samples)
    alone = [hessian(model, NAMES, samples.subset(torch.tensor([index]))) for index in range(n)]
    shares = {
        "gradient": g,
        "fisher": g.square(),
        "variance": g.square() - 2 * g.mean(0) * g,
        "hessian": torch.stack([one.diagonal() for one in alone]),
        "whole_hessian": torch.stack(alone).flatten(1),
    }
    expected = {quantity: (of.var(0).sum() / n).item() for quantity, of in shares.items()}
    assert statistics.spreads == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_spreads_are_what_samples_of_one_domain_differ_by(quantity):
    model = small_model(2, binary=True)
    all_samples = small_samples(model, 200 * 100)
    parts = [
        head_statistics(model, all_samples.subset(torch.arange(100 * index, 100 * index + 100)), 100)
        for index in range(200)
    ]
    values = torch.stack([part.of(quantity).flatten() for part in parts])
    measured = values.var(0).sum().item()
    assert torch.tensor([part.spreads[quantity] for part in parts]).mean().item() == pytest.approx(measured, rel=0.3)


def test_a_loss_that_is_not_finite():
    model = small_model()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(
        DataError, match=r"^the model's loss is not finite: its weights, or the inputs, have values that"
    ):
        head_statistics(model, small_samples(model, 4), batch_size=4)


def test_large_hessians_are_not_formed(monkeypatch):
    model = small_model(3, width=5)  # 3 · (5 + 1) = 18 weights
    samples = small_samples(model, 4)
    monkeypatch.setattr(head, "LARGEST_WHOLE", 17)
    statistics = head_statistics(model, samples, batch_size=4)
    assert statistics.whole_hessian is None
    assert statistics.quantities == QUANTITIES[:4]
    assert "whole_hessian" not in statistics.spreads
    monkeypatch.setattr(head, "LARGEST_WHOLE", 18)
    assert head_statistics(model, samples, batch_size=4).whole_hessian.shape == (18, 18)
