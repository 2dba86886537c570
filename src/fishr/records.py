"""Run records: one for each checkpoint of a run, a line of ``metrics.jsonl`` each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Split = Literal["in", "out"]


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


def read_records(path: Path) -> list[RunRecord]:
    """All records of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                records.append(RunRecord.from_json(line.decode()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} cannot be read, line {number} is damaged ({type(error).__name__})") from None
    return records
