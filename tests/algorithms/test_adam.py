import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from fishr.algorithms import ALGORITHMS, ERM
from fishr.algorithms.adam import FusedAdam
from fishr.data import DomainBatch
from fishr.models import ModelConfig, build_model
from fishr.training.checkpoint import Progress, load_checkpoint, newest_whole_checkpoint, save_checkpoint

SHAPES = ((4, 3, 3, 3), (4, 3, 1, 1), (5, 4), (5,), ())


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def take_steps(optimizer: Adam, begin: int = 0, end: int = 5, lay=lambda value: value) -> None:
    for step in range(begin, end):
        for weight, gradient in zip(optimizer.param_groups[0]["params"], gradients(step), strict=True):
            weight.grad = lay(gradient)
        optimizer.step()


def laid_channels_last(values: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(channels_last(value.detach())) for value in values]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_it_is_adam(weight_decay: float, betas: tuple[float, float]) -> None:
    plain, fused = weights(), weights()
    take_steps(Adam(plain, 0.1, betas, weight_decay=weight_decay))
    take_steps(FusedAdam(fused, 0.1, betas, weight_decay))
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("gradients_last", [False, True])
def test_gradients_may_lie_otherwise_than_weights(weights_last: bool, gradients_last: bool) -> None:
    expected = weights()
    take_steps(Adam(expected, 0.1))
    of_layout = laid_channels_last(weights()) if weights_last else weights()
    take_steps(FusedAdam(of_layout, 0.1), lay=channels_last if gradients_last else torch.Tensor.contiguous)
    torch.testing.assert_close(of_layout, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("saved_last", [False, True])
@pytest.mark.parametrize("loaded_last", [False, True])
def test_moments_may_come_from_weights_that_lie_otherwise(saved_last: bool, loaded_last: bool) -> None:
    unbroken = weights()
    take_steps(FusedAdam(unbroken, 0.1))
    before = laid_channels_last(weights()) if saved_last else weights()
    optimizer = FusedAdam(before, 0.1)
    take_steps(optimizer, end=3)
    after = laid_channels_last(before) if loaded_last else [nn.Parameter(value.detach().clone()) for value in before]
    continued = FusedAdam(after, 0.1)
    continued.load_state_dict(optimizer.state_dict())
    take_steps(continued, begin=3)
    torch.testing.assert_close(after, unbroken, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(Adam, FusedAdam), (FusedAdam, Adam)])
def test_a_state_of_the_other_kind_is_continued(first: type[Adam], second: type[Adam]) -> None:
    unbroken = weights()
    take_steps(Adam(unbroken, 0.1))
    values = weights()
    optimizer = first(values, 0.1)
    take_steps(optimizer, end=3)
    continued = second(values, 0.1)
    continued.load_state_dict(optimizer.state_dict())
    take_steps(continued, begin=3)
    torch.testing.assert_close(values, unbroken, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_all_algorithms_take_it(name: str) -> None:
    algorithm_class = ALGORITHMS[name]
    network = build_model(algorithm_class.model_config(ModelConfig("mlp", {"width": 4})), (6,), 3)
    for optimizer in algorithm_class(*network, 3, steps=10).configure_optimizers().values():
        assert isinstance(optimizer, FusedAdam)
        assert all(group["fused"] for group in optimizer.param_groups)


class Convolution(nn.Sequential):
    """A featurizer whose weights are laid out channels last, as on a GPU."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def of_images(laid_last: bool) -> ERM:
    torch.manual_seed(0)
    algorithm = ERM(Convolution(), nn.Linear(4, 2), 2)
    if laid_last:
        algorithm.featurizer.to(memory_format=torch.channels_last)
    return algorithm


def train(algorithm: ERM, optimizers: dict[str, Adam], begin: int, end: int) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = DomainBatch(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 2, (4, 4))
    for step in range(begin, end):
        algorithm.training_step(batch, step, optimizers)


@pytest.mark.parametrize("saved_last", [False, True])
@pytest.mark.parametrize("loaded_last", [False, True])
def test_a_checkpoint_fits_weights_of_either_layout(saved_last: bool, loaded_last: bool, tmp_path) -> None:
    unbroken = of_images(laid_last=False)
    train(unbroken, unbroken.configure_optimizers(), 0, 6)
    before = of_images(saved_last)
    optimizers = before.configure_optimizers()
    train(before, optimizers, 0, 3)
    save_checkpoint(tmp_path, {"algorithm": before}, optimizers, Progress(3, {}, 0))
    after = of_images(loaded_last)
    optimizers = after.configure_optimizers()
    load_checkpoint(newest_whole_checkpoint(tmp_path), {"algorithm": after}, optimizers)
    train(after, optimizers, 3, 6)
    weight = after.featurizer[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == loaded_last
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, unbroken.state_dict()[name], atol=1e-6, rtol=1e-5)
