"""Within a training step, and on a batch's way to the device, the host does not wait for an accelerator.

Where there is a GPU, torch itself raises where it waits. Everywhere, a device that computes nothing stands for it
(:mod:`waits`); there nothing may be float64 either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fishr.algorithms import ALGORITHMS, Algorithm
from fishr.data import BatchSampler, DomainBatch, load_dataset
from fishr.functional import variance
from fishr.models import ModelConfig, build_model
from fishr.models.backbone import lay_weights
from fishr.training.averaging import AVERAGES, AverageConfig, make_average
from fishr.training.stacked import Stack
from small_runs import write_pictures
from waits import ACCELERATOR, watched

GPU = torch.device("cuda")
SIZES = (12, 12, 12)
LENGTH, STEPS = 20, (0, 5, 6, 10, 19)
"""Of a run; some of its steps: before, at and after the switch-on, and both turns of what takes turns."""

INPUTS = {
    "vectors": ((6,), ModelConfig("mlp", {"width": 16})),
    "small_images": ((2, 8, 8), ModelConfig("mnist-cnn")),
    "images": ((3, 32, 32), ModelConfig("timm", {"name": "test_resnet", "mean": [0.5] * 3, "std": [0.2] * 3})),
}


@contextmanager
def refused_by_cuda() -> Iterator[None]:
    """Raises where the host would wait for a GPU inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def algorithm_of(name: str, kind: str, device: torch.device, *, num_outputs: int = 3, **changes: Any) -> Algorithm:
    algorithm_class = ALGORITHMS[name]
    shape, model = INPUTS[kind]
    torch.manual_seed(0)
    network = build_model(algorithm_class.model_config(model), shape, num_outputs)
    config = algorithm_class.Config.recommended(kind).updated(changes)
    return algorithm_class(*network, len(SIZES), config, steps=LENGTH).to(device)


def take_steps(
    algorithm: Algorithm, kind: str, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> set[torch.dtype]:
    """Steps within which the host may not wait; on a GPU after some in which it may, since kernels are loaded once."""
    inputs, targets = torch.rand(sum(sizes), *INPUTS[kind][0]), torch.arange(sum(sizes)) % 3
    batch = DomainBatch(inputs, targets, sizes).to(device)
    with watched() if device == ACCELERATOR else nullcontext() as watch:
        optimizers = algorithm.configure_optimizers()
        if device == GPU:
            for step in STEPS:
                algorithm.training_step(batch, step, optimizers)
        with refused_by_cuda() if device == GPU else nullcontext():
            for step in STEPS:
                algorithm.training_step(batch, step, optimizers)
    return set() if watch is None else watch.dtypes


@pytest.fixture(params=["stand-in", "GPU"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "stand-in":
        return ACCELERATOR
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return GPU


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_no_algorithm_waits_on_vectors(name: str, device: torch.device) -> None:
    dtypes = take_steps(algorithm_of(name, "vectors", device), "vectors", device)
    # Which Apple's GPUs have not; CMA has it wherever it is.
    assert torch.float64 not in dtypes or name == "cma"


@pytest.mark.parametrize("name", ["erm", "fishr", "mixup", "mtl", "arm"])
def test_no_algorithm_waits_on_images(name: str, device: torch.device) -> None:
    take_steps(algorithm_of(name, "small_images", device), "small_images", device)


@pytest.mark.parametrize("name", ["erm", "fishr"])
def test_no_backbone_waits(name: str, device: torch.device) -> None:
    algorithm = algorithm_of(name, "images", device)
    lay_weights(algorithm.featurizer, GPU)
    take_steps(algorithm, "images", device)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("erm", {"l2": 0.1}),
        ("irm", {"estimator": "full"}),
        ("vrex", {}),
        ("fishr", {"ema": 0.0}),
        ("fishr", {"ema": 0.0, "variant": "second_moment"}),
        ("fishr", {"variant": "covariance"}),
    ],
    ids=str,
)
def test_stacked_models_do_not_wait(name: str, changes: dict[str, Any], device: torch.device) -> None:
    penalized = {} if name == "erm" else {"strength": None, "reset_optimizer": False, "rescale": True}
    of_each = [algorithm_of(name, "vectors", device, num_outputs=1, **changes, **penalized) for _ in range(2)]
    batch = DomainBatch(torch.rand(12, 6), torch.arange(12) % 2, (4, 4, 4)).to(device)
    stack = Stack(of_each, [batch, batch])
    if device == GPU:
        stack.backward(0)
    with watched() if device == ACCELERATOR else refused_by_cuda():
        for step in STEPS:
            stack.backward(step)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fishr", {"variant": "second_moment"}),
        ("fishr", {"variant": "covariance"}),
        ("fishr", {"strength": None, "ema": 0.0, "rescale": True}),
        ("irm", {"estimator": "full"}),
        ("dann", {"gradient_penalty": 1.0, "discriminator_dropout": 0.5}),
        ("cdann", {"gradient_penalty": 1.0}),
        ("erm", {"dropout": 0.5, "l2": 0.1}),
    ],
    ids=str,
)
def test_no_setting_waits(name: str, changes: dict[str, Any], device: torch.device) -> None:
    take_steps(algorithm_of(name, "vectors", device, **changes), "vectors", device)


