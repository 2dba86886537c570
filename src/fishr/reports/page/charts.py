"""Charts of runs: learning curves, accuracy seen against unseen, hyperparameters."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fishr.records import RunHistory, Split
from fishr.reports.page.parts import Chart, ChartGroup, Figure, Toggle
from fishr.reports.palette import DASHES, GLYPHS, PALETTE
from fishr.reports.render import Table
from fishr.reports.tables import one_line

MOST_POINTS = 2_000
"""Runs that a scatter plot shows, evenly spread over all."""

MOST_CURVES = 200
"""Charts of learning curves; where there were more, only the held-out domains have one."""

TrainDomains = Mapping[str, Sequence[str]]
"""What a run trained on, by its folder, of runs that kept it."""

LOGARITHMIC_FROM = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

MARGIN = {"l": 56, "r": 12, "t": 12, "b": 48}
PERCENT = {"ticksuffix": " %"}
WHOLE = [0, 101]


def held_out_name(domains: Sequence[str]) -> str:
    return " and ".join(domains) or "none"


def styles_of(algorithms: Sequence[str]) -> dict[str, dict[str, str]]:
    """Color, dash and symbol of each algorithm: where colors repeat, the others differ."""
    return {
        name: {
            "color": PALETTE[index % len(PALETTE)],
            "dash": DASHES[index // len(PALETTE) % len(DASHES)],
            "symbol": tuple(GLYPHS)[index % len(GLYPHS)],
        }
        for index, name in enumerate(algorithms)
    }


# Learning curves


def learning_curves(
    histories: Sequence[RunHistory], train_domains: TrainDomains, styles: Mapping[str, Mapping[str, str]]
) -> list[ChartGroup]:
    """A group for each dataset and held-out domain, with a chart for each domain and a line for each algorithm.

    Where that were more than :data:`MOST_CURVES` charts, only those of the held-out domains.
    """
    runs: dict[tuple[str, tuple[str, ...]], list[RunHistory]] = defaultdict(list)
    for history in histories:
        runs[history.dataset, history.test_domains].append(history)
    alone = [key for key in runs if len(key[1]) == 1] or list(runs)
    order = {(run.dataset, name): index for run in reversed(histories) for index, name in enumerate(run.domains)}
    num_curves = sum(len({name for run in runs[key] for name in run.domains}) for key in alone)
    groups = []
    for number, (dataset, held_out) in enumerate(
        sorted(alone, key=lambda key: (key[0], [order[key[0], name] for name in key[1]]))
    ):
        of_group = runs[dataset, held_out]
        algorithms = [name for name in styles if any(run.algorithm == name for run in of_group)]
        domains = [*held_out, *dict.fromkeys(name for run in of_group for name in run.domains if name not in held_out)]
        charts = [
            _curves_on(domain, of_group, train_domains, {name: styles[name] for name in algorithms})
            for domain in (domains if num_curves <= MOST_CURVES or not held_out else held_out)
        ]
        groups.append(
            ChartGroup(
                f"{dataset}, held out: {held_out_name(held_out)}",
                "The line is the mean over the runs of all draws and trials, the band reaches from the lowest to the "
                "highest; steps that not all runs have reached are left out.",
                charts,
                {name: Toggle(styles[name]["color"], GLYPHS[styles[name]["symbol"]]) for name in algorithms},
                folded=number > 0,
            )
        )
    return groups


def _curves_on(
    domain: str, runs: Sequence[RunHistory], train_domains: TrainDomains, styles: Mapping[str, Mapping[str, str]]
) -> Chart:
    on_domain = [run for run in runs if domain in run.domains]
    traces: list[dict[str, Any]] = []
    rows = []
    for algorithm, style in styles.items():
        of_algorithm = [run for run in on_domain if run.algorithm == algorithm]
        if not of_algorithm:
            continue
        steps, low, mean, high = _over_runs(domain, of_algorithm)
        hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "meta": algorithm}
        several = len(of_algorithm) > 1
        if several:
            traces += [
                {"type": "scatter", "x": steps.tolist(), "y": low.tolist(), **hidden},
                {
                    "type": "scatter",
                    "x": steps.tolist(),
                    "y": high.tolist(),
                    **hidden,
                    "fill": "tonexty",
                    "fillcolor": style["color"] + "30",
                },
            ]
        traces.append(
            {
                "type": "scatter",
                "x": steps.tolist(),
                "y": mean.tolist(),
                "mode": "lines+markers",
                "name": escaped(algorithm),
                "meta": algorithm,
                "line": {"color": style["color"], "dash": style["dash"]},
                "marker": {"symbol": style["symbol"], "size": 6},
                "hovertemplate": "%{y:.1f} % at step %{x}",
            }
        )
        for step, least, middle, most in zip(steps.tolist(), low, mean, high, strict=True):
            spread = [f"{least:.1f}", f"{most:.1f}"] if several else ["", ""]
            rows.append([algorithm, str(step), f"{middle:.1f}", *spread])
    return Chart(
        f"{domain} ({_role(domain, on_domain[0], train_domains)})",
        f"Accuracy in % on {domain} over training steps, mean over runs with a band from the lowest to the highest",
        _figure(traces, {"title": "step"}, {"title": "accuracy", **PERCENT}),
        numbers=Table("", ["algorithm", "step", "mean in %", "lowest", "highest"], rows, []),
    )


def _role(domain: str, run: RunHistory, train_domains: TrainDomains) -> str:
    """What a domain was in a run, and the split that is shown of it."""
    if domain in run.test_domains:
        return "held out"
    if domain in run.validated_domains:
        return "trained on, out-split"
    if run.folder in train_domains:
        return "trained on, in-split" if domain in train_domains[run.folder] else "evaluation only"
    return "in-split"


def _over_runs(domain: str, runs: Sequence[RunHistory]) -> tuple[NDArray[Any], ...]:
    """Steps, and lowest, mean and highest accuracy in % at each."""
    all_steps = np.concatenate([run.steps for run in runs])
    all_values = 100 * np.concatenate([run.accuracy(domain, split_of(run, domain)) for run in runs])
    evaluated = np.isfinite(all_values)
    steps, at, counts = np.unique(all_steps[evaluated], return_inverse=True, return_counts=True)
    values = all_values[evaluated]
    low, high = np.full(len(steps), np.inf), np.full(len(steps), -np.inf)
    np.minimum.at(low, at, values)
    np.maximum.at(high, at, values)
    by_all = counts == counts.max(initial=0)
    return steps[by_all], low[by_all], (np.bincount(at, values, len(steps)) / counts)[by_all], high[by_all]


def split_of(run: RunHistory, domain: str) -> Split:
    """The split of a domain that says most at every checkpoint: of training domains what was not trained on."""
    return "out" if domain in run.validated_domains and domain not in run.test_domains else "in"


# All runs


@dataclass(frozen=True)
class Point:
    """A run at its last checkpoint, accuracies in %.

    Attributes:
        run: The run.
        seen: Mean over the training domains, on the out-splits where there are any.
        unseen: On the in-split of the held-out domain.
    """

    run: RunHistory
    seen: float
    unseen: float


def points(histories: Sequence[RunHistory], train_domains: TrainDomains) -> list[Point]:
    """The runs that hold out one domain and say how they did on it and on the others."""
    found = []
    for run in histories:
        seen = [name for name in run.validated_domains if name not in run.test_domains] or train_domains.get(
            run.folder, []
        )
        if len(run.test_domains) == 1 and seen:
            last = int(run.steps.argmax())
            on_seen = np.mean([run.accuracy(name, split_of(run, name))[last] for name in seen])
            found.append(Point(run, 100 * float(on_seen), 100 * float(run.accuracy(run.test_domains[0], "in")[last])))
    return [point for point in found if math.isfinite(point.seen + point.unseen)]


def scatter_of_runs(found: Sequence[Point], styles: Mapping[str, Mapping[str, str]]) -> list[ChartGroup]:
    """For each dataset the accuracy on the held-out domain over that on the training domains, a mark for each run."""
    groups = []
    for dataset, of_dataset in _by_dataset(found).items():
        traces: list[dict[str, Any]] = [
            {
                "type": "scatter",
                "x": [0, 100],
                "y": [0, 100],
                "mode": "lines",
                "line": {"dash": "dot", "color": "#888888", "width": 1},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        ]
        traces += _marks(of_dataset, styles, lambda point: point.seen)
        chart = Chart(
            dataset,
            "Accuracy in % on the held-out domain over the mean on the training domains, a mark for each run",
            _figure(
                traces,
                {"title": "training domains", "range": WHOLE, **PERCENT},
                {"title": "held-out domain", "range": WHOLE, **PERCENT},
            ),
            height=420,
            numbers=_numbers(of_dataset, "training domains", lambda point: f"{point.seen:.1f}"),
        )
        text = (
            "A mark for each run at its last checkpoint. On the dotted line both accuracies are the same: the further "
            f"below it, the more is lost on an unseen domain.{_thinned(of_dataset)}"
        )
        groups.append(ChartGroup(dataset, text, [chart], _toggles(of_dataset, styles)))
    return groups


def hyperparameters(found: Sequence[Point], styles: Mapping[str, Mapping[str, str]]) -> list[ChartGroup]:
    """For each dataset the accuracy on the held-out domain over each hyperparameter that differs between runs."""
    groups = []
    for dataset, of_dataset in _by_dataset(found).items():
        charts = []
        for name in dict.fromkeys(name for point in of_dataset for name in point.run.hparams):
            with_value = [point for point in of_dataset if _is_number(point.run.hparams.get(name))]
            values: dict[str, set[float]] = defaultdict(set)
            for point in with_value:
                values[point.run.algorithm].add(point.run.hparams[name])
            if any(len(of_algorithm) > 1 for of_algorithm in values.values()):
                charts.append(_over_hyperparameter(name, with_value, styles))
        if charts:
            text = f"A mark for each run at its last checkpoint.{_thinned(of_dataset)}"
            groups.append(ChartGroup(dataset, text, charts, _toggles(of_dataset, styles)))
    return groups


def _over_hyperparameter(name: str, found: Sequence[Point], styles: Mapping[str, Mapping[str, str]]) -> Chart:
    values = [point.run.hparams[name] for point in found]
    logarithmic = min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM
    axis = {"title": name} | ({"type": "log", "exponentformat": "power"} if logarithmic else {})
    return Chart(
        name,
        f"Accuracy in % on the held-out domain over {name}, a mark for each run",
        _figure(
            _marks(found, styles, lambda point: point.run.hparams[name]), axis, {"title": "held-out domain", **PERCENT}
        ),
        numbers=_numbers(found, name, lambda point: f"{point.run.hparams[name]:g}"),
    )


def _by_dataset(found: Sequence[Point]) -> dict[str, list[Point]]:
    of_datasets: dict[str, list[Point]] = defaultdict(list)
    for point in found:
        of_datasets[point.run.dataset].append(point)
    return of_datasets


def _shown(found: Sequence[Point]) -> list[Point]:
    """At most :data:`MOST_POINTS`, evenly spread."""
    if len(found) <= MOST_POINTS:
        return list(found)
    return [found[index] for index in np.linspace(0, len(found) - 1, MOST_POINTS).astype(int)]


def _thinned(found: Sequence[Point]) -> str:
    return f" {MOST_POINTS:,} of {len(found):,} runs are shown." if len(found) > MOST_POINTS else ""


def _marks(
    found: Sequence[Point], styles: Mapping[str, Mapping[str, str]], x: Callable[[Point], float]
) -> Iterator[dict[str, Any]]:
    """A trace of marks for each algorithm, the held-out domain's accuracy over ``x``."""
    shown = _shown(found)
    for algorithm, style in styles.items():
        of_algorithm = [point for point in shown if point.run.algorithm == algorithm]
        if of_algorithm:
            yield {
                "type": "scatter",
                "x": [x(point) for point in of_algorithm],
                "y": [point.unseen for point in of_algorithm],
                "mode": "markers",
                "name": escaped(algorithm),
                "meta": algorithm,
                "text": [escaped(_of(point.run)) for point in of_algorithm],
                "marker": {"color": style["color"], "symbol": style["symbol"], "size": 8, "opacity": 0.75},
                "hovertemplate": "%{text}<br>%{x:.4g}: %{y:.1f} %",
            }


