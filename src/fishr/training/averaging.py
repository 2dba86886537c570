"""Averages of the weights over the steps of a run; they combine with every algorithm.

Weights are a mapping from names to tensors, such as a ``state_dict``. Floating tensors are averaged, the running
statistics of batch norm among them, in float32 or wider, and returned in their own dtype; all others
(``num_batches_tracked``) are those of the newest weights in the average.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from fishr.errors import ConfigError, InputError
from fishr.registry import Registry, unknown

logger = logging.getLogger(__name__)


class WeightAverage(Protocol):
    """A way to average weights.

    Attributes:
        defaults: Its options and their defaults; a default's type is the option's.
        needs_validation: Whether every checkpoint must give it a validation loss.
    """

    defaults: ClassVar[Mapping[str, float | int]]
    needs_validation: ClassVar[bool]

    def __init__(self, **options: Any) -> None: ...

    @staticmethod
    def problems(options: Mapping[str, Any]) -> list[str]:
        """What is wrong with options of the right types, one phrase each."""

    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Take the weights after a training step; ``steps`` updates have been made so far, 1 after the first."""

    def at_checkpoint(self, validation_loss: float | None) -> None:
        """Take the loss of the plain weights at a checkpoint, after :meth:`update`."""

    def current(self) -> dict[str, Tensor] | None:
        """A copy of the average so far, to evaluate and keep at a checkpoint; None: the plain weights."""

    def final(self) -> dict[str, Tensor] | None:
        """What the run's model is made of; None, with a warning logged: the plain weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on, not copied."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; it is copied."""


AVERAGES: Registry[type[WeightAverage]] = Registry("average")
"""Weight averages by name."""


@dataclass(frozen=True)
class AverageConfig:
    """Which average of the weights; equal settings are equal configs, written out or not.

    Attributes:
        name: A name in :data:`AVERAGES`.
        options: Its options; those not given are filled in with their defaults.

    Raises:
        ConfigError: an unknown name or option, or values that cannot be; all such problems in one message.
    """

    name: str
    options: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.options, Mapping):
            raise ConfigError(
                f"an average is a name and a mapping of options, got {self.name!r} and {self.options!r} "
                f"(names: {', '.join(AVERAGES)})"
            )
        average = AVERAGES[self.name]
        problems = []
        for name, value in self.options.items():
            if name not in average.defaults:
                problems.append(str(unknown(f"option of {self.name!r}", str(name), average.defaults)))
            elif type(average.defaults[name]) is int:
                if type(value) is not int:
                    problems.append(f"{name} must be a whole number, got {value!r}")
            elif type(value) not in (int, float) or not math.isfinite(value):
                problems.append(f"{name} must be a number, got {value!r}")
        if problems := problems or average.problems({**average.defaults, **self.options}):
            raise ConfigError("; ".join(problems))
        options = {name: type(default)(self.options.get(name, default)) for name, default in average.defaults.items()}
        object.__setattr__(self, "options", options)


def make_average(config: AverageConfig) -> WeightAverage:
    """An average that has seen no weights yet."""
    return AVERAGES[config.name](**config.options)


def valley(losses: Sequence[float], n_converge: int, n_tolerance: int, tolerance: float) -> range | None:
    """Which segments of a run SWAD averages; segment i is the steps that end at checkpoint i.

    With l_i the validation loss at checkpoint i,

        s = the first checkpoint with l_s = min(l_s, ..., l_{s + n_converge − 1})
        threshold = tolerance · mean(l_s, ..., l_{s + n_converge − 1})
        e = the first checkpoint after s with l_e, ..., l_{e + n_tolerance − 1} all above the threshold

    and the valley is s, ..., e − 1. Where there is no such e, it ends with the last checkpoint that is not above
    the threshold.

    Args:
        losses: l_i ≥ 0, as far as the run has come.
        n_converge: Checkpoints that the loss must not fall below l_s, s itself among them.
        n_tolerance: Checkpoints that it must stay above the threshold; at least ``n_converge``.
        tolerance: Factor of the threshold, at least 1.

    Returns:
        s, ..., e − 1; None if there is no s.

    >>> valley([0.9, 0.5, 0.6, 0.55, 0.8, 0.9, 1.0], n_converge=3, n_tolerance=3, tolerance=1.3)
    range(1, 4)
    """
    for start in range(len(losses) - n_converge + 1):
        window = losses[start : start + n_converge]
        if window[0] == min(window):
            break
    else:
        return None
    threshold = tolerance * (sum(window) / n_converge)
    end = start + 1
    for checkpoint in range(end, len(losses)):
        if losses[checkpoint] <= threshold:
            end = checkpoint + 1
        elif checkpoint + 1 - end == n_tolerance:
            break
    return range(start, end)


