"""What there is to say about an algorithm, taken from its class."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, get_args

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import AlgorithmConfig
from fishr.data.base import Kind
from fishr.errors import ConfigError

STEP_COSTS = "step_costs.json"
"""What benchmarks/algorithms.py measured."""


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter.

    Attributes:
        name: Its name.
        meaning: What it does.
        defaults: Its published default for each kind of data.
        recommended: What to begin with on data of one's own, likewise.
        spaces: What it is drawn from for each kind of data where it is searched.
    """

    name: str
    meaning: str
    defaults: dict[str, Any]
    recommended: dict[str, Any]
    spaces: dict[str, str]


@dataclass(frozen=True)
class Description:
    """An algorithm as its class describes it.

    Attributes:
        name: The name it is looked up by.
        title: Its customary name.
        year: Of publication.
        idea: In one line.
        text: Objective and remarks.
        reference: Citation.
        hyperparameters: Its own first, then those that all share.
        step_costs: Duration of a training step as a multiple of ERM's, for each case that was measured.
    """

    name: str
    title: str
    year: int
    idea: str
    text: str
    reference: str
    hyperparameters: tuple[Hyperparameter, ...]
    step_costs: dict[str, float]


def describe(name: str) -> Description:
    """Describe the algorithm of that name.

    Raises:
        ConfigError: there is none, or it does not say its reference.
    """
    algorithm = ALGORITHMS[name]
    if not hasattr(algorithm, "reference"):
        raise ConfigError(f"algorithm {name!r} does not describe itself: it has no reference")
    idea, _, text = inspect.cleandoc(algorithm.__doc__ or "").partition("\n\n")
    return Description(
        name,
        algorithm.title,
        algorithm.reference.year,
        " ".join(_plain(idea).split()),
        _plain(text),
        str(algorithm.reference),
        tuple(_hyperparameters(algorithm.Config)),
        json.loads(files("fishr.algorithms").joinpath(STEP_COSTS).read_text(encoding="utf-8")).get(name, {}),
    )


def by_kind(values: Mapping[str, Any]) -> str:
    """One value where all kinds of data have the same, else each with its kinds.

    >>> by_kind({"vectors": 0.001, "small_images": 0.001, "images": 5e-5})
    '0.001 for vectors and small images; 5e-05 for images'
    """
    kinds: dict[str, list[str]] = {}
    for kind, value in values.items():
        kinds.setdefault(_value(value), []).append(kind.replace("_", " "))
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{value} for {' and '.join(of_value)}" for value, of_value in kinds.items())


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as --set reads it
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _hyperparameters(config: type[AlgorithmConfig]) -> list[Hyperparameter]:
    meanings = _meanings(config)
    kinds = get_args(Kind)
    defaults = {kind: config.default(kind).as_dict() for kind in kinds}
    recommended = {kind: config.recommended(kind).as_dict() for kind in kinds}
    spaces = {kind: config.space(kind) for kind in kinds}
    shared = [item.name for item in fields(AlgorithmConfig)]
    own = [item.name for item in fields(config) if item.name not in shared]
    return [
        Hyperparameter(
            name,
            meanings.get(name, ""),
            {kind: defaults[kind][name] for kind in kinds},
            {kind: recommended[kind][name] for kind in kinds},
            {kind: str(spaces[kind][name]) for kind in kinds if name in spaces[kind]},
        )
        for name in (*own, *shared)
    ]


def _meanings(config: type[AlgorithmConfig]) -> dict[str, str]:
    """The ``Attributes`` of the docstrings of a config and its bases."""
    meanings: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        _, _, attributes = (inspect.cleandoc(cls.__dict__.get("__doc__") or "")).partition("\nAttributes:\n")
        section = attributes.partition("\n\n")[0]
        for match in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE):
            meanings[match[1]] = " ".join(_plain(match[2]).split())
    return meanings


def _plain(text: str) -> str:
    """Text without the markup of docstrings."""
    return re.sub(r":\w+:`([^`]+)`", r"\1", text).replace("``", "")
