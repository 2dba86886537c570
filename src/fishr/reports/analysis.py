"""An analysis (:meth:`fishr.analysis.Analysis.as_dict`) told in words and tables."""

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from statistics import fmean
from typing import Any

import numpy as np

QUANTITIES = {
    "gradient": "gradient",
    "variance": "gradient variance",
    "fisher": "Fisher diagonal",
    "hessian": "Hessian diagonal",
    "whole_hessian": "Hessian",
}

DOMAIN_COLUMNS = ("domain", "in training", "samples", "risk", "accuracy", "gradient", "correlation")

CHECKPOINT_ROWS = 10
"""Checkpoints that are told, at most, evenly spread over all."""


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


def pair_columns(layer: Mapping[str, Any]) -> list[str]:
    """Titles of :func:`pair_rows`."""
    return ["domains", *(QUANTITIES[quantity] for quantity in layer["distances"])]


def pair_rows(layer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each pair of domains: relative distances, and in brackets what sampling alone would give."""
    names = list(layer["domains"])
    return [
        (
            f"{names[first]} – {names[second]}",  # noqa: RUF001
            *(_distance(between, first, second) for between in layer["distances"].values()),
        )
        for first, second in combinations(range(len(names)), 2)
    ]


def checkpoint_columns(analysis: Mapping[str, Any]) -> list[str]:
    """Titles of :func:`checkpoint_rows`."""
    return ["step", *_others(analysis), "gradient variance", "Hessian diagonal", "inconsistency"]


def checkpoint_rows(analysis: Mapping[str, Any], model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for some of a model's checkpoints: accuracies on other domains, distances between the compared ones."""
    names, count = analysis["compared"], len(model["checkpoints"])
    chosen = sorted({round(index) for index in np.linspace(0, count - 1, min(count, CHECKPOINT_ROWS))})
    rows = []
    for index in chosen:
        step, head = model["checkpoints"][index]["step"], model["checkpoints"][index]["head"]
        found = inconsistency(head, inconsistency_kind(analysis), names)
        rows.append(
            (
                str(step),
                *(f"{100 * head['domains'][name]['accuracy']:.1f}" for name in _others(analysis)),
                *(f"{mean_distance(head, quantity, 'distance', names):.3g}" for quantity in ("variance", "hessian")),
                f"{found['score']:.3f}",
            )
        )
    return rows


def checkpoint_title(analysis: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """What :func:`checkpoint_rows` shows."""
    others = ", ".join(_others(analysis))
    return (
        f"{model['name']} over its checkpoints: "
        + f"accuracy on {others}; " * bool(others)
        + f"distances, not relative, and inconsistency ({inconsistency_kind(analysis)}) of "
        + ", ".join(analysis["compared"])
    )


def inconsistency_kind(analysis: Mapping[str, Any]) -> str:
    """``"exact"`` where all heads are small enough for it, else ``"diagonal"``."""
    heads = [model["head"] for model in analysis["models"]]
    return "exact" if all(head["inconsistency"]["exact"] is not None for head in heads) else "diagonal"


def inconsistency(head: Mapping[str, Any], kind: str, names: Sequence[str]) -> dict[str, Any]:
    """The largest R_B − R_A + ε · ratio over ordered pairs (A, B) of some domains, in nats, and which pair has it.

    Args:
        head: The head's part of an analysis.
        kind: ``"diagonal"`` or ``"exact"``, which must have been computed.
        names: The domains, at least 2.
    """
    positions = {name: index for index, name in enumerate(head["domains"])}
    scores = head["inconsistency"][kind]["scores"]
    score, pair = max((scores[positions[a]][positions[b]], (a, b)) for a, b in permutations(names, 2))
    return {"score": score, "from": pair[0], "to": pair[1]}


def mean_distance(head: Mapping[str, Any], quantity: str, kind: str, names: Sequence[str]) -> float:
    """Mean over the pairs of some domains of a distance: ``"distance"``, ``"sampling"`` or ``"relative"``."""
    positions = [index for index, name in enumerate(head["domains"]) if name in names]
    matrix = head["distances"][quantity][kind]
    return fmean(matrix[first][second] for first, second in combinations(positions, 2))


def sentences(analysis: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """What the analysis of a model's head says."""
    head, names = model["head"], analysis["compared"]
    told = [head["outlier"]]
    for kind, basis in (("exact", "whole Hessians"), ("diagonal", "diagonals of the Hessians")):
        if head["inconsistency"][kind] is not None:
            found = inconsistency(head, kind, names)
            told.append(
                f"Inconsistency among {', '.join(names)} by {basis}: {found['score']:.3f} nats. So far can the loss of "
                f"{found['to']!r} lie above that of {found['from']!r} within a step that raises the latter by at most "
                f"{analysis['epsilon']:g}."
            )
    return told


def comparison_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """How the second model differs from the first in what Fishr is to align."""
    first, second = analysis["models"]
    names = analysis["compared"]
    told = []
    for quantity in ("variance", "hessian"):
        before, after = (
            {kind: mean_distance(model["head"], quantity, kind, names) for kind in ("distance", "relative")}
            for model in (first, second)
        )
        if before["distance"] == 0:
            continue
        told.append(
            f"{QUANTITIES[quantity].capitalize()}s of {', '.join(names)} lie "
            f"{after['distance'] / before['distance']:.2f} times as far apart in {second['name']} as in "
            f"{first['name']}, relative to their size {after['relative'] / before['relative']:.2f} times."
        )
    return told


def barrier(line: Mapping[str, Any]) -> dict[str, float]:
    """How far the risk of each domain rises between two models above the straight line between their risks, in nats."""
    positions = np.array(line["positions"])
    between = (positions >= 0) & (positions <= 1)
    barriers = {}
    for name, risks in line["risks"].items():
        risk = np.array(risks, dtype=float)[between]
        straight = np.interp(positions[between], [0, 1], [risk[0], risk[-1]])
        barriers[name] = float((risk - straight).max())
    return barriers


def _distance(between: Mapping[str, Any], first: int, second: int) -> str:
    distance, relative = between["distance"][first][second], between["relative"][first][second]
    if between["sampling"] is None:
        return f"{relative:.2f}"
    sampling = between["sampling"][first][second]
    return f"{relative:.2f} ({relative * sampling / distance if distance > 0 else 0:.2f})"


def _others(analysis: Mapping[str, Any]) -> list[str]:
    """The domains that are not compared."""
    return [name for name in analysis["models"][0]["head"]["domains"] if name not in analysis["compared"]]
