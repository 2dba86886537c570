"""Figures of an analysis, drawn by plotly."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pyarrow as pa
import pyarrow.compute as pc
from plotly.subplots import make_subplots

from fishr.errors import ConfigError
from fishr.reports.analysis import QUANTITIES, inconsistency, inconsistency_kind, mean_distance
from fishr.reports.palette import DASHES, PALETTE

MOST_POINTS = 1000
"""Weights that a scatter plot shows of a domain, evenly spread over all."""

ROW, WIDTH = 360, 1000
"""Pixels."""

GAP = 0.15
"""Between two rows, as a share of the figure."""

LOGARITHMIC = {"type": "log", "dtick": "D2", "tickformat": "~g"}
"""An axis over few decades: 1, 2 and 5 of each."""

LEVELS, LEAST_RISK = 20, 1e-12
"""Contours of a plane, on a logarithmic scale."""


def figures_of(analysis: Mapping[str, Any], weights: pa.Table) -> dict[str, go.Figure]:
    """All figures that there are data for, by name.

    Args:
        analysis: What :meth:`fishr.analysis.Analysis.as_dict` returns.
        weights: What :meth:`fishr.analysis.Analysis.weights` returns.
    """
    figures = {"distances": distances_figure(analysis), "curvature": curvature_figure(analysis, weights)}
    if any(model["checkpoints"] for model in analysis["models"]):
        figures["checkpoints"] = checkpoints_figure(analysis)
    if analysis["line"] is not None:
        figures["line"] = line_figure(analysis)
    if analysis["models"][0]["plane"] is not None:
        figures["plane"] = plane_figure(analysis)
    return figures


def distances_figure(analysis: Mapping[str, Any]) -> go.Figure:
    """Relative distances between the domains' gradient variances and Hessian diagonals, a row for each model."""
    models, shown = analysis["models"], ("variance", "hessian")
    titles = [f"{QUANTITIES[quantity]}, {_text(model['name'])}" for model in models for quantity in shown]
    figure = make_subplots(len(models), 2, subplot_titles=titles, horizontal_spacing=0.2, vertical_spacing=GAP)
    for row, model in enumerate(models, 1):
        names = [_text(name) for name in model["head"]["domains"]]
        for column, quantity in enumerate(shown, 1):
            matrix = np.array(model["head"]["distances"][quantity]["relative"])
            heat = go.Heatmap(x=names, y=names, z=matrix, texttemplate="%{z:.2f}", coloraxis="coloraxis")
            figure.add_trace(heat, row, column)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 2**0.5})
    return _laid_out(figure, "Distance between domains, relative to size", len(models))


def curvature_figure(analysis: Mapping[str, Any], weights: pa.Table) -> go.Figure:
    """The head's gradient variance against its Hessian's diagonal, a row for each model, a column for each domain.

    Weights for which one of them is zero are not on the logarithmic axes.
    """
    models = analysis["models"]
    domains = list(models[0]["head"]["domains"])
    titles = []
    for model in models:
        for name in domains:
            value = model["head"]["domains"][name]["correlation"]
            said = "no correlation" if value is None else f"linear correlation {value:.3f}"
            titles.append(f"{_text(name)}: {said}")
    figure = make_subplots(
        len(models), len(domains), subplot_titles=titles, shared_xaxes="all", shared_yaxes="all", vertical_spacing=GAP
    )
    for row, model in enumerate(models, 1):
        for column, name in enumerate(domains, 1):
            points = weights.filter(
                (pc.field("layer") == model["head"]["layer"])
                & (pc.field("model") == model["name"])
                & (pc.field("domain") == name)
            )
            points = points.take(np.unique(np.linspace(0, len(points) - 1, MOST_POINTS).astype(np.int64)))
            variance, hessian = points["variance"].to_numpy(), points["hessian"].to_numpy()
            drawn = (variance > 0) & (hessian > 0)
            marks = go.Scatter(
                x=hessian[drawn],
                y=variance[drawn],
                mode="markers",
                marker={"size": 4, "color": PALETTE[row - 1], "opacity": 0.6},
                name=_text(model["name"]),
                showlegend=column == 1,
            )
            figure.add_trace(marks, row, column)
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_xaxes(title_text="Hessian diagonal", row=len(models))
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_yaxes(title_text="gradient variance", col=1)
    return _laid_out(figure, "Gradient variance and curvature of each weight of the head", len(models))


