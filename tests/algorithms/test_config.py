import dataclasses
import re
from typing import Any

import pytest
from torch import nn

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import AlgorithmConfig
from fishr.algorithms.erm import ERM
from fishr.algorithms.fishr import Fishr, FishrConfig
from fishr.algorithms.irm import IRMConfig
from fishr.algorithms.penalized import PenalizedConfig
from fishr.algorithms.vrex import VRExConfig
from fishr.errors import ConfigError
from fishr.space import Choice, Distribution, LogUniform, Uniform, draw

KINDS = ("vectors", "small_images", "images")
CONFIGS = {name: ALGORITHMS[name].Config for name in ALGORITHMS}


def problems_of(config: type[AlgorithmConfig], **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    return str(caught.value).split("; ")


# Values


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"batch_size": 8.0}, "batch_size must be a whole number or null, got 8.0"),
        ({"batch_size": True}, "batch_size must be a whole number or null, got True"),
        ({"switch_on": "0.3"}, "switch_on must be a whole number or a number, got '0.3'"),
        ({"rescale": 1}, "rescale must be true or false, got 1"),
        ({"reset_optimizer": None}, "reset_optimizer must be true or false, got None"),
        ({"ema": "none"}, "ema must be a number or null, got 'none'"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum' or null, got 'max'"),
        ({"variant": "std"}, "variant must be one of 'variance', 'second_moment', 'covariance', got 'std'"),
        ({"variant": ["variance"]}, "variant must be one of .*, got ['variance']"),
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"lr": -1e-3}, "lr must be above 0, got -0.001"),
        ({"batch_size": 0}, "batch_size must be at least 1, or null for all samples, got 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"l2": -0.5}, "l2 must be at least 0, got -0.5"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in [0, 1), got -0.1"),
        ({"dropout": None}, "dropout must be a number, got None"),
        ({"penalty_weight": -1.0}, "penalty_weight must be at least 0, got -1.0"),
        ({"weight_before": -1.0}, "weight_before must be at least 0, got -1.0"),
        ({"switch_on": -1}, "switch_on must be at least 0, got -1"),
        ({"switch_on": -0.1}, "switch_on must be at least 0, got -0.1"),
    ],
)
def test_a_value_that_cannot_be(values: dict[str, Any], problem: str) -> None:
    (said,) = problems_of(FishrConfig, **values)
    assert re.fullmatch(re.escape(problem).replace(r"\.\*", ".*"), said)


@pytest.mark.parametrize(
    ("config", "values", "problem"),
    [
        (IRMConfig, {"estimator": "half"}, "estimator must be one of 'split', 'full', got 'half'"),
        (VRExConfig, {"reduction": None}, "reduction must be one of 'mean', 'sum', got None"),
    ],
)
def test_a_value_of_another_algorithm(config: type[AlgorithmConfig], values: dict[str, Any], problem: str) -> None:
    assert problems_of(config, **values) == [problem]


def test_all_problems_come_at_once() -> None:
    assert problems_of(FishrConfig, lr="x", batch_size=1.5, rescale="yes") == [
        "lr must be a number, got 'x'",
        "batch_size must be a whole number or null, got 1.5",
        "rescale must be true or false, got 'yes'",
    ]
    assert problems_of(FishrConfig, lr=-1, batch_size=-1, l2=-1) == [
        "lr must be above 0, got -1",
        "batch_size must be at least 1, or null for all samples, got -1",
        "l2 must be at least 0, got -1",
    ]
    assert problems_of(FishrConfig, penalty_weight=-1, switch_on=-1) == [
        "penalty_weight must be at least 0, got -1",
        "switch_on must be at least 0, got -1",
    ]


def test_problems_of_base_and_subclass_come_at_once() -> None:
    assert problems_of(FishrConfig, lr=-1, penalty_weight=-1) == [
        "lr must be above 0, got -1",
        "penalty_weight must be at least 0, got -1",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "l2", "dropout", "penalty_weight", "switch_on", "ema"])
def test_a_number_must_be_finite(name: str, value: float) -> None:
    """``--set lr=NaN`` reads as a number."""
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value}"):
        FishrConfig(**{name: value})


@pytest.mark.parametrize("ema", [1.0, 1.5, -0.1])
def test_a_decay_lies_below_one(ema: float) -> None:
    with pytest.raises(ConfigError, match=rf"ema must lie in \[0, 1\), got {ema}"):
        FishrConfig(ema=ema)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 1},
        {"batch_size": None},
        {"batch_size": 1},
        {"weight_decay": 0, "l2": 0, "penalty_weight": 0, "weight_before": 0},
        {"switch_on": 0},
        {"switch_on": 1.5},
        {"ema": None, "reduction": None},
        {"ema": 0},
        {"dropout": 0},
        {"dropout": 0.999},
    ],
)
def test_a_value_at_the_edge(values: dict[str, Any]) -> None:
    config = FishrConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FishrConfig().lr = 1.0


