"""How well a saved model does on labelled data: accuracy, macro-F1, calibration and confusions of each domain."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fishr.data import MultiDomainDataset, is_dataset_name, load_dataset
from fishr.data.base import Samples
from fishr.data.cache import CacheMode, Progress
from fishr.data.image_dataset import BENCHMARK_DATASETS
from fishr.devices import torch_device
from fishr.errors import ConfigError, DataError, InputError
from fishr.models.batch_context import evaluation_order
from fishr.models.card import ModelCard
from fishr.models.saved import SavedModel
from fishr.registry import unknown

NUM_BINS = 15

Role = Literal["trained on", "held out", "evaluation only"]
"""What a domain was in the training of the model."""


@dataclass(frozen=True)
class Scores:
    """Measures of a model on a domain, or their means, all in [0, 1].

    Attributes:
        accuracy: Share of samples whose most probable class is theirs.
        macro_f1: Mean of the F1 scores of the classes that occur among the targets or the predictions.
        calibration_error: See :func:`calibration_error`.
    """

    accuracy: float
    macro_f1: float
    calibration_error: float


@dataclass(frozen=True, eq=False)
class DomainEvaluation(Scores):
    """A model on one domain.

    Attributes:
        samples: Number of samples.
        confusion: Samples of each true class by predicted class, int64 ``[class, class]``.
        predictions: The most probable class of each sample, int64 ``[sample]``.
        confidences: Its probability, ``[sample]``.
        role: What the domain was in the training of the model; None where that is not known.
    """

    samples: int
    confusion: NDArray[np.int64]
    predictions: NDArray[np.int64]
    confidences: NDArray[np.float64]
    role: Role | None


@dataclass(frozen=True)
class Evaluation:
    """A model on several domains.

    Attributes:
        classes: Names of the model's classes, in the order of the confusions.
        domains: Name of each domain to what was measured there.
    """

    classes: tuple[str, ...]
    domains: Mapping[str, DomainEvaluation]

    @property
    def mean(self) -> Scores:
        """Means over domains; each domain counts the same, however many samples it has."""
        domains = self.domains.values()
        return Scores(
            fmean(domain.accuracy for domain in domains),
            fmean(domain.macro_f1 for domain in domains),
            fmean(domain.calibration_error for domain in domains),
        )

    @property
    def worst(self) -> str:
        """The domain with the lowest accuracy; the first of equals."""
        return min(self.domains, key=lambda name: self.domains[name].accuracy)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """The confusions of all domains added up, ``[class, class]``."""
        pooled: NDArray[np.int64] = np.sum([domain.confusion for domain in self.domains.values()], axis=0)
        return pooled


def evaluate_model(
    model: SavedModel,
    dataset: MultiDomainDataset,
    *,
    device: str = "auto",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model on all samples of every domain of a dataset.

    Classes are matched by name; the data may lack some of the model's. A batch holds samples of one domain, in a random
    order where predictions depend on it.

    Args:
        model: The model; it is moved to the device and put into ``eval()`` mode.
        dataset: The data, such as from :func:`load_data_for`; one domain is enough.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        batch_size: Samples that go through the network together.
        progress: Is told how many samples are done, and of how many.

    Raises:
        DataError: classes that the model does not know, inputs of another shape than the model's, images that cannot be
            read, or a model whose probabilities are not finite.
        ConfigError: a batch size below 1, or no such device.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size}")
    card = model.card
    samples_of = samples_for(card, dataset)
    model.to(torch_device(device)).eval()
    roles = domain_roles(card, dataset)
    total, done = sum(len(samples.targets) for samples in samples_of.values()), 0
    domains = {}
    for name, samples in samples_of.items():
        confidences, predictions = np.empty(len(samples.targets)), np.empty(len(samples.targets), np.int64)
        for batch in torch.split(evaluation_order(model.featurizer, len(samples.targets)), batch_size):
            rows = batch.numpy()
            confidences[rows], predictions[rows] = _predict(model, samples.inputs[batch])
            if not np.isfinite(confidences[rows]).all():
                raise DataError(
                    f"the model's probabilities on domain {name!r} of {dataset.name!r} are not finite: its weights, or "
                    "the inputs, have values that it cannot compute with"
                )
            done += len(rows)
            if progress is not None:
                progress(done, total)
        targets = samples.targets.numpy()
        domains[name] = _domain_evaluation(targets, predictions, confidences, len(card.classes), roles.get(name))
    return Evaluation(card.classes, domains)


def calibration_error(confidences: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy.

    ECE = Σ_m |B_m| / n · |acc(B_m) − conf(B_m)|, with B_m the samples whose confidence lies in ((m − 1)/M, m/M], acc
    their accuracy and conf their mean confidence (Guo et al., ICML 2017, arXiv 1706.04599; M = 15 there and here).

    Args:
        confidences: Probability of each predicted class, ``[sample]``.
        correct: Whether it is the sample's class, ``[sample]``.
        num_bins: M.

    Raises:
        InputError: no samples, or arrays of different shapes.

    >>> round(calibration_error([0.9, 0.9, 0.6, 0.6], [True, True, True, False]), 3)
    0.1
    """
    confidence, hits = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != hits.shape or confidence.size == 0:
        raise InputError(
            "confidences and correct must have the same shape [sample] with at least one sample, "
            f"got {list(confidence.shape)} and {list(hits.shape)}"
        )
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    # |B_m| · |acc − conf| is the absolute sum of the differences in the bin.
    sums = np.bincount(np.searchsorted(inner_edges, confidence), weights=hits - confidence)
    return float(np.abs(sums).sum() / len(confidence))


