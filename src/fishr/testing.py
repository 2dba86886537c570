"""Contract tests for algorithms and datasets, of this package or of others.

Call them in a test of your own::

    from fishr.testing import check_algorithm

    def test_my_algorithm():
        check_algorithm(MyAlgorithm)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.data.base import DomainBatch, Kind, MultiDomainDataset, Samples
from fishr.errors import ConfigError, ContractError
from fishr.models.batch_context import BatchDependent
from fishr.models.build import ModelConfig, build_model
from fishr.space import draw
from fishr.training.checkpoint import Progress, load_checkpoint, save_checkpoint

STEPS, CUTS = 20, (3, 12)
"""Length of the runs that are cut and resumed, and where."""

LEARNING_STEPS, LEARNED = 60, 0.9
"""Length of the run that is to learn, and the share of the first risk below which the last must be."""

VECTOR, IMAGE = (6,), (2, 8, 8)
NUM_DOMAINS, SIZE, RAGGED_SIZES = 3, 12, (5, 12, 3)
"""Domains, or as many more as an algorithm needs; samples of each, or in turn of domains that are unequal."""

OTHER_STEPS = 6
"""Length of the runs with other settings."""


def check_algorithm(algorithm: type[Algorithm], config: AlgorithmConfig | None = None) -> None:
    """Check that an algorithm keeps the contract of :class:`fishr.algorithms.Algorithm`.

    It describes itself; its config has defaults and draws for every kind of data and refuses values of the wrong type;
    it trains and lowers its risk, with several classes and with a single logit; it trains on vectors and on images, on
    domains of unequal sizes, with published and with drawn hyperparameters, with the featurizer in bfloat16 and with a
    frozen featurizer; runs are deterministic and resume exactly; evaluation changes no state; a prediction depends on
    its sample alone, unless the network is a :class:`fishr.models.BatchDependent`.

    Args:
        algorithm: The class.
        config: Hyperparameters to train with; default ``Config.recommended("vectors")``.

    Raises:
        ContractError: what it does not keep to.
    """
    with _named("description"):
        _check_description(algorithm)
    with _named("config"):
        _check_config(algorithm)
    trained_with = algorithm.Config.recommended("vectors") if config is None else config
    for check in (
        _check_few_domains,
        _check_learning,
        _check_determinism,
        _check_resume,
        _check_other_data,
        _check_other_settings,
        _check_bfloat16,
        _check_frozen_featurizer,
        _check_prediction,
    ):
        with _named(check.__name__.removeprefix("_check_").replace("_", " ")), torch.random.fork_rng(devices=[]):
            check(algorithm, trained_with)


def check_dataset(factory: Callable[..., MultiDomainDataset]) -> None:
    """Check that a dataset keeps the contract of :data:`fishr.data.DatasetFactory`.

    It takes ``(root, seed=, subset=)``, with None for the root; it can be trained on with any one domain held out;
    inputs and targets have the types that training takes; the same seed makes the same data; a subset has no more
    samples in a domain than it says.

    Args:
        factory: The factory.

    Raises:
        ContractError: what it does not keep to.
    """
    with _named("dataset"):
        first, again, few = (factory(None, seed=0, subset=subset) for subset in (None, None, 2))
        kind = type(first).__name__
        _require(isinstance(first, MultiDomainDataset), f"it must return a MultiDomainDataset, got {kind}")
        first.check_test_domains(())
        for other in (again, few):
            _require(list(first.domains) == list(other.domains), "the same seed must make the same domains")
        for domain, samples in first.domains.items():
            _check_samples(domain, samples, again.domains[domain])
            size = len(few.domains[domain].targets)
            _require(size <= 2, f"subset=2 must leave at most 2 samples in a domain, {domain!r} has {size}")


def _check_samples(domain: str, samples: Samples, again: Samples) -> None:
    inputs, targets = samples.inputs[:], samples.targets
    fits = inputs.dtype in (torch.float32, torch.uint8) and targets.dtype == torch.int64
    _require(
        fits,
        f"inputs must be float32 or uint8 and targets int64, those of domain {domain!r} are {inputs.dtype} and "
        f"{targets.dtype}",
    )
    same = torch.equal(inputs, again.inputs[:]) and torch.equal(targets, again.targets)
    _require(same, f"the same seed must make the same samples, those of domain {domain!r} differ")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ContractError(message)


@contextmanager
def _named(check: str) -> Iterator[None]:
    try:
        yield
    except ContractError as error:
        raise ContractError(f"{check}: {error}") from error
    except Exception as error:
        raise ContractError(f"{check}: {type(error).__name__}: {error}") from error


def _check_description(algorithm: type[Algorithm]) -> None:
    reference = getattr(algorithm, "reference", None)
    _require(isinstance(reference, Reference), f"reference must be a Reference, got {reference!r}")
    _require(bool(algorithm.__doc__), "its docstring must say the idea in its first line, then the objective")


def _check_config(algorithm: type[Algorithm]) -> None:
    config = algorithm.Config
    for kind in get_args(Kind):
        space = config.space(kind)
        for seed in range(5):
            for base in (config.default(kind), config.recommended(kind)):
                base.updated(draw(space, seed))
    wrong_types: list[tuple[str, object]] = [(item.name, ["a list"]) for item in fields(config)]
    for name, value in (*wrong_types, ("lr", -1.0), ("no_such_setting", 1)):
        try:
            config().updated({name: value})
        except ConfigError as error:
            _require(name in str(error), f"the error for {name}={value!r} must name {name!r}, it says {error}")
        else:
            raise ContractError(f"the config must refuse {name}={value!r}")


def _check_few_domains(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    if algorithm.min_domains < 2:
        return
    try:
        _Training(algorithm, config, num_domains=algorithm.min_domains - 1)
    except ConfigError:
        return
    raise ContractError(f"it must refuse fewer than min_domains={algorithm.min_domains} domains")


def _check_learning(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    for num_outputs in (3, 1):
        training = _Training(algorithm, config, num_outputs=num_outputs, steps=LEARNING_STEPS)
        before = training.risk()
        training.run(LEARNING_STEPS)
        after = training.risk()
        _require(
            after < LEARNED * before,
            f"with {num_outputs} outputs the risk went from {before:.3f} to {after:.3f} in {LEARNING_STEPS} steps, "
            f"expected below {LEARNED * before:.3f}",
        )


def _check_determinism(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    one, other = _Training(algorithm, config).run(STEPS), _Training(algorithm, config).run(STEPS)
    _require_same(one.state(), other.state(), "two runs with the same seeds must end with the same bits")


def _check_resume(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    unbroken = _Training(algorithm, config).run(STEPS)
    for cut in CUTS:
        with TemporaryDirectory() as folder:
            killed = _Training(algorithm, config).run(cut)
            progress = Progress(cut, {}, 0)
            checkpoint = save_checkpoint(Path(folder), {"algorithm": killed.algorithm}, killed.optimizers, progress)
            resumed = _Training(algorithm, config, seed=1)
            load_checkpoint(checkpoint, {"algorithm": resumed.algorithm}, resumed.optimizers)
            resumed.run(STEPS, start=cut)
        _require_same(
            unbroken.state(),
            resumed.state(),
            f"a run that was cut after step {cut} and resumed from its checkpoint must end with the same bits: keep "
            "what later steps need in parameters, buffers and optimizers",
        )


def _check_other_data(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    _Training(algorithm, config, ragged=True).run(STEPS)
    _Training(algorithm, config, input_shape=IMAGE, model=ModelConfig("mnist-cnn")).run(2)


def _check_other_settings(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    published = algorithm.Config.default("vectors")
    drawn = published.updated(draw(algorithm.Config.space("vectors"), 1))
    for settings in (published, drawn):
        _Training(algorithm, settings, steps=OTHER_STEPS).run(OTHER_STEPS)
    _Training(algorithm, drawn, steps=OTHER_STEPS).freeze_featurizer().run(OTHER_STEPS)


def _check_bfloat16(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    training = _Training(algorithm, config)
    training.algorithm.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    training.run(STEPS)
    logits = training.algorithm(training.batch(0).inputs)
    _require(logits.dtype == torch.float32, f"logits must be float32 with a featurizer in bfloat16, got {logits.dtype}")


def _check_frozen_featurizer(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    training = _Training(algorithm, config).freeze_featurizer()
    before = [weights.clone() for weights in training.algorithm.featurizer.parameters()]
    training.run(STEPS)
    same = all(map(torch.equal, before, training.algorithm.featurizer.parameters()))
    _require(same, "weights with requires_grad=False must stay as they are")


def _check_prediction(algorithm: type[Algorithm], config: AlgorithmConfig) -> None:
    training = _Training(algorithm, config).run(2)
    trained, inputs = training.algorithm.eval(), training.batch(0).inputs
    before = training.state()
    with torch.no_grad():
        together = trained(inputs)
        alone = torch.cat([trained(inputs[index : index + 1]) for index in range(len(inputs))])
    _require_same(before, training.state(), "evaluation must change no state")
    _require(together.shape == (len(inputs), 3), f"logits must be [sample, class], got {list(together.shape)}")
    if not isinstance(trained.featurizer, BatchDependent):
        same = torch.allclose(together, alone, atol=1e-5)
        _require(same, "a prediction must depend on its sample alone, or the featurizer be a BatchDependent")
    network = nn.ModuleDict({"featurizer": trained.featurizer, "classifier": trained.classifier})
    with torch.no_grad():
        features = network["featurizer"](inputs)
        saved = torch.allclose(network["classifier"](features), together, atol=1e-5)
    _require(saved, "the prediction must be that of classifier(featurizer(inputs)): nothing else is saved")


def _require_same(one: Mapping[str, Any], other: Mapping[str, Any], message: str) -> None:
    differing = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    _require(not differing and one.keys() == other.keys(), f"{message}; differs: {', '.join(differing[:3])}")


class _Training:
    """A small run on a task that can be learned: classes lie apart, domains are shifted."""

    def __init__(
        self,
        algorithm: type[Algorithm],
        config: AlgorithmConfig,
        *,
        num_outputs: int = 3,
        num_domains: int | None = None,
        ragged: bool = False,
        input_shape: tuple[int, ...] = VECTOR,
        model: ModelConfig = ModelConfig("mlp", {"width": 16}),
        steps: int = STEPS,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        if num_domains is None:
            num_domains = max(NUM_DOMAINS, algorithm.min_domains)
        sizes = tuple(islice(cycle(RAGGED_SIZES if ragged else (SIZE,)), num_domains))
        self.num_classes, self.sizes, self.input_shape = max(2, num_outputs), sizes, input_shape
        network = build_model(algorithm.model_config(model), input_shape, num_outputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.centers = 2 * torch.randn(self.num_classes, *input_shape)
            self.shifts = 0.5 * torch.randn(len(sizes), *input_shape)
        self.algorithm = algorithm(*network, num_domains, config, steps=steps)
        self.optimizers: dict[str, Optimizer] = self.algorithm.configure_optimizers()
        self.terms: list[str] | None = None

    def freeze_featurizer(self) -> "_Training":
        self.algorithm.featurizer.requires_grad_(False)
        self.optimizers = self.algorithm.configure_optimizers()
        return self

    def batch(self, step: int) -> DomainBatch:
        generator = torch.Generator().manual_seed(1000 + step)
        targets = [torch.randint(self.num_classes, (size,), generator=generator) for size in self.sizes]
        inputs = [
            self.centers[of_domain] + shift + torch.randn(len(of_domain), *self.input_shape, generator=generator)
            for of_domain, shift in zip(targets, self.shifts, strict=True)
        ]
        return DomainBatch.of(inputs, targets)

    def run(self, steps: int, start: int = 0) -> "_Training":
        self.algorithm.train()
        for step in range(start, steps):
            torch.manual_seed(step)
            self._check_losses(self.algorithm.training_step(self.batch(step), step, self.optimizers), step)
        return self

    def risk(self) -> float:
        """Mean loss on a batch that is not trained on."""
        self.algorithm.eval()
        batch = self.batch(-1)
        with torch.no_grad():
            return float(self.algorithm.sample_losses(self.algorithm(batch.inputs), batch.targets).mean())

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, as tensors."""
        state = {f"algorithm/{name}": value.clone() for name, value in self.algorithm.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"optimizer/{name}/{index}/{key}": torch.as_tensor(v).clone() for key, v in values.items()}
        return state

    def _check_losses(self, losses: Losses, step: int) -> None:
        values = {"total": losses.total, **losses.terms}
        for name, value in values.items():
            finite = value.ndim == 0 and bool(torch.isfinite(value))
            shown = f"{value}" if value.ndim == 0 else f"of shape {list(value.shape)}"
            _require(finite, f"the loss term {name!r} must be a finite scalar, at step {step} it is {shown}")
        _require("risk" in losses.terms, f"the terms must have a 'risk', got {', '.join(losses.terms) or 'none'}")
        before = self.terms or list(values)
        _require(
            set(before) == set(values),
            f"the terms must be the same at every step: before step {step} {', '.join(before)}, then "
            f"{', '.join(values)}",
        )
        self.terms = before
