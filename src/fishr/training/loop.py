"""The training loop: one run from its config to its model, killed and continued as often as it takes."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import Algorithm, Losses
from fishr.data.base import DomainBatch, MultiDomainDataset, Samples
from fishr.data.sampling import BatchSampler, split_dataset
from fishr.errors import ConfigError, NonFiniteLossError, RunError, RunInterruptedError
from fishr.models.backbone import lay_weights, load_initial_weights
from fishr.models.build import build_model
from fishr.models.card import ModelCard
from fishr.models.mlp import MLP
from fishr.models.saved import SavedModel
from fishr.records import Metrics, RunRecord, Split
from fishr.training.averaging import make_average
from fishr.training.best import BestWeights
from fishr.training.checkpoint import (
    Progress,
    Stateful,
    load_checkpoint,
    newest_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from fishr.training.compilation import compile_featurizer, compiler_errors_explained, uncompiled
from fishr.training.config import RunConfig
from fishr.training.evaluation import evaluate
from fishr.training.hints import penalty_hints
from fishr.training.observer import Observer, Observers, Silent
from fishr.training.ranks import Ranks, lost_rank
from fishr.training.run_folder import RunFolder, snapshots_of, tidy
from fishr.training.signals import stop_on_signal
from fishr.training.stacked import Stack, stacking_pays
from fishr.training.tracking import Tracking

STEPS_BETWEEN_LOOKS = 20
"""On an accelerator, steps between looks at the losses: each look makes the host wait."""

WARM_UP_STEPS, TIMED_STEPS, TIMED_EVALUATIONS, TIMED_SAMPLES = 2, 8, 3, 256
"""What is measured to tell how long a run takes."""

_INIT, _STEP = 0x1217, 0x57E9
"""Second word of torch's seeds: numpy pads them with zeros, so (seed,) and (seed, 0) would be the same."""

# Fabric writes what precision it uses to stderr; a library does not.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where it lies.
        records: Its records, oldest first.
        kept: The record of the model that was kept.
        trained: Whether this call trained; False if the run was done already.
        hints: What to change about the penalty's weight (:func:`fishr.training.hints.penalty_hints`).
    """

    folder: Path
    records: list[RunRecord]
    kept: RunRecord
    trained: bool
    hints: list[str]


def train(
    config: RunConfig,
    dataset: MultiDomainDataset,
    output: Path | str,
    *,
    weights: Path | None = None,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    compile: bool = False,
    snapshots: bool = False,
    keep_model: bool = True,
    observer: Observer | None = None,
    track: str | None = None,
) -> RunResult:
    """Run one training, or continue it where it was cut.

    At each checkpoint those splits are evaluated that model selection needs: the out-split of each training domain (the
    in-split where there is no out-split), the in-split of all others, and at the last checkpoint the out-split of the
    held-out domains too.

    With several devices each has a process of its own, which runs the calling program from its beginning, as with
    Lightning; batches are shared out, and what is computed is the same up to the order of sums. A run may be
    continued with another number of them. All machines must see the run's folder; the first process writes.

    Args:
        config: The run.
        dataset: The data that the config names.
        output: Folder of the run.
        weights: File with the featurizer's initial weights, where the config names one by its digest.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        devices: Devices on each machine; on a CPU, processes.
        nodes: Machines, on each of which the program was started.
        compile: Train with a compiled featurizer (``torch.compile``): it takes a minute or more, then steps are
            faster. Results differ by rounding; a run may be continued with it or without.
        snapshots: Keep the model of every checkpoint that is made from now on; see
            :func:`fishr.training.run_folder.snapshots_of`.
        keep_model: Keep the model of the run when it is done; tables need the records only.
        observer: Is told of steps and records.
        track: Who else is told, of the config, the records and the model: one of
            :data:`fishr.training.trackers.TRACKERS`, or nobody.

    Raises:
        RunError: the folder holds another run, all its checkpoints are damaged, it cannot be written, or it is done
            and has none of the snapshots that are asked for.
        RunInterruptedError: SIGINT or SIGTERM came; the state was saved.
        NonFiniteLossError: a loss term became NaN or infinite.
        ConfigError: the config does not fit the dataset, there is no such device or tracker, or the algorithm does not
            train on several devices, or cannot be compiled.
        TrackingError: the tracker cannot be told that the run begins.
    """
    (result,) = _train(
        [PlannedRun(config, dataset, Path(output), observer)],
        device=device,
        track=track,
        devices=devices,
        nodes=nodes,
        weights=weights,
        compile=compile,
        snapshots=snapshots,
        keep_model=keep_model,
    )
    return result


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained; :func:`train` says what the parts are."""

    config: RunConfig
    dataset: MultiDomainDataset
    output: Path
    observer: Observer | None = None


