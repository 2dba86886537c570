"""Gradient variance of a linear head per domain, in closed form.

For sample i with features f_i, h_i = [f_i; 1] and residual r_i = ∂ℓ_i/∂logits_i, the gradient of ℓ_i with
respect to the head is the outer product g_i = r_i ⊗ h_i. Its elementwise mean and second moment over the
n_e samples of a domain are matrix products, so no per-sample gradient is stored:

    m_e = Rᵀ H / n_e        s_e = (R∘R)ᵀ (H∘H) / n_e        v_e = s_e − m_e∘m_e

Memory is O(classes · features) per domain instead of O(samples · classes · features). With many samples
the products are bound by memory traffic, so each domain is walked in chunks that stay in the cache, forward
and backward, and features in half precision are widened chunk by chunk. Domains that together are no larger than a
chunk are computed at once where they have as many samples each: on a small network the calls are what takes time.

In a data-parallel run (torch.distributed) moments and counts are summed over ranks, so every rank gets the variances of
the whole batch; the backward pass sums the incoming gradient over ranks, so that the average of the ranks' gradients,
which DistributedDataParallel takes, is the gradient of one process with the whole batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from fishr.functional.distributed import sum_over_ranks
from fishr.functional.domains import Domains, group_by_domain

CHUNK_ELEMENTS = 2**18
"""Feature entries in one chunk on a CPU: 1 MiB of float32, the size of a common second-level cache. Domains of equal
sizes with no more entries in all are computed at once."""

ACCELERATOR_ELEMENTS = 2**22
"""The same on an accelerator, where calls are what takes time: 16 MiB of float32 in all."""

CHUNK_ROWS = 64
"""Samples in one chunk at least, on a CPU: each chunk walks the statistics of its domain, ``[class, feature]``, which
takes longer than the arithmetic where it has few samples of many features."""


def domain_gradient_variances(
    features: Tensor,
    residuals: Tensor,
    domains: Domains,
    num_domains: int,
    *,
    bias: bool = True,
    centered: bool = True,
    mask: Tensor | None = None,
    over_ranks: bool = True,
) -> Tensor:
    """Elementwise variance over samples of the linear head's per-sample gradients, for each domain.

    v_e = 1/n_e Σ_i g_i² − (1/n_e Σ_i g_i)², with g_i = residuals_i ⊗ [features_i; 1] (Rame et al., ICML 2022,
    section 3; arXiv 2109.02934). The variance is biased (divided by n_e), as published. Differentiable once
    with respect to features and residuals.

    Args:
        features: ``[sample, feature]``, the input of the head, any floating type.
        residuals: ``[sample, class]``, the derivative of each sample's loss with respect to its logits.
        domains: int64 ``[sample]``, or a tuple of sizes when samples lie domain after domain. On an
            accelerator sizes are faster: indices make the host wait for their counts.
        num_domains: Number of domains E, at least 2; each needs a sample.
        bias: Whether the head has a bias, whose gradient is the residual itself.
        centered: Whether to subtract the squared mean; without it the result is the second moment.
        mask: ``[sample]`` bool, False for samples that leave their domain (ignored targets); default all count.
        over_ranks: Whether the ranks of a data-parallel run, if there are several, share the samples out; False where
            each has all of them.

    Returns:
        ``[domain, class, feature]`` in float32 (float64 if an argument is float64); with ``bias`` the last
        feature entry belongs to the bias.

    Raises:
        InputError: see :func:`fishr.functional.domains.group_by_domain`.

    >>> import torch
    >>> features, residuals = torch.tensor([[1.0], [3.0], [2.0], [2.0]]), torch.ones(4, 1)
    >>> domain_gradient_variances(features, residuals, (2, 2), 2).squeeze(1)
    tensor([[1., 0.],
            [0., 0.]])
    """
    samples = group_by_domain(features, residuals, domains, num_domains, mask, over_ranks=over_ranks)
    variances: Tensor = _head_variances(
        samples.features, samples.residuals, list(samples.sizes), samples.counts, bias, centered, over_ranks
    )[0]
    return variances


@library.custom_op("fishr::head_variances", mutates_args=())
def _head_variances(
    features: Tensor,
    residuals: Tensor,
    sizes: list[int],
    counts: Tensor,
    bias: bool,
    centered: bool,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """Second moment minus squared mean, and the mean (empty when not centred), per domain."""
    dtype = torch.promote_types(features.dtype, residuals.dtype)
    num_classes, num_features = residuals.shape[1], features.shape[1]
    shape = (len(sizes), num_classes, num_features + bias)
    with torch.autocast(features.device.type, enabled=False):
        if fit_together(sizes, features):
            h, r = stacked(features, residuals, len(sizes), bias=bias)
            variances, means = stacked_moments(h, r, counts.to(dtype), centered=centered)
        else:
            variances = features.new_zeros(shape, dtype=dtype)
            means = features.new_zeros(shape if centered else 0, dtype=dtype)
            _add_moments(features, residuals, sizes, counts.to(dtype), variances, means)
    if over_ranks:
        variances, means = sum_over_ranks(variances), sum_over_ranks(means) if centered else means
    if centered:
        variances.addcmul_(means, means, value=-1)
    return variances, means


def _add_moments(
    features: Tensor, residuals: Tensor, sizes: list[int], counts: Tensor, seconds: Tensor, means: Tensor
) -> None:
    """Add s_e to ``seconds`` and m_e to ``means``, unless those are empty."""
    num_features = features.shape[1]
    bias = seconds.shape[2] > num_features
    for domain, chunk in _chunks(sizes, features):
        r, h = residuals[chunk].to(seconds.dtype), features[chunk].to(seconds.dtype)
        r_over_n = r / counts[domain]
        r_squared_over_n = r * r_over_n
        seconds[domain, :, :num_features].addmm_(r_squared_over_n.T, h.square())
        if bias:
            seconds[domain, :, num_features] += r_squared_over_n.sum(0)
        if means.numel():
            means[domain, :, :num_features].addmm_(r_over_n.T, h)
            if bias:
                means[domain, :, num_features] += r_over_n.sum(0)


def fit_together(sizes: Sequence[int], features: Tensor) -> bool:
    """Whether domains are as large as each other and together small enough to be computed at once."""
    most = CHUNK_ELEMENTS if features.device.type == "cpu" else ACCELERATOR_ELEMENTS
    return len(set(sizes)) == 1 and features.numel() <= most


def stacked(features: Tensor, residuals: Tensor, num_domains: int, *, bias: bool) -> tuple[Tensor, Tensor]:
    """H ``[domain, sample, feature (+1)]`` and R ``[domain, sample, class]`` of domains of one size, in one type."""
    dtype = torch.promote_types(features.dtype, residuals.dtype)
    h, r = (
        values.view(num_domains, len(values) // num_domains, values.shape[1]).to(dtype)
        for values in (features, residuals)
    )
    return F.pad(h, (0, 1), value=1.0) if bias else h, r


def stacked_moments(h: Tensor, r: Tensor, counts: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor]:
    """s_e and m_e (empty when not centred), ``[domain, class, feature]``."""
    r_over_n = r / counts.view(-1, 1, 1)
    means = torch.bmm(r_over_n.mT, h) if centered else h.new_empty(0)
    return torch.bmm((r * r_over_n).mT, h.square()), means


def stacked_gradients(grad: Tensor, h: Tensor, r: Tensor, means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂H and ∂L/∂R for G = ``grad``, as :func:`_head_variances_backward` writes them."""
    factor = 2 / counts.view(-1, 1, 1)
    r_scaled = r * factor
    grad_h = torch.bmm(r * r_scaled, grad).mul_(h)
    grad_r = torch.bmm(h.square(), grad.mT).mul_(r)
    if means.numel():
        through_mean = means * grad
        grad_h.baddbmm_(r_scaled, through_mean, alpha=-1)
        grad_r.baddbmm_(h, through_mean.mT, alpha=-1)
    return grad_h, grad_r.mul_(factor)


