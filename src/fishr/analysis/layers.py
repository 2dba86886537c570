"""Statistics of deeper layers, where no closed form is at hand, within a bound on memory.

Gradients of single samples come from ``torch.func`` (vmap of grad), a chunk of samples at a time; the Hessian's
diagonal is Hutchinson's estimate from products with vectors of random signs,

    D = 1/K Σ_k v_k ∘ H v_k

unbiased, and the better the larger the diagonal is beside the rest of the Hessian's rows (Bekas, Kokiopoulou and Saad,
Applied Numerical Mathematics 57, 2007).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishr.analysis.head import correct, loss_of
from fishr.analysis.statistics import Statistics
from fishr.data.base import Samples, network_input
from fishr.errors import ConfigError
from fishr.functional.residuals import per_sample_losses
from fishr.models.backbone import Backbone
from fishr.models.saved import SavedModel
from fishr.registry import unknown

MIB = 2**20

COPIES_OF_GRADIENTS, COPIES_OF_ACTIVATIONS = 3, 4
"""What a sample of a chunk costs: its gradient, the square and a temporary; activations in forward and double backward
passes."""


@dataclass(frozen=True)
class LayerEstimator:
    """How statistics of layers are estimated.

    Attributes:
        memory: Bound in MiB on what gradients, activations and statistics take.
        draws: K, vectors of random signs.
        seed: Their seed; domains share the signs, so that equal Hessians have equal estimates.
    """

    memory: int
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.memory < 1 or self.draws < 1:
            raise ConfigError(f"memory must be at least 1 MiB and draws at least 1, got {self.memory} and {self.draws}")

    def chunk(self, model: SavedModel, parameters: Sequence[str], inputs: Tensor, num_domains: int) -> int:
        """Samples that may go through the network together.

        Args:
            model: The network.
            parameters: Names of the parameters.
            inputs: One of its inputs, ``[1, ...]``.
            num_domains: Domains whose statistics are held, half by half.

        Raises:
            ConfigError: not even one may.
        """
        weights = sum(model.get_parameter(name).numel() for name in parameters)
        held = (2 * num_domains + 1) * 3 * 8 * weights
        activations = _activation_bytes(model, parameters, inputs)
        sample = 4 * COPIES_OF_GRADIENTS * weights + COPIES_OF_ACTIVATIONS * activations
        if held + sample > self.memory * MIB:
            raise ConfigError(
                f"{weights:,} weights in {num_domains} domains need at least {(held + sample) / MIB:,.0f} MiB, and the "
                f"bound is {self.memory:,} MiB: choose fewer layers or domains, or raise the bound"
            )
        return int((self.memory * MIB - held) // sample)


def parameters_of(model: SavedModel, layer: str) -> list[str]:
    """Names of the parameters of a layer: a module's name, such as ``featurizer.1``, or a parameter's.

    Raises:
        ConfigError: there is no such layer, or it has no parameters.
    """
    names = [name for name, _ in model.named_parameters() if name == layer or name.startswith(f"{layer}.")]
    if not names:
        raise unknown("layer", layer, [name for name, module in model.named_modules() if name and _has_own(module)])
    return names


def layer_statistics(
    model: SavedModel, parameters: Sequence[str], samples: Samples, estimator: LayerEstimator, chunk: int
) -> Statistics:
    """Statistics of some parameters over samples of one domain.

    Args:
        model: The model, in ``eval()`` mode, none of its parameters with ``requires_grad``, as that would keep
            activations of other layers; its predictions must not depend on the batch.
        parameters: Names of the parameters.
        samples: Samples of one domain, with the model's classes as targets.
        estimator: Draws of the Hessian's diagonal and their seed.
        chunk: Samples that go through the network together.
    """
    weights = {name: model.get_parameter(name).detach() for name in parameters}
    size, total = sum(value.numel() for value in weights.values()), len(samples.targets)
    risk, accuracy = 0.0, 0.0
    gradient, fisher, hessian = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    device = model.classifier.weight.device
    per_sample = vmap(grad(partial(_sample_loss, model)), in_dims=(None, 0, 0))
    for batch in torch.split(torch.arange(total), chunk):
        share = len(batch) / total
        inputs, targets = network_input(samples.inputs[batch], device), samples.targets[batch].to(device)
        with torch.no_grad():  # but for the gradients that per_sample takes itself
            with _mapped_over_samples(model):
                gradients = per_sample(weights, inputs, targets)
            gradient += share * _flat({name: value.mean(0) for name, value in gradients.items()})
            fisher += share * _flat({name: value.square_().mean(0) for name, value in gradients.items()})
            del gradients
            logits = model(inputs)
        risk += share * per_sample_losses(loss_of(model), logits, targets).mean().item()
        accuracy += share * correct(logits, targets).double().mean().item()
        hessian += share * _hutchinson(model, weights, inputs, targets, estimator)
    return Statistics(total, risk, accuracy, gradient, fisher, hessian)


@contextmanager
def _mapped_over_samples(model: SavedModel) -> Iterator[None]:
    """The model in a form that vmap takes."""
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    for backbone in backbones:
        backbone.channels_last = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backbone in backbones:
            backbone.channels_last = True


def _sample_loss(model: SavedModel, weights: Mapping[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
    logits = functional_call(model, dict(weights), (inputs.unsqueeze(0),))
    if model.card.binary:
        return F.binary_cross_entropy_with_logits(logits[0, 0], target.to(logits.dtype))
    return F.cross_entropy(logits, target.unsqueeze(0))


def _hutchinson(
    model: SavedModel, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, estimator: LayerEstimator
) -> Tensor:
    """D of the mean loss of a batch, float64 ``[weight]``."""
    variables = {name: value.clone().requires_grad_() for name, value in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that is differentiated twice
        logits = functional_call(model, variables, (inputs,))
        risk = per_sample_losses(loss_of(model), logits, targets).mean()
        gradients = torch.autograd.grad(risk, list(variables.values()), create_graph=True)
    generator = torch.Generator().manual_seed(estimator.seed)
    estimate = torch.zeros(sum(value.numel() for value in weights.values()), dtype=torch.float64)
    for _ in range(estimator.draws):
        signs = [torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1 for value in weights.values()]
        products = torch.autograd.grad(
            gradients, list(variables.values()), signs, retain_graph=True, materialize_grads=True
        )
        shares = [sign * product for sign, product in zip(signs, products, strict=True)]
        estimate += _flat(dict(zip(weights, shares, strict=True))) / estimator.draws
    return estimate


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()]).cpu().double()


def _activation_bytes(model: SavedModel, parameters: Sequence[str], inputs: Tensor) -> int:
    """What the forward pass of one sample keeps for the backward pass to some parameters, without the weights."""
    variables = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in parameters}
    own = {weights.untyped_storage().data_ptr() for weights in (*model.parameters(), *variables.values())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        functional_call(model, variables, (inputs,))
    return sum(kept.values())


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
