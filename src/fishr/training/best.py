"""The best weights of a run so far."""

from collections.abc import Mapping

import torch
from torch import Tensor


class BestWeights:
    """Weights of the best checkpoint so far, as a part of the run's checkpoints.

    Attributes:
        step: Updates made when they were kept; None as long as there are none.
        weights: A copy of them.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.weights: dict[str, Tensor] = {}

    def keep(self, weights: Mapping[str, Tensor], step: int) -> None:
        self.step, self.weights = step, {name: value.detach().clone() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        if self.step is None:
            return {}
        return {"step": torch.tensor(self.step), **{f"weights/{name}": value for name, value in self.weights.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; it is copied."""
        if state:
            weights = {name.removeprefix("weights/"): value for name, value in state.items() if name != "step"}
            self.keep(weights, int(state["step"]))