def train_together(runs: Sequence[PlannedRun], *, device: str = "auto", track: str | None = None) -> list[RunResult]:
    """Runs that differ in their seeds alone, trained at once: step by step, by :class:`fishr.training.stacked.Stack`.

    Each leaves what :func:`train` leaves of it, the same up to the order of sums; it may be cut and continued with the
    others or alone, and is not made again. On a CPU, larger models take each step one after the other.

    Args:
        runs: What to train.
        device: As :func:`train` takes it.
        track: Likewise.

    Raises:
        ConfigError: runs that differ in more than their seeds, do not take all samples at each step, or cannot be
            stacked; a tracker that knows one run at a time.
        FishrError: as :func:`train`.
    """
    if len(runs) > 1:
        first, *others = (replace(run.config, seed=0, data_options={}) for run in runs)
        if differences := [text for other in others for text in first.differences(other)]:
            raise ConfigError(f"runs trained together must be the same but for their seeds, got {differences[0]}")
        if first.hparams.batch_size is not None:
            raise ConfigError(
                "runs trained together take all samples at each step: batch_size must be null, got "
                f"{first.hparams.batch_size}"
            )
        if track == "wandb":
            raise ConfigError(
                "wandb follows one run of a process at a time: take another tracker, or train the runs one by one, "
                "without --stack"
            )
    return _train(runs, device=device, track=track)


def _train(
    planned: Sequence[PlannedRun],
    *,
    device: str,
    track: str | None,
    devices: int = 1,
    nodes: int = 1,
    weights: Path | None = None,
    compile: bool = False,
    snapshots: bool = False,
    keep_model: bool = True,
) -> list[RunResult]:
    for each in planned:
        _check_dataset(each.config, each.dataset)
    config, where = planned[0].config, _named([each.output for each in planned])
    try:
        ranks = Ranks(device, config.precision, devices, nodes)
        if ranks.number > 1 and not ALGORITHMS[config.algorithm].for_ranks:
            raise ConfigError(
                f"{config.algorithm} looks at the inputs of the whole batch and trains on one device only, got "
                f"{ranks.number}: take one device, or another algorithm"
            )
        ranks.launch()
        folders = ranks.from_main(lambda: [RunFolder(each.output, each.config) for each in planned])
        done = ranks.from_main(lambda: [_is_done(folder, snapshots=snapshots) for folder in folders])
        missing = [(each, folder) for each, folder, was in zip(planned, folders, done, strict=True) if not was]
        if missing:
            with torch.random.fork_rng(range(torch.cuda.device_count())), ExitStack() as held:
                runs = []
                for each, folder in missing:
                    tracking = None if track is None else Tracking(track, folder)
                    told = (tracking, each.observer) if ranks.is_main else ()
                    observers = Observers(*(observer for observer in told if observer is not None))
                    run = _Run(
                        each.config,
                        each.dataset,
                        folder,
                        ranks,
                        observers,
                        weights,
                        compile=compile,
                        snapshots=snapshots,
                        keep_model=keep_model,
                    )
                    ranks.from_main(partial(held.enter_context, folder.alone()))
                    if tracking is not None and ranks.is_main:
                        held.enter_context(tracking)
                    run.start()
                    runs.append(run)
                with compiler_errors_explained() if compile else nullcontext():
                    _finish(runs)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write the run in {where}: {getattr(error, 'strerror', None) or error}; "
            "what was saved before is intact: mend the cause and run again to continue"
        ) from error
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise RunError(
            f"another process of the run in {where} has ended; what it said tells why: run again to continue from the "
            "last checkpoint"
        ) from error
    return ranks.from_main(
        lambda: [
            _result(folder, each.dataset, trained=not was_done)
            for each, folder, was_done in zip(planned, folders, done, strict=True)
        ]
    )


