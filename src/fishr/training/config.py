"""RunConfig: all that changes the result of a run, and nothing else."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import AlgorithmConfig
from fishr.data.base import MultiDomainDataset
from fishr.errors import ConfigError
from fishr.models.build import ModelConfig, default_model
from fishr.records import settings_that_differ
from fishr.training.averaging import AVERAGES, AverageConfig

Precision = Literal["32", "bf16-mixed"]


@dataclass(frozen=True)
class RunConfig:
    """One training.

    Attributes:
        data: Name of the dataset.
        data_options: Options it is loaded with, its seed among them.
        test_domains: Domains held out from training.
        algorithm: Name of the algorithm.
        hparams: Its hyperparameters.
        model: The network.
        steps: Updates to make.
        checkpoint_every: Updates between evaluations and checkpoints.
        seed: Seed of initial weights, batches and dropout.
        trial: Seed of the splits.
        out_fraction: Share of each domain in its out-split; 0 trains on all.
        precision: ``"32"``, or ``"bf16-mixed"``: the featurizer in bfloat16, everything from the head on in float32.
        average: How weights are averaged over steps; None keeps the plain ones.
        select: Keep the weights of the checkpoint with the best mean accuracy on the out-splits of the training
            domains, among those after the switch-on step (the first of equals), instead of the last.
        class_balanced: Draw the class of a training sample first, each as likely.
        draw: Number of the hyperparameter draw in a sweep: where ``hparams`` come from. It changes no result.

    Raises:
        ConfigError: a value that cannot be.
    """

    data: str
    test_domains: tuple[str, ...]
    algorithm: str
    hparams: AlgorithmConfig
    model: ModelConfig
    steps: int
    checkpoint_every: int
    data_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    trial: int = 0
    out_fraction: float = 0.2
    precision: Precision = "32"
    average: AverageConfig | None = None
    select: bool = False
    class_balanced: bool = False
    draw: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.test_domains, str):
            raise ConfigError(f"test_domains must be a tuple of names, got the text {self.test_domains!r}")
        if self.average is not None and not isinstance(self.average, AverageConfig):
            raise ConfigError(f"average must be an AverageConfig or None, got {self.average!r}")
        problems = [
            f"{name} must be a whole number, got {getattr(self, name)!r}"
            for name in ("steps", "checkpoint_every", "seed", "trial")
            if type(getattr(self, name)) is not int
        ]
        if problems:
            raise ConfigError("; ".join(problems))
        # Their order changes no result, so neither does it the hash.
        object.__setattr__(self, "test_domains", tuple(sorted(set(self.test_domains))))
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("steps", 1), ("checkpoint_every", 1), ("seed", 0), ("trial", 0))
            if getattr(self, name) < least
        ]
        if self.precision not in get_args(Precision):
            problems.append(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if not 0 <= self.out_fraction < 1:
            problems.append(f"out_fraction must lie in [0, 1), got {self.out_fraction}")
        validates = self.select or self.needs_validation_loss
        if validates and self.out_fraction == 0:
            problems.append("selection and SWAD need out-splits of the training domains: out_fraction must be above 0")
        if self.select and self.needs_validation_loss:
            problems.append(
                "SWAD chooses what it averages by validation itself: select and average='swad' exclude each other"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def for_dataset(
        cls,
        dataset: MultiDomainDataset,
        algorithm: str,
        *,
        steps: int,
        test_domains: tuple[str, ...] | None = None,
        hparams: Mapping[str, Any] | None = None,
        model: ModelConfig | None = None,
        checkpoint_every: int | None = None,
        **rest: Any,
    ) -> Self:
        """A config with the customary choices for a dataset where none is given.

        Args:
            dataset: The data.
            algorithm: Name of the algorithm.
            steps: Updates to make.
            test_domains: Default: the dataset's customary one, if it has one.
            hparams: Changes to the algorithm's published defaults for the kind of data, or for data that are no
                published benchmark to the recommended ones; a ``penalty_weight`` among them takes the place of the
                recommended ``strength``.
            model: Default: the customary network for the kind of data.
            checkpoint_every: Default: ten checkpoints in the run.
            rest: Other fields.
        """
        customary = () if dataset.test_domain is None else (dataset.test_domain,)
        config = ALGORITHMS[algorithm].Config
        defaults = config.default(dataset.kind) if dataset.published else config.recommended(dataset.kind)
        return cls(
            data=dataset.name,
            data_options=dict(dataset.options),
            test_domains=customary if test_domains is None else test_domains,
            algorithm=algorithm,
            hparams=defaults.with_given(hparams or {}),
            model=default_model(dataset.kind, dataset.input_shape) if model is None else model,
            steps=steps,
            checkpoint_every=max(1, steps // 10) if checkpoint_every is None else checkpoint_every,
            **rest,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they read back from JSON."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`."""
        return cls(
            **{
                **content,
                "test_domains": tuple(content["test_domains"]),
                "hparams": ALGORITHMS[content["algorithm"]].Config(**content["hparams"]),
                "model": ModelConfig(**content["model"]),
                "average": None if content["average"] is None else AverageConfig(**content["average"]),
            }
        )

    @property
    def needs_validation_loss(self) -> bool:
        """Whether the averaging of weights follows the loss on the out-splits of the training domains."""
        return self.average is not None and AVERAGES[self.average.name].needs_validation

    @property
    def hash(self) -> str:
        """Names the run: equal exactly for equal configs, whatever data with the same fingerprint are called."""
        canonical = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What makes the run another one than others."""
        content = self.as_dict()
        del content["draw"]
        if "fingerprint" in self.data_options:
            del content["data"]
        return content

    def differences(self, other: "RunConfig") -> list[str]:
        """Settings in which another config differs, ``name: ours → theirs``."""
        return settings_that_differ(self.identity(), other.identity())
