"""Small models and domains that tests of analyses share."""

import torch
from torch import Tensor, nn

from fishr.data import Samples
from fishr.models import ModelCard, ModelConfig, SavedModel, build_model

CLASSES = ("a", "b", "c", "d")


def small_model(
    num_classes: int = 3, *, binary: bool = False, width: int = 5, depth: int = 2, seed: int = 0
) -> SavedModel:
    """An MLP for inputs of 6 numbers, in float64."""
    card = ModelCard(ModelConfig("mlp", {"width": width, "depth": depth}), (6,), CLASSES[:num_classes], binary)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
    return model.double().eval()


def small_samples(model: SavedModel, size: int, seed: int = 0, shift: float = 0.0) -> Samples:
    """Random samples of one domain."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64) + shift
    return Samples(inputs, torch.randint(len(model.card.classes), (size,), generator=generator))


def risk_of(model: SavedModel, names: list[str], samples: Samples):
    """The mean loss as a function of some parameters, flattened one after the other; and where they are."""
    shapes = [model.get_parameter(name).shape for name in names]
    point = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def risk(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        weights = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(model, weights, (samples.inputs,))
        if model.card.binary:
            return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], samples.targets.double())
        return nn.functional.cross_entropy(logits, samples.targets)

    return risk, point


def sample_gradients(model: SavedModel, names: list[str], samples: Samples) -> Tensor:
    """The gradient of the loss of each sample, one after the other, ``[sample, weight]``: slow, obviously right."""
    gradients = []
    for index in range(len(samples.targets)):
        risk, point = risk_of(model, names, samples.subset(torch.tensor([index])))
        point = point.requires_grad_()
        gradients.append(torch.autograd.grad(risk(point), point)[0])
    return torch.stack(gradients)


def hessian(model: SavedModel, names: list[str], samples: Samples) -> Tensor:
    """The Hessian of the mean loss, ``[weight, weight]``."""
    risk, point = risk_of(model, names, samples)
    return torch.autograd.functional.hessian(risk, point)