def _check_dataset(config: RunConfig, dataset: MultiDomainDataset) -> None:
    named, given = (config.data, dict(config.data_options)), (dataset.name, dict(dataset.options))
    if named[1] != given[1] or ("fingerprint" not in given[1] and named[0] != given[0]):
        raise ConfigError("the config names the dataset {!r} with {}, got {!r} with {}".format(*named, *given))
    dataset.check_test_domains(config.test_domains)


def _named(folders: Sequence[Path]) -> str:
    return str(folders[0]) if len(folders) == 1 else f"{folders[0]} and {len(folders) - 1} more"


def _is_done(folder: RunFolder, *, snapshots: bool) -> bool:
    """Whether there is nothing to do; raises RunError where what is asked for is missing all the same."""
    if not folder.done:
        return False
    tidy(folder.path)
    if not folder.records():
        raise RunError(f"{folder.metrics} is missing or empty: delete the run's folder to start anew")
    if snapshots and not snapshots_of(folder.path):
        raise RunError(
            f"the run in {folder.path} is done and kept no snapshots: choose another --output to train it anew"
        )
    return True


def _result(folder: RunFolder, dataset: MultiDomainDataset, *, trained: bool) -> RunResult:
    records, config = folder.records(), folder.config
    train_domains = [name for name in dataset.trainable_domains if name not in config.test_domains]
    return RunResult(folder.path, records, folder.kept(), trained, penalty_hints(records, config, train_domains))


@dataclass(frozen=True)
class RunCost:
    """How long the parts of a run take.

    Attributes:
        start: Seconds until the first step, with decoded images.
        step: Seconds of a training step after the switch-on.
        checkpoint: Seconds of evaluating and saving a checkpoint.
    """

    start: float
    step: float
    checkpoint: float

    def seconds(self, steps: int, checkpoint_every: int) -> float:
        """Seconds of a whole run."""
        return self.start + steps * self.step + math.ceil(steps / checkpoint_every) * self.checkpoint


def measure_cost(
    config: RunConfig,
    dataset: MultiDomainDataset,
    *,
    weights: Path | None = None,
    device: str = "auto",
) -> RunCost:
    """Measure on a few steps, and the evaluation of a few samples, how long a run takes; nothing is kept.

    Args:
        config: The run.
        dataset: The data that the config names; images that are not in the cache are decoded first.
        weights: As :func:`train` takes them.
        device: Likewise.

    Raises:
        FishrError: as :func:`train`.
    """
    dataset.open()
    with TemporaryDirectory() as scratch, torch.random.fork_rng(range(torch.cuda.device_count())):
        folder = RunFolder(Path(scratch) / "run", config)
        folder.create()
        for _ in range(2):  # what is imported, downloaded or started up once is of no run's cost
            began = time.perf_counter()
            run = _Run(config, dataset, folder, Ranks(device, config.precision), Silent(), weights)
            start = time.perf_counter() - began
        return RunCost(start, run.seconds_per_step(), run.seconds_per_checkpoint())


