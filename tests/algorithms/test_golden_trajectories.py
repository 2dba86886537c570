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
NAMES = {
    "erm": "ERM",
    "irm": "IRM",
    "vrex": "VREx",
    "fishr": "Fishr",
    "groupdro": "GroupDRO",
    "coral": "CORAL",
    "mmd": "MMD",
    "sd": "SD",
    "andmask": "ANDMask",
    "sandmask": "SANDMask",
    "iga": "IGA",
    "fish": "Fish",
    "ib-erm": "IB_ERM",
    "ib-irm": "IB_IRM",
    "eqrm": "EQRM",
    "rsc": "RSC",
    "dann": "DANN",
    "cdann": "CDANN",
}
HYPERPARAMETERS: dict[str, dict[str, str]] = {
    "irm": {"irm_lambda": "penalty_weight", "irm_penalty_anneal_iters": "switch_on"},
    "vrex": {"vrex_lambda": "penalty_weight", "vrex_penalty_anneal_iters": "switch_on"},
    "fishr": {"lambda": "penalty_weight", "penalty_anneal_iters": "switch_on", "ema": "ema"},
    "groupdro": {"groupdro_eta": "eta"},
    "coral": {"mmd_gamma": "penalty_weight"},
    "mmd": {"mmd_gamma": "penalty_weight"},
    "sd": {"sd_reg": "penalty_weight"},
    "andmask": {"tau": "tau"},
    "sandmask": {"tau": "tau", "k": "k"},
    "iga": {"penalty": "penalty_weight"},
    "fish": {"meta_lr": "meta_lr"},
    "ib-erm": {"ib_lambda": "penalty_weight", "ib_penalty_anneal_iters": "switch_on"},
    "ib-irm": {
        "irm_lambda": "penalty_weight",
        "irm_penalty_anneal_iters": "switch_on",
        "ib_lambda": "ib_weight",
        "ib_penalty_anneal_iters": "ib_switch_on",
    },
    "eqrm": {"eqrm_quantile": "quantile", "eqrm_burnin_iters": "burn_in", "eqrm_lr": "lr_after"},
    "rsc": {"rsc_f_drop_factor": "feature_drop", "rsc_b_drop_factor": "batch_drop"},
    "dann": (
        adversarial := {
            "lambda": "adversary_weight",
            "weight_decay_d": "discriminator_weight_decay",
            "d_steps_per_g_step": "discriminator_steps",
            "grad_penalty": "gradient_penalty",
            "beta1": "beta1",
            "lr_d": "discriminator_lr",
            "lr_g": "lr",
            "weight_decay_g": "weight_decay",
        }
    ),
    "cdann": adversarial,
}
"""Published hyperparameters to ours."""

LOSSES: dict[str, dict[str, str]] = {
    "vrex": {"loss": "total", "penalty": "penalty"},  # its nll is the last domain's
    "fishr": {"loss": "total", "nll": "risk", "penalty": "penalty"},
    "irm": {"loss": "total", "nll": "risk", "penalty": "penalty"},
    "coral": {"loss": "risk", "penalty": "penalty"},
    "mmd": {"loss": "risk", "penalty": "penalty"},
    "sd": {"loss": "risk", "penalty": "penalty"},
    "iga": {"loss": "risk", "penalty": "penalty"},
    "fish": {},  # its loss is the last domain's
    "ib-erm": {"loss": "total", "IB_penalty": "penalty"},
    "ib-irm": {"loss": "total", "IRM_penalty": "penalty", "IB_penalty": "bottleneck"},
    "dann": {"gen_loss": "total", "disc_loss": "total"},
    "cdann": {"gen_loss": "total", "disc_loss": "total"},
}
"""Published losses to ours, where they are more than the total."""


def load_linear(layer: nn.Linear, arrays: dict[str, np.ndarray], name: str) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(arrays[f"{name}.weight"]))
        layer.bias.copy_(torch.from_numpy(arrays[f"{name}.bias"]))


@pytest.mark.parametrize("file", ["domainbed_trajectories", "domainbed_trajectories_ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_follow_the_published_trajectory(name: str, file: str) -> None:
    arrays = dict(np.load(GOLDEN / f"{file}.npz"))
    published = json.loads((GOLDEN / f"{file}.json").read_text())
    common, of_algorithm = published["common"], published["algorithms"][NAMES[name]]
    inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    sizes = tuple(arrays["domain_sizes"].tolist()) if "domain_sizes" in arrays else (inputs.shape[2],) * 3
    init = {key.split("/init/")[1]: value for key, value in arrays.items() if key.startswith(f"{NAMES[name]}/init/")}
    init |= {key.replace("network.net.0", "featurizer"): value for key, value in init.items() if ".net.0." in key}
    init |= {key.replace("network.net.1", "classifier"): value for key, value in init.items() if ".net.1." in key}

    featurizer = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8))
    classifier = nn.Linear(8, 4)
    load_linear(featurizer[0], init, "featurizer.input")
    load_linear(featurizer[2], init, "featurizer.output")
    load_linear(classifier, init, "classifier")

    cls = ALGORITHMS[name]
    hparams: dict[str, Any] = {"lr": common["lr"], "weight_decay": common["weight_decay"]}
    hparams |= {HYPERPARAMETERS[name][key]: value for key, value in of_algorithm["hparams"].items()}
    if name in ("dann", "cdann"):
        hparams |= {"discriminator_width": common["mlp_width"], "discriminator_depth": 2}
    algorithm = cls(featurizer, classifier, len(sizes), cls.Config(**hparams))
    if name in ("dann", "cdann"):
        load_linear(algorithm.discriminator[0], init, "discriminator.input")
        load_linear(algorithm.discriminator[-1], init, "discriminator.output")
    if name == "cdann":
        algorithm.class_embeddings.load_state_dict({"weight": torch.from_numpy(init["class_embeddings.weight"])})

    optimizers = algorithm.configure_optimizers()
    reference = torch.from_numpy(arrays[f"{NAMES[name]}/eval_logits"])
    for step in range(len(inputs)):
        batch = DomainBatch(inputs[step].reshape(-1, 10), targets[step].reshape(-1), sizes)
        losses = algorithm.training_step(batch, step, optimizers)
        with torch.no_grad():
            logits = algorithm(torch.from_numpy(arrays["eval_inputs"]))
        assert (logits - reference[step]).abs().max() / reference.abs().max() <= 1e-4
        values = {"total": losses.total, **losses.terms}
        names = LOSSES.get(name, {"loss": "total"})
        for theirs, expected in of_algorithm["losses"][step].items():
            if theirs in names:
                torch.testing.assert_close(values[names[theirs]].item(), expected, rtol=1e-3, atol=1e-6)


def test_the_published_trajectories_are_all_followed() -> None:
    published = json.loads((GOLDEN / "domainbed_trajectories.json").read_text())["algorithms"]
    assert sorted(NAMES.values()) == sorted(published)