@_head_variances.register_fake
def _(
    features: Tensor,
    residuals: Tensor,
    sizes: list[int],
    counts: Tensor,
    bias: bool,
    centered: bool,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, residuals.dtype)
    shape = (len(sizes), residuals.shape[1], features.shape[1] + bias)
    return features.new_empty(shape, dtype=dtype), features.new_empty(shape if centered else 0, dtype=dtype)


@library.custom_op("fishr::head_variances_backward", mutates_args=())
def _head_variances_backward(
    grad: Tensor,
    features: Tensor,
    residuals: Tensor,
    means: Tensor,
    sizes: list[int],
    counts: Tensor,
    bias: bool,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to features and residuals.

    With G = ∂L/∂v_e and P = m_e∘G (zero when not centred):
        ∂L/∂H = 2/n_e (H∘(R∘R G) − R P)        ∂L/∂R = 2/n_e (R∘(H∘H Gᵀ) − H Pᵀ)
    """
    grad, counts = sum_over_ranks(grad) if over_ranks else grad, counts.to(grad.dtype)
    with torch.autocast(features.device.type, enabled=False):
        if not fit_together(sizes, features):
            return _gradients(grad, features, residuals, means, sizes, counts)
        h, r = stacked(features, residuals, len(sizes), bias=bias)
        grad_h, grad_r = stacked_gradients(grad, h, r, means, counts)
        grad_features = grad_h[:, :, : features.shape[1]].reshape(features.shape).contiguous()
        return grad_features.to(features.dtype), grad_r.view_as(residuals).to(residuals.dtype)


def _gradients(
    grad: Tensor, features: Tensor, residuals: Tensor, means: Tensor, sizes: list[int], counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to features and residuals."""
    num_features = features.shape[1]
    grad_features, grad_residuals = torch.empty_like(features), torch.empty_like(residuals)
    of_chunk = _single_class_gradients if residuals.shape[1] == 1 else _chunk_gradients
    chunks = list(_chunks(sizes, features))
    # Allocated once: temporaries of each chunk would come and go at the end of the heap, a page fault for each page.
    most_rows = max((chunk.stop - chunk.start for _, chunk in chunks), default=0)
    scratch, widened = grad.new_empty(2, most_rows, num_features)
    of_domain = None
    for domain, chunk in chunks:
        if domain != of_domain:
            of_domain, factor, weight = domain, 2 / counts[domain], grad[domain]
            through_mean = means[domain] * weight if means.numel() else torch.zeros_like(weight)
        r, h = residuals[chunk].to(grad.dtype), features[chunk].to(grad.dtype)
        grad_h = grad_features[chunk] if grad_features.dtype == grad.dtype else widened[: len(r)]
        grad_r = of_chunk(h, r, r * factor, weight, through_mean, grad_h, scratch[: len(r)])
        grad_residuals[chunk] = grad_r.mul_(factor)
        if grad_h.dtype != grad_features.dtype:
            grad_features[chunk] = grad_h
    return grad_features, grad_residuals


def _chunk_gradients(
    h: Tensor, r: Tensor, r_scaled: Tensor, weight: Tensor, through_mean: Tensor, grad_h: Tensor, scratch: Tensor
) -> Tensor:
    """Gradients for some rows, from G and P with the bias's column, if any, behind the features'.

    Writes ∂L/∂H, with the factor 2/n_e that is in ``r_scaled``, to ``grad_h``; returns ∂L/∂R without that factor.
    """
    num_features = h.shape[1]
    torch.mm(r * r_scaled, weight[:, :num_features], out=grad_h).mul_(h)
    grad_h.addmm_(r_scaled, through_mean[:, :num_features], alpha=-1)
    grad_r = torch.mm(torch.mul(h, h, out=scratch), weight[:, :num_features].T)
    grad_r += weight[:, num_features:].sum(1)
    grad_r *= r
    grad_r.addmm_(h, through_mean[:, :num_features].T, alpha=-1)
    grad_r -= through_mean[:, num_features:].sum(1)
    return grad_r


def _single_class_gradients(
    h: Tensor, r: Tensor, r_scaled: Tensor, weight: Tensor, through_mean: Tensor, grad_h: Tensor, scratch: Tensor
) -> Tensor:
    """The same for one class, where both gradients share U = R∘H∘G − P: R∘U and the sum of H∘U over features.

    Matrix products with a single row or column would be slower than these elementwise passes.
    """
    num_features = h.shape[1]
    torch.mul(h, weight[:, :num_features], out=grad_h).mul_(r).sub_(through_mean[:, :num_features])
    grad_r = torch.mul(grad_h, h, out=scratch).sum(1, keepdim=True)
    grad_h *= r_scaled
    grad_r += r * weight[:, num_features:].sum(1) - through_mean[:, num_features:].sum(1)
    return grad_r


@_head_variances_backward.register_fake
def _(
    grad: Tensor,
    features: Tensor,
    residuals: Tensor,
    means: Tensor,
    sizes: list[int],
    counts: Tensor,
    bias: bool,
    over_ranks: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(residuals)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, list[int], Tensor, bool, bool, bool],
    output: tuple[Tensor, Tensor],
) -> None:
    features, residuals, sizes, counts, bias, _, over_ranks = inputs
    ctx.save_for_backward(features, residuals, output[1], counts)
    ctx.sizes, ctx.bias, ctx.over_ranks = sizes, bias, over_ranks  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, None, None, None, None, None]:
    features, residuals, means, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_features, grad_residuals = _head_variances_backward(
        grad,
        features,
        residuals,
        means,
        ctx.sizes,  # type: ignore[attr-defined]
        counts,
        ctx.bias,  # type: ignore[attr-defined]
        ctx.over_ranks,  # type: ignore[attr-defined]
    )
    return grad_features, grad_residuals, None, None, None, None, None