# Changes


def test_changes_make_a_copy() -> None:
    original = FishrConfig()
    changed = original.updated({"lr": 0.5, "ema": 0.9})
    assert (changed.lr, changed.ema, changed.batch_size) == (0.5, 0.9, original.batch_size)
    assert original == FishrConfig()
    assert type(changed) is FishrConfig


@pytest.mark.parametrize(
    ("name", "hint"),
    [("penalty_wieght", "penalty_weight"), ("learning_rate_lr", None), ("batchsize", "batch_size"), ("emma", "ema")],
)
def test_an_unknown_hyperparameter_suggests_the_nearest(name: str, hint: str | None) -> None:
    suggestion = f"; did you mean {hint!r}?" if hint else ""
    known = ", ".join(sorted(field.name for field in dataclasses.fields(FishrConfig)))
    with pytest.raises(ConfigError) as caught:
        FishrConfig().updated({name: 1})
    assert str(caught.value) == f"unknown hyperparameter {name!r}{suggestion} (known: {known})"


def test_a_penalty_weight_is_not_erms() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown hyperparameter 'penalty_weight' \(known: batch_size, dropout, l2, lr, we"
    ):
        ERM.Config().updated({"penalty_weight": 1.0})


def test_changes_are_checked() -> None:
    with pytest.raises(ConfigError, match="lr must be above 0, got 0"):
        FishrConfig().updated({"lr": 0})


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_values_and_back(name: str) -> None:
    config = CONFIGS[name](lr=0.25, batch_size=None)
    assert CONFIGS[name](**config.as_dict()) == config
    assert config.as_dict()["lr"] == 0.25


# Defaults


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_defaults_of_each_kind(name: str) -> None:
    for kind, lr, batch_size in (("vectors", 1e-3, 64), ("small_images", 1e-3, 64), ("images", 5e-5, 32)):
        config = CONFIGS[name].default(kind)
        assert type(config) is CONFIGS[name]
        if name == "arm" and kind == "images":
            batch_size = 8
        assert (config.lr, config.batch_size) == (lr, batch_size)
        assert (config.weight_decay, config.l2, config.dropout) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "weight", "switch_on", "before"),
    [
        ("fishr", 1000, 1500, 0),
        ("irm", 100, 500, 1),
        ("vrex", 10, 500, 1),
        ("ib-erm", 100, 500, 0),
        ("ib-irm", 100, 500, 1),
        ("coral", 1, 0, 0),
        ("mmd", 1, 0, 0),
        ("sd", 0.1, 0, 0),
        ("iga", 1000, 0, 0),
    ],
)
def test_published_penalties(name: str, weight: float, switch_on: int, before: float) -> None:
    config = CONFIGS[name]()
    assert (config.penalty_weight, config.weight_before) == (weight, before)
    assert config.switch_on_step(5000) == switch_on
    assert (config.rescale, config.reset_optimizer) == (False, True)


def test_fishrs_own_defaults_are_the_variants() -> None:
    head = nn.Linear(3, 2)
    for variant, decay, reduction in (("variance", 0.95, "mean"), ("second_moment", 0.95, "mean")):
        penalty = Fishr(nn.Identity(), head, 2, FishrConfig(variant=variant, switch_on=1)).penalty
        assert (penalty.average.decay, penalty.reduction) == (decay, reduction)
    penalty = Fishr(nn.Identity(), head, 2, FishrConfig(variant="covariance", switch_on=1)).penalty
    assert (type(penalty.average), penalty.reduction) == (nn.Identity, "sum")


# Search spaces


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_draw_is_a_config(name: str, kind: str) -> None:
    config = CONFIGS[name]
    space = config.space(kind)
    assert set(space) <= {field.name for field in dataclasses.fields(config)}
    drawn = [config.default(kind).updated(draw(space, seed)) for seed in range(50)]
    assert len({each.lr for each in drawn}) == 50


SWITCH_ON = LogUniform(1 / 5000, 2)
"""DomainBed's 10^U(0, 4), as a share of 5,000."""

