"""The smoothed AND-mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishr.algorithms.andmask import ANDMask, ANDMaskConfig, agreement
from fishr.algorithms.base import Reference
from fishr.data.base import Kind
from fishr.space import Distribution, LogUniform, Uniform


@dataclass(frozen=True)
class SANDMaskConfig(ANDMaskConfig):
    """Hyperparameters of the SAND-mask.

    Attributes:
        tau: Agreement τ of the domains' signs below which an entry is masked. The published default is 1, with which
            the mask is zero everywhere and nothing is learned; here it is 0.5.
        k: Steepness k of the mask.
    """

    tau: float = 0.5
    k: float = 10.0

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.k <= 0:
            problems.append(f"k must be above 0, got {self.k}")
        return problems

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return super().space(kind) | {"tau": Uniform(0.0, 1.0), "k": LogUniform(1e-3, 1e5)}


class SANDMask(ANDMask):
    """Follow entries of the gradient the more, the better the domains agree on sign and size.

    gradient = m ⊙ ḡ / mean of m, ḡ = 1/|E| Σ_e ∇R_e

    m = max(0, tanh(k / σ² · (|1/|E| Σ_e sign ∇R_e| − τ))), entry by entry, with σ² the unbiased variance of the entry
    over domains; the mean is over each weight tensor. Where the AND-mask is 0 or 1, this one is continuous.
    """

    title = "SAND-mask"
    reference = Reference(
        "Shahtalebi, Gagnon-Audet, Laleh, Faramarzi, Ahuja, Rish",
        "SAND-mask: An Enhanced Gradient Masking Strategy for the Discovery of Invariances in Domain Generalization",
        2021,
        arxiv="2106.02266",
    )
    Config = SANDMaskConfig
    config: SANDMaskConfig

    def mask(self, gradients: Tensor) -> Tensor:
        excess = agreement(gradients) - self.config.tau
        mask = torch.tanh(self.config.k / gradients.var(0) * excess).relu()
        return mask.nan_to_num(1e-17)  # domains that agree to the last bit, exactly at τ
