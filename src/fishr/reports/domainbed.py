"""Run folders as DomainBed leaves them: ``results.jsonl``, a record per checkpoint, and ``done``.

A record has ``step``, ``step_time`` (seconds), ``env{i}_in_acc`` and ``env{i}_out_acc`` of domain i, ``hparams`` and
``args`` (``dataset``, ``algorithm``, ``test_envs``, ``hparams_seed``, ``trial_seed``).
"""

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fishr.records import MAKER, SPLITS, RunHistory

RECORDS, DONE = "results.jsonl", "done"

DATASETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ColoredMNIST": ("colored-mnist", ("+90%", "+80%", "-90%")),
    "RotatedMNIST": ("rotated-mnist", ("0", "15", "30", "45", "60", "75")),
    "VLCS": ("vlcs", ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
    "PACS": ("pacs", ("art_painting", "cartoon", "photo", "sketch")),
    "OfficeHome": ("office-home", ("Art", "Clipart", "Product", "Real World")),
    "TerraIncognita": ("terra-incognita", ("location_100", "location_38", "location_43", "location_46")),
    "DomainNet": ("domain-net", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")),
}
"""DomainBed's names of datasets to ours and their domains, in the order in which it numbers them."""


def history(folder: Path, records: Sequence[Mapping[str, Any]]) -> RunHistory:
    """The run of a folder from its records.

    Raises:
        KeyError: a record lacks what it should have.
    """
    args = records[0]["args"]
    num_domains = next(number for number in count() if f"env{number}_out_acc" not in records[0])
    dataset, domains = DATASETS.get(args["dataset"], (args["dataset"], ()))
    if len(domains) != num_domains:
        domains = tuple(f"env{number}" for number in range(num_domains))
    steps = np.array([record["step"] for record in records])
    new_steps = np.maximum(np.diff(steps, prepend=-1), 0)  # a run that was started again writes on in the same file
    seconds = np.array([record["step_time"] for record in records]) * new_steps
    return RunHistory(
        folder=str(folder),
        dataset=dataset,
        algorithm=algorithm_name(args["algorithm"]),
        test_domains=tuple(domains[number] for number in args["test_envs"]),
        swept=True,
        draw=args["hparams_seed"],
        trial=args["trial_seed"],
        hparams=records[0]["hparams"],
        protocol={MAKER: "DomainBed", "steps": args.get("steps") or "the dataset's"},
        domains=domains,
        steps=steps,
        accuracies=np.array(
            [
                [[record[f"env{number}_{split}_acc"] for number in range(num_domains)] for record in records]
                for split in SPLITS
            ]
        ),
        hours=float(seconds.sum()) / 3600,
        done=(folder / DONE).exists(),
    )


def algorithm_name(theirs: str) -> str:
    """``IB_ERM`` as ``ib-erm``."""
    return theirs.lower().replace("_", "-")
