"""Distance between the full gradient covariances of the domains (the off-diagonal variant).

For one parameter tensor with p entries (the weight, or the bias) and the centred per-sample gradients of a
domain, [g_i − mean g], the covariance is C_e = 1/(n_e p) Σ_i g_i g_iᵀ. The penalty needs only the inner
products of the C_e, and there are two ways to them:

- directly, through the p × p matrices;
- through Gram matrices: ⟨C_a, C_b⟩ = ‖K_ab‖² / (n_a n_b p²) with K_ab the inner products of the gradients of a and b.
  For the weight, K = (R_a R_bᵀ) ∘ (F_a F_bᵀ), centred afterwards, so no gradient is formed either.

The one with the smaller matrix is taken, for each parameter tensor.
"""

import torch
from torch import Tensor

from fishr.errors import InputError
from fishr.functional.distributed import is_distributed
from fishr.functional.domains import Domains, GroupedSamples, group_by_domain
from fishr.functional.penalty import variance_penalty


def domain_gradient_covariance_distance(
    features: Tensor,
    residuals: Tensor,
    domains: Domains,
    num_domains: int,
    *,
    bias: bool = True,
    mask: Tensor | None = None,
    over_ranks: bool = True,
) -> Tensor:
    """Σ over parameter tensors of Σ_e ‖C_e − C̄‖², with C_e the covariance of that tensor's gradient.

    The off-diagonal variant of the Colored MNIST script (Table 6 of Rame et al., ICML 2022): each entry of a
    covariance is divided by n_e · p, weight and bias are never crossed, the distance is summed over
    entries and domains.

    Args:
        features: ``[sample, feature]``.
        residuals: ``[sample, class]``.
        domains: int64 ``[sample]``, or a tuple of sizes when samples lie domain after domain.
        num_domains: Number of domains, at least 2; each needs a sample.
        bias: Whether the head has a bias.
        mask: ``[sample]`` bool, False for samples that leave their domain.
        over_ranks: Whether the ranks of a data-parallel run, if there are several, share the samples out; False where
            each has all of them.

    Returns:
        A scalar, differentiable with respect to features and residuals.

    Raises:
        InputError: several ranks that share the samples out, over which covariances are not summed; else see
            :func:`fishr.functional.domains.group_by_domain`.
    """
    if over_ranks and is_distributed():
        raise InputError(
            "the covariance distance is not available over several ranks: use the variance, or one process"
        )
    samples = group_by_domain(features, residuals, domains, num_domains, mask, over_ranks=over_ranks)
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(samples.features.dtype, samples.residuals.dtype)
        r, f = samples.residuals.to(dtype), samples.features.to(dtype)
        distance = _tensor_distance(r, f, samples)
        if bias:
            distance = distance + _tensor_distance(r, None, samples)
    return distance


def _tensor_distance(r: Tensor, f: Tensor | None, samples: GroupedSamples) -> Tensor:
    """The distance for the weight (gradient r_i ⊗ f_i) or, without features, for the bias (gradient r_i)."""
    num_entries = r.shape[1] * (1 if f is None else f.shape[1])
    if num_entries <= r.shape[0]:
        gradients = r if f is None else (r.unsqueeze(2) * f.unsqueeze(1)).flatten(1)
        return _direct_distance(gradients, samples)
    return _gram_distance(r @ r.T if f is None else (r @ r.T) * (f @ f.T), samples, num_entries)


def _direct_distance(gradients: Tensor, samples: GroupedSamples) -> Tensor:
    covariances = []
    for part, kept, count in _per_domain(gradients, samples):
        centred = part - part.sum(0) / count
        if kept is not None:
            centred = centred * kept.unsqueeze(1)
        covariances.append(centred.T @ centred / (count * gradients.shape[1]))
    return variance_penalty(torch.stack(covariances), reduction="sum")


def _gram_distance(gram: Tensor, samples: GroupedSamples, num_entries: int) -> Tensor:
    """Σ_e ‖C_e − C̄‖² = Σ_e ⟨C_e, C_e⟩ − 1/|E| Σ_ab ⟨C_a, C_b⟩, from the inner products of all gradients."""
    for _ in range(2):  # centre the columns within each domain, then, transposed, the rows
        parts = []
        for part, kept, count in _per_domain(gram, samples):
            centred = part - part.sum(0) / count
            parts.append(centred if kept is None else centred * kept.unsqueeze(1))
        gram = torch.cat(parts).T
    counts = samples.counts.to(gram.dtype)
    rows = [part.square().sum(0) for part in torch.split(gram, list(samples.sizes))]
    products = torch.stack(
        [torch.stack([cell.sum() for cell in torch.split(row, list(samples.sizes))]) for row in rows]
    )
    products = products / (counts.outer(counts) * num_entries**2)
    return products.diagonal().sum() - products.sum() / len(samples.sizes)


def _per_domain(values: Tensor, samples: GroupedSamples) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    sizes = list(samples.sizes)
    masks = [None] * len(sizes) if samples.mask is None else torch.split(samples.mask, sizes)
    return list(zip(torch.split(values, sizes), masks, samples.counts.to(values.dtype), strict=True))
