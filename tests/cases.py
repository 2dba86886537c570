"""Random batches, one for each kind of loss, and the golden files."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
SIZES = (4, 7, 3)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
dtypes = (torch.float64, torch.float32)


def load_golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def log_cosh_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss without closed form in the library: one value for each sample."""
    return (logits - targets).cosh().log().sum(1)


@dataclass(frozen=True)
class LossCase:
    """A loss and how to draw targets for it."""

    loss: Callable[[torch.dtype], nn.Module | Callable[[Tensor, Tensor], Tensor]]
    targets: Callable[[torch.Generator, int, torch.dtype], Tensor]
    num_classes: int = 4
    ignore_index: int | None = None


def _indices(generator: torch.Generator, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(4, (n,), generator=generator)


def _indices_some_ignored(ignore_index: int) -> Callable[[torch.Generator, int, torch.dtype], Tensor]:
    def draw(generator: torch.Generator, n: int, dtype: torch.dtype) -> Tensor:
        targets = torch.randint(3, (n,), generator=generator)
        targets[1::4] = ignore_index
        return targets

    return draw


def _distributions(generator: torch.Generator, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 4, generator=generator, dtype=dtype).softmax(1)


def _binary(*outputs: int) -> Callable[[torch.Generator, int, torch.dtype], Tensor]:
    return lambda generator, n, dtype: torch.randint(2, (n, *outputs), generator=generator).to(dtype)


def _real(*outputs: int) -> Callable[[torch.Generator, int, torch.dtype], Tensor]:
    return lambda generator, n, dtype: torch.randn(n, *outputs, generator=generator, dtype=dtype)


CLASS_WEIGHTS = (0.2, 1.7, 0.9, 3.0)

LOSSES = {
    "cross-entropy": LossCase(lambda dtype: nn.CrossEntropyLoss(), _indices),
    "class weights": LossCase(
        lambda dtype: nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype)), _indices
    ),
    "label smoothing": LossCase(lambda dtype: nn.CrossEntropyLoss(label_smoothing=0.3), _indices),
    "ignore_index": LossCase(lambda dtype: nn.CrossEntropyLoss(), _indices_some_ignored(-100), ignore_index=-100),
    "all combined": LossCase(
        lambda dtype: nn.CrossEntropyLoss(
            weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype), label_smoothing=0.3, ignore_index=3
        ),
        _indices_some_ignored(3),
        ignore_index=3,
    ),
    "soft targets": LossCase(lambda dtype: nn.CrossEntropyLoss(), _distributions),
    "soft targets, weights, smoothing": LossCase(
        lambda dtype: nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype), label_smoothing=0.3),
        _distributions,
    ),
    "binary, targets [sample]": LossCase(lambda dtype: nn.BCEWithLogitsLoss(), _binary(), num_classes=1),
    "binary, weighted": LossCase(
        lambda dtype: nn.BCEWithLogitsLoss(
            weight=torch.tensor([0.4], dtype=dtype), pos_weight=torch.tensor([2.5], dtype=dtype)
        ),
        _binary(1),
        num_classes=1,
    ),
    "binary, many outputs": LossCase(lambda dtype: nn.BCEWithLogitsLoss(), _binary(4)),
    "binary, many outputs, weighted": LossCase(
        lambda dtype: nn.BCEWithLogitsLoss(
            weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype), pos_weight=torch.tensor([2.0, 0.3, 1.0, 5.0], dtype=dtype)
        ),
        _binary(4),
    ),
    "squared": LossCase(lambda dtype: nn.MSELoss(), _real(4)),
    "squared, targets [sample]": LossCase(lambda dtype: nn.MSELoss(), _real(), num_classes=1),
    "callable": LossCase(lambda dtype: log_cosh_loss, _real(4)),
}


@dataclass
class Batch:
    """What a penalty is called with, samples in any order; the leaves want gradients."""

    loss: nn.Module | Callable[[Tensor, Tensor], Tensor]
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    domains: Tensor
    num_domains: int
    mask: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.features, self.weight, self.bias) if leaf is not None]

    @property
    def logits(self) -> Tensor:
        return F.linear(self.features, self.weight, self.bias)

    def widened(self) -> "Batch":
        """The same batch in float64, for the oracle; gradients still reach these leaves."""
        return replace(
            self,
            loss=copy.deepcopy(self.loss).double() if isinstance(self.loss, nn.Module) else self.loss,
            features=self.features.double(),
            weight=self.weight.double(),
            bias=None if self.bias is None else self.bias.double(),
            targets=self.targets.double() if self.targets.is_floating_point() else self.targets,
        )

    @property
    def head(self) -> nn.Linear:
        num_classes, num_features = self.weight.shape
        return nn.Linear(num_features, num_classes, bias=self.bias is not None, dtype=self.weight.dtype)


def draw_batch(
    case: str | LossCase,
    dtype: torch.dtype = torch.float64,
    *,
    sizes: tuple[int, ...] = SIZES,
    num_features: int = 5,
    bias: bool = True,
    shuffled: bool = True,
    seed: int = 0,
) -> Batch:
    case = LOSSES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    num_samples = sum(sizes)
    targets = case.targets(generator, num_samples, dtype)
    domains = indices_of(sizes)
    if shuffled:
        order = torch.randperm(num_samples, generator=generator)
        targets, domains = targets[order], domains[order]
    return Batch(
        loss=case.loss(dtype),
        features=normal(num_samples, num_features),
        weight=normal(case.num_classes, num_features),
        bias=normal(case.num_classes) if bias else None,
        targets=targets,
        domains=domains,
        num_domains=len(sizes),
        mask=None if case.ignore_index is None else targets != case.ignore_index,
    )


def indices_of(sizes: tuple[int, ...]) -> Tensor:
    """The domain of each sample when samples lie domain after domain."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
