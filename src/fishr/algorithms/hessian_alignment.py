"""Hessian alignment, with the Hessian-gradient product or Hutchinson's estimate of the diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishr.algorithms.base import Reference
from fishr.algorithms.penalized import PenalizedAlgorithm, PenalizedConfig
from fishr.data.base import DomainBatch, Kind
from fishr.errors import ConfigError
from fishr.functional.hessian import head_gradients, hessian_diagonal_estimates, hessian_vector_products
from fishr.functional.penalty import variance_penalty
from fishr.functional.residuals import loss_residuals
from fishr.space import Distribution, LogUniform


@dataclass(frozen=True)
class HessianAlignmentConfig(PenalizedConfig):
    """Hyperparameters of what aligns gradients and Hessians of the head.

    The penalty is the sum of both distances with their weights. ``penalty_weight`` multiplies it from the first step on
    and is 1 in the published objective; with ``strength``, only the ratio of the two weights matters.

    Attributes:
        gradient_weight: α, the weight of the distance between the domains' gradients.
        hessian_weight: β, the weight of the distance between the domains' Hessians.
    """

    switch_on: int | float = 0
    gradient_weight: float = 1.0
    hessian_weight: float = 1.0

    def problems(self) -> list[str]:
        return super().problems() + [
            f"{name} must be at least 0, got {getattr(self, name)}"
            for name in ("gradient_weight", "hessian_weight")
            if getattr(self, name) < 0
        ]


class HessianAlignment(PenalizedAlgorithm):
    """Shared by the algorithms that align gradients and Hessians of the head."""

    min_domains = 2
    for_classes = True
    Config = HessianAlignmentConfig
    config: HessianAlignmentConfig

    def setup(self) -> None:
        super().setup()
        num_outputs = self.classifier.out_features
        expected: type[nn.Module] = nn.BCEWithLogitsLoss if num_outputs == 1 else nn.CrossEntropyLoss
        if type(self.loss) is not expected:
            came = getattr(self.loss, "__name__", type(self.loss).__name__)
        elif any(getattr(self.loss, name, None) is not None for name in ("weight", "pos_weight")):
            came = f"{expected.__name__} with weights"
        elif getattr(self.loss, "ignore_index", -1) >= 0:
            came = f"{expected.__name__} with an ignored class"
        else:
            return
        raise ConfigError(
            f"{self.title} takes the Hessian in closed form, known for a head with {num_outputs} outputs under a plain "
            f"{expected.__name__}, got {came}: take that loss, or another algorithm"
        )

    @property
    def bias(self) -> bool:
        """Whether the head has a bias."""
        return self.classifier.bias is not None

    def gradients(self, features: Tensor, logits: Tensor, batch: DomainBatch) -> Tensor:
        """g_e, ``[domain, class, feature]``."""
        residuals = loss_residuals(self.loss, logits, batch.targets)
        return head_gradients(features, residuals, batch.sizes, bias=self.bias)

    def combined(self, gradients: Tensor, hessian_distance: Tensor) -> Tensor:
        """α · 1/|E| Σ_e ‖g_e − ḡ‖² + β · the distance of the Hessians."""
        return self.config.gradient_weight * spread(gradients) + self.config.hessian_weight * hessian_distance


def spread(values: Tensor) -> Tensor:
    """1/|E| Σ_e ‖v_e − v̄‖² of ``[domain, ...]``."""
    return variance_penalty(values, reduction="sum") / len(values)


@dataclass(frozen=True)
class HessianGradientProductConfig(HessianAlignmentConfig):
    """Hyperparameters of HGP."""

    gradient_weight: float = 5e-3
    hessian_weight: float = 1e-4

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "gradient_weight": LogUniform(1e-3, 1e-1),
            "hessian_weight": LogUniform(1e-5, 1e-3),
        }


class HessianGradientProduct(HessianAlignment):
    """Equal gradients and Hessian-gradient products of the head in all domains.

    objective = 1/|E| Σ_e R_e + λ · 1/|E| Σ_e (α ‖g_e − ḡ‖² + β ‖H_e g_e − mean_e H_e g_e‖²)

    with g_e the gradient and H_e the Hessian of R_e with respect to the head, ḡ the mean over domains, α and β the
    gradient and the Hessian weight, and λ the penalty weight, 1 as published. Equal gradients and Hessians make the
    domains' loss landscapes alike around the weights. H_e g_e is how the gradient changes along itself; it is computed
    in closed form (:mod:`fishr.functional.hessian`), which takes cross-entropy, or binary cross-entropy with a single
    logit, without weights.

    The authors' code compares H_e g_e with the product of the mean loss, H̄ ḡ, as a constant; here it is the mean of the
    products, as in the formula. Their code calls β ``penalty_alpha`` and α ``penalty_beta``.
    """

    title = "HGP"
    reference = Reference(
        "Hemati, Zhang, Estiri, Chen",
        "Understanding Hessian Alignment for Domain Generalization",
        2023,
        venue="ICCV",
        arxiv="2308.11778",
    )
    Config = HessianGradientProductConfig
    config: HessianGradientProductConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        gradients = self.gradients(features, logits, batch)
        products = hessian_vector_products(features, logits, batch.sizes, gradients, bias=self.bias)
        return self.domain_risks(logits, batch).mean(), self.combined(gradients, spread(products))


@dataclass(frozen=True)
class HutchinsonConfig(HessianAlignmentConfig):
    """Hyperparameters of Hutchinson; the published defaults lie below the published search space.

    Attributes:
        num_draws: K, the random vectors that the diagonals are estimated with.
    """

    gradient_weight: float = 5e-3
    hessian_weight: float = 1e-3
    num_draws: int = 300

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.num_draws < 1:
            problems.append(f"num_draws must be at least 1, got {self.num_draws}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {
            "gradient_weight": LogUniform(1e2, 1e6),
            "hessian_weight": LogUniform(1e1, 1e4),
        }


class Hutchinson(HessianAlignment):
    """Equal gradients and diagonals of the Hessian of the head in all domains.

    objective = 1/|E| Σ_e R_e + λ · 1/|E| Σ_e (α ‖g_e − ḡ‖² + β ‖D_e − D̄‖²), D_e = 1/K Σ_k v_k ∘ H_e v_k

    with g_e the gradient and H_e the Hessian of R_e with respect to the head, a bar for the mean over domains, α and β
    the gradient and the Hessian weight, λ the penalty weight, 1 as published, and vectors v_k of random signs, drawn at
    every step: D_e estimates the diagonal of H_e. Products with H_e are in closed form
    (:mod:`fishr.functional.hessian`), which takes cross-entropy, or binary cross-entropy with a single logit, without
    weights.

    All domains share the v_k (the authors' code draws them for each), so the estimates are equal where the Hessians
    are. The distance is then on average that of the diagonals and 1/K of that of the entries beside them: one draw
    aligns, with much noise, whole Hessians. The authors' code calls β ``penalty_alpha`` and α ``penalty_beta``.
    """

    title = "Hutchinson"
    reference = HessianGradientProduct.reference
    Config = HutchinsonConfig
    config: HutchinsonConfig

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        gradients = self.gradients(features, logits, batch)
        shape = (self.config.num_draws, *gradients.shape[1:])
        signs = torch.randint(2, shape, dtype=gradients.dtype, device=gradients.device) * 2 - 1
        diagonals = hessian_diagonal_estimates(features, logits, batch.sizes, signs, bias=self.bias)
        return self.domain_risks(logits, batch).mean(), self.combined(gradients, spread(diagonals))