_head_variances.register_autograd(_backward, setup_context=_setup_context)


@_head_variances.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    features: Tensor,
    residuals: Tensor,
    sizes: list[int],
    counts: Tensor,
    *settings: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    """Several models at once are as one with all their domains, one model's after another's."""
    num_models: int = info.batch_size
    features, residuals, counts = (
        (value.expand(num_models, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
        for value, dim in ((features, in_dims[0]), (residuals, in_dims[1]), (counts, in_dims[3]))
    )
    variances, means = _head_variances(features, residuals, sizes * num_models, counts, *settings)
    of_models = (num_models, len(sizes))
    if means.numel() == 0:
        return (variances.unflatten(0, of_models), means), (0, None)
    return (variances.unflatten(0, of_models), means.unflatten(0, of_models)), (0, 0)


def _chunks(sizes: list[int], features: Tensor) -> Iterator[tuple[int, slice]]:
    """Domain and rows of each chunk: cache-sized on a CPU, the whole domain elsewhere."""
    on_cpu = features.device.type == "cpu"
    start = 0
    for domain, size in enumerate(sizes):
        rows = max(CHUNK_ROWS, CHUNK_ELEMENTS // features.shape[1]) if on_cpu else max(1, size)
        stop = start + size
        for begin in range(start, stop, rows):
            yield domain, slice(begin, min(begin + rows, stop))
        start = stop
