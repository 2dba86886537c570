"""The algorithms as scikit-learn estimators, for arrays, tables and embeddings.

Scikit-learn's names stand beside the project's own: ``X`` and ``y`` are inputs and targets, ``n_iter_no_change`` counts
epochs.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from numbers import Integral, Real
from statistics import fmean
from threading import Lock
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import Algorithm, AlgorithmConfig
from fishr.algorithms.erm import ERM
from fishr.data.base import DomainBatch
from fishr.data.sampling import split_indices
from fishr.devices import torch_device
from fishr.errors import ConfigError, InputError, NonFiniteLossError
from fishr.functional.residuals import Loss
from fishr.models.build import ModelConfig

ROWS_AT_ONCE = 2**16
"""Samples that are predicted at once, which bounds the memory of hidden layers."""

FOR_TORCH: Mapping[str, Any] = {"order": "C", "force_writeable": True}
"""What the check of an array sees to besides: of one that runs backwards or is read-only torch makes no tensor."""

Rows = NDArray[np.int64]
"""Which samples, int64 ``[sample]``."""


class _DomainEstimator(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share: settings, the samples of each domain, training."""

    # Domains are meant for fit wherever they are given: nobody has to ask with set_fit_request(domains=True).
    __metadata_request__fit: ClassVar = {"domains": True}

    network_: nn.Sequential

    def __init__(
        self,
        algorithm: str | type[Algorithm] = "fishr",
        *,
        hidden: Sequence[int] = (128,),
        epochs: int = 100,
        batch_size: int | None = 64,
        lr: float = 1e-3,
        hparams: Mapping[str, Any] | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.hparams = hparams
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "network_")

    @property
    def _continues(self) -> bool:
        """Whether fit goes on from the weights that there are."""
        return self.warm_start and self.__sklearn_is_fitted__()

    def _score_outputs(self, outputs: Tensor, targets: Tensor) -> float:
        """What early stopping wants to be high, of the samples of one domain."""
        raise NotImplementedError

    def _check_algorithm(self, algorithm: type[Algorithm]) -> None:
        model = ModelConfig("mlp")
        if (other := algorithm.model_config(model)) != model:
            raise ConfigError(
                f"{algorithm.title} predicts with a network of its own ({other.featurizer!r}), which takes a batch for "
                "samples of one domain, but an estimator predicts each row by itself: train it with fishr.train, or "
                "take another algorithm"
            )

    def _fit(self, X: NDArray[np.float32], targets: Tensor, num_outputs: int, loss: Loss, domains: Any) -> None:
        """Train on ``X [sample, feature]`` and set the attributes that a fit leaves."""
        algorithm_class, config = self._checked_settings()
        names, rows = _rows_of_domains(domains, len(X))
        if names is None and algorithm_class.min_domains > 1:
            warnings.warn(
                f"{algorithm_class.title} compares domains, and fit was given none, so this is ERM: pass "
                "fit(X, y, domains=...) with the domain of each sample, or say algorithm='erm'",
                UserWarning,
                stacklevel=3,
            )
            algorithm_class = ERM
            config = ERM.Config(**{item.name: getattr(config, item.name) for item in fields(ERM.Config)})

        rng = check_random_state(self.random_state)
        seed = int(rng.randint(2**31))
        aside: list[Rows] = []
        if self.early_stopping:
            rows, aside = _split(rows, self.validation_fraction, seed, names)
        _check_sizes(algorithm_class, config, rows)
        batches = _Batches(rows, config.batch_size, rng)

        device = torch_device(self.device)
        with _torch_random_state(seed, device):
            if self._continues:
                network = copy.deepcopy(self.network_).train()
            else:
                network = _network(X.shape[1], self.hidden, num_outputs)
            featurizer, head = network[0], cast(nn.Linear, network[1])
            num_steps = self.epochs * batches.steps_per_epoch
            algorithm = algorithm_class(featurizer, head, len(rows), config, loss=loss, steps=num_steps).to(device)
            inputs, targets = torch.from_numpy(X).to(device), targets.to(device)
            self._train(algorithm, network, inputs, targets, batches, aside)

        if not all(torch.isfinite(weights).all() for weights in network.parameters()):
            raise NonFiniteLossError("the weights became NaN or infinite in the last step: try a smaller lr")
        network.zero_grad()
        self.network_ = network.cpu().eval()
        self.algorithm_ = algorithm_class
        self.domains_ = names

    def _train(
        self,
        algorithm: Algorithm,
        network: nn.Sequential,
        inputs: Tensor,
        targets: Tensor,
        batches: "_Batches",
        aside: list[Rows],
    ) -> None:
        """Train to the last epoch or, with rows set aside, until they say stop; keep the best weights."""
        optimizers = algorithm.configure_optimizers()
        validation = [(inputs[rows], targets[rows]) for rows in map(torch.from_numpy, aside)]
        # Not before the algorithm is what it says, unless that is never.
        settled = min(algorithm.switch_on_step + algorithm.ramp, self.epochs * batches.steps_per_epoch - 1)
        step = 0
        losses: list[float] = []
        scores: list[float] = []
        best_epoch, best_weights = 0, {}
        for epoch in range(1, self.epochs + 1):
            of_steps = []
            for rows in batches.epoch().to(inputs.device):
                batch = DomainBatch(inputs.index_select(0, rows), targets.index_select(0, rows), batches.sizes)
                of_steps.append(algorithm.training_step(batch, step, optimizers).total.detach())
                step += 1
            losses.append(float(torch.stack(of_steps).mean()))
            if not math.isfinite(losses[-1]):
                raise NonFiniteLossError(
                    f"the loss of epoch {epoch} is {losses[-1]}: standardise the features (StandardScaler), or try a "
                    "smaller lr or penalty weight"
                )
            if not validation:
                continue
            with torch.no_grad():
                scores.append(fmean(self._score_outputs(network(some), of_some) for some, of_some in validation))
            if step <= settled:
                continue
            if best_epoch == 0 or scores[-1] > scores[best_epoch - 1]:
                best_epoch, best_weights = epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= self.n_iter_no_change:
                break
        if validation:
            network.load_state_dict(best_weights)
        self.n_epochs_ = len(losses)
        self.best_epoch_ = best_epoch if validation else len(losses)
        self.loss_curve_ = losses
        self.validation_scores_ = scores if validation else None

    def _outputs(self, X: Any) -> Tensor:
        """What the network says of each sample, ``[sample, output]``, in the precision of ``X``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), **FOR_TORCH, reset=False)
        inputs = torch.from_numpy(X)
        network = self.network_ if inputs.dtype == torch.float32 else copy.deepcopy(self.network_).double()
        with torch.no_grad():
            return torch.cat([network(rows) for rows in torch.split(inputs, ROWS_AT_ONCE)])

    def _checked_settings(self) -> tuple[type[Algorithm], AlgorithmConfig]:
        """The algorithm and its hyperparameters.

        Raises:
            ConfigError: a parameter that does not exist or cannot take its value; the estimator's own in one message.
        """
        problems = []
        if not isinstance(self.hidden, tuple | list) or not all(map(_is_count, self.hidden)):
            problems.append(f"hidden must be a tuple of the hidden layers' widths, such as (128,), got {self.hidden!r}")
        problems += [
            f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}"
            for name in ("epochs", "n_iter_no_change")
            if not _is_count(getattr(self, name))
        ]
        if not isinstance(self.validation_fraction, Real) or not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction!r}")
        if not isinstance(self.hparams, Mapping | None):
            problems.append(f"hparams must be a dict of the algorithm's hyperparameters, got {self.hparams!r}")
        problems += [
            f"hparams must not hold {name!r}: give it as the estimator's own parameter {name}"
            for name in ("lr", "batch_size")
            if isinstance(self.hparams, Mapping) and name in self.hparams
        ]
        if problems:
            raise ConfigError("; ".join(problems))

        algorithm = ALGORITHMS[self.algorithm] if isinstance(self.algorithm, str) else self.algorithm
        if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
            raise ConfigError(
                f"algorithm must be a name or a subclass of fishr.algorithms.Algorithm, got {algorithm!r}"
            )
        self._check_algorithm(algorithm)
        if self._continues and (kept := _hidden_widths(self.network_)) != tuple(self.hidden):
            raise ConfigError(
                f"warm_start continues a network with hidden={kept}, got {self.hidden!r}: set it back, or fit a new "
                "estimator"
            )
        given = {**(self.hparams or {}), "lr": self.lr, "batch_size": self.batch_size}
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        return algorithm, algorithm.Config.recommended("vectors").with_given(plain)


class FishrClassifier(ClassifierMixin, _DomainEstimator):  # type: ignore[misc]
    """A classifier of vectors that is trained on several domains.

    The network is a multilayer perceptron with a linear head, trained with cross-entropy by any algorithm of this
    package whose prediction depends on the sample alone. Standardise the features before. In a pipeline,
    ``cross_val_score`` or ``GridSearchCV`` the domains reach :meth:`fit` as metadata, which with
    ``sklearn.set_config(enable_metadata_routing=True)`` needs no request.

    Without domains an algorithm that needs several is replaced by ERM, with a warning.

    Args:
        algorithm: Name of an algorithm (``fishr algorithms list``), or its class.
        hidden: Width of each hidden layer; ``()`` for a linear model.
        epochs: Number of epochs. In each as many samples are drawn as there are, with replacement, but for what fills
            the last batch up.
        batch_size: Samples of each domain in a batch; None for all of them at every step.
        lr: Learning rate of Adam.
        hparams: Further hyperparameters of the algorithm (``fishr algorithms show NAME``); what is not given is as
            recommended for vectors. A ``penalty_weight`` takes the place of the recommended ``strength``.
        class_weight: Weight of a sample's loss by its class: a dict of those that are not 1, or ``"balanced"``, which
            is n / (number of classes · samples of the class). Losses are not divided by the sum of weights.
        early_stopping: Set samples aside from each domain, and keep the weights of the epoch with the best mean over
            domains of the accuracy there. Epochs count from the one on in which the algorithm has reached its full
            objective (the published switch-on of Fishr is at 30 % of all steps).
        validation_fraction: Share of each domain that is set aside then.
        n_iter_no_change: Epochs without a better score after which training stops.
        warm_start: Start from the weights of the last fit, with a new optimizer and schedule.
        device: Where fit computes: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``. Predictions are made on the CPU.
        random_state: Seed of initial weights, batches, dropout and samples set aside. torch's own random state is
            neither used nor changed.

    Attributes:
        classes_: Labels of the classes.
        domains_: Names of the training domains, or None.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the columns of ``X`` had names.
        algorithm_: Class of the algorithm that was trained, ERM where domains were missing.
        network_: Featurizer and linear head, on the CPU.
        loss_curve_: Mean of the objective in each epoch.
        validation_scores_: With early stopping, the score after each epoch.
        n_epochs_: Epochs that were trained.
        best_epoch_: The epoch, from 1, whose weights were kept; without early stopping the last.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y, domains = rng.integers(2, size=300), rng.integers(3, size=300)
    >>> X = rng.normal(size=(300, 4)) + 2 * y[:, None]
    >>> X[:, 0] += domains
    >>> model = FishrClassifier(hidden=(16,), lr=0.01, random_state=0).fit(X, y, domains=domains)
    >>> bool(model.score(X, y) > 0.9)
    True
    """

    classes_: NDArray[Any]

    def __init__(
        self,
        algorithm: str | type[Algorithm] = "fishr",
        *,
        hidden: Sequence[int] = (128,),
        epochs: int = 100,
        batch_size: int | None = 64,
        lr: float = 1e-3,
        hparams: Mapping[str, Any] | None = None,
        class_weight: Mapping[Any, float] | str | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(
            algorithm,
            hidden=hidden,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            hparams=hparams,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            warm_start=warm_start,
            device=device,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, domains: Any = None) -> Self:
        """Train on samples of several domains.

        Args:
            X: ``[sample, feature]``, array or table.
            y: ``[sample]``, labels of any kind.
            domains: ``[sample]``, the domain of each sample, names or numbers.

        Raises:
            ConfigError: a parameter that cannot take its value, or an algorithm that cannot be trained here or needs
                more domains.
            InputError: one class only, domains that do not fit the samples, or a domain with too few samples; with
                ``warm_start``, other classes than before.
            NonFiniteLossError: the loss became NaN or infinite.
        """
        continues = self._continues
        X, y = validate_data(self, X, y, dtype=np.float32, **FOR_TORCH, reset=not continues)
        check_classification_targets(y)
        classes, targets = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"y has one class, {classes.tolist()[0]!r}: at least 2 are needed to tell apart")
        if continues and not np.array_equal(classes, self.classes_):
            raise InputError(
                f"warm_start continues with the classes {self.classes_.tolist()}, got {classes.tolist()}: give samples "
                "of all these, or fit a new estimator"
            )
        loss = nn.CrossEntropyLoss(_class_weights(self.class_weight, classes, targets))
        self._fit(X, torch.from_numpy(targets), len(classes), loss, domains)
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The label of each sample, ``[sample]``."""
        outputs = self._outputs(X)
        labels: NDArray[Any] = self.classes_[outputs.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.floating]:
        """Probabilities ``[sample, class]``, in the order of ``classes_``."""
        return self._outputs(X).softmax(1).numpy()

    def decision_function(self, X: Any) -> NDArray[np.floating]:
        """Logits ``[sample, class]``; of two classes the second logit less the first, ``[sample]``."""
        outputs = self._outputs(X)
        return (outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs).numpy()

    def _score_outputs(self, outputs: Tensor, targets: Tensor) -> float:
        return int((outputs.argmax(1) == targets).sum()) / len(targets)


