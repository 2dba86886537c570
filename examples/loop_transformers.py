"""FishrPenalty in Hugging Face's Trainer: a small ResNet on Colored Digits with and without it.

    python examples/loop_transformers.py

One short run of each: the seed alone changes the accuracy on the held-out domain by as much as the penalty.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from colored_digits import TRAINING, DomainsInTurn, report, training_samples
from fishr import FishrPenalty
from fishr.nn import GradientBalance

EPOCHS = 3
SWITCH_ON, RAMP = 0.3, 0.05
"""Shares of the run: when the penalty begins to act; how long its strength is measured before, and grows after."""


class FishrTrainer(Trainer):
    """Cross-entropy and the Fishr penalty of the model's head, its last linear layer."""

    def __init__(self, *arguments: Any, num_domains: int, with_penalty: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.args.gradient_accumulation_steps > 1:
            raise ValueError("the penalty of a batch is not the mean over its parts: gradient_accumulation_steps > 1")
        self.with_penalty = with_penalty
        self.head = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        self.head.register_forward_pre_hook(self.keep_features)
        # Submodules of the model: its checkpoints hold what they remember.
        self.model.penalty = FishrPenalty(self.head, num_domains)
        self.model.balance = GradientBalance(strength=0.5).to(self.model.device)

    def keep_features(self, head: nn.Module, inputs: tuple[Tensor]) -> None:
        (self.features,) = inputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        labels, domains = inputs.pop("labels"), inputs.pop("domains")
        outputs = model(**inputs)  # in bfloat16
        features = self.features.float()
        logits = self.head(features)  # once more, in float32: autocast is on in the model alone
        loss = F.cross_entropy(logits, labels)
        if model.training:
            # From the first step on: the moving average is warm when the penalty is switched on.
            penalty = self.model.penalty(features, logits, labels, domains)
            step, steps = self.state.global_step, self.state.max_steps
            switch_on, ramp = round(SWITCH_ON * steps), round(RAMP * steps)
            if step >= switch_on - ramp:
                self.model.balance.observe(features, loss, penalty)
            if self.with_penalty and step >= switch_on:
                loss = loss + min(1.0, (step - switch_on + 1) / ramp) * self.model.balance.weight() * penalty
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        sampler = DomainsInTurn(domains=self.train_dataset.tensors[2])
        batch_size = self.args.per_device_train_batch_size
        loader = DataLoader(self.train_dataset, batch_size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def collate(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """What the model takes, the labels, and the domain of each sample."""
    inputs, targets, domains = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"pixel_values": inputs.view(-1, 2, 8, 8), "labels": targets, "domains": domains}


def trainer(folder: Path, epochs: int, *, with_penalty: bool) -> FishrTrainer:
    """Writes a checkpoint after each epoch; to continue from the last, ``train(resume_from_checkpoint=True)``."""
    set_seed(0)
    config = ResNetConfig(
        num_channels=2, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return FishrTrainer(
        ResNetForImageClassification(config),
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=128,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,  # "domains" is no argument of the model
            save_strategy="epoch",
        ),
        data_collator=collate,
        train_dataset=training_samples(),
        num_domains=len(TRAINING),
        with_penalty=with_penalty,
    )


def main(epochs: int = EPOCHS) -> None:
    for name, with_penalty in (("ERM", False), ("Fishr", True)):
        with tempfile.TemporaryDirectory() as folder:
            trained = trainer(Path(folder), epochs, with_penalty=with_penalty)
            trained.train()
        model = trained.model.eval()
        del model.penalty, model.balance  # they are for training alone: model.save_pretrained(...) leaves no trace
        report(name, lambda inputs, model=model: model(inputs.view(-1, 2, 8, 8)).logits)


if __name__ == "__main__":
    main()
