"""Every algorithm against what DomainBed's own code computed: predictions after each of five steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fishr.algorithms import ALGORITHMS
from fishr.data import DomainBatch

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {"erm": "ERM", "irm": "IRM", "vrex": "VREx", "fishr": "Fishr"}


def hyperparameters(name: str, published: dict[str, Any]) -> dict[str, Any]:
    """The published hyperparameters under our names."""
    prefix = f"{name}_" if name != "fishr" else ""
    ours = {
        f"{prefix}lambda": "penalty_weight",
        f"{prefix}penalty_anneal_iters": "switch_on",
        "ema": "ema",
    }
    assert set(published) <= set(ours), f"unknown hyperparameter in {published}"
    return {ours[key]: value for key, value in published.items()}


def load_linear(layer: nn.Linear, arrays: dict[str, np.ndarray], name: str) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(arrays[f"{name}.weight"]))
        layer.bias.copy_(torch.from_numpy(arrays[f"{name}.bias"]))


@pytest.mark.parametrize("file", ["domainbed_trajectories", "domainbed_trajectories_ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_follow_the_published_trajectory(name: str, file: str) -> None:
    arrays = dict(np.load(GOLDEN / f"{file}.npz"))
    published = json.loads((GOLDEN / f"{file}.json").read_text())
    common, golden_name = published["common"], NAMES[name]
    inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    sizes = tuple(arrays["domain_sizes"].tolist()) if "domain_sizes" in arrays else (inputs.shape[2],) * 3

    featurizer = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8))
    classifier = nn.Linear(8, 4)
    init = {key.split("/init/")[1]: value for key, value in arrays.items() if key.startswith(f"{golden_name}/init/")}
    load_linear(featurizer[0], init, "featurizer.input")
    load_linear(featurizer[2], init, "featurizer.output")
    load_linear(classifier, init, "classifier")

    cls = ALGORITHMS[name]
    config = cls.Config(
        lr=common["lr"],
        weight_decay=common["weight_decay"],
        **hyperparameters(name, published["algorithms"][golden_name]["hparams"]),
    )
    algorithm = cls(featurizer, classifier, len(sizes), config)
    optimizers = algorithm.configure_optimizers()
    reference = torch.from_numpy(arrays[f"{golden_name}/eval_logits"])
    for step in range(len(inputs)):
        batch = DomainBatch(inputs[step].reshape(-1, 10), targets[step].reshape(-1), sizes)
        losses = algorithm.training_step(batch, step, optimizers)
        with torch.no_grad():
            logits = algorithm(torch.from_numpy(arrays["eval_inputs"]))
        assert (logits - reference[step]).abs().max() / reference.abs().max() <= 1e-4
        published_losses = published["algorithms"][golden_name]["losses"][step]
        if "penalty" in published_losses:
            torch.testing.assert_close(
                losses.terms["penalty"].item(), published_losses["penalty"], rtol=1e-3, atol=1e-6
            )
        if name != "vrex":  # its published nll is the last domain's
            expected = published_losses.get("nll", published_losses["loss"])
            torch.testing.assert_close(losses.terms["risk"].item(), expected, rtol=1e-4, atol=1e-6)
