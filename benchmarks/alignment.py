"""Does Fishr align the domain-level Hessians, as the paper says? ERM and Fishr on Colored MNIST, over their training.

Runs of the published protocol that keep their models at checkpoints, analysed as ``fishr analyze`` does. Runs lie in
``--runs`` and continue where they were cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fishr.analysis import analyze
from fishr.analysis.analyze import EPSILON
from fishr.data import load_dataset
from fishr.reports.analysis import compared_domains, inconsistency, mean_distance
from fishr.reports.figures import LOGARITHMIC, PALETTE, write_images
from fishr.reports.tables import markdown_table
from fishr.training import train
from fishr.workflows.colored import TITLES, UNSEEN, method_config
from fishr.workflows.reproduce import PUBLISHED_LABEL_FLIP, setting

METHOD = """Colored MNIST with the published hyperparameters, full batch, hidden layers in bf16-mixed; at each
checkpoint all samples of the two training domains and of the unseen one; statistics of the head (391 weights),
exact and in closed form. Distance: of the two training domains. Relative: over the root mean square of their norms.
Inconsistency: between the training domains, by the whole Hessians, epsilon 0.01 nats. Correlation: over the head's
weights, of gradient variance with Hessian diagonal, mean of the training domains. Means over seeds."""

METHODS = ("erm", "fishr")

MEASURES = {
    "unseen": "accuracy on the unseen domain",
    "variance": "distance of gradient variances",
    "hessian": "distance of Hessian diagonals",
    "variance_relative": "relative distance of gradient variances",
    "hessian_relative": "relative distance of Hessian diagonals",
    "inconsistency": "inconsistency (nats)",
    "correlation": "correlation",
}


def main(options: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=3)
    parser.add_argument("--data-root", type=Path, help="data root with MNIST in it")
    parser.add_argument("--runs", type=Path, default=Path("runs/alignment"), help="folder of the runs")
    arguments = parser.parse_args(options)
    steps, every, subset = (20, 10, 100) if arguments.quick else (500, 25, None)
    seeds = range(arguments.repeats)
    found = {str(seed): series(seed, steps, every, subset, arguments.data_root, arguments.runs) for seed in seeds}
    switch_on = setting(PUBLISHED_LABEL_FLIP, "bf16-mixed", steps).switch_on
    setup = common.describe_setup(arguments, ["fishr", "torch", "plotly"], METHOD)
    table = f"{summary(found, switch_on)}\n\n{verdict(found)}\n\n![over the steps](alignment.svg)"
    results = {"switch_on": switch_on, "seeds": found}
    common.write_results(arguments.output, "alignment", setup, results, [], table)
    write_images(arguments.output, {"alignment": figure(found, switch_on)}, ["svg"])


def series(
    seed: int, steps: int, every: int, subset: int | None, data_root: Path | None, runs: Path
) -> dict[str, dict[str, list[float]]]:
    """Of each method its measures at each checkpoint."""
    dataset = load_dataset("colored-mnist-irm", root=data_root, seed=seed, subset=subset)
    folders = []
    for method in METHODS:
        config = method_config(setting(PUBLISHED_LABEL_FLIP, "bf16-mixed", steps), method, dataset, seed)
        folder = runs / f"{method}-{seed}"
        common.progress.print(f"{method}, seed {seed}", markup=False)
        train(replace(config, checkpoint_every=every), dataset, folder, snapshots=True)
        folders.append(folder)
    shown = replace(dataset, domains={name: dataset.domains[name] for name in dataset.trainable_domains})
    models = analyze(folders, shown, batch_size=1024).as_dict()["models"]
    return {method: measures(model) for method, model in zip(METHODS, models, strict=True)}


def measures(model: Mapping[str, Any]) -> dict[str, list[float]]:
    """:data:`MEASURES` at each checkpoint, and its step."""
    names = compared_domains(model)
    rows = []
    for checkpoint in model["checkpoints"]:
        head = checkpoint["head"]
        exact = inconsistency(head, "exact", names, EPSILON)
        rows.append(
            {
                "step": checkpoint["step"],
                "unseen": head["domains"][UNSEEN]["accuracy"],
                **{one: mean_distance(head, one, "distance", names) for one in ("variance", "hessian")},
                **{f"{one}_relative": mean_distance(head, one, "relative", names) for one in ("variance", "hessian")},
                "inconsistency": None if exact is None else exact["score"],
                "correlation": fmean(head["domains"][name]["correlation"] for name in names),
            }
        )
    return {name: [row[name] for row in rows] for name in ("step", *MEASURES)}


def summary(found: Mapping[str, Any], switch_on: int) -> str:
    """Measures of both methods, before the switch-on and at the end."""
    steps = next(iter(found.values()))["erm"]["step"]
    shown = [max((step for step in steps if step <= switch_on), default=steps[0]), steps[-1]]
    rows = []
    for name, title in MEASURES.items():
        cells = [title]
        for step in shown:
            at = steps.index(step)
            values = {method: [one[method][name][at] for one in found.values()] for method in METHODS}
            cells += [f"{fmean(values[method]):.3g} ± {np.std(values[method]):.1g}" for method in METHODS]
        rows.append(cells)
    header = ["measure", *(f"{TITLES[method]}, step {step}" for step in shown for method in METHODS)]
    return markdown_table(header, rows)


def verdict(found: Mapping[str, Any]) -> str:
    """What the numbers say of the claim, in words."""
    lines = []
    for name, what in (("hessian", "Hessian diagonals"), ("variance", "gradient variances")):
        for suffix, how in (("", ""), ("_relative", ", relative to their size")):
            ratios = [one["fishr"][name + suffix][-1] / one["erm"][name + suffix][-1] for one in found.values()]
            closer = sum(ratio < 1 for ratio in ratios)
            lines.append(
                f"- At the last step the {what} of the training domains lie {fmean(ratios):.3g} times as far apart "
                f"under Fishr as under ERM{how}; closer in {closer} of {len(ratios)} seeds "
                f"({', '.join(f'{ratio:.2g}' for ratio in ratios)})."
            )
    return "\n".join(lines)


def figure(found: Mapping[str, Any], switch_on: int) -> go.Figure:
    """A line for each seed and method."""
    panels: Sequence[str] = ("unseen", "inconsistency", "variance", "hessian", "variance_relative", "hessian_relative")
    drawn = make_subplots(3, 2, subplot_titles=[MEASURES[name] for name in panels], vertical_spacing=0.09)
    for color, method in zip(PALETTE, METHODS, strict=False):
        for seed, one in found.items():
            for index, name in enumerate(panels):
                line = go.Scatter(
                    x=one[method]["step"],
                    y=one[method][name],
                    line={"color": color, "width": 1.5},
                    name=TITLES[method],
                    showlegend=index == 0 and seed == next(iter(found)),
                )
                drawn.add_trace(line, index // 2 + 1, index % 2 + 1)
    drawn.add_vline(switch_on, line_dash="dot", line_width=1)
    drawn.update_yaxes(tickformat=".0%", row=1, col=1)
    drawn.update_yaxes(LOGARITHMIC, row=1, col=2)
    for row in (2, 3):
        drawn.update_yaxes(LOGARITHMIC, row=row)
    drawn.update_xaxes(title_text="step", row=3)
    return drawn.update_layout(
        title_text="Colored MNIST, a line for each seed; dotted: the penalty's switch-on",
        template="plotly_white",
        width=1000,
        height=1000,
    )


if __name__ == "__main__":
    main()
