"""The best draws of a sweep as options of ``fishr train``."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fishr.errors import RunError
from fishr.records import CONFIG_FILE, RunHistory
from fishr.reports.benchmark import selections
from fishr.selection import best_draw
from fishr.sweeps.folder import Job, SweepFolder

OF_THE_RUN = ("steps", "checkpoint_every", "seed", "trial")
"""Options of ``fishr train`` that a run's config has by the same names."""


def best_configs(histories: Sequence[RunHistory], rule: str) -> dict[str, dict[str, Any]]:
    """Of each dataset, algorithm and held-out domain the run with the best validation over draws and trials.

    Args:
        histories: Runs of sweeps.
        rule: One of :data:`fishr.selection.RULES`.

    Returns:
        ``DATASET-ALGORITHM-DOMAIN`` to options, as ``fishr train --config`` takes them.

    Raises:
        RunError: a run is not of a sweep of ours.
    """
    sweeps = cache(_sweep)
    configs = {}
    for (dataset, algorithm, domain), trials in selections(histories, rule).items():
        best = max((best_draw(of_draws) for of_draws in trials.values()), key=lambda selected: selected.validation)
        folder = Path(best.run.folder)
        configs[f"{dataset}-{algorithm}-{domain}".replace("/", "_")] = _options(folder, *sweeps(folder.parents[1]))
    return configs


def _sweep(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Job]]:
    """What the runs of a sweep share, and its runs by their names."""
    sweep = SweepFolder(folder)
    return sweep.settings(), {job.run: job for job in sweep.jobs()}


def _options(run: Path, shared: Mapping[str, Any], jobs: Mapping[str, Job]) -> dict[str, Any]:
    if run.name not in jobs:
        raise RunError(f"{run} is not planned in {run.parents[1]}: best configs are of runs of a sweep")
    config = json.loads((run / CONFIG_FILE).read_bytes())
    options = {
        "data": jobs[run.name].source,
        "data_root": jobs[run.name].root,
        "algorithm": config["algorithm"],
        "test_domain": config["test_domains"],
        **shared,
        **{name: config[name] for name in OF_THE_RUN},
        "set": config["hparams"],
    }
    del options["batch_size"]  # it is a hyperparameter
    return {
        name.replace("_", "-"): value
        for name, value in options.items()
        if value is not None and value is not False and value != []
    }