def checkpoints_figure(analysis: Mapping[str, Any]) -> go.Figure:
    """Over the checkpoints: accuracy, and of the compared domains inconsistency and distances."""
    names, kind = analysis["compared"], inconsistency_kind(analysis)
    others = [name for name in analysis["models"][0]["head"]["domains"] if name not in names]
    panels = [f"mean accuracy on {_text(', '.join(names))}" + " (others: dashed)" * bool(others), "inconsistency"]
    panels += [f"distance of {QUANTITIES[quantity]}s" for quantity in ("variance", "hessian")]
    figure = make_subplots(2, 2, subplot_titles=panels, vertical_spacing=GAP)
    for color, model in zip(PALETTE, analysis["models"], strict=False):
        steps = [checkpoint["step"] for checkpoint in model["checkpoints"]]
        heads = [checkpoint["head"] for checkpoint in model["checkpoints"]]
        series = [(1, 1, [_mean_accuracy(head, names) for head in heads], "solid")]
        if others:
            series.append((1, 1, [_mean_accuracy(head, others) for head in heads], "dash"))
        series.append((1, 2, [inconsistency(head, kind, names)["score"] for head in heads], "solid"))
        for column, quantity in enumerate(("variance", "hessian"), 1):
            values = [mean_distance(head, quantity, "distance", names) for head in heads]
            series.append((2, column, values, "solid"))
        for number, (row, column, values, dash) in enumerate(series):
            trace = go.Scatter(
                x=steps,
                y=values,
                line={"color": color, "dash": dash},
                mode="lines+markers",
                name=_text(model["name"]),
                showlegend=number == 0,
            )
            figure.add_trace(trace, row, column)
    figure.update_xaxes(title_text="step", row=2)
    figure.update_yaxes(tickformat=".0%", row=1, col=1)
    figure.update_yaxes(LOGARITHMIC | {"title": "nats"}, row=1, col=2)
    figure.update_yaxes(LOGARITHMIC, row=2)
    return _laid_out(figure, "Over the checkpoints of the run", 2)


def line_figure(analysis: Mapping[str, Any]) -> go.Figure:
    """Risk of each domain along the line between two models."""
    line, figure = analysis["line"], go.Figure()
    for position, (name, risks) in enumerate(line["risks"].items()):
        style = {"color": PALETTE[position % len(PALETTE)], "dash": DASHES[position // len(PALETTE) % len(DASHES)]}
        figure.add_trace(go.Scatter(x=line["positions"], y=risks, name=_text(name), line=style, mode="lines"))
    first, second = (_text(model["name"]) for model in analysis["models"])
    figure.add_vline(0, line_dash="dot", annotation_text=first, annotation_position="top right")
    figure.add_vline(1, line_dash="dot", annotation_text=second, annotation_position="top right")
    figure.update_xaxes(title_text="position between the models")
    figure.update_yaxes(LOGARITHMIC | {"title": "risk (nats)"})
    return _laid_out(figure, "Risk along the line between the models", 1)


def plane_figure(analysis: Mapping[str, Any]) -> go.Figure:
    """Risk of each domain in the random plane around each model, on a logarithmic scale."""
    models = analysis["models"]
    domains = list(models[0]["plane"]["risks"])
    titles = [f"{_text(name)}, {_text(model['name'])}" for model in models for name in domains]
    figure = make_subplots(
        len(models),
        len(domains),
        subplot_titles=titles,
        shared_xaxes="all",
        shared_yaxes="all",
        vertical_spacing=GAP,
    )
    risks = [[np.array(model["plane"]["risks"][name], dtype=float).T for name in domains] for model in models]
    heights = np.log10(np.maximum(risks, LEAST_RISK))  # [model, domain, y, x]; not a number where the risk is none
    low, high = np.nanmin(heights), np.nanmax(heights)
    contours = {"start": low, "end": high, "size": max(high - low, LEAST_RISK) / LEVELS}
    for row, model in enumerate(models, 1):
        positions = model["plane"]["positions"]
        for column in range(1, len(domains) + 1):
            surface = heights[row - 1, column - 1]
            figure.add_trace(
                go.Contour(x=positions, y=positions, z=surface, contours=contours, coloraxis="coloraxis"), row, column
            )
    ticks = np.linspace(low, high, 6)
    bar = {"title": "risk (nats)", "tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "colorbar": bar, "cmin": low, "cmax": high})
    return _laid_out(figure, "Risk in a random plane; the network is in its middle", len(models))


def write_images(folder: Path, figures: Mapping[str, go.Figure], kinds: Sequence[str]) -> None:
    """Each figure as a file of each kind, ``png`` or ``svg``, named by it.

    Raises:
        ConfigError: kaleido, or the browser it draws with, is missing or failed.
    """
    wanted = [(figure, folder / f"{name}.{kind}") for name, figure in figures.items() for kind in kinds]
    if not wanted:
        return
    drawn, files = zip(*wanted, strict=True)
    try:
        plotly.io.write_images(  # all by one browser
            list(drawn),
            list(files),
            width=[figure.layout.width for figure in drawn],
            height=[figure.layout.height for figure in drawn],
        )
    except Exception as error:  # kaleido's have no class in common
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"figures cannot be drawn as {' and '.join(kinds)} ({reason}): it needs pip install 'fishr[figures]', and "
            "Chrome or Chromium"
        ) from error


def _mean_accuracy(head: Mapping[str, Any], names: Sequence[str]) -> float:
    return fmean(head["domains"][name]["accuracy"] for name in names)


def _laid_out(figure: go.Figure, title: str, rows: int) -> go.Figure:
    return figure.update_layout(
        title_text=title,
        template="plotly_white",
        colorway=PALETTE,
        width=WIDTH,
        height=ROW * rows + 100,
        legend={"orientation": "h", "yanchor": "top", "y": -0.12 if rows > 1 else -0.2},
    )


def _text(name: str) -> str:
    """A name as plotly shows it as it is."""
    return escape(name, quote=False)  # plotly does not know the entities of quotes