SMALL = {
    "lr": LogUniform(10**-4.5, 10**-2.5),
    "weight_decay": Choice((0.0,)),
    "batch_size": LogUniform(2**3, 2**9, integer=True),
}
IMAGES = {
    "lr": LogUniform(1e-5, 10**-3.5),
    "weight_decay": LogUniform(1e-6, 1e-2),
    "batch_size": LogUniform(2**3, 2**5.5, integer=True),
    "dropout": Choice((0.0, 0.1, 0.5)),
}
ADVERSARIAL = {
    "adversary_weight": LogUniform(1e-2, 1e2),
    "discriminator_steps": LogUniform(1, 8, integer=True),
    "discriminator_weight_decay": LogUniform(1e-6, 1e-2),
    "discriminator_width": LogUniform(2**6, 2**10, integer=True),
    "discriminator_depth": Choice((3, 4, 5)),
    "discriminator_dropout": Choice((0.0, 0.1, 0.5)),
    "gradient_penalty": LogUniform(1e-2, 1e1),
    "beta1": Choice((0.0, 0.5)),
}
SPACES: dict[str, dict[str, Distribution]] = {
    "erm": {},
    "fishr": {"penalty_weight": LogUniform(1e1, 1e4), "switch_on": Uniform(0.0, 1.0), "ema": Uniform(0.90, 0.99)},
    "irm": {"penalty_weight": LogUniform(1e-1, 1e5), "switch_on": SWITCH_ON},
    "vrex": {"penalty_weight": LogUniform(1e-1, 1e5), "switch_on": SWITCH_ON},
    "groupdro": {"eta": LogUniform(1e-3, 1e-1)},
    "coral": {"penalty_weight": LogUniform(0.1, 10.0)},
    "mmd": {"penalty_weight": LogUniform(0.1, 10.0)},
    "causirl-coral": {"penalty_weight": LogUniform(0.1, 10.0)},
    "causirl-mmd": {"penalty_weight": LogUniform(0.1, 10.0)},
    "mixup": {"alpha": LogUniform(0.1, 10.0)},
    "mldg": {"beta": LogUniform(0.1, 10.0), "num_meta_test": Choice((1, 2))},
    "mtl": {"update_weight": Choice((0.5, 0.9, 0.99, 1.0))},
    "sd": {"penalty_weight": LogUniform(1e-5, 1e-1)},
    "andmask": {"tau": Uniform(0.5, 1.0)},
    "sandmask": {"tau": Uniform(0.0, 1.0), "k": LogUniform(1e-3, 1e5)},
    "iga": {"penalty_weight": LogUniform(1e1, 1e5)},
    "fish": {"meta_lr": Choice((0.05, 0.1, 0.5))},
    "ib-erm": {"penalty_weight": LogUniform(1e-1, 1e5), "switch_on": SWITCH_ON},
    "ib-irm": {
        "penalty_weight": LogUniform(1e-1, 1e5),
        "switch_on": SWITCH_ON,
        "ib_weight": LogUniform(1e-1, 1e5),
        "ib_switch_on": SWITCH_ON,
    },
    "rsc": {"feature_drop": Uniform(0.0, 0.5), "batch_drop": Uniform(0.0, 0.5)},
    "sagnet": {"adversary_weight": LogUniform(1e-2, 1e1)},
    "dann": ADVERSARIAL,
    "cdann": ADVERSARIAL,
    "arm": {},
    "selfreg": {},
    "eqrm": {
        "quantile": Uniform(0.5, 0.99),
        "burn_in": LogUniform(10**2.5 / 5000, 10**3.5 / 5000),
        "lr_after": LogUniform(1e-7, 1e-5),
    },
}
"""DomainBed's, beside those that all share."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPACES)
def test_search_spaces_are_the_published_ones(name: str, kind: str) -> None:
    expected = (IMAGES if kind == "images" else SMALL) | SPACES[name]
    if name in ("dann", "cdann"):
        expected |= {"discriminator_lr": expected["lr"]}
    if name == "arm" and kind == "images":
        expected |= {"batch_size": Choice((8,))}
    assert CONFIGS[name].space(kind) == expected


# Algorithm and config


def test_a_config_of_another_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ERM takes a AlgorithmConfig, got a dict$"):
        ERM(nn.Identity(), nn.Linear(2, 2), 2, {"lr": 1})
    with pytest.raises(ConfigError, match=r"^Fishr takes a FishrConfig, got a PenalizedConfig$"):
        Fishr(nn.Identity(), nn.Linear(2, 2), 2, PenalizedConfig(switch_on=1))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_algorithm_says_where_it_comes_from(name: str) -> None:
    assert re.search(r" \d{4}(, arXiv \d{4}\.\d{4,5})?$", str(ALGORITHMS[name].reference))
