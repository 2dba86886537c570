"""Checkpoints: all state that a later step depends on, as safetensors and JSON with checksums.

A checkpoint is a folder ``step-N``: ``tensors.safetensors`` (weights, buffers, optimizer state), ``state.json`` (step,
optimizer settings, sums of loss terms) and ``SHA256SUMS``, which ``sha256sum -c`` checks too. Random numbers need no
state: they are functions of seed and step.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from fishr.errors import RunError
from fishr.files import CHECKSUMS, checksums, new_folder

TENSORS, STATE = "tensors.safetensors", "state.json"
KEPT = 2
"""Checkpoints kept: the last, and the one before should the last be damaged."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Updates made.
        loss_sums: Sum of each loss term over the steps since the last record.
        steps_in_sums: Number of those steps.
    """

    step: int
    loss_sums: Mapping[str, float]
    steps_in_sums: int


class Stateful(Protocol):
    """Something whose state is named tensors, such as a module."""

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object: ...


def save_checkpoint(
    folder: Path, parts: Mapping[str, Stateful], optimizers: Mapping[str, Optimizer], progress: Progress
) -> Path:
    """Write ``folder/step-N`` and remove all but the last checkpoints; returns the new one."""
    tensors = {f"{part}/{name}": value for part, owner in parts.items() for name, value in owner.state_dict().items()}
    settings: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        content = optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for index, values in content["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{index}/{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        settings[name] = {"param_groups": content["param_groups"], "scalars": scalars}
    state = {
        "step": progress.step,
        "loss_sums": dict(progress.loss_sums),
        "steps_in_sums": progress.steps_in_sums,
        "optimizers": settings,
    }
    path = folder / f"step-{progress.step:08d}"
    with new_folder(path) as aside:
        # Clones: safetensors refuses tensors that share memory.
        clones = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(clones, aside / TENSORS)
        (aside / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (aside / CHECKSUMS).write_text(checksums(aside, TENSORS, STATE), encoding="utf-8")
    for stale in list(_newest_first(folder))[KEPT:]:
        shutil.rmtree(stale)
    return path


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None if there is none yet; damaged ones are removed with a warning.

    Raises:
        RunError: there are checkpoints, but none is whole.
    """
    damaged = []
    for path in _newest_first(folder):
        if not _is_whole(path):
            damaged.append(path.name)
            continue
        if damaged:
            logger.warning("checkpoint %s is damaged; continuing from %s", ", ".join(damaged), path.name)
            for name in damaged:
                shutil.rmtree(folder / name)
        return path
    if damaged:
        raise RunError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): delete the run's folder to start anew"
        )
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    return next(_newest_first(folder), None)


def load_checkpoint(path: Path, parts: Mapping[str, Stateful], optimizers: Mapping[str, Optimizer]) -> Progress:
    """Take over the state in a checkpoint; returns where the run stands."""
    tensors = load_file(path / TENSORS)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    for part, owner in parts.items():
        prefix = f"{part}/"
        owner.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
    for name, optimizer in optimizers.items():
        settings = state["optimizers"][name]
        per_parameter: dict[int, dict[str, Any]] = {int(index): dict(v) for index, v in settings["scalars"].items()}
        prefix = f"optimizer/{name}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, field = key.removeprefix(prefix).split("/")
                per_parameter.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": per_parameter, "param_groups": settings["param_groups"]})
    return Progress(state["step"], state["loss_sums"], state["steps_in_sums"])


def _newest_first(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("step-*"), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        return (path / CHECKSUMS).read_text(encoding="utf-8") == checksums(path, TENSORS, STATE)
    except (FileNotFoundError, UnicodeDecodeError):
        return False