class FishrRegressor(RegressorMixin, _DomainEstimator):  # type: ignore[misc]
    """A regressor of vectors that is trained on several domains.

    As :class:`FishrClassifier`, with the mean squared error; of several outputs their mean. Algorithms that presuppose
    classes are refused (``Algorithm.for_classes``). Standardise the targets too
    (``sklearn.compose.TransformedTargetRegressor``): a weight moves by about ``lr`` in a step, however far it has to.

    Args:
        algorithm: As :class:`FishrClassifier` takes it, and all parameters; there is no ``class_weight``, and early
            stopping looks at minus the mean squared error.

    Attributes:
        n_outputs_: Targets of a sample. All others are those of :class:`FishrClassifier`, but for ``classes_``.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, domains = rng.normal(size=(300, 4)), rng.integers(3, size=300)
    >>> y = X.sum(1) / 2
    >>> model = FishrRegressor(hidden=(16,), lr=0.01, random_state=0).fit(X, y, domains=domains)
    >>> bool(model.score(X, y) > 0.9)
    True
    """

    n_outputs_: int

    def fit(self, X: Any, y: Any, domains: Any = None) -> Self:
        """Train on samples of several domains.

        Args:
            X: ``[sample, feature]``, array or table.
            y: ``[sample]`` or ``[sample, output]``, numbers.
            domains: ``[sample]``, the domain of each sample, names or numbers.

        Raises:
            ConfigError: a parameter that cannot take its value, or an algorithm that cannot be trained here or needs
                more domains.
            InputError: domains that do not fit the samples, or a domain with too few samples; with ``warm_start``,
                another number of outputs than before.
            NonFiniteLossError: the loss became NaN or infinite.
        """
        continues = self._continues
        X, y = validate_data(
            self, X, y, dtype=np.float32, **FOR_TORCH, multi_output=True, y_numeric=True, reset=not continues
        )
        targets = torch.from_numpy(y.reshape(len(y), -1).astype(np.float32))
        num_outputs = targets.shape[1]
        if continues and num_outputs != self.n_outputs_:
            raise InputError(
                f"warm_start continues with {self.n_outputs_} outputs, got {num_outputs} targets of each sample: give "
                "the same, or fit a new estimator"
            )
        self._fit(X, targets, num_outputs, nn.MSELoss(), domains)
        self.n_outputs_ = num_outputs
        return self

    def predict(self, X: Any) -> NDArray[np.floating]:
        """Predictions ``[sample]``, of several outputs ``[sample, output]``."""
        outputs = self._outputs(X).numpy()
        return outputs[:, 0] if self.n_outputs_ == 1 else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _score_outputs(self, outputs: Tensor, targets: Tensor) -> float:
        return -float(F.mse_loss(outputs, targets))

    def _check_algorithm(self, algorithm: type[Algorithm]) -> None:
        if algorithm.for_classes:
            raise ConfigError(
                f"{algorithm.title} presupposes classes, which a regressor has not: take another algorithm, such as "
                "erm, fishr, vrex or coral"
            )
        super()._check_algorithm(algorithm)


