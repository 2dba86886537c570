"""FishrPenalty: the regulariser as a module for anybody's training loop."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fishr.errors import ConfigError, InputError
from fishr.functional.covariance import domain_gradient_covariance_distance
from fishr.functional.cross_entropy_penalty import cross_entropy_penalty
from fishr.functional.distributed import is_distributed
from fishr.functional.domains import Domains, values_may_be_checked
from fishr.functional.penalty import Reduction, check_reduction, variance_penalty
from fishr.functional.residuals import (
    Loss,
    check_class_targets,
    is_plain_cross_entropy,
    loss_residuals,
    samples_that_count,
)
from fishr.functional.variance import domain_gradient_variances, fit_together
from fishr.nn.moving_average import MovingAverage

Variant = Literal["variance", "second_moment", "covariance"]

PUBLISHED_DECAY = 0.95

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""What a module calls besides itself."""


class FishrPenalty(nn.Module):
    """Distance between the domains' gradient variances of a linear head (Rame et al., ICML 2022).

        penalty = 1/|E| Σ_e mean over head parameters of (v̂_e − mean_e v̂_e)²

    with v̂_e the moving average (:class:`MovingAverage`) of the variances v_e
    (:func:`fishr.functional.domain_gradient_variances`). With ``reduction="mean"`` and the default decay this is
    DomainBed's penalty; with ``reduction="sum"`` and ``ema=0`` the Colored MNIST script's. Add it to the
    loss with a weight, usually from 30 % of the run on; call it from the first step so that the
    average is warm by then. Other layers, and heads whose weights tokens share: :class:`NetworkFishrPenalty`.

    Args:
        head: The linear head. Only its shape and whether it has a bias are read.
        num_domains: Number of training domains, at least 2.
        loss: ``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss``, ``nn.MSELoss`` (closed forms) or any callable
            ``(logits, targets) -> losses [sample]``. Default: cross-entropy, for a single logit binary
            cross-entropy.
        ema: Decay γ of the moving average, in [0, 1). Default: 0.95; 0 for ``"covariance"``, which takes none.
        reduction: ``"mean"`` (DomainBed) or ``"sum"`` (Colored MNIST script, and the only one for
            ``"covariance"``). Default: ``"mean"``; ``"sum"`` for ``"covariance"``.
        variant: ``"variance"``; ``"second_moment"`` (not centred); ``"covariance"`` (full matrices).
        over_ranks: Whether the ranks of a data-parallel run, if there are several, share each batch out; False where
            each has all of it.

    Raises:
        ConfigError: a setting that does not exist or does not go with the variant.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> head = nn.Linear(8, 3)
    >>> penalty = FishrPenalty(head, num_domains=2)
    >>> features, targets = torch.randn(10, 8), torch.randint(3, (10,))
    >>> penalty(features, head(features), targets, (5, 5)).ndim
    0
    """

    def __init__(
        self,
        head: nn.Linear,
        num_domains: int,
        *,
        loss: Loss | None = None,
        ema: float | None = None,
        reduction: Reduction | None = None,
        variant: Variant = "variance",
        over_ranks: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"head must be an nn.Linear (the last layer of the network), got {type(head).__name__}")
        if num_domains < 2:
            raise ConfigError(f"num_domains must be at least 2, got {num_domains}")
        if variant not in ("variance", "second_moment", "covariance"):
            raise ConfigError(f"variant must be 'variance', 'second_moment' or 'covariance', got {variant!r}")
        if reduction is None:
            reduction = "sum" if variant == "covariance" else "mean"
        check_reduction(reduction)
        if variant == "covariance" and (ema or reduction != "sum"):
            raise ConfigError(
                "variant 'covariance' takes no moving average and only reduction='sum', "
                f"got ema={ema} and reduction={reduction!r}"
            )
        if ema is None:
            ema = 0.0 if variant == "covariance" else PUBLISHED_DECAY
        self.num_features, self.num_classes, self.bias = head.in_features, head.out_features, head.bias is not None
        self.num_domains, self.reduction, self.variant = num_domains, reduction, variant
        self.over_ranks = over_ranks
        if loss is None:
            loss = nn.BCEWithLogitsLoss() if head.out_features == 1 else nn.CrossEntropyLoss()
        self.loss = loss
        self.average: nn.Module = nn.Identity()
        if ema:
            average = MovingAverage((num_domains, self.num_classes, self.num_features + self.bias), ema)
            self.average = average.to(head.weight.device, head.weight.dtype)

    def forward(self, features: Tensor, logits: Tensor, targets: Tensor, domains: Domains) -> Tensor:
        """The penalty of one batch.

        Args:
            features: ``[sample, feature]``, what the head was given.
            logits: ``[sample, class]``, what the head returned. Compute them outside autocast: half-precision
                logits give residuals that are already rounded.
            targets: As the loss takes them; samples with ``ignore_index`` leave their domain.
            domains: int64 ``[sample]``, or a tuple of sizes when samples lie domain after domain.

        Call ``backward`` outside autocast, as PyTorch advises: with ``"covariance"`` or a callable loss it would round
        to half precision.

        Returns:
            A scalar in float32 (float64 if features or logits are).

        Raises:
            InputError: shapes that do not fit the head, or a domain without a sample.
        """
        self._check_shapes(features, logits)
        with torch.autocast(features.device.type, enabled=False):
            wide_logits = logits if logits.dtype == torch.float64 else logits.float()
            mask = samples_that_count(self.loss, targets)
            if self._is_small_and_plain(features, targets, domains, mask):
                return self._of_small_batch(features, wide_logits, targets, mask)
            residuals = loss_residuals(self.loss, wide_logits, targets)
            if self.variant == "covariance":
                return domain_gradient_covariance_distance(
                    features,
                    residuals,
                    domains,
                    self.num_domains,
                    bias=self.bias,
                    mask=mask,
                    over_ranks=self.over_ranks,
                )
            variances = domain_gradient_variances(
                features,
                residuals,
                domains,
                self.num_domains,
                bias=self.bias,
                centered=self.variant == "variance",
                mask=mask,
                over_ranks=self.over_ranks,
            )
            return variance_penalty(self.average(variances), reduction=self.reduction)

    def _is_small_and_plain(self, features: Tensor, targets: Tensor, domains: Domains, mask: Tensor | None) -> bool:
        """Whether :func:`cross_entropy_penalty` may be called: it makes fewer calls."""
        return (
            self.variant == "variance"
            and isinstance(domains, Sequence)
            and all(type(size) is int for size in domains)
            and len(domains) == self.num_domains
            and sum(domains) == len(features) > 0
            and fit_together(list(domains), features)
            and not targets.is_floating_point()
            and is_plain_cross_entropy(self.loss)
            # Where a domain may be found empty, the general way finds it.
            and (mask is None or not values_may_be_checked(targets))
            and type(self.average) in (MovingAverage, nn.Identity)
            and not any(getattr(self.average, hooks) for hooks in HOOKS)
            and not (self.over_ranks and is_distributed())
            and not torch.compiler.is_compiling()
        )

    def _of_small_batch(self, features: Tensor, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        check_class_targets(cast(nn.CrossEntropyLoss, self.loss), logits.shape, targets)
        average = self.average if isinstance(self.average, MovingAverage) else None
        penalty, variances = cross_entropy_penalty(
            features,
            logits,
            targets,
            self.num_domains,
            bias=self.bias,
            mask=mask,
            history=0.0 if average is None else average.scaled_history(),
            reduction=self.reduction,
        )
        if average is not None:
            average.update(variances)
        return penalty

    def _check_shapes(self, features: Tensor, logits: Tensor) -> None:
        num_samples = features.shape[:1]
        if features.shape != (*num_samples, self.num_features) or logits.shape != (*num_samples, self.num_classes):
            remedy = "; pool tokens before the head, or take NetworkFishrPenalty, which adds their gradients up"
            raise InputError(
                f"the head takes features [sample, {self.num_features}] and returns logits "
                f"[sample, {self.num_classes}], got {list(features.shape)} and {list(logits.shape)}"
                + (remedy if features.ndim > 2 else "")
            )

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_classes={self.num_classes}, num_domains={self.num_domains}, "
            f"variant={self.variant!r}, reduction={self.reduction!r}"
        )