@dataclass
class _Mean:
    """A weighted mean of weights.

    Attributes:
        values: Means of the floating tensors, in float32 or wider.
        others: The tensors that have no mean, of the newest weights.
        narrow: Empty tensors in the dtype of those that are narrower than float32.
        steps: Number of weights in it.
    """

    values: dict[str, Tensor]
    others: dict[str, Tensor]
    narrow: dict[str, Tensor]
    steps: int = 1

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Self:
        """The weights of one step, not copied."""
        mean = cls({}, {}, {})
        for name, value in weights.items():
            if not value.is_floating_point():
                mean.others[name] = value.detach()
                continue
            wide = torch.promote_types(value.dtype, torch.float32)
            mean.values[name] = value.detach().to(wide)
            if wide != value.dtype:
                mean.narrow[name] = torch.empty(0, dtype=value.dtype)
        return mean

    def weights(self) -> dict[str, Tensor]:
        """A copy in the dtypes of the weights."""
        values = {
            name: value.to(self.narrow[name].dtype if name in self.narrow else value.dtype, copy=True)
            for name, value in self.values.items()
        }
        return values | _clones(self.others)

    def state(self, prefix: str) -> dict[str, Tensor]:
        groups = {"values": self.values, "others": self.others, "narrow": self.narrow}
        tensors = {f"{prefix}/{group}/{name}": value for group, them in groups.items() for name, value in them.items()}
        return {f"{prefix}/steps": torch.tensor(self.steps), **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str) -> Self | None:
        """A copy of what :meth:`state` returned; None if there was no mean yet."""
        if f"{prefix}/steps" not in state:
            return None
        values, others, narrow = (
            {name.removeprefix(start): value.clone() for name, value in state.items() if name.startswith(start)}
            for start in (f"{prefix}/values/", f"{prefix}/others/", f"{prefix}/narrow/")
        )
        return cls(values, others, narrow, int(state[f"{prefix}/steps"]))


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _merged(older: _Mean | None, newer: _Mean, share: float | None = None) -> _Mean:
    """``(1 − share) · older + share · newer``, written into ``older``; default: each step counts the same."""
    if older is None:
        return _Mean(_clones(newer.values), _clones(newer.others), dict(newer.narrow), newer.steps)
    older.steps += newer.steps
    share = newer.steps / older.steps if share is None else share
    for name, value in newer.values.items():
        # A mean that was loaded lies on the CPU until it meets the weights.
        older.values[name] = older.values[name].to(value.device).lerp_(value, share)
    older.others = _clones(newer.others)
    return older


class _Average:
    """What the averages share: the mean, its state, and the warning where there is none."""

    needs_validation: ClassVar[bool] = False
    mean: _Mean | None = None

    def at_checkpoint(self, validation_loss: float | None) -> None: ...

    def current(self) -> dict[str, Tensor] | None:
        return None if self.mean is None else self.mean.weights()

    def final(self) -> dict[str, Tensor] | None:
        if self.mean is None:
            logger.warning("no weights were averaged, the run's last weights are kept: %s", self.why_none())
        return self.current()

    def why_none(self) -> str:
        return "no step was made"

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.mean is None else self.mean.state("mean")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mean = _Mean.from_state(state, "mean")


class SMA(_Average):
    """Simple moving average: the mean of the weights after updates ``start``, ``start`` + 1, ...

    Before, and in a run that never comes so far, the plain weights. Each step counts the same.

    Reference: Arpit, Wang, Zhou, Xiong: Ensemble of Averages, NeurIPS 2022, arXiv 2110.10832.

    Args:
        start: The first update whose weights are averaged, counted from 1.
    """

    defaults: ClassVar[Mapping[str, float | int]] = {"start": 100}

    def __init__(self, start: int = 100) -> None:
        self.start = start

    @staticmethod
    def problems(options: Mapping[str, Any]) -> list[str]:
        start = options["start"]
        return [] if start >= 1 else [f"start must be at least 1, got {start}"]

    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        if steps >= self.start:
            self.mean = _merged(self.mean, _Mean.of(weights))

    def why_none(self) -> str:
        return f"sma starts at update {self.start}, which the run did not reach; lower its start"


class EMA(_Average):
    """Exponential moving average: mean ← decay · mean + (1 − decay) · weights.

    It starts at the weights after the first step, so it has no bias towards zero, and these keep a share of
    decay^(t − 1) in the mean after step t.

    Args:
        decay: In [0, 1).
    """

    defaults: ClassVar[Mapping[str, float | int]] = {"decay": 0.999}

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay

    @staticmethod
    def problems(options: Mapping[str, Any]) -> list[str]:
        decay = options["decay"]
        return [] if 0 <= decay < 1 else [f"decay must lie in [0, 1), got {decay}"]

    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        self.mean = _merged(self.mean, _Mean.of(weights), share=1 - self.decay)


