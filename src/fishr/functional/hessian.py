"""Gradient and Hessian of a domain's mean loss with respect to a linear head, in closed form.

For softmax cross-entropy, and for binary cross-entropy of a single logit, with p_i the probabilities of sample i
(softmax, or sigmoid), h_i = [features_i; 1] and r_i = ∂ℓ_i/∂logits_i, domain e has

    g_e = 1/n_e Σ_i r_i ⊗ h_i        H_e = 1/n_e Σ_i A_i ⊗ h_i h_iᵀ        A_i = diag(p_i) − p_i p_iᵀ

H_e, a matrix with (classes · features)² entries, is applied, sampled or compared without being formed where that would
be costly. Targets are not in it; label smoothing does not change it.

Samples lie domain after domain: ``sizes`` are the samples of each domain. What has an entry for each weight of the head
is ``[class, feature]``, with the bias, if there is one, as the last feature. Half precision is widened to float32; call
these functions outside autocast, which would round the products again.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishr.errors import InputError


def head_gradients(features: Tensor, residuals: Tensor, sizes: Sequence[int], *, bias: bool = True) -> Tensor:
    """g_e, the gradient of the mean loss of each domain.

    Args:
        features: ``[sample, feature]``, the input of the head.
        residuals: ``[sample, class]``, as :func:`fishr.functional.loss_residuals` returns them, for any loss.
        sizes: Samples of each domain, at least one.
        bias: Whether the head has a bias.

    Returns:
        ``[domain, class, feature]``.

    Raises:
        InputError: shapes that do not fit.

    >>> head_gradients(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [-0.5]]), (1, 1)).squeeze(1)
    tensor([[ 0.5000,  0.5000],
            [-1.5000, -0.5000]])
    """
    h = _head_inputs(features, residuals, sizes, bias=bias)
    parts = zip(_split(residuals.to(h.dtype), sizes), _split(h, sizes), strict=True)
    return torch.stack([r_e.T @ h_e / len(h_e) for r_e, h_e in parts])


def hessian_diagonals(features: Tensor, logits: Tensor, sizes: Sequence[int], *, bias: bool = True) -> Tensor:
    """The diagonal of H_e of each domain.

        (H_e)_cj,cj = 1/n_e Σ_i p_ic (1 − p_ic) h_ij²

    Args:
        features: ``[sample, feature]``, the input of the head.
        logits: ``[sample, class]``, its output; a single one is binary.
        sizes: Samples of each domain, at least one.
        bias: Whether the head has a bias.

    Returns:
        ``[domain, class, feature]``.

    Raises:
        InputError: shapes that do not fit.

    >>> hessian_diagonals(torch.tensor([[2.0]]), torch.zeros(1, 1), (1,))
    tensor([[[1.0000, 0.2500]]])
    """
    h = _head_inputs(features, logits, sizes, bias=bias)
    p = _probabilities(logits.to(h.dtype))
    parts = zip(_split(p * (1 - p), sizes), _split(h.square(), sizes), strict=True)
    return torch.stack([curvature.T @ squares / len(squares) for curvature, squares in parts])


def hessians(features: Tensor, logits: Tensor, sizes: Sequence[int], *, bias: bool = True) -> Tensor:
    """H_e of each domain, for heads small enough to form it.

    Args:
        features: ``[sample, feature]``, the input of the head.
        logits: ``[sample, class]``, its output; a single one is binary.
        sizes: Samples of each domain, at least one.
        bias: Whether the head has a bias.

    Returns:
        ``[domain, class, feature, class, feature]``.

    Raises:
        InputError: shapes that do not fit.
    """
    h = _head_inputs(features, logits, sizes, bias=bias)
    p = _probabilities(logits.to(h.dtype))
    num_classes, num_features = p.shape[1], h.shape[1]
    whole = h.new_empty(len(sizes), num_classes, num_features, num_classes, num_features)
    for first, second, blocks in _blocks(h, p, sizes):
        whole[:, first, :, second] = whole[:, second, :, first] = blocks
    return whole


def hessian_vector_products(
    features: Tensor, logits: Tensor, sizes: Sequence[int], vectors: Tensor, *, bias: bool = True
) -> Tensor:
    """H_e v_e of each domain.

        H_e v_e = 1/n_e Σ_i (A_i v_e h_i) ⊗ h_i

    Args:
        features: ``[sample, feature]``, the input of the head.
        logits: ``[sample, class]``, its output; a single one is binary.
        sizes: Samples of each domain, at least one.
        vectors: v_e, ``[domain, class, feature]``.
        bias: Whether the head has a bias.

    Returns:
        ``[domain, class, feature]``.

    Raises:
        InputError: shapes that do not fit.
    """
    h = _head_inputs(features, logits, sizes, bias=bias)
    p = _probabilities(logits.to(h.dtype))
    if vectors.shape != (len(sizes), p.shape[1], h.shape[1]):
        raise InputError(
            f"vectors must be [domain, class, feature] = [{len(sizes)}, {p.shape[1]}, {h.shape[1]}], "
            f"got {list(vectors.shape)}"
        )
    parts = zip(_split(h, sizes), _split(p, sizes), vectors, strict=True)
    return torch.stack([_apply_curvature(p_e, h_e @ v_e.T).T @ h_e / len(h_e) for h_e, p_e, v_e in parts])


def hessian_diagonal_estimates(
    features: Tensor, logits: Tensor, sizes: Sequence[int], signs: Tensor, *, bias: bool = True
) -> Tensor:
    """Hutchinson's estimate of the diagonal of H_e of each domain.

        D_e = 1/K Σ_k v_k ∘ H_e v_k

    with K vectors v_k of random signs, the same for all domains (Bekas, Kokiopoulou and Saad, Applied Numerical
    Mathematics 57, 2007). It is unbiased; an entry's variance is 1/K times the sum of the squares of the others in its
    row of H_e. As the signs are shared, D_a − D_b is the estimate for H_a − H_b: equal Hessians have equal estimates.

    Memory is O((draws + samples) · classes · features).

    Args:
        features: ``[sample, feature]``, the input of the head.
        logits: ``[sample, class]``, its output; a single one is binary.
        sizes: Samples of each domain, at least one.
        signs: v_k, ``[draw, class, feature]``, of entries −1 and 1.
        bias: Whether the head has a bias.

    Returns:
        ``[domain, class, feature]``.

    Raises:
        InputError: shapes that do not fit.
    """
    h = _head_inputs(features, logits, sizes, bias=bias)
    p = _probabilities(logits.to(h.dtype))
    if signs.ndim != 3 or len(signs) == 0 or signs.shape[1:] != (p.shape[1], h.shape[1]):
        raise InputError(
            f"signs must be [draw, class, feature] = [at least 1, {p.shape[1]}, {h.shape[1]}], got {list(signs.shape)}"
        )
    signs = signs.to(h.dtype)
    products = _apply_curvature(p, h @ signs.mT)  # [draw, sample, class]
    # The sum over draws first: a sample's share of the diagonal is smaller than a product for each draw and domain.
    shares = torch.einsum("kcf,knc->cfn", signs, products) / len(signs) * h.T
    return torch.stack([part.mean(2) for part in torch.split(shares, list(sizes), dim=2)])


def hessian_distance(features: Tensor, logits: Tensor, sizes: Sequence[int], *, bias: bool = True) -> Tensor:
    """Mean squared Frobenius distance of the domains' Hessians to their mean.

        1/|E| Σ_e ‖H_e − H̄‖² = 1/|E| Σ_e w_eᵀ K w_e        K_ij = ⟨A_i, A_j⟩ (h_i · h_j)²

    with signed weights w_e: 1/n_e − 1/(|E| n_e) for the samples of domain e, −1/(|E| n_a) for those of another domain
    a, and

        ⟨A_i, A_j⟩ = Σ_c p_ic p_jc − Σ_c p_ic² p_jc − Σ_c p_ic p_jc² + (p_i · p_j)²

    Both cancel, the first where domains are nearly aligned and the second where predictions are nearly certain, so K is
    computed in float64 (float32 on mps, which has no other). K has an entry for each pair of samples; where the head
    has no more weights than there are samples, the Hessians are smaller than that and are compared block by block
    (Chen and others, arXiv 2506.07378, derive the closed form).

    Args:
        features: ``[sample, feature]``, the input of the head.
        logits: ``[sample, class]``, its output; a single one is binary.
        sizes: Samples of each domain, at least one.
        bias: Whether the head has a bias.

    Returns:
        A scalar, at least 0.

    Raises:
        InputError: shapes that do not fit.
    """
    h = _head_inputs(features, logits, sizes, bias=bias)
    if logits.shape[1] * h.shape[1] <= len(h):
        return _direct_distance(h, _probabilities(logits.to(h.dtype)), sizes)
    wide = torch.float32 if h.device.type == "mps" else torch.float64
    return _pairwise_distance(h.to(wide), _probabilities(logits.to(wide)), sizes).to(h.dtype)


def _direct_distance(h: Tensor, p: Tensor, sizes: Sequence[int]) -> Tensor:
    """From the Hessians' blocks, one pair of classes after the other."""
    distances = []
    for first, second, blocks in _blocks(h, p, sizes):
        distance = (blocks - blocks.mean(0)).square().sum() / len(sizes)
        distances.append(distance if first == second else 2 * distance)
    return torch.stack(distances).sum()