def load_data_for(
    card: ModelCard,
    data: str,
    *,
    root: Path | None = None,
    subset: int | None = None,
    cache: CacheMode = "none",
) -> MultiDomainDataset:
    """The dataset with a name or path, in the form that a model takes.

    Images are brought to the model's format. A dataset of another kind that the model was trained on is loaded with the
    options of that training, its seed among them, but not with its subset.

    Args:
        card: The model's card.
        data: A dataset's name, or the path of a folder DOMAIN/CLASS/image or of a manifest.
        root: Data root of datasets with a name.
        subset: Keep as many samples of each domain as this; None keeps all.
        cache: Where decoded images are kept; ``"none"`` suits those who read them once.

    Raises:
        ConfigError: no such dataset, or no such folder or manifest.
        DataError: data that cannot be used, or images for a model that does not take images.
    """
    options: dict[str, Any] = {}
    is_known = is_dataset_name(data)
    if data in BENCHMARK_DATASETS or (not is_known and Path(data).exists()):
        if card.image_format is None:
            raise DataError(
                f"{data} holds images, but the model takes float32 inputs of shape {_shape(card.input_shape)}: "
                "use data like those it was trained on"
            )
        options = {"image_size": card.image_format.size, "channels": card.image_format.channels, "cache": cache}
    elif is_known and data == _trained_config(card).get("data"):
        options = _without_subset(_trained_config(card)["data_options"])
    return load_dataset(data, root=root, subset=subset, **options)


@torch.no_grad()
def _predict(model: SavedModel, inputs: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The probability of the most probable class of each sample, and its index."""
    confidences, predictions = model.predict_proba(inputs).max(1)
    return confidences.cpu().numpy(), predictions.cpu().numpy()


def _domain_evaluation(
    targets: NDArray[np.int64],
    predictions: NDArray[np.int64],
    confidences: NDArray[np.float64],
    num_classes: int,
    role: Role | None,
) -> DomainEvaluation:
    from sklearn.metrics import f1_score

    correct = predictions == targets
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (targets, predictions), 1)
    return DomainEvaluation(
        accuracy=float(correct.mean()),
        macro_f1=float(f1_score(targets, predictions, average="macro")),
        calibration_error=calibration_error(confidences, correct),
        samples=len(targets),
        confusion=confusion,
        predictions=predictions,
        confidences=confidences,
        role=role,
    )


def samples_for(card: ModelCard, dataset: MultiDomainDataset) -> dict[str, Samples]:
    """The samples of each domain, with the model's classes, matched by name, as targets.

    Raises:
        DataError: classes that the model does not know, or inputs of another shape than the model's.
    """
    if dataset.input_shape != card.input_shape:
        raise DataError(
            f"inputs of {dataset.name!r} have shape {_shape(dataset.input_shape)}, but the model takes "
            f"{_shape(card.input_shape)}: use data like those it was trained on"
        )
    foreign = [name for name in dataset.classes if name not in card.classes]
    if foreign:
        others = f" (as are {len(foreign) - 1} others: {', '.join(map(repr, foreign[1:6]))})" if foreign[1:] else ""
        raise DataError(
            f"classes of {dataset.name!r} are not all among the model's: {unknown('class', foreign[0], card.classes)}"
            f"{others}; rename the classes, or leave them out"
        )
    labels = torch.tensor([card.classes.index(name) for name in dataset.classes])
    return {name: Samples(inputs, labels[targets]) for name, (inputs, targets) in dataset.domains.items()}


def domain_roles(card: ModelCard, dataset: MultiDomainDataset) -> dict[str, Role]:
    """What the domains were in the training; empty where the data are not those that the model was trained on."""
    config = _trained_config(card)
    if not config:
        return {}
    trained, given = config["data_options"], dataset.options
    if "fingerprint" in given:
        same = trained.get("fingerprint") == given["fingerprint"]
    else:
        same = config["data"] == dataset.name and _without_subset(trained) == _without_subset(given)
    if not same:
        return {}
    roles: dict[str, Role] = dict.fromkeys(dataset.evaluation_only, "evaluation only")
    roles |= dict.fromkeys(card.provenance["train_domains"], "trained on")
    return roles | dict.fromkeys(config["test_domains"], "held out")


def _trained_config(card: ModelCard) -> Mapping[str, Any]:
    """The config of the run that made the model; empty for a model from elsewhere."""
    config: Mapping[str, Any] = card.provenance["config"] if "train_domains" in card.provenance else {}
    return config


def _without_subset(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "subset"}


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