def _numbers(found: Sequence[Point], name: str, value: Callable[[Point], str]) -> Table:
    rows = [[point.run.algorithm, _of(point.run), value(point), f"{point.unseen:.1f}"] for point in _shown(found)]
    return Table("", ["algorithm", "run", name, "held-out domain, %"], rows, [])


def _of(run: RunHistory) -> str:
    draw = f", draw {run.draw}" if run.swept else ""
    return f"held out {held_out_name(run.test_domains)}, trial {run.trial}{draw}"


def _toggles(found: Sequence[Point], styles: Mapping[str, Mapping[str, str]]) -> dict[str, Toggle]:
    present = {point.run.algorithm for point in found}
    return {name: Toggle(style["color"], GLYPHS[style["symbol"]]) for name, style in styles.items() if name in present}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _figure(traces: Iterable[Mapping[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any]) -> Figure:
    titled = [{**axis, "title": {"text": escaped(axis["title"])}, "automargin": True} for axis in (x, y)]
    layout = {"xaxis": titled[0], "yaxis": titled[1], "margin": MARGIN, "showlegend": False, "hovermode": "closest"}
    return {"data": list(traces), "layout": layout}


def escaped(name: str) -> str:
    """A name as plotly shows it as it is."""
    return escape(one_line(name), quote=False)  # plotly does not know the entities of quotes
