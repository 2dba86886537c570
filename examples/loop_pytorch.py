"""FishrPenalty in a plain PyTorch loop: Colored Digits with and without it.

    python examples/loop_pytorch.py

One short run of each: the seed alone changes the accuracy on the held-out domain by as much as the penalty.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from colored_digits import TRAINING, DomainsInTurn, report, training_samples
from fishr import FishrPenalty
from fishr.nn import GradientBalance

EPOCHS = 3
SWITCH_ON, RAMP = 0.3, 0.05
"""Shares of the run: when the penalty begins to act; how long its strength is measured before, and grows after."""


def train(*, with_penalty: bool, epochs: int = EPOCHS) -> nn.ModuleDict:
    """A network trained on the training domains, and what the penalty remembers: its state_dict holds all of it."""
    torch.manual_seed(0)
    head = nn.Linear(128, 2)
    model = nn.ModuleDict(
        {
            "featurizer": nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
            "head": head,
            "penalty": FishrPenalty(head, num_domains=len(TRAINING)),
            "balance": GradientBalance(strength=0.5),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    samples = training_samples()
    sampler = DomainsInTurn(domains=samples.tensors[2])
    loader = DataLoader(samples, batch_size=128, sampler=sampler)
    switch_on, ramp = round(SWITCH_ON * epochs * len(loader)), round(RAMP * epochs * len(loader))

    step = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets, domains in loader:
            features = model["featurizer"](inputs)
            logits = model["head"](features)
            risk = F.cross_entropy(logits, targets)
            # From the first step on: the moving average is warm when the penalty is switched on.
            penalty = model["penalty"](features, logits, targets, domains)
            if step >= switch_on - ramp:
                model["balance"].observe(features, risk, penalty)
            weight = 0.0
            if with_penalty and step >= switch_on:
                weight = min(1.0, (step - switch_on + 1) / ramp) * model["balance"].weight()
            optimizer.zero_grad()
            (risk + weight * penalty).backward()
            optimizer.step()
            step += 1
    return model


def main(epochs: int = EPOCHS) -> None:
    for name, with_penalty in (("ERM", False), ("Fishr", True)):
        model = train(with_penalty=with_penalty, epochs=epochs)
        report(name, nn.Sequential(model["featurizer"], model["head"]))


if __name__ == "__main__":
    main()
