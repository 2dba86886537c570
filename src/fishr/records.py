"""Run records, one for each checkpoint of a run, a line of ``metrics.jsonl`` each; and the history made of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 2
"""Version of a run's files."""

CONFIG_FILE, RECORDS_FILE, DONE_FILE = "config.json", "metrics.jsonl", "DONE"
MISTAKES_FILE = "mistakes.json"
MADE_BY_FILE = "made_by.json"
"""The command that made a folder, and the versions of what it used."""
MAKER = "made by"
"""Whose run it is, in the protocol of a history."""

LEASE_FILE, FAILED_FILE = ".lease", "FAILED"
LEASE_SECONDS = 60.0
"""A process that says nothing for so long is taken for dead; one that died on this machine is found out at once."""

Split = Literal["in", "out"]
SPLITS: tuple[Split, Split] = ("in", "out")


@dataclass(frozen=True)
class Metrics:
    """How a model does on one split of one domain.

    Attributes:
        accuracy: Share of samples classified correctly, in [0, 1].
        loss: Mean loss.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class RunRecord:
    """One checkpoint of a run.

    Attributes:
        step: Updates made so far.
        losses: Mean of each loss term over the steps since the last record.
        domains: Metrics of each domain and split that was evaluated.
        seconds_per_step: Mean duration of a training step since the last record (or since the run was continued).
    """

    step: int
    losses: Mapping[str, float]
    domains: Mapping[str, Mapping[Split, Metrics]]
    seconds_per_step: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "RunRecord":
        content = json.loads(line)
        domains = {
            domain: {split: Metrics(**metrics) for split, metrics in splits.items()}
            for domain, splits in content.pop("domains").items()
        }
        return cls(domains=domains, **content)


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file, but for a last one that was cut off."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def read_records(path: Path) -> list[RunRecord]:
    """All records of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            records.append(RunRecord.from_json(line.decode()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read, line {number} is damaged ({type(error).__name__})") from None
    return records


@dataclass(frozen=True, eq=False)
class RunHistory:
    """What one run recorded, as arrays.

    Attributes:
        folder: Where the run lies.
        dataset: Name of the dataset.
        algorithm: Name of the algorithm.
        test_domains: Domains held out.
        swept: Whether a sweep made it; tables are of such runs.
        draw: Number of its hyperparameter draw; 0 for a run of no sweep.
        trial: Seed of its splits.
        hparams: Its hyperparameters.
        protocol: What else its result depends on, and runs of one table should share.
        domains: All domains, in the dataset's order.
        steps: Updates made until each checkpoint, at least one: int64 [checkpoint].
        accuracies: In [0, 1], NaN where not evaluated: float64 [split, checkpoint, domain], splits as in
            :data:`SPLITS`.
        hours: Duration of its training steps.
        done: Whether it is finished.
    """

    folder: str
    dataset: str
    algorithm: str
    test_domains: tuple[str, ...]
    swept: bool
    draw: int
    trial: int
    hparams: Mapping[str, Any]
    protocol: Mapping[str, Any]
    domains: tuple[str, ...]
    steps: NDArray[np.int64]
    accuracies: NDArray[np.float64]
    hours: float
    done: bool

    def accuracy(self, domain: str, split: Split) -> NDArray[np.float64]:
        """Accuracy on one split of one domain: [checkpoint]."""
        of_checkpoints: NDArray[np.float64] = self.accuracies[SPLITS.index(split), :, self.domains.index(domain)]
        return of_checkpoints

    @cached_property
    def validated_domains(self) -> list[str]:
        """Domains whose out-split was evaluated."""
        evaluated = ~np.isnan(self.accuracies[SPLITS.index("out")]).all(axis=0)
        return [domain for domain, was in zip(self.domains, evaluated, strict=True) if was]


@dataclass(frozen=True)
class Mistake:
    """A sample that a model gets wrong.

    Attributes:
        sample: Its file's name, or its number.
        label: The class that it is of.
        predicted: The class that it is taken for.
        probability: How sure the model is of that, in [0, 1].
        picture: It as a data URI; None where samples are no pictures.
    """

    sample: str
    label: str
    predicted: str
    probability: float
    picture: str | None


@dataclass(frozen=True)
class DomainMistakes:
    """What a model gets wrong on a domain.

    Attributes:
        confusion: Samples of each true class by predicted class, ``[class, class]``.
        worst: Those that it is most sure of, in that order.
    """

    confusion: Sequence[Sequence[int]]
    worst: Sequence[Mistake]


@dataclass(frozen=True)
class Mistakes:
    """What the model that a run kept gets wrong on the domains that were held out; ``mistakes.json``.

    Attributes:
        classes: Names of the classes, in the order of the confusions.
        train_domains: Domains that the run trained on.
        domains: By held-out domain.
    """

    classes: Sequence[str]
    train_domains: Sequence[str]
    domains: Mapping[str, DomainMistakes]

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Mistakes":
        content = json.loads(text)
        return cls(
            content["classes"],
            content["train_domains"],
            {
                name: DomainMistakes(domain["confusion"], [Mistake(**mistake) for mistake in domain["worst"]])
                for name, domain in content["domains"].items()
            },
        )


def flat_settings(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def settings_that_differ(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings, also nested ones, that are not the same, ``name: ours → theirs``."""
    ours, theirs = flat_settings(ours), flat_settings(theirs)
    return [
        f"{name}: {ours.get(name, 'not set')} → {theirs.get(name, 'not set')}"
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or json.dumps(ours[name]) != json.dumps(theirs[name])
    ]