@pytest.mark.parametrize("kind", ["vectors", "small_images"])
def test_fishr_on_all_layers_does_not_wait(kind: str, device: torch.device) -> None:
    algorithm = algorithm_of("fishr", kind, device, layers="all")
    algorithm.penalty._verified = device == ACCELERATOR  # once, at the first step, gradients are compared
    take_steps(algorithm, kind, device)


@pytest.mark.parametrize("name", ["fishr", "irm", "mixup", "dann", "causirl-coral"])
def test_domains_of_unequal_sizes_do_not_wait(name: str, device: torch.device) -> None:
    take_steps(algorithm_of(name, "vectors", device), "vectors", device, sizes=(3, 9, 5))


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 5, 4]], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_of_the_variances_nothing_waits(sizes: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Of operators of one's own the stand-in sees but the shapes, so here they are what they are made of."""
    features, residuals = torch.rand(12, 5, device=device, dtype=dtype), torch.rand(12, 2, device=device)
    counts = torch.stack([residuals.new_full((), size) for size in sizes])
    forward, backward = variance._head_variances._init_fn, variance._head_variances_backward._init_fn
    with watched() if device == ACCELERATOR else refused_by_cuda():
        variances, means = forward(features, residuals, sizes, counts, True, True, False)
        of_features, of_residuals = backward(variances, features, residuals, means, sizes, counts, True, False)
    assert (of_features.shape, of_residuals.shape) == (features.shape, residuals.shape)


@pytest.mark.parametrize("name", list(AVERAGES))
def test_averaging_weights_does_not_wait(name: str, device: torch.device) -> None:
    network = algorithm_of("erm", "vectors", device)
    average = make_average(AverageConfig(name, {"start": 1} if name == "sma" else {}))
    with watched() if device == ACCELERATOR else refused_by_cuda():
        for step in range(1, 4):
            average.update(network.state_dict(), step)


# The way to the device


def test_a_batch_of_images_is_finished_on_the_device(device: torch.device, sampler_for: Callable[..., Any]) -> None:
    sampler = sampler_for(device)
    sampler.batch(0).to(device)
    batch = sampler.batch(1)
    assert (batch.inputs.dtype, batch.inputs.device.type) == (torch.uint8, "cpu")
    with watched() if device == ACCELERATOR else refused_by_cuda():
        there = batch.to(device)
        domains = there.domains
    assert there.inputs.device.type == there.targets.device.type == domains.device.type == device.type
    assert there.inputs.dtype == torch.float32
    assert there.colors is None


@pytest.fixture
def sampler_for(tmp_path: Path) -> Callable[[torch.device], BatchSampler]:
    dataset = load_dataset(write_pictures(tmp_path / "pictures"), image_size=16, cache="none")
    samples = [dataset.domains[name] for name in ("lab", "shop")]
    return lambda device: BatchSampler(samples, 4, seed=0, device=device)


# The watch itself


class _WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.ones(grad.shape).to(grad.device)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda value: value.sum().item(),
    "float": lambda value: float(value.sum().detach()),
    "if": lambda value: bool((value > 0).all()),
    "tolist": lambda value: value.tolist(),
    "cpu": lambda value: value.cpu(),
    "nonzero": lambda value: value.nonzero(),
    "index by a mask": lambda value: value[value > 0],
    "index from the host": lambda value: value[torch.tensor([0, 1])],
    "copy from the host": lambda value: torch.ones(2).to(value.device),
    "copy into": lambda value: torch.empty_like(value).copy_(torch.ones(2)),
    "number from the host": lambda value: torch.tensor(1.0).to(value.device),
    "new tensor": lambda value: value.new_tensor([1.0, 2.0]),
    "tensor": lambda value: torch.tensor([1.0, 2.0], device=value.device),
    "bincount": lambda value: torch.bincount(value.long()),
    "unique": lambda value: torch.unique(value),
    "covariance": lambda value: torch.cov(torch.stack([value, value])),
    "in the backward pass": lambda value: _WaitsInBackward.apply(value).sum().backward(),
}

WAITS_NOT: dict[str, Callable[[Tensor], object]] = {
    "a number as an argument": lambda value: value * torch.tensor(2.0),
    "fill": lambda value: value.new_full((2,), 1.0),
    "where": lambda value: torch.where(value > 0, value, 0.0),
    "copy said to be non-blocking": lambda value: torch.ones(2).to(value.device, non_blocking=True),
    "index": lambda value: value[torch.randperm(2, device=value.device)],
    "backward": lambda value: value.square().sum().backward(),
}


def leaf(device: torch.device) -> Tensor:
    return torch.ones(2).to(device).requires_grad_()


@pytest.mark.parametrize("name", list(WAITS))
def test_the_watch_sees_what_waits(name: str, device: torch.device) -> None:
    value = leaf(device)
    with (
        pytest.raises((AssertionError, NotImplementedError, RuntimeError)),
        watched() if device == ACCELERATOR else refused_by_cuda(),
    ):
        WAITS[name](value)


@pytest.mark.parametrize("name", list(WAITS_NOT))
def test_the_watch_lets_pass_what_does_not_wait(name: str, device: torch.device) -> None:
    value = leaf(device)
    with watched() if device == ACCELERATOR else refused_by_cuda():
        WAITS_NOT[name](value)
