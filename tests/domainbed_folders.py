"""Run folders as DomainBed leaves them, made by hand: few distinct accuracies, so that ties abound, and gaps.

The tables that DomainBed's own script prints of them are ``golden/domainbed_tables.txt``.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

NUM_DOMAINS = {"ColoredMNIST": 3, "PACS": 4, "RotatedMNIST": 6}
ALGORITHMS = ("ERM", "VREx", "Fishr")
DRAWS, TRIALS = 4, 3
STEPS = (0, 300, 600)


def accuracy(*names: object) -> float:
    """One of six values, and another one for other names."""
    return 0.5 + crc32(repr(names).encode()) % 6 / 11


def is_missing(dataset: str, algorithm: str, test_envs: tuple[int, ...], draw: int, trial: int) -> bool:
    """Some runs never ran: a trial of V-REx, a domain of Fishr, and single runs here and there."""
    return (
        (algorithm == "VREx" and dataset == "PACS" and trial == 2 and test_envs == (1,))
        or (algorithm == "Fishr" and dataset == "RotatedMNIST" and test_envs == (5,))
        or (algorithm == "ERM" and dataset == "RotatedMNIST" and len(test_envs) == 2 and trial == 1)
        or crc32(repr((dataset, algorithm, test_envs, draw, trial)).encode()) % 23 == 0
    )


def record(
    dataset: str, algorithm: str, test_envs: tuple[int, ...], draw: int, trial: int, step: int
) -> dict[str, Any]:
    accuracies = {
        f"env{env}_{split}_acc": accuracy(dataset, algorithm, test_envs, draw, trial, step, env, split)
        for env in range(NUM_DOMAINS[dataset])
        for split in ("in", "out")
    }
    memory = {} if draw == 1 else {"mem_gb": 1.5}
    return {
        **accuracies,
        **memory,
        "args": {
            "algorithm": algorithm,
            "dataset": dataset,
            "hparams_seed": draw,
            "output_dir": "sweep",
            "seed": 7,
            "steps": 601,
            "test_envs": list(test_envs),
            "trial_seed": trial,
        },
        "epoch": step / 30,
        "hparams": {"lr": 1e-3 / (draw + 1)},
        "loss": 0.7,
        "step": step,
        "step_time": 0.36,
    }


def write_sweep(folder: Path) -> None:
    """A sweep of three datasets with single held-out domains and pairs of them."""
    for dataset, num_domains in NUM_DOMAINS.items():
        held_out = [*combinations(range(num_domains), 1), *combinations(range(num_domains), 2)]
        for algorithm in ALGORITHMS:
            for test_envs in held_out:
                for draw in range(DRAWS):
                    for trial in range(TRIALS):
                        if not is_missing(dataset, algorithm, test_envs, draw, trial):
                            _write_run(folder, dataset, algorithm, test_envs, draw, trial)


def _write_run(folder: Path, dataset: str, algorithm: str, test_envs: tuple[int, ...], draw: int, trial: int) -> None:
    run = folder / f"{crc32(repr((dataset, algorithm, test_envs, draw, trial)).encode()):08x}"
    run.mkdir(parents=True)
    steps = STEPS[:2] if draw == 2 and trial == 0 else STEPS  # killed, without done
    if draw == 3 and trial == 1:  # started again, and killed then
        steps = (*STEPS, *STEPS[:2])
    records = [record(dataset, algorithm, test_envs, draw, trial, step) for step in steps]
    (run / "results.jsonl").write_text("".join(json.dumps(each, sort_keys=True) + "\n" for each in records))
    if steps[: len(STEPS)] == STEPS:
        (run / "done").write_text("done")
