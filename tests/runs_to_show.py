"""Folders of runs for tests of what is shown of them."""

import json
from pathlib import Path

import numpy as np

from fishr.records import DomainMistakes, Metrics, Mistake, Mistakes, RunRecord

DOMAINS = ("north", "south", "west")


def write_run(
    folder: Path,
    algorithm: str = "erm",
    *,
    held_out: tuple[str, ...] = ("west",),
    domains: tuple[str, ...] = DOMAINS,
    draw: int | None = 0,
    trial: int = 0,
    lr: float = 1e-3,
    accuracies: tuple[float, ...] = (0.5, 0.6),
    done: bool = True,
) -> Path:
    """A run: accuracies of its checkpoints on the training domains; on those held out it is 0.1 below."""
    folder.mkdir(parents=True)
    config = {
        "format": 2,
        "data": "toys",
        "algorithm": algorithm,
        "hparams": {"lr": lr, "batch_size": 8, "strength": None, "reset_optimizer": True},
        "test_domains": list(held_out),
        "trial": trial,
        "seed": 0,
        "steps": 10 * len(accuracies),
    } | ({} if draw is None else {"draw": draw})
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for number, accuracy in enumerate(accuracies, 1):
        of_domains = {
            name: {"in": Metrics(accuracy - 0.1, 1.0)} if name in held_out else {"out": Metrics(accuracy, 1.0)}
            for name in domains
        }
        lines.append(RunRecord(10 * number, {"loss": 1.0}, of_domains, 0.01).to_json() + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if done:
        (folder / "DONE").write_text(lines[-1])
    return folder


def write_sweep(folder: Path, *, trials: int = 2) -> Path:
    """ERM against Fishr, which is 0.05 to 0.07 better wherever it is tested."""
    for algorithm, better in (("erm", 0.0), ("fishr", 0.05)):
        for index, name in enumerate(DOMAINS):
            for trial in range(trials):
                for draw, lr in enumerate((1e-3, 1e-1)):
                    accuracy = 0.5 + 0.1 * index + 0.01 * trial + better + (0.01 * index if better else 0)
                    write_run(
                        folder / f"{algorithm}-{name}-{trial}-{draw}",
                        algorithm,
                        held_out=(name,),
                        draw=draw,
                        trial=trial,
                        lr=lr,
                        accuracies=(accuracy - 0.1, accuracy - 0.02 * draw),
                    )
    return folder


def mistakes_of(classes: tuple[str, ...] = ("cat", "dog"), held_out: str = "west") -> Mistakes:
    """Of a model that takes three samples of the first class for the second, and gets one of each right."""
    confusion = np.eye(len(classes), dtype=int)
    confusion[0, 1] = 3
    worst = [Mistake("0.png", classes[0], classes[1], 0.97, None)]
    return Mistakes(classes, ("north", "south"), {held_out: DomainMistakes(confusion.tolist(), worst)})
