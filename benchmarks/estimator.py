"""FishrClassifier against scikit-learn's MLPClassifier: a whole fit of the same network on the same arrays.

All sides run one after the other in one process, round by round.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common  # sets torch's allocator up: before torch
import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from fishr.estimator import FishrClassifier
from fishr.reports.tables import markdown_table

METHOD = """A fit of float32 arrays: {samples} samples of {features} features, {classes} classes, {domains} domains of
about one size; one hidden layer of {hidden}; {epochs} epochs of batches of {batch}, Adam at 1e-3. MLPClassifier: no
early stopping and no tolerance, so that it makes all epochs; it knows no domains. FishrClassifier: {per_domain} samples
of each domain in a batch; Fishr as recommended for vectors: its moving average from the first step, its penalty from
30 % of the steps. Gaussian classes that overlap, domains shifted. Ratio: median of the ratios of the rounds, after one
warm-up round; the order within a round turns."""


@dataclass(frozen=True)
class Size:
    samples: int = 100_000
    features: int = 256
    classes: int = 10
    domains: int = 4
    hidden: int = 128
    epochs: int = 10
    batch: int = 512

    @property
    def per_domain(self) -> int:
        return self.batch // self.domains


FULL = Size()
QUICK = Size(samples=400, features=8, classes=3, hidden=16, epochs=2, batch=64)


@dataclass(frozen=True)
class Arrays:
    X: NDArray[np.float32]
    y: NDArray[np.int64]
    domains: NDArray[np.int64]


def draw(size: Size) -> Arrays:
    """Gaussian classes, each domain shifted."""
    rng = np.random.default_rng(0)
    y, domains = rng.integers(size.classes, size=size.samples), rng.integers(size.domains, size=size.samples)
    centers = rng.normal(size=(size.classes, size.features)) * 3 / size.features**0.5
    shifts = 0.2 * rng.normal(size=(size.domains, size.features))
    X = centers[y] + shifts[domains] + rng.normal(size=(size.samples, size.features))
    return Arrays(X.astype(np.float32), y, domains)


def fits(arrays: Arrays, size: Size) -> Mapping[str, Callable[[], Any]]:
    """What each side does."""

    def scikit_learn() -> MLPClassifier:
        model = MLPClassifier(
            (size.hidden,),
            batch_size=size.batch,
            max_iter=size.epochs,
            tol=0.0,
            n_iter_no_change=size.epochs,
            random_state=0,
        )
        with warnings.catch_warnings():  # that it stops after max_iter is what is asked for
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(arrays.X, arrays.y)

    def ours(algorithm: str) -> FishrClassifier:
        model = FishrClassifier(
            algorithm, hidden=(size.hidden,), epochs=size.epochs, batch_size=size.per_domain, random_state=0
        )
        return model.fit(arrays.X, arrays.y, domains=arrays.domains)

    return {"scikit-learn": scikit_learn, "erm": lambda: ours("erm"), "fishr": lambda: ours("fishr")}


def measure(size: Size, *, repeats: int) -> dict[str, Any]:
    arrays = draw(size)
    jobs = fits(arrays, size)
    seconds = common.time_alternating(jobs, repeats=repeats, warm_up=1)
    return {
        name: {
            "seconds": common.spread(values),
            "ratio": common.spread(common.paired_ratios(values, seconds["scikit-learn"])),
            "training_accuracy": float(jobs[name]().score(arrays.X, arrays.y)),
        }
        for name, values in seconds.items()
    }


def table(results: Mapping[str, Any]) -> str:
    titles = {"scikit-learn": "MLPClassifier", "erm": "FishrClassifier, ERM", "fishr": "FishrClassifier, Fishr"}
    header = ["fit", "seconds", "over MLPClassifier", "quartiles", "training accuracy"]
    rows = []
    for name, result in results.items():
        ratio = result["ratio"]
        rows.append(
            [
                titles[name],
                f"{result['seconds']['median']:.2f}",
                f"{ratio['median']:.2f}",
                f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
                f"{100 * result['training_accuracy']:.1f} %",
            ]
        )
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=9)
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else FULL
    common.progress.print(f"{size}")
    results = measure(size, repeats=arguments.repeats)
    goals = [
        common.Goal(f"{name}: fit over MLPClassifier's", bound, False, results[name]["ratio"]["median"])
        for name, bound in (("erm", 1.0), ("fishr", 1.3))
    ]
    method = METHOD.format(**vars(size), per_domain=size.per_domain)
    setup = common.describe_setup(arguments, ["torch", "scikit-learn", "numpy", "fishr"], method)
    common.write_results(arguments.output, "estimator", setup, results, goals, table(results))


if __name__ == "__main__":
    main()
