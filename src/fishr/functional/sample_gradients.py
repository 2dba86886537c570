"""Gradient variances of layers whose per-sample gradients are no single outer product, in chunks of samples.

For sample i let a_i be the input of a layer, y_i its output and r_i = ∂ℓ_i/∂y_i. The gradient g_i of ℓ_i with respect
to the layer's weights is a function of a_i and r_i, its rule. A linear layer on one vector for each sample has
g_i = r_i ⊗ a_i, and moments in closed form (:mod:`fishr.functional.variance`). In other layers g_i is a sum over tokens
or pixels t,

    linear: g_i = Σ_t r_it ⊗ a_it        convolution: g_i[u] = Σ_t r_it ⊗ a_i,t+u for an offset u in the kernel

whose square does not factorise. There the g_i of a chunk of samples are made, summed and dropped,

    m_e = 1/n_e Σ_i g_i        s_e = 1/n_e Σ_i g_i∘g_i        v_e = s_e − m_e∘m_e

and made again in the backward pass, where ∂L/∂g_i = 2/n_e (g_i − m_e)∘∂L/∂v_e, so that no more of them exist at once
than a chunk has.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fishr.functional.domains import DomainLayout

Rule = Callable[..., tuple[Tensor, ...]]
"""``(inputs, output_gradients, *parameters)`` of some samples to the gradients ``[sample, ...]`` of one weight tensor
or more, differentiable; ``parameters`` are what they depend on besides."""


def linear_sample_gradients(inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a linear layer's weight ``[sample, output, input]`` and bias ``[sample, output]``.

    Args:
        inputs: ``[sample, ..., input]``; what lies between are tokens, if any, over which gradients are summed.
        output_gradients: ``[sample, ..., output]``.
    """
    tokens, gradients = (values.reshape(len(values), -1, values.shape[-1]) for values in (inputs, output_gradients))
    return torch.bmm(gradients.mT, tokens), gradients.sum(1)


def convolution_sample_gradients(
    inputs: Tensor,
    output_gradients: Tensor,
    weight_shape: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's weight ``[sample, *weight_shape]`` and bias ``[sample, output channel]``.

    The gradient of a convolution's weight is a convolution of its input with its output gradient; those of several
    samples are one grouped convolution.

    Args:
        inputs: ``[sample, input channel, *space]``, space of one to three dimensions, padded with zeros.
        output_gradients: ``[sample, output channel, *space]``.
        weight_shape: ``(output channel, input channel / groups, *kernel)``.
        stride: As the convolution's, like the rest.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
    """
    num_samples, num_outputs = output_gradients.shape[:2]
    weight_gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[inputs.ndim - 3]
    gradients: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
        inputs.flatten(0, 1).unsqueeze(0),
        (num_samples * num_outputs, *weight_shape[1:]),
        output_gradients.flatten(0, 1).unsqueeze(0),
        stride,
        padding,
        dilation,
        num_samples * groups,
    )
    return gradients.reshape(num_samples, *weight_shape), output_gradients.flatten(2).sum(2)


def chunked_gradient_variances(
    rule: Rule,
    inputs: Tensor,
    output_gradients: Tensor,
    parameters: tuple[Tensor, ...],
    layout: DomainLayout,
    chunk: int,
    *,
    centered: bool = True,
) -> tuple[Tensor, ...]:
    """Elementwise variance over samples of the gradients that a rule gives, for each domain.

    Differentiable once with respect to inputs, output gradients and parameters. Values in half precision are widened
    to float32.

    Args:
        rule: Per-sample gradients of a layer.
        inputs: ``[sample, ...]``, what the layer was given.
        output_gradients: ``[sample, ...]``, the derivative of each sample's loss with respect to what it returned.
        parameters: What the rule takes besides.
        layout: Where the samples of each domain lie.
        chunk: Samples whose gradients may exist at once.
        centered: Whether to subtract the squared mean; without it the result is the second moment.

    Returns:
        Of each weight tensor ``[domain, ...]``.
    """
    found: tuple[Tensor, ...] = _ChunkedVariances.apply(
        rule, layout, chunk, centered, inputs, output_gradients, *parameters
    )
    return found


class _ChunkedVariances(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        layout: DomainLayout,
        chunk: int,
        centered: bool,
        inputs: Tensor,
        output_gradients: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        variances: list[Tensor] = []
        means: list[Tensor] = []
        for domain, rows in layout.chunks(chunk):
            gradients = rule(widened(inputs[rows]), widened(output_gradients[rows]), *parameters)
            if not variances:
                shapes = [(len(layout.sizes), *gradient.shape[1:]) for gradient in gradients]
                variances, means = (
                    [output_gradients.new_zeros(shape, dtype=gradients[0].dtype) for shape in shapes] for _ in range(2)
                )
            for variance, mean, gradient in zip(variances, means, gradients, strict=True):
                if centered:
                    mean[domain] += gradient.sum(0) / layout.counts[domain]
                variance[domain] += gradient.square().sum(0) / layout.counts[domain]
        for variance, mean in zip(variances, means, strict=True):
            variance.addcmul_(mean, mean, value=-1)
        ctx.save_for_backward(inputs, output_gradients, *parameters, *means)
        ctx.rule, ctx.layout, ctx.chunk, ctx.num_parameters = rule, layout, chunk, len(parameters)
        return tuple(variances)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, output_gradients, *saved = ctx.saved_tensors
        parameters, means = saved[: ctx.num_parameters], saved[ctx.num_parameters :]
        needed = ctx.needs_input_grad[4:]
        wanted = [index for index, need in enumerate(needed) if need]
        tensors = (inputs, output_gradients, *parameters)
        found = {index: torch.zeros_like(tensors[index]) for index in wanted}
        for domain, rows in ctx.layout.chunks(ctx.chunk):
            leaves = [widened(inputs[rows]), widened(output_gradients[rows]), *parameters]
            leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needed, strict=True)]
            with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
                gradients = ctx.rule(*leaves)
            factor = 2 / ctx.layout.counts[domain]
            pairs = [
                (gradient, (gradient.detach() - mean[domain]).mul_(grad[domain] * factor))
                for gradient, mean, grad in zip(gradients, means, grads, strict=True)
                if gradient.requires_grad
            ]
            if not pairs:
                continue
            of_leaves = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [leaves[index] for index in wanted],
                [cotangent for _, cotangent in pairs],
                materialize_grads=True,
            )
            for index, of_leaf in zip(wanted, of_leaves, strict=True):
                if index < 2:
                    found[index][rows] = of_leaf.to(tensors[index].dtype)
                else:
                    found[index] += of_leaf
        return (None, None, None, None, *map(found.get, range(len(tensors))))


def widened(values: Tensor) -> Tensor:
    """Values in half precision as float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
