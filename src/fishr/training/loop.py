"""The training loop: one run from its config to its model, killed and continued as often as it takes."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from torch.optim import Optimizer

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import Algorithm, Losses
from fishr.data.base import MultiDomainDataset, Samples
from fishr.data.sampling import BatchSampler, split_indices
from fishr.errors import ConfigError, DataError, NonFiniteLossError, RunError, RunInterruptedError
from fishr.models.build import build_model
from fishr.models.saved import ModelCard, SavedModel
from fishr.records import Metrics, RunRecord, Split
from fishr.registry import unknown
from fishr.training.checkpoint import Progress, newest_checkpoint, restore_checkpoint, save_checkpoint
from fishr.training.config import RunConfig
from fishr.training.evaluation import evaluate
from fishr.training.run_folder import RunFolder
from fishr.training.signals import stop_on_signal

STEPS_BETWEEN_LOOKS = 20
"""On an accelerator, steps between looks at the losses: each look makes the host wait."""

_INIT, _STEP = 0x1217, 0x57E9
"""Second word of torch's seeds: numpy pads them with zeros, so (seed,) and (seed, 0) would be the same."""

# Fabric writes what precision it uses to stderr; a library does not.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


class Observer(Protocol):
    """Somebody who watches a run, such as a progress bar."""

    def on_start(self, config: RunConfig, step: int) -> None:
        """The run begins, or continues after ``step`` updates."""

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        """``step`` updates have been made; the loss terms are those of the last one looked at."""

    def on_record(self, record: RunRecord) -> None:
        """A checkpoint was evaluated."""


