"""FishrPenalty in a LightningModule, in mixed precision: Colored Digits with and without it.

    python examples/loop_lightning.py

One short run of each: the seed alone changes the accuracy on the held-out domain by as much as the penalty.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from colored_digits import TRAINING, DomainsInTurn, report, training_samples
from fishr import FishrPenalty
from fishr.nn import GradientBalance

EPOCHS = 3
SWITCH_ON, RAMP = 0.3, 0.05
"""Shares of the run: when the penalty begins to act; how long its strength is measured before, and grows after."""


class DigitClassifier(lightning.LightningModule):
    """Penalty and balance are submodules: what they remember is in every checkpoint.

    Args:
        steps: Length of the run, the same when it is continued.
        with_penalty: Whether the penalty acts.
    """

    def __init__(self, steps: int, *, with_penalty: bool) -> None:
        super().__init__()
        self.featurizer = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 2)
        self.penalty = FishrPenalty(self.head, num_domains=len(TRAINING))
        self.balance = GradientBalance(strength=0.5)
        self.with_penalty, self.switch_on, self.ramp = with_penalty, round(SWITCH_ON * steps), round(RAMP * steps)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.featurizer(inputs))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        inputs, targets, domains = batch
        features = self.featurizer(inputs)  # in bfloat16
        with torch.autocast(self.device.type, enabled=False):  # from the head on in float32
            features = features.float()
            logits = self.head(features)
            risk = F.cross_entropy(logits, targets)
            # From the first step on: the moving average is warm when the penalty is switched on.
            penalty = self.penalty(features, logits, targets, domains)
            if self.global_step >= self.switch_on - self.ramp:
                self.balance.observe(features, risk, penalty)
            weight = 0.0
            if self.with_penalty and self.global_step >= self.switch_on:
                weight = min(1.0, (self.global_step - self.switch_on + 1) / self.ramp) * self.balance.weight()
            self.log_dict({"risk": risk, "penalty": penalty, "penalty_weight": weight})
            return risk + weight * penalty

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def training_loader() -> DataLoader[tuple[Tensor, ...]]:
    samples = training_samples()
    return DataLoader(samples, batch_size=128, sampler=DomainsInTurn(domains=samples.tensors[2]))


def trainer(folder: Path, epochs: int) -> lightning.Trainer:
    """Writes a checkpoint after each epoch; to continue from one, ``fit(..., ckpt_path=...)``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the samples are in memory
    return lightning.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(epochs: int = EPOCHS) -> None:
    for name, with_penalty in (("ERM", False), ("Fishr", True)):
        lightning.seed_everything(0, verbose=False)
        loader = training_loader()
        model = DigitClassifier(epochs * len(loader), with_penalty=with_penalty)
        with tempfile.TemporaryDirectory() as folder:
            trainer(Path(folder), epochs).fit(model, loader)
        report(name, model)


if __name__ == "__main__":
    main()
