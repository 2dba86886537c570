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
from fishr.analysis.statistics import Quantity, Statistics, spread, variance_spread
from fishr.data.base import Samples, network_input
from fishr.errors import ConfigError
from fishr.functional.residuals import per_sample_losses
from fishr.models.backbone import Backbone
from fishr.models.saved import SavedModel
from fishr.registry import unknown

MIB = 2**20

COPIES_OF_GRADIENTS, COPIES_OF_ACTIVATIONS, COPIES_OF_OUTPUTS = 4, 4, 3
"""What a sample of a chunk costs: its gradient, powers of it and a temporary; what is kept for backward passes, the
first and the second; the largest output of a module, with its input and a temporary."""

STORED_QUANTITIES = 3
"""Float64 numbers that are held of a weight in a domain."""


@dataclass(frozen=True)
class LayerEstimator:
    """How statistics of layers are estimated.

    Attributes:
        memory: Bound in MiB on what gradients, activations and statistics take.
        draws: K, vectors of random signs, at least 2.
        seed: Their seed; domains share the signs, so that equal Hessians have equal estimates.
    """

    memory: int
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.memory < 1 or self.draws < 2:
            raise ConfigError(f"memory must be at least 1 MiB and draws at least 2, got {self.memory} and {self.draws}")

    def chunk(self, model: SavedModel, parameters: Sequence[str], inputs: Tensor, held: int) -> int:
        """Samples that may go through the network together.

        Args:
            model: The network.
            parameters: Names of the parameters.
            inputs: One of its inputs, ``[1, ...]``.
            held: Weights whose statistics are held meanwhile, counted for each domain, layer and model.

        Raises:
            ConfigError: not even one may.
        """
        weights = sum(model.get_parameter(name).numel() for name in parameters)
        fixed = 8 * (STORED_QUANTITIES * held + (STORED_QUANTITIES + 2 * self.draws) * weights)
        kept, largest = _activation_bytes(model, parameters, inputs)
        sample = 4 * COPIES_OF_GRADIENTS * weights + COPIES_OF_ACTIVATIONS * kept + COPIES_OF_OUTPUTS * largest
        if fixed + sample > self.memory * MIB:
            raise ConfigError(
                f"{weights:,} weights need at least {(fixed + sample) / MIB:,.0f} MiB in all their domains, and the "
                f"bound is {self.memory:,} MiB: choose fewer layers or domains, or raise the bound"
            )
        return int((self.memory * MIB - fixed) // sample)


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
        samples: At least 2 samples of one domain, with the model's classes as targets.
        estimator: Draws of the Hessian's diagonal and their seed.
        chunk: Samples that go through the network together.

    Raises:
        ConfigError: torch.func cannot take gradients of single samples through this network.
    """
    weights = {name: model.get_parameter(name).detach() for name in parameters}
    size, n = sum(value.numel() for value in weights.values()), len(samples.targets)
    risk, accuracy, fourth, square = 0.0, 0.0, 0.0, 0.0
    gradient, fisher, third = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    estimates = torch.zeros(estimator.draws, size, dtype=torch.float64)
    device = model.classifier.weight.device
    for batch in torch.split(torch.arange(n), chunk):
        share = len(batch) / n
        inputs, targets = network_input(samples.inputs[batch], device), samples.targets[batch].to(device)
        gradients = _sample_gradients(model, weights, inputs, targets)
        gradient += share * _flat([value.mean(0) for value in gradients])
        third += share * _flat([torch.linalg.vecdot(value, value.square(), dim=0) / len(batch) for value in gradients])
        for value in gradients:
            value.square_()
        fisher += share * _flat([value.mean(0) for value in gradients])
        square += share * sum(value.sum().item() for value in gradients) / len(batch)
        fourth += share * sum(value.square_().sum().item() for value in gradients) / len(batch)
        del gradients
        with torch.no_grad():
            logits = model(inputs)
        risk += share * per_sample_losses(loss_of(model), logits, targets).mean().item()
        accuracy += share * correct(logits, targets).cpu().double().mean().item()
        for draw, estimate in enumerate(_hutchinson(model, weights, inputs, targets, estimator)):
            estimates[draw] += share * estimate
    hessian = estimates.mean(0)
    norm = hessian.norm().item()
    error = (estimates.var(0).sum() / estimator.draws).sqrt().item() / norm if norm > 0 else 0.0
    spreads: dict[Quantity, float] = {
        "gradient": spread(square, gradient, n),
        "variance": variance_spread(fourth, third, fisher, gradient, n),
        "fisher": spread(fourth, fisher, n),
    }
    return Statistics(n, risk, accuracy, gradient, fisher, hessian, spreads, hessian_error=error)


def _sample_gradients(
    model: SavedModel, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """Of each parameter the gradients of all samples, ``[sample, ...]``."""
    per_sample = vmap(grad(partial(_sample_loss, model)), in_dims=(None, 0, 0))
    try:
        with torch.no_grad(), _mapped_over_samples(model):  # but for the gradients that it takes itself
            return list(per_sample(dict(weights), inputs, targets).values())
    except RuntimeError as error:
        raise ConfigError(
            "torch.func cannot take the gradients of single samples through this network: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


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
) -> Iterator[Tensor]:
    """v_k ∘ H v_k of the mean loss of a batch for each draw, float64 ``[weight]``."""
    variables = [value.clone().requires_grad_() for value in weights.values()]
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that is differentiated twice
        logits = functional_call(model, dict(zip(weights, variables, strict=True)), (inputs,))
        risk = per_sample_losses(loss_of(model), logits, targets).mean()
        gradients = torch.autograd.grad(risk, variables, create_graph=True)
    generator = torch.Generator().manual_seed(estimator.seed)
    for _ in range(estimator.draws):
        signs = [torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1 for value in variables]
        products = torch.autograd.grad(gradients, variables, signs, retain_graph=True, materialize_grads=True)
        yield _flat([sign * product for sign, product in zip(signs, products, strict=True)])


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values]).cpu().double()


def _activation_bytes(model: SavedModel, parameters: Sequence[str], inputs: Tensor) -> tuple[int, int]:
    """Of one sample: what its forward pass keeps for the backward pass to some parameters, and its largest output."""
    variables = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in parameters}
    own = {weights.untyped_storage().data_ptr() for weights in (*model.parameters(), *variables.values())}
    kept: dict[int, int] = {}
    outputs = [4 * inputs.numel()]

    def note_kept(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_output(module: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.nbytes)

    hooks = [module.register_forward_hook(note_output) for module in model.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note_kept, lambda tensor: tensor):
            functional_call(model, variables, (inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(kept.values()), max(outputs)


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