class Silent:
    """An observer that does nothing."""

    def on_start(self, config: RunConfig, step: int) -> None: ...
    def on_step(self, step: int, losses: Mapping[str, float]) -> None: ...
    def on_record(self, record: RunRecord) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where it lies.
        records: Its records, oldest first.
        trained: Whether this call trained; False if the run was done already.
    """

    folder: Path
    records: list[RunRecord]
    trained: bool


def train(
    config: RunConfig,
    dataset: MultiDomainDataset,
    output: Path | str,
    *,
    device: str = "auto",
    observer: Observer | None = None,
) -> RunResult:
    """Run one training, or continue it where it was cut.

    Args:
        config: The run.
        dataset: The data that the config names.
        output: Folder of the run.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        observer: Is told of steps and records.

    Raises:
        RunError: the folder holds another run, all its checkpoints are damaged, or it cannot be written.
        RunInterruptedError: SIGINT or SIGTERM came; the state was saved.
        NonFiniteLossError: a loss term became NaN or infinite.
        ConfigError: the config does not fit the dataset, or there is no such device.
    """
    output = Path(output)
    named, given = (config.data, dict(config.data_options)), (dataset.name, dict(dataset.options))
    if named != given:
        raise ConfigError("the config names the dataset {!r} with {}, got {!r} with {}".format(*named, *given))
    dataset.check_test_domains(config.test_domains)
    try:
        fabric = _fabric(device, config)
        folder = RunFolder(output, config)
        if folder.done:
            records = folder.records()
            if not records:
                raise RunError(f"{folder.metrics} is missing or empty: delete the run's folder to start anew")
            return RunResult(output, records, trained=False)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            _Run(config, dataset, folder, fabric, observer or Silent()).finish()
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write the run in {output}: {getattr(error, 'strerror', None) or error}; "
            "what was saved before is intact: mend the cause and run again to continue"
        ) from error
    return RunResult(output, folder.records(), trained=True)


class _Run:
    """State of a run between two steps."""

    def __init__(
        self,
        config: RunConfig,
        dataset: MultiDomainDataset,
        folder: RunFolder,
        fabric: Fabric,
        observer: Observer,
    ) -> None:
        self.config, self.dataset, self.folder, self.fabric, self.observer = config, dataset, folder, fabric, observer
        self.splits = _split_all(dataset, config)
        train_domains = [name for name in dataset.trainable_domains if name not in config.test_domains]
        in_splits = [self.splits[name]["in"] for name in train_domains]
        self.sampler = BatchSampler(in_splits, config.hparams.batch_size, config.seed)

        _seed_torch(config.seed, _INIT)
        featurizer, classifier = build_model(config.model, dataset.input_shape, dataset.num_outputs)
        self.algorithm: Algorithm = ALGORITHMS[config.algorithm](
            featurizer, classifier, len(train_domains), config.hparams, steps=config.steps
        ).to(fabric.device)
        self.algorithm.autocast = fabric.autocast
        self.optimizers: dict[str, Optimizer] = self.algorithm.configure_optimizers()

        folder.create()
        progress = restore_checkpoint(folder.checkpoints, self.algorithm, self.optimizers)
        self.step = 0 if progress is None else progress.step
        self.monitor = _LossMonitor(folder, looks_every=1 if fabric.device.type == "cpu" else STEPS_BETWEEN_LOOKS)
        if progress is not None:
            self.monitor.sums, self.monitor.count = dict(progress.loss_sums), progress.steps_in_sums
        folder.forget_records_after(self.step)

    def finish(self) -> None:
        """Make the remaining steps and write the model."""
        config = self.config
        self.observer.on_start(config, self.step)
        timed_from, timed_steps = time.perf_counter(), 0
        with stop_on_signal() as stop:
            while self.step < config.steps:
                _seed_torch(config.seed, _STEP, self.step)
                batch = self.sampler.batch(self.step).to(self.fabric.device)
                losses = self.algorithm.training_step(batch, self.step, self.optimizers)
                self.step += 1
                timed_steps += 1
                self.monitor.add(self.step, losses)
                self.observer.on_step(self.step, self.monitor.last)
                # Looked at once: a signal that comes later in this step counts for the next.
                signal_number = stop.signal_number
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._record((time.perf_counter() - timed_from) / timed_steps)
                    self._save()
                    timed_from, timed_steps = time.perf_counter(), 0
                elif signal_number is not None:
                    self._save()
                if signal_number is not None and self.step < config.steps:
                    raise RunInterruptedError(
                        f"stopped after step {self.step} of {config.steps}, saved in {self.folder.path}: "
                        "run the same command again to continue",
                        signal_number,
                    )
            self.folder.finish(self._saved_model())
            if stop.signal_number is not None:
                raise RunInterruptedError(f"stopped; the run in {self.folder.path} is done", stop.signal_number)

    def _record(self, seconds_per_step: float) -> None:
        domains: dict[str, dict[Split, Metrics]] = {
            name: {split: evaluate(self.algorithm, samples, self.fabric.device) for split, samples in splits.items()}
            for name, splits in self.splits.items()
        }
        for name, splits in domains.items():
            for split, metrics in splits.items():
                if not np.isfinite(metrics.loss):
                    raise self.monitor.error(self.step, [f"the loss on the {split}-split of {name} is {metrics.loss}"])
        record = RunRecord(self.step, self.monitor.take_means(), domains, seconds_per_step)
        self.folder.append(record)
        self.observer.on_record(record)

    def _save(self) -> None:
        self.monitor.look()
        progress = Progress(self.step, self.monitor.sums, self.monitor.count)
        save_checkpoint(self.folder.checkpoints, self.algorithm, self.optimizers, progress)

    def _saved_model(self) -> SavedModel:
        last = self.folder.records()[-1]
        provenance: dict[str, Any] = {
            "config": self.config.as_dict(),
            "accuracy": {
                domain: {split: metrics.accuracy for split, metrics in splits.items()}
                for domain, splits in last.domains.items()
            },
            "versions": {name: version(name) for name in ("fishr", "torch")},
        }
        card = ModelCard(
            self.config.model, self.dataset.input_shape, self.dataset.classes, self.dataset.binary, provenance
        )
        return SavedModel(self.algorithm.featurizer, self.algorithm.classifier, card)


@dataclass
class _LossMonitor:
    """Sums of the loss terms since the last record, and a stop at the first that is not finite."""

    folder: RunFolder
    looks_every: int
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    last: dict[str, float] = field(default_factory=dict)
    unseen: list[tuple[int, Losses]] = field(default_factory=list)

    def add(self, step: int, losses: Losses) -> None:
        self.unseen.append((step, losses))
        if len(self.unseen) >= self.looks_every:
            self.look()

    def look(self) -> None:
        """Read the losses not yet seen."""
        for step, losses in self.unseen:
            terms = {"loss": losses.total, **losses.terms}
            values = torch.stack([value.detach().float() for value in terms.values()]).tolist()
            self.last = dict(zip(terms, values, strict=True))
            bad = [f"{name} is {value}" for name, value in self.last.items() if not np.isfinite(value)]
            if bad:
                raise self.error(step, bad)
            for name, value in self.last.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        self.unseen.clear()

    def take_means(self) -> dict[str, float]:
        self.look()
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def error(self, step: int, bad: list[str]) -> NonFiniteLossError:
        last_good = newest_checkpoint(self.folder.checkpoints)
        kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint was saved before"
        return NonFiniteLossError(f"at step {step} {' and '.join(bad)}; {kept}; try a smaller lr or penalty weight")


def _fabric(device: str, config: RunConfig) -> Fabric:
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if device not in available:
        raise unknown("device", device, available)
    if not available[device]:
        raise ConfigError(f"device {device!r} is not available here: torch finds none; use 'auto' or 'cpu'")
    return Fabric(accelerator=device, devices=1, precision="32-true" if config.precision == "32" else config.precision)


def _split_all(dataset: MultiDomainDataset, config: RunConfig) -> dict[str, dict[Split, Samples]]:
    """In- and out-split of every domain; a domain without an out-split has only ``"in"``."""
    all_splits: dict[str, dict[Split, Samples]] = {}
    for index, (name, samples) in enumerate(dataset.domains.items()):
        in_indices, out_indices = split_indices(len(samples.targets), config.out_fraction, config.trial, index)
        if len(out_indices) == 0:
            if config.out_fraction > 0:
                raise DataError(
                    f"domain {name!r} has {len(samples.targets)} samples, too few for an out-split of "
                    f"{config.out_fraction:.0%}: use more of its samples, or out_fraction=0"
                )
            all_splits[name] = {"in": samples}
        else:
            all_splits[name] = {
                "in": Samples(samples.inputs[in_indices], samples.targets[in_indices]),
                "out": Samples(samples.inputs[out_indices], samples.targets[out_indices]),
            }
    return all_splits


def _seed_torch(*seed: int) -> None:
    """Make torch's random numbers a function of ``seed``, so that no generator state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
