"""Does Fishr align the domain-level Hessians, as the paper says? ERM and Fishr on Colored MNIST, over their training.

Runs of the published protocol that keep their models at checkpoints, analysed as ``fishr analyze`` does. Runs lie in
``--runs`` and continue where they were cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fishr.analysis import analyze
from fishr.data import load_dataset
from fishr.reports.analysis import inconsistency, mean_distance
from fishr.reports.figures import LOGARITHMIC, write_images
from fishr.reports.palette import PALETTE
from fishr.reports.tables import markdown_table
from fishr.training import train
from fishr.workflows.colored import TITLES, UNSEEN, method_config
from fishr.workflows.reproduce import PUBLISHED_LABEL_FLIP, setting

METHOD = """Colored MNIST with the published hyperparameters, full batch, hidden layers in bf16-mixed; at each
checkpoint all samples of the two training domains and of the unseen one; statistics of the head (391 weights) in
closed form. Distance: of the two training domains; relative: over the root mean square of their norms; sampling:
what samples of one domain would differ by. Inconsistency: between the training domains, by whole Hessians, epsilon
0.01 nats. Correlation: over the head's weights, of gradient variance with Hessian diagonal, mean of the training
domains. Ratios: geometric means over seeds."""

METHODS = ("erm", "fishr")

CLAIMS = {"whole_hessian": "Hessians", "hessian": "Hessian diagonals", "variance": "gradient variances"}

MEASURES = {
    "unseen": "accuracy on the unseen domain",
    **{name: f"distance of {title}" for name, title in CLAIMS.items()},
    **{f"{name}_relative": f"relative distance of {title}" for name, title in CLAIMS.items()},
    **{f"{name}_sampling": f"of {title}, by sampling alone" for name, title in CLAIMS.items()},
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
    analysis = analyze(folders, shown).as_dict()
    return {method: measures(analysis, model) for method, model in zip(METHODS, analysis["models"], strict=True)}


def measures(analysis: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, list[float]]:
    """:data:`MEASURES` at each checkpoint, and its step."""
    names = analysis["compared"]
    rows = []
    for checkpoint in model["checkpoints"]:
        head = checkpoint["head"]
        row = {
            "step": checkpoint["step"],
            "unseen": head["domains"][UNSEEN]["accuracy"],
            "inconsistency": inconsistency(head, "exact", names)["score"],
            "correlation": fmean(head["domains"][name]["correlation"] for name in names),
        }
        for name in CLAIMS:
            for kind, suffix in (("distance", ""), ("relative", "_relative"), ("sampling", "_sampling")):
                row[name + suffix] = mean_distance(head, name, kind, names)
        rows.append(row)
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
    """What the last checkpoint says of the claim, in words."""
    lines = []
    for name, title in CLAIMS.items():
        ratios = {
            how: [one["fishr"][key][-1] / one["erm"][key][-1] for one in found.values()]
            for how, key in (("absolute", name), ("relative", f"{name}_relative"))
        }
        closer = {how: sum(ratio < 1 for ratio in values) for how, values in ratios.items()}
        seeds = len(found)
        if closer["absolute"] == closer["relative"] == seeds:
            said = "Fishr aligns them, in size and relative to it"
        elif closer["absolute"] == seeds:
            said = "Fishr brings them closer in size, but not, in every seed, relative to it"
        elif closer["absolute"] == closer["relative"] == 0:
            said = "Fishr does not align them"
        else:
            said = "undecided"
        lines.append(
            f"- {title[0].upper()}{title[1:]} of the training domains: **{said}**. At the last step they lie "
            f"{geometric_mean(ratios['absolute']):.2g} times as far apart as under ERM (closer in {closer['absolute']} "
            f"of {seeds} seeds), relative to their size {geometric_mean(ratios['relative']):.2g} times "
            f"({closer['relative']} of {seeds})."
        )
    return "\n".join(lines)


def figure(found: Mapping[str, Any], switch_on: int) -> go.Figure:
    """A line for each seed and method."""
    panels = ("unseen", "inconsistency", "variance", "whole_hessian", "variance_relative", "whole_hessian_relative")
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