def _blocks(h: Tensor, p: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """The Hessians' blocks, ``[domain, feature, feature]``, of each pair of classes, the first not above the second."""
    for first in range(p.shape[1]):
        for second in range(first, p.shape[1]):
            curvature = p[:, first] * (float(first == second) - p[:, second])
            parts = zip(_split(h * curvature.unsqueeze(1), sizes), _split(h, sizes), strict=True)
            yield first, second, torch.stack([weighted_e.T @ h_e / len(h_e) for weighted_e, h_e in parts])


def _pairwise_distance(h: Tensor, p: Tensor, sizes: Sequence[int]) -> Tensor:
    """From K, ``[sample, sample]``."""
    of_class, mixed = p @ p.T, p.square() @ p.T
    kernel = (of_class - mixed - mixed.T + of_class.square()) * (h @ h.T).square()
    num_domains = len(sizes)
    means = [h.new_full((1, size), 1 / size) for size in sizes]
    shares: Tensor = torch.block_diag(*means)  # type: ignore[no-untyped-call]
    weights = shares - shares.sum(0) / num_domains  # [domain, sample]
    return (weights @ kernel * weights).sum(1).clamp_min(0).mean()


def _apply_curvature(p: Tensor, u: Tensor) -> Tensor:
    """A_i u_i of every sample, from ``[..., sample, class]``."""
    weighted = p * u
    return weighted - p * weighted.sum(-1, keepdim=True)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def _head_inputs(features: Tensor, outputs: Tensor, sizes: Sequence[int], *, bias: bool) -> Tensor:
    """h_i of every sample, ``[sample, feature]``, in the wider type of both arguments."""
    fit = features.ndim == 2 and outputs.ndim == 2 and len(features) == len(outputs) == sum(sizes)
    if not fit or min(sizes, default=0) < 1:
        raise InputError(
            "features must be [sample, feature] and logits or residuals [sample, class] with the same samples, in "
            f"domains of at least one, got {list(features.shape)}, {list(outputs.shape)} and sizes {tuple(sizes)}"
        )
    dtype = torch.promote_types(features.dtype, outputs.dtype)
    h = features.to(torch.promote_types(dtype, torch.float32))
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1) if bias else h


def _split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(values, list(sizes))
