"""Layers of a network: some weights each, and the one call of a module that they act in.

The gradient of a sample's loss with respect to them follows from the sample's input of that call and the derivative of
its loss with respect to the output, by a rule for linear layers and convolutions, by ``torch.func`` for all others.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishr.errors import ConfigError
from fishr.functional.sample_gradients import Rule, convolution_sample_gradients, linear_sample_gradients
from fishr.nn.recording import Call

COPIES_OF_GRADIENTS, COPIES_OF_ACTIVATIONS = 3, 2
"""What a sample of a chunk costs: its gradient, what is differentiated of it and a temporary; what the layer takes and
the modules in it return, and the gradients of that."""


@dataclass(frozen=True)
class Layer:
    """Some weights and the call that they act in.

    Attributes:
        name: Of the module that was called.
        module: The module.
        call: Its call.
        weights: Names of the weights in the module.
        activations: Numbers that the module takes and those in it return, for all samples.
    """

    name: str
    module: nn.Module
    call: Call
    weights: tuple[str, ...]
    activations: int

    @property
    def full_names(self) -> list[str]:
        """Names of the weights in the network."""
        return [f"{self.name}.{weight}" if self.name else weight for weight in self.weights]

    @property
    def is_outer_product(self) -> bool:
        """Whether the gradient of a sample is the outer product of two vectors."""
        return self._is(nn.Linear) and self.call.inputs.ndim == 2

    def rule(self) -> tuple[Rule, tuple[Tensor, ...]]:
        """How gradients of single samples follow from input and output gradients, and the parameters that it takes."""
        if self._is(nn.Linear):
            return partial(_chosen, self.weights, linear_sample_gradients), ()
        if self._is(nn.Conv1d, nn.Conv2d, nn.Conv3d):
            module = cast(nn.Conv2d, self.module)
            batched = self.call.inputs.ndim == module.weight.ndim
            if batched and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                of_both = partial(
                    convolution_sample_gradients,
                    weight_shape=module.weight.shape,
                    stride=module.stride,
                    padding=module.padding,
                    dilation=module.dilation,
                    groups=module.groups,
                )
                return partial(_chosen, self.weights, of_both), ()
        trainable = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        return partial(_by_torch_func, self, tuple(trainable)), tuple(trainable.values())

    def chunk(self, memory: int) -> int:
        """Samples whose gradients fit into so many bytes, at least one."""
        weights = sum(self.module.get_parameter(name).numel() for name in self.weights)
        activations = self.activations // len(self.call.inputs)
        numbers = COPIES_OF_GRADIENTS * weights + COPIES_OF_ACTIVATIONS * activations
        return max(1, memory // (numbers * max(4, self.call.inputs.element_size())))

    def _is(self, *kinds: type[nn.Module]) -> bool:
        # Exact types with weights of their own: what is derived from them may compute something else.
        return type(self.module) in kinds and set(self.weights) <= {"weight", "bias"}


def _chosen(weights: tuple[str, ...], rule: Rule, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients of those of weight and bias that are named."""
    of_both = dict(zip(("weight", "bias"), rule(inputs, output_gradients), strict=True))
    return tuple(of_both[name] for name in weights)


def _by_torch_func(
    layer: Layer, names: tuple[str, ...], inputs: Tensor, output_gradients: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a layer's weights; ``parameters`` are all trainable weights of its module, by their ``names``."""
    trainable = dict(zip(names, parameters, strict=True))

    def of_sample(own: dict[str, Tensor], inputs: Tensor) -> Tensor:
        arguments = (inputs.unsqueeze(0), *layer.call.others)
        returned: Tensor = functional_call(layer.module, {**trainable, **own}, arguments, dict(layer.call.keywords))
        return returned.squeeze(0)

    create_graph = torch.is_grad_enabled()
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only attention that is differentiated twice
            own = {name: trainable[name].expand(len(inputs), *trainable[name].shape) for name in layer.weights}
            outputs = vmap(of_sample)(own, inputs)
            return torch.autograd.grad(
                outputs, tuple(own.values()), output_gradients, create_graph=create_graph, materialize_grads=True
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"torch.func cannot take the gradients of single samples with respect to "
            f"{', '.join(map(repr, layer.full_names))} through the {type(layer.module).__name__} {layer.name!r}: "
            f"{' '.join(str(error).split())[:200]}; freeze these weights with requires_grad_(False), or leave them out "
            "of the network whose gradients are compared"
        ) from error


def layers_of(
    network: nn.Module, weights: Iterable[str], calls: Mapping[str, list[Call | None]], num_samples: int
) -> list[Layer]:
    """The layers of a network that some weights belong to.

    A weight acts in the call of its own module where that was called once, with one tensor ``[sample, ...]``. Else, or
    if it belongs to several modules, in that of the next module around it for which this holds.

    Args:
        network: The network.
        weights: Names of weights; those that are frozen are in no layer.
        calls: What the modules of the network were called with.
        num_samples: Samples in the batch.

    Raises:
        ConfigError: there is no such module.
    """
    paths: dict[nn.Parameter, list[list[str]]] = defaultdict(list)
    for name, weight in network.named_parameters(remove_duplicate=False):
        paths[weight].append(name.split(".")[:-1])
    found: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        weight = network.get_parameter(name)
        if weight.requires_grad:
            module = _module_of(name, _common(paths[weight]), calls, num_samples)
            found[module].append(name.removeprefix(f"{module}."))
    return [_layer(network, name, tuple(of_module), calls) for name, of_module in found.items()]


def _layer(network: nn.Module, name: str, weights: tuple[str, ...], calls: Mapping[str, list[Call | None]]) -> Layer:
    module = network.get_submodule(name)
    call = cast(Call, calls[name][0])
    inside = [each for inner, _ in module.named_modules(prefix=name) for each in calls.get(inner, ())]
    activations = call.inputs.numel() + sum(each.shape.numel() for each in inside if each is not None)
    return Layer(name, module, call, weights, activations)


def _common(paths: Sequence[list[str]]) -> list[str]:
    """What all paths begin with."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _module_of(weight: str, path: list[str], calls: Mapping[str, list[Call | None]], num_samples: int) -> str:
    """Name of the module whose call a weight acts in, the innermost on the path to its own module."""
    for length in range(len(path), -1, -1):
        name = ".".join(path[:length])
        if [call is not None and call.is_of(num_samples) for call in calls[name]] == [True]:
            return name
    own = ".".join(path)
    raise ConfigError(
        f"the gradients of single samples with respect to {weight!r} cannot be told: {own!r} was called "
        f"{len(calls[own])} times, and neither it nor a module around it was called once with one tensor of "
        f"[{num_samples}, ...], the samples, and returned one; run the whole batch through the network in one call, or "
        "freeze this weight with requires_grad_(False)"
    )
