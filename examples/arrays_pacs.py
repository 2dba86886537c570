"""PACS without a network: HOG and color histograms, each domain held out, ERM against Fishr.

    python examples/arrays_pacs.py --data-root DATA

DATA holds the folder PACS (``fishr data download pacs``); default as everywhere, ``$FISHR_DATA``. Needs scikit-image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sklearn
from numpy.typing import NDArray
from rich.console import Console
from skimage.feature import hog
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fishr import FishrClassifier, load_dataset
from fishr.reports.tables import markdown_table

ALGORITHMS = {"erm": "ERM", "fishr": "Fishr"}
BINS = (4, 4, 4)


def features_of(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Histograms of oriented gradients, and one of the colors; square roots bring large counts down."""
    colors, _ = np.histogramdd(image.reshape(-1, 3), bins=BINS, range=[(0, 256)] * 3)
    shapes = hog(image, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)
    return np.concatenate([shapes, np.sqrt(colors.ravel() / colors.sum())]).astype(np.float32)


def arrays(root: Path | None, subset: int | None) -> tuple[NDArray[np.float32], NDArray[np.str_], NDArray[np.str_]]:
    """Features ``[sample, feature]``, labels and domains ``[sample]``."""
    dataset = load_dataset("pacs", root=root, subset=subset, image_size=64, cache="none")
    features, labels, domains = [], [], []
    for domain, (images, targets) in dataset.domains.items():
        features += [features_of(image.permute(1, 2, 0).numpy()) for image in images[:]]
        labels += [dataset.classes[target] for target in targets]
        domains += [domain] * len(targets)
    return np.stack(features), np.array(labels), np.array(domains)


def model(algorithm: str, epochs: int, seed: int) -> Pipeline:
    return make_pipeline(StandardScaler(), FishrClassifier(algorithm, epochs=epochs, random_state=seed))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder that PACS lies in")
    parser.add_argument("--subset", type=int, help="images of each domain (default: all)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)

    X, y, domains = arrays(arguments.data_root, arguments.subset)
    rows = []
    with sklearn.config_context(enable_metadata_routing=True):
        for algorithm, title in ALGORITHMS.items():
            of_seeds = [
                cross_val_score(
                    model(algorithm, arguments.epochs, seed),
                    X,
                    y,
                    cv=LeaveOneGroupOut(),
                    params={"domains": domains, "groups": domains},
                )
                for seed in range(arguments.seeds)
            ]
            accuracies = 100 * np.array(of_seeds)  # [seed, held-out domain]
            means, deviations = accuracies.mean(0), accuracies.std(0)
            cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in zip(means, deviations, strict=True)]
            rows.append([title, *cells, f"{means.mean():.1f}"])
    console = Console()
    title = f"{len(X)} images, {X.shape[1]} features; accuracy in % on the held-out domain, {arguments.seeds} seeds"
    console.print(title, soft_wrap=True)
    console.print(markdown_table(["held out", *np.unique(domains), "mean"], rows), soft_wrap=True)


if __name__ == "__main__":
    main()