class _Run:
    """State of a run between two steps."""

    def __init__(
        self,
        config: RunConfig,
        dataset: MultiDomainDataset,
        folder: RunFolder,
        ranks: Ranks,
        observer: Observer,
        weights: Path | None,
        *,
        compile: bool = False,
        snapshots: bool = False,
        keep_model: bool = True,
    ) -> None:
        self.config, self.dataset, self.folder, self.ranks, self.observer = config, dataset, folder, ranks, observer
        self.snapshots, self.keep_model = snapshots, keep_model
        self.splits = _split_all(dataset, config)
        self.train_domains = [name for name in dataset.trainable_domains if name not in config.test_domains]
        in_splits = [self.splits[name]["in"] for name in self.train_domains]
        _check_sizes(config, dict(zip(self.train_domains, in_splits, strict=True)))
        self.sampler = BatchSampler(
            in_splits,
            config.hparams.batch_size,
            config.seed,
            class_balanced=config.class_balanced,
            rank=ranks.index,
            num_ranks=ranks.number,
            device=ranks.device,
        )

        _seed_torch(config.seed, _INIT)
        algorithm_class = ALGORITHMS[config.algorithm]
        self.model = algorithm_class.model_config(config.model)
        featurizer, classifier = build_model(self.model, dataset.input_shape, dataset.num_outputs)
        if config.model.weights is not None and newest_checkpoint(folder.checkpoints) is None:
            load_initial_weights(featurizer, config.model.weights, weights)
        self.algorithm: Algorithm = algorithm_class(
            featurizer, classifier, len(self.train_domains), config.hparams, steps=config.steps
        ).to(ranks.device)
        lay_weights(featurizer, ranks.device)
        if compile:
            compile_featurizer(self.algorithm)
        self.evaluating = uncompiled if compile else nullcontext
        self.algorithm.autocast = ranks.fabric.autocast
        self.network = nn.ModuleDict({"featurizer": self.algorithm.featurizer, "classifier": self.algorithm.classifier})
        self.average = None if config.average is None else make_average(config.average)
        self.best = BestWeights()
        self.optimizers: dict[str, Optimizer] = self.algorithm.configure_optimizers()
        ranks.keep_equal(featurizer, list(self.optimizers.values()))

        self._halved = self._halved_batch()

        self.step, self.durations = 0, list[float]()
        self.monitor = _LossMonitor(folder, looks_every=1 if ranks.device.type == "cpu" else STEPS_BETWEEN_LOOKS)
        # Whatever may be wrong with the settings was found before: decoding can take long.
        with ranks.main_first():
            dataset.open(observer.on_images)

    def start(self) -> None:
        """Make the folder, or continue from its newest checkpoint."""
        self.ranks.from_main(self.folder.create)
        checkpoint = self.ranks.from_main(lambda: newest_whole_checkpoint(self.folder.checkpoints))
        if checkpoint is not None:
            progress = load_checkpoint(checkpoint, self._stateful(), self.optimizers)
            self.step = progress.step
            self.monitor.sums, self.monitor.count = dict(progress.loss_sums), progress.steps_in_sums
        self.ranks.from_main(lambda: self.folder.forget_records_after(self.step))

    def batch(self, step: int) -> DomainBatch:
        """The batch of a step, on the device."""
        return self.sampler.batch(step).to(self.ranks.device) if self._halved is None else self._halved

    def _halved_batch(self) -> DomainBatch | None:
        """The batch of all samples in bfloat16, where nothing but that is done with its inputs at every step."""
        halves = self.config.precision == "bf16-mixed" and isinstance(self.algorithm.featurizer, MLP)
        if not halves or self.config.hparams.batch_size is not None or not self.algorithm.for_ranks:
            return None
        whole = self.sampler.batch(0).to(self.ranks.device)
        return replace(whole, inputs=whole.inputs.bfloat16())

    def training_step(self) -> Losses:
        """Update the weights alone; :meth:`count_step` is to follow."""
        _seed_torch(self.config.seed, _STEP, self.step)
        return self.algorithm.training_step(self.batch(self.step), self.step, self.optimizers).detached()

    def count_step(self, losses: Losses) -> None:
        """An update was made."""
        self.step += 1
        if self.average is not None:
            self.average.update(self.network.state_dict(), self.step)
        self.monitor.add(self.step, losses)
        self.observer.on_step(self.step, self.monitor.last)

    @property
    def at_checkpoint(self) -> bool:
        return self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps

    def save(self) -> None:
        """Save the state; at a checkpoint, evaluate it first."""
        record = self._record() if self.at_checkpoint else None
        self._save()
        if record is not None:
            self.observer.on_record(record)

    def agreed(self, signal_number: int | None) -> int | None:
        """The signal that came to any rank; on accelerators they ask each other where they look at the losses."""
        if self.ranks.number > 1:
            if self.monitor.unseen and self.step % self.config.checkpoint_every:
                return None
            return int(self.ranks.largest(signal_number or 0)) or None
        return signal_number

    def seconds_per_step(self) -> float:
        """Mean duration of a few of the last steps, which may be of several kinds that take turns."""
        durations = []
        for step in range(max(0, self.config.steps - WARM_UP_STEPS - TIMED_STEPS), self.config.steps):
            began = time.perf_counter()
            _seed_torch(self.config.seed, _STEP, step)
            self.algorithm.training_step(self.batch(step), step, self.optimizers).total.item()
            if self.average is not None:
                self.average.update(self.network.state_dict(), step + 1)
            durations.append(time.perf_counter() - began)
        return fmean(durations[-TIMED_STEPS:])

    def seconds_per_checkpoint(self) -> float:
        """Duration of evaluating and saving a checkpoint, the former from that of a few samples."""
        evaluated = [self.splits[name][split] for name in self.splits for split in self._splits_needed(name)]
        some = evaluated[0].subset(torch.arange(min(len(evaluated[0].targets), TIMED_SAMPLES)))
        durations = []
        for _ in range(TIMED_EVALUATIONS):
            began = time.perf_counter()
            evaluate(self.algorithm, some, self.ranks)
            durations.append(time.perf_counter() - began)
        began = time.perf_counter()
        self._save()
        saving = time.perf_counter() - began
        return saving + median(durations) / len(some.targets) * sum(len(samples.targets) for samples in evaluated)

    def _record(self) -> RunRecord:
        """Evaluate a checkpoint; with selection, keep its weights if they are the best so far."""
        earlier, seconds_per_step = self.folder.records(), fmean(self.durations)
        self.durations.clear()
        with self._weights(self._recorded_average()):
            record = RunRecord(self.step, self.monitor.take_means(), self._evaluate(), seconds_per_step)
            if self.config.select and self._is_best(record, earlier):
                self.best.keep(self.network.state_dict(), self.step)
            if self.snapshots:
                self.ranks.from_main(lambda: self.folder.add_snapshot(self._saved_model(record), self.step))
        if self.average is not None:
            loss = self._validation(record, "loss") if self.config.needs_validation_loss else None
            self.average.at_checkpoint(loss)
        self.ranks.from_main(lambda: self.folder.append(record))
        return record

    def _recorded_average(self) -> dict[str, Tensor] | None:
        """What a record is about; None: the plain weights, whose validation loss SWAD follows."""
        if self.average is None or self.config.needs_validation_loss:
            return None
        return self.average.current()

    def _evaluate(self) -> dict[str, dict[Split, Metrics]]:
        domains: dict[str, dict[Split, Metrics]] = {}
        for name, splits in self.splits.items():
            domains[name] = {}
            for split in self._splits_needed(name):
                with self.evaluating():
                    metrics = evaluate(self.algorithm, splits[split], self.ranks)
                if not np.isfinite(metrics.loss):
                    raise self.monitor.error(self.step, [f"the loss on the {split}-split of {name} is {metrics.loss}"])
                domains[name][split] = metrics
        return domains

    def _splits_needed(self, domain: str) -> tuple[Split, ...]:
        if "out" not in self.splits[domain]:
            return ("in",)
        if domain in self.train_domains:
            return ("out",)
        return ("in", "out") if domain in self.config.test_domains and self.step == self.config.steps else ("in",)

    def _validation(self, record: RunRecord, name: Literal["accuracy", "loss"]) -> float:
        """Mean over the out-splits of the training domains."""
        return fmean(getattr(record.domains[domain]["out"], name) for domain in self.train_domains)

    def _is_best(self, record: RunRecord, earlier: list[RunRecord]) -> bool:
        """Whether a checkpoint is to be kept: the first of the best after the switch-on, or the last in want of one."""
        if not self._is_eligible(record):
            return record.step == self.config.steps
        rivals = [self._validation(rival, "accuracy") for rival in earlier if self._is_eligible(rival)]
        return self._validation(record, "accuracy") > max(rivals, default=-1.0)

    def _is_eligible(self, record: RunRecord) -> bool:
        settled = self.algorithm.switch_on_step + self.algorithm.ramp
        return record.step > min(settled, self.config.steps - 1) and record.step > self.algorithm.switch_on_step

    def end(self) -> None:
        """Write the record of the model that is kept as the run's outcome, and the model."""
        records = self.folder.records()
        if self.config.select:
            record = next(record for record in records if record.step == self.best.step)
            weights: Mapping[str, Tensor] | None = self.best.weights
        else:
            record = records[-1]
            weights = None if self.average is None else self.average.final()
        with self._weights(weights):
            if weights is not None and self.config.needs_validation_loss:
                # Its records are those of the plain weights.
                record = replace(record, losses={}, domains=self._evaluate())
            kept = self._saved_model(record) if self.keep_model else None
            self.ranks.from_main(lambda: self.folder.finish(kept, record))

    @contextmanager
    def _weights(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The network with other weights inside the block; None leaves its own."""
        if weights is None:
            yield
            return
        own = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(weights)
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def _save(self) -> None:
        self.monitor.look()
        self.ranks.from_main(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        self.folder.check_still_alone()
        progress = Progress(self.step, self.monitor.sums, self.monitor.count)
        save_checkpoint(self.folder.checkpoints, self._stateful(), self.optimizers, progress)

    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {"algorithm": self.algorithm, "best": self.best}
        return parts if self.average is None else {**parts, "average": self.average}

    def _saved_model(self, record: RunRecord) -> SavedModel:
        provenance: dict[str, Any] = {
            "config": self.config.as_dict(),
            "step": record.step,
            "train_domains": self.train_domains,
            "accuracy": {
                domain: {split: metrics.accuracy for split, metrics in splits.items()}
                for domain, splits in record.domains.items()
            },
            "versions": {name: version(name) for name in ("fishr", "torch", "timm")},
        }
        card = ModelCard(
            self.model,
            self.dataset.input_shape,
            self.dataset.classes,
            self.dataset.binary,
            provenance,
            self.dataset.image_format,
        )
        return SavedModel(self.algorithm.featurizer, self.algorithm.classifier, card)


def _finish(runs: Sequence[_Run]) -> None:
    """Make the remaining steps of runs and write their models; those that are behind go first."""
    steps, where = runs[0].config.steps, _named([run.folder.path for run in runs])
    for run in runs:
        run.observer.on_start(run.config, run.step)
    stack: Stack | None = None
    with stop_on_signal() as stop:
        while unfinished := [run for run in runs if run.step < steps]:
            step = min(run.step for run in unfinished)
            abreast = [run for run in unfinished if run.step == step]
            began = time.perf_counter()
            if len(abreast) == 1 or not stacking_pays(abreast[0].batch(step)):
                for run in abreast:
                    run.count_step(run.training_step())
            else:
                algorithms = [run.algorithm for run in abreast]
                if stack is None or stack.algorithms != algorithms:
                    stack = Stack(algorithms, [run.batch(step) for run in abreast])
                for run, losses in zip(abreast, stack.backward(step), strict=True):
                    run.optimizers["main"].step()
                    run.count_step(losses)
            seconds = (time.perf_counter() - began) / len(abreast)
            for run in abreast:
                run.durations.append(seconds)
            # Looked at once: a signal that comes later in this step counts for the next.
            signal_number = abreast[0].agreed(stop.signal_number)
            for run in abreast:
                if run.at_checkpoint or signal_number is not None:
                    run.save()
            if signal_number is not None and step + 1 < steps:
                raise RunInterruptedError(
                    f"stopped after step {step + 1} of {steps}, saved in {where}: run the same command again to "
                    "continue",
                    signal_number,
                )
        for run in runs:
            run.end()
        if stop.signal_number is not None:
            raise RunInterruptedError(f"stopped; the run in {where} is done", stop.signal_number)


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
            values = torch.stack([value.float() for value in terms.values()]).tolist()
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
        kept = f"the last good checkpoint is {last_good}" if last_good else f"{self.folder.path} has no checkpoint yet"
        return NonFiniteLossError(f"at step {step} {' and '.join(bad)}; {kept}; try a smaller lr or penalty weight")


def _check_sizes(config: RunConfig, in_splits: Mapping[str, Samples]) -> None:
    least = config.hparams.least_batch_size()
    for name, samples in in_splits.items():
        if config.hparams.batch_size is None and len(samples.targets) < least:
            raise ConfigError(
                f"{config.algorithm} needs {least} samples of each domain in a batch, the in-split of {name!r} has "
                f"{len(samples.targets)}: hold it out, or give a batch_size, which is drawn with replacement"
            )


def _split_all(dataset: MultiDomainDataset, config: RunConfig) -> dict[str, dict[Split, Samples]]:
    """In- and out-split of every domain; a domain without an out-split has only ``"in"``."""
    all_splits: dict[str, dict[Split, Samples]] = {}
    for name, (inside, outside) in split_dataset(
        dataset, config.out_fraction, config.trial, config.test_domains
    ).items():
        samples = dataset.domains[name]
        if len(outside) == 0:
            all_splits[name] = {"in": samples}
        else:
            all_splits[name] = {"in": samples.subset(inside), "out": samples.subset(outside)}
    return all_splits


def _seed_torch(*seed: int) -> None:
    """Make torch's random numbers a function of ``seed``, so that no generator state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