class _Batches:
    """Which rows make the batches of an epoch; all are drawn at once, because one by one costs a tenth of a step.

    Args:
        rows: Those of each domain.
        batch_size: How many of each domain to draw, with replacement; None takes all.
        rng: What they are drawn with.
    """

    def __init__(self, rows: list[Rows], batch_size: int | None, rng: np.random.RandomState) -> None:
        self.rows, self.rng = rows, rng
        self.sizes = tuple(len(of_domain) if batch_size is None else batch_size for of_domain in rows)
        self.steps_per_epoch = 1 if batch_size is None else math.ceil(sum(map(len, rows)) / sum(self.sizes))
        self.draws = batch_size is not None

    def epoch(self) -> Tensor:
        """Rows of the next epoch, domain after domain, ``[step, sample]``."""
        if not self.draws:
            return torch.from_numpy(np.concatenate(self.rows)).unsqueeze(0)
        shape = (self.steps_per_epoch, self.sizes[0])
        drawn = [of_domain[self.rng.randint(len(of_domain), size=shape)] for of_domain in self.rows]
        return torch.from_numpy(np.concatenate(drawn, axis=1))


_ONE_FIT = Lock()
"""torch's random state is the process's: fits in threads take turns."""


@contextmanager
def _torch_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random state inside the block; after it, it is as it was."""
    with _ONE_FIT, torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would start CUDA up, or seed it, for a fit on a CPU
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def _network(num_features: int, hidden: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Featurizer and linear head, initialised from torch's random state."""
    layers: list[nn.Module] = []
    widths = (num_features, *hidden)
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(widths[-1], num_outputs))