class SWAD(_Average):
    """Stochastic weight averaging, densely: the mean of every step's weights in a valley of the validation loss.

    The segments between checkpoints that :func:`valley` names, each step counted the same. :meth:`current` is what
    :meth:`final` would be if the run ended here; once the valley has ended, neither changes any more. Steps after
    the last checkpoint never count.

    Reference: Cha, Chun, Lee, Cho, Park, Lee, Park: SWAD, NeurIPS 2021, arXiv 2102.08604, Algorithm 1. The authors'
    code finds the same s, threshold and end (and, as here, leaves out the checkpoints above the threshold that a run
    ends with), but it weighs segments, not steps, the same, counts some of them several times, takes up to
    n_tolerance − n_converge − 1 of those before s too, and loses segment s where n_tolerance = n_converge or the run
    ends on its n_converge-th checkpoint.

    Args:
        n_converge: Checkpoints without a lower loss that start the valley.
        n_tolerance: Checkpoints above the threshold that end it; at least ``n_converge``, since with fewer the
            authors' code does not look at all of them.
        tolerance: The threshold as a multiple of the mean loss at the start; the authors take 1.2 on VLCS.
    """

    defaults: ClassVar[Mapping[str, float | int]] = {"n_converge": 3, "n_tolerance": 6, "tolerance": 1.3}
    needs_validation: ClassVar[bool] = True

    def __init__(self, n_converge: int = 3, n_tolerance: int = 6, tolerance: float = 1.3) -> None:
        self.n_converge, self.n_tolerance, self.tolerance = n_converge, n_tolerance, tolerance
        self.losses: list[float] = []
        self.segment: _Mean | None = None
        self.pending: list[_Mean] = []
        self.ended = False

    @staticmethod
    def problems(options: Mapping[str, Any]) -> list[str]:
        n_converge, n_tolerance, tolerance = options["n_converge"], options["n_tolerance"], options["tolerance"]
        problems = []
        if n_converge < 1:
            problems.append(f"n_converge must be at least 1, got {n_converge}")
        if n_tolerance < max(1, n_converge):
            problems.append(f"n_tolerance must be at least 1 and at least n_converge ({n_converge}), got {n_tolerance}")
        if tolerance < 1:
            problems.append(f"tolerance must be at least 1, got {tolerance}")
        return problems

    def update(self, weights: Mapping[str, Tensor], steps: int) -> None:
        if not self.ended:
            self.segment = _merged(self.segment, _Mean.of(weights))

    def at_checkpoint(self, validation_loss: float | None) -> None:
        """Close the segment; without a step since the last checkpoint there is none to close.

        Raises:
            InputError: no validation loss, or one that is negative or not finite.
        """
        if validation_loss is None or not 0 <= validation_loss < math.inf:
            raise InputError(
                "swad needs a finite validation loss of at least 0 at every checkpoint, since its threshold is a "
                f"multiple of it, got {validation_loss}; without an out-split take sma or ema"
            )
        if self.segment is None:
            return
        self.losses.append(validation_loss)
        self.pending.append(self.segment)
        self.segment = None
        found = valley(self.losses, self.n_converge, self.n_tolerance, self.tolerance)
        if found is None:
            self.pending = self.pending[-(self.n_converge - 1) :]
            return
        # The oldest pending segment is the valley's first, or the first above the threshold.
        above = len(self.losses) - found.stop
        while len(self.pending) > above:
            self.mean = _merged(self.mean, self.pending.pop(0))
        if above == self.n_tolerance:
            self.ended = True
            self.pending.clear()

    def why_none(self) -> str:
        if len(self.losses) < self.n_converge:
            return (
                f"swad needs {self.n_converge} checkpoints (n_converge), the run had {len(self.losses)}; "
                "lower checkpoint_every"
            )
        return (
            f"swad found no checkpoint whose validation loss is the lowest of {self.n_converge} from there "
            "(n_converge), it fell to the end; train longer or lower checkpoint_every"
        )

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "ended": torch.tensor(self.ended),
        }
        if self.segment is not None:
            state |= self.segment.state("segment")
        for index, segment in enumerate(self.pending):
            state |= segment.state(f"pending/{index}")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.losses = state["losses"].tolist()
        self.ended = bool(state["ended"])
        self.segment = _Mean.from_state(state, "segment")
        self.pending = []
        while (segment := _Mean.from_state(state, f"pending/{len(self.pending)}")) is not None:
            self.pending.append(segment)


AVERAGES.register("sma", SMA)
AVERAGES.register("ema", EMA)
AVERAGES.register("swad", SWAD)
