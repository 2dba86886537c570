"""An analysis (:meth:`fishr.analysis.Analysis.as_dict`) told in words and tables."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

QUANTITIES = {
    "gradient": "gradient",
    "variance": "gradient variance",
    "fisher": "Fisher diagonal",
    "hessian": "Hessian diagonal",
}

DOMAIN_COLUMNS = ("domain", "in training", "samples", "risk", "accuracy", "gradient", "correlation")
PAIR_COLUMNS = ("domains", *QUANTITIES.values())


def domain_rows(layer: Mapping[str, Any], roles: Mapping[str, str]) -> list[tuple[str, ...]]:
    """A row for each domain: :data:`DOMAIN_COLUMNS`."""
    return [
        (
            name,
            roles.get(name, ""),
            f"{domain['samples']:,}",
            f"{domain['risk']:.3f}",
            f"{100 * domain['accuracy']:.1f}",
            f"{domain['norms']['gradient']:.3g}",
            "" if domain["correlation"] is None else f"{domain['correlation']:.3f}",
        )
        for name, domain in layer["domains"].items()
    ]


def pair_rows(layer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each pair of domains: relative distances, and in brackets what sampling alone would give."""
    names = list(layer["domains"])
    return [
        (
            f"{names[first]} – {names[second]}",  # noqa: RUF001
            *(_distance(layer["distances"][quantity], first, second) for quantity in QUANTITIES),
        )
        for first, second in combinations(range(len(names)), 2)
    ]


def compared_domains(model: Mapping[str, Any]) -> list[str]:
    """The domains that training could align: those trained on, where two or more are known, else all."""
    names = list(model["head"]["domains"])
    trained_on = [name for name in names if model["roles"].get(name) == "trained on"]
    return trained_on if len(trained_on) > 1 else names


def inconsistency(head: Mapping[str, Any], kind: str, names: Sequence[str], epsilon: float) -> dict[str, Any] | None:
    """The largest R_B − R_A + ε · ratio over ordered pairs (A, B) of some domains, in nats, and which pair has it.

    Args:
        head: The head's part of an analysis.
        kind: ``"diagonal"`` or ``"exact"``; None is returned where that was not computed.
        names: The domains, at least 2.
        epsilon: ε, in nats.
    """
    found = head["inconsistency"][kind]
    if found is None:
        return None
    scores = np.array(found["gaps"]) + epsilon * np.array(found["ratios"])
    positions = {name: index for index, name in enumerate(head["domains"])}
    pairs = [(first, second) for first in names for second in names if first != second]
    score, (first, second) = max((scores[positions[a], positions[b]], (a, b)) for a, b in pairs)
    return {"score": float(score), "from": first, "to": second}


def mean_distance(head: Mapping[str, Any], quantity: str, kind: str, names: Sequence[str]) -> float:
    """Mean over the pairs of some domains of a distance: ``"distance"``, ``"sampling"`` or ``"relative"``."""
    positions = [index for index, name in enumerate(head["domains"]) if name in names]
    matrix = head["distances"][quantity][kind]
    return fmean(matrix[first][second] for first, second in combinations(positions, 2))


def sentences(model: Mapping[str, Any], epsilon: float) -> list[str]:
    """What the analysis of a model's head says."""
    head, names = model["head"], compared_domains(model)
    told = [head["outlier"]]
    for kind, basis in (("exact", "whole Hessians"), ("diagonal", "diagonals of the Hessians")):
        found = inconsistency(head, kind, names, epsilon)
        if found is not None:
            told.append(
                f"Inconsistency ({basis}, epsilon {epsilon:g}): {found['score']:.3f} nats, by how much the loss of "
                f"{found['to']!r} can lie above that of {found['from']!r} where the latter is content."
            )
    return told


def comparison_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """How the second model differs from the first in what Fishr is to align."""
    first, second = analysis["models"]
    names = compared_domains(first)
    told = []
    for quantity in ("variance", "hessian"):
        before, after = (
            {kind: mean_distance(model["head"], quantity, kind, names) for kind in ("distance", "relative")}
            for model in (first, second)
        )
        told.append(
            f"{QUANTITIES[quantity].capitalize()}: {second['name']} has "
            f"{_times(after['distance'], before['distance'])} the distance between domains of {first['name']}, "
            f"relative to its size {_times(after['relative'], before['relative'])} (over {', '.join(names)})."
        )
    return told


def barrier(line: Mapping[str, Any]) -> dict[str, float]:
    """How far the risk of each domain rises between two models above the straight line between their risks, in nats."""
    positions = np.array(line["positions"])
    between = (positions >= 0) & (positions <= 1)
    barriers = {}
    for name, risks in line["risks"].items():
        risk = np.array(risks)[between]
        straight = np.interp(positions[between], [0, 1], [risk[0], risk[-1]])
        barriers[name] = float((risk - straight).max())
    return barriers


def _distance(between: Mapping[str, Any], first: int, second: int) -> str:
    distance, sampling, relative = (between[kind][first][second] for kind in ("distance", "sampling", "relative"))
    noise = relative * sampling / distance if distance > 0 else 0.0
    return f"{relative:.2f} ({noise:.2f})"


def _times(value: float, reference: float) -> str:
    return f"{value / reference:.2f} times" if reference > 0 and math.isfinite(value) else "no multiple of"