def _hidden_widths(network: nn.Sequential) -> tuple[int, ...]:
    return tuple(layer.out_features for layer in network[0].modules() if isinstance(layer, nn.Linear))


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _rows_of_domains(domains: Any, num_samples: int) -> tuple[NDArray[Any] | None, list[Rows]]:
    """Names of the domains and the rows of each; None and all rows where none were given."""
    if domains is None:
        return None, [np.arange(num_samples)]
    column = np.asarray(domains, dtype=object) if isinstance(domains, list | tuple) else np.asarray(domains)
    if np.ma.is_masked(domains):
        raise InputError("domains must be all names or all numbers, none of them missing")
    if column.shape != (num_samples,):
        raise InputError(
            f"domains must be the domain of each of the {num_samples} samples, [sample], got shape {list(column.shape)}"
        )
    try:
        names, codes = np.unique(column, return_inverse=True)
        missing = any(name is None or name != name for name in names.tolist())
    except TypeError:  # None or pandas.NA among names, or names among numbers
        missing = True
    if missing:
        raise InputError("domains must be all names or all numbers, none of them missing")
    return names, np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def _class_weights(
    given: Mapping[Any, float] | str | None, classes: NDArray[Any], targets: NDArray[np.int64]
) -> Tensor | None:
    """Weight of each class, ``[class]``."""
    if given is None:
        return None
    labels = classes.tolist()
    if isinstance(given, Mapping):
        # A label that is not there may be of a class that this part of the data lacks.
        absent, unweighted = [label for label in given if label not in labels], set(labels) - set(given)
        if absent and unweighted:
            raise ConfigError(f"class_weight names {absent[0]!r}, which is no class; the classes are {labels}")
        weights = np.array([given.get(label, 1.0) for label in labels], np.float32)
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ConfigError(f"class_weight must have finite weights of at least 0, got {given!r}")
    elif given == "balanced":
        weights = (len(targets) / (len(classes) * np.bincount(targets))).astype(np.float32)
    else:
        raise ConfigError(f"class_weight must be None, 'balanced' or a dict of weights by label, got {given!r}")
    return torch.from_numpy(weights)


def _split(
    rows: list[Rows], out_fraction: float, seed: int, names: NDArray[Any] | None
) -> tuple[list[Rows], list[Rows]]:
    """The rows of each domain to train on, and those set aside."""
    inside, aside = [], []
    for index, of_domain in enumerate(rows):
        in_split, out_split = (split.numpy() for split in split_indices(len(of_domain), out_fraction, seed, index))
        if len(out_split) == 0:
            where = "there are" if names is None else f"domain {names.tolist()[index]!r} has"
            raise InputError(
                f"{where} {len(of_domain)} samples, too few to set a share of {out_fraction:.3g} aside: raise "
                "validation_fraction, or give early_stopping=False"
            )
        inside.append(of_domain[in_split])
        aside.append(of_domain[out_split])
    return inside, aside


def _check_sizes(algorithm: type[Algorithm], config: AlgorithmConfig, rows: list[Rows]) -> None:
    least, smallest = config.least_batch_size(), min(map(len, rows))
    if config.batch_size is None and smallest < least:
        raise InputError(
            f"{algorithm.title} needs {least} samples of each domain in a batch, and the smallest domain has "
            f"{smallest}: give a batch_size, which is drawn with replacement"
        )
