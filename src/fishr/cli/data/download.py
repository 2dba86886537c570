"""``fishr data download``."""

from pathlib import Path

import typer

from fishr.cli.console import DataRoot, Json, Quiet, print_json, print_line
from fishr.cli.data.prepare import print_prepared
from fishr.cli.data.progress import watchers


def download(
    name: str = typer.Argument(..., metavar="NAME", help="Name of a dataset: see fishr data list."),
    data_root: Path | None = DataRoot,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Download a dataset and lay it out as it is trained on: pacs, terra-incognita, domain-net, and those of MNIST.

    Stopped at any moment and called again, it continues. The numbers of domains, classes and images are compared with
    the published ones; then the downloaded files are deleted. HF_ENDPOINT names another Hugging Face hub.

    Examples:

        fishr data download pacs

        fishr data download domain-net --data-root /scratch/data
    """
    from fishr.data import DATASETS
    from fishr.data.download import download_benchmark
    from fishr.data.inventory import MNIST_DATASETS
    from fishr.data.listing import BENCHMARKS
    from fishr.data.mnist import data_root as default_root
    from fishr.data.mnist import mnist_images
    from fishr.registry import unknown

    root = default_root(data_root)
    if name in BENCHMARKS:
        with watchers(quiet=quiet) as watching:
            prepared = download_benchmark(name, root, on_bytes=watching.on_bytes, on_files=watching.on_files)
        print_prepared(prepared, as_json=as_json, done="downloaded")
        return
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    folder = root / "MNIST" / "raw" if name in MNIST_DATASETS else None
    if folder is not None:
        mnist_images(root)
    if as_json:
        print_json({"dataset": name, "folder": folder and str(folder)})
    elif folder is None:
        print_line(f"{name} needs no files: nothing to download")
    else:
        print_line(f"{name} is made of MNIST, which is there, complete: {folder}")
