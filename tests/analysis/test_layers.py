"""Statistics of deeper layers, against autograd sample by sample, and their bound on memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishr.analysis.head import head_statistics
from fishr.analysis.layers import LayerEstimator, layer_statistics, parameters_of
from fishr.data import Samples
from fishr.errors import ConfigError
from fishr.models import ModelCard, SavedModel, backbone_config, build_model
from oracles import relative_error
from small_models import CLASSES, hessian, risk_of, sample_gradients, small_model, small_samples

NAMES = ["featurizer.3.weight", "featurizer.3.bias"]


def estimator(draws: int = 4, seed: int = 0, memory: int = 64) -> LayerEstimator:
    return LayerEstimator(memory, draws, seed)


@pytest.mark.parametrize("binary", [False, True])
def test_gradients_against_autograd(binary):
    model = small_model(2, binary=binary)
    samples = small_samples(model, 11)
    statistics = layer_statistics(model, NAMES, samples, estimator(), chunk=4)
    gradients = sample_gradients(model, NAMES, samples)
    assert relative_error(statistics.gradient, gradients.mean(0)) < 1e-12
    assert relative_error(statistics.variance, gradients.var(0, unbiased=False)) < 1e-12


def test_the_head_as_a_layer_is_the_head():
    model = small_model()
    samples = small_samples(model, 11)
    expected = head_statistics(model, samples, batch_size=11)
    names = parameters_of(model, "classifier")
    statistics = layer_statistics(model, names, samples, estimator(), chunk=4)
    assert relative_error(statistics.gradient, expected.gradient) < 1e-12
    assert relative_error(statistics.fisher, expected.fisher) < 1e-12
    assert statistics.spreads == pytest.approx({name: expected.spreads[name] for name in statistics.spreads})
    assert list(statistics.spreads) == ["gradient", "variance", "fisher"]
    assert statistics.risk == pytest.approx(expected.risk)
    assert (statistics.accuracy, statistics.samples) == (pytest.approx(expected.accuracy), 11)


def test_the_estimate_of_given_signs():
    model = small_model()
    samples = small_samples(model, 11)
    statistics = layer_statistics(model, NAMES, samples, estimator(draws=3, seed=5), chunk=11)
    generator, whole = torch.Generator().manual_seed(5), hessian(model, NAMES, samples)
    shapes, estimates = [model.get_parameter(name).shape for name in NAMES], []
    for _ in range(3):
        signs = torch.cat([torch.randint(2, shape, generator=generator).flatten() for shape in shapes]).double() * 2 - 1
        estimates.append(signs * (whole @ signs))
    assert relative_error(statistics.hessian, torch.stack(estimates).mean(0)) < 1e-12


def test_many_signs_come_near_the_diagonal_as_far_as_said():
    model = small_model(2, binary=True)
    samples = small_samples(model, 9)
    expected = hessian(model, NAMES, samples).diagonal()
    few, many = (layer_statistics(model, NAMES, samples, estimator(draws=draws), chunk=9) for draws in (20, 2000))
    for found in (few, many):
        assert 0.5 < (found.hessian - expected).norm() / found.hessian.norm() / found.hessian_error < 2
    assert many.hessian_error < 0.2 * few.hessian_error


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("test_resnet", "featurizer.network.conv1"),
        ("test_efficientnet", "featurizer.network.blocks.1"),
        ("test_vit", "featurizer.network.blocks.0.attn.qkv"),
    ],
)
def test_backbones_of_timm(architecture, layer):
    torch.manual_seed(0)
    arguments = {"img_size": 32} if architecture == "test_vit" else {}
    config = backbone_config(architecture, arguments=arguments, weights=None, mean=0.5, std=0.5)
    card = ModelCard(config, (3, 32, 32), CLASSES[:3], False)
    model = SavedModel(*build_model(card.model, card.input_shape, 3), card).double().eval().requires_grad_(False)
    samples = Samples(torch.rand(5, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0]))
    names = parameters_of(model, layer)
    statistics = layer_statistics(model, names, samples, estimator(draws=2), chunk=3)
    gradients = sample_gradients(model, names, samples)
    assert relative_error(statistics.variance, gradients.var(0, unbiased=False)) < 1e-10
    risk, point = risk_of(model, names, samples)
    generator = torch.Generator().manual_seed(0)
    shapes = [model.get_parameter(name).shape for name in names]
    estimates = []
    for _ in range(2):
        signs = torch.cat([torch.randint(2, shape, generator=generator).flatten() for shape in shapes]).double() * 2 - 1
        with sdpa_kernel(SDPBackend.MATH):
            _, product = torch.autograd.functional.hvp(risk, point, signs)
        estimates.append(signs * product)
    assert relative_error(statistics.hessian, torch.stack(estimates).mean(0)) < 1e-10
    assert model.featurizer.channels_last


def test_chunks_make_no_difference():
    model = small_model()
    samples = small_samples(model, 11)
    one, other = (layer_statistics(model, NAMES, samples, estimator(), chunk) for chunk in (11, 3))
    for name in ("gradient", "fisher", "hessian"):
        assert relative_error(getattr(one, name), getattr(other, name)) < 1e-12


def test_a_layer_that_does_nothing():
    """Its Hessian is zero, and so is the error of the estimate."""
    model = small_model()
    with torch.no_grad():
        model.classifier.weight.zero_()
    statistics = layer_statistics(model, ["featurizer.1.weight"], small_samples(model, 9), estimator(), chunk=9)
    assert statistics.gradient.abs().max() == 0
    assert (statistics.hessian.abs().max(), statistics.hessian_error) == (0, 0.0)


def test_names_of_layers():
    model = small_model()
    assert parameters_of(model, "featurizer.3") == NAMES
    assert parameters_of(model, "featurizer.3.bias") == NAMES[1:]
    assert len(parameters_of(model, "featurizer")) == 4
    with pytest.raises(
        ConfigError,
        match=r"^unknown layer 'featuriser\.3'; did you mean 'featurizer\.3'\? "
        r"\(known: classifier, featurizer\.1, featurizer\.3\)$",
    ):
        parameters_of(model, "featuriser.3")
    with pytest.raises(ConfigError, match=r"^unknown layer 'featurizer\.2'"):  # a ReLU
        parameters_of(model, "featurizer.2")


def test_a_bound_that_is_too_tight():
    model = small_model(width=200)
    inputs = small_samples(model, 1).inputs
    with pytest.raises(
        ConfigError,
        match=r"^40,200 weights need at least 7 MiB in all their domains, and the bound is 1 MiB: choose fewer "
        r"layers or domains, or raise the bound$",
    ):
        estimator(memory=1).chunk(model, parameters_of(model, "featurizer.3"), inputs, 3 * 40_200)


def test_more_memory_larger_chunks():
    model = small_model(width=200)
    inputs = small_samples(model, 1).inputs
    chunks = [estimator(memory=memory).chunk(model, NAMES, inputs, 40_200) for memory in (20, 100, 1000)]
    assert chunks == sorted(chunks)
    assert 5 <= chunks[0] <= 40


def test_what_the_network_computes_before_the_layer_counts():
    """The last layer has few weights and keeps nothing of the first ones, whose outputs are large all the same."""
    config = backbone_config("test_resnet", weights=None, mean=0.5, std=0.5)
    card = ModelCard(config, (3, 96, 96), CLASSES[:2], False)
    model = SavedModel(*build_model(card.model, card.input_shape, 2), card).eval().requires_grad_(False)
    chunk = estimator(memory=64).chunk(model, ["classifier.bias"], torch.rand(1, 3, 96, 96), 2)
    largest = 4 * 32 * 48 * 48
    assert chunk <= 64 * 2**20 / largest


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_stays_within_the_bound():
    """400 samples of 90,000 weights: all their gradients at once would take 137 MiB, and as much again for squares."""
    script = """
import torch
from pathlib import Path
torch.set_num_threads(1)
from fishr.analysis.layers import LayerEstimator, layer_statistics, parameters_of
from small_models import small_model, small_samples
model = small_model(width=300).float()
samples = small_samples(model, 400)
samples = samples._replace(inputs=samples.inputs.float())
names = parameters_of(model, "featurizer.3")
estimator = LayerEstimator(memory=64, draws=2, seed=0)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
layer_statistics(model, names, samples.subset(torch.arange(2)), estimator, chunk=1)
before = peak()
chunk = estimator.chunk(model, names, samples.inputs[:1], 90_300)
layer_statistics(model, names, samples, estimator, chunk)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert 5 < float(done.stdout) < 64
