"""``fishr data prepare``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fishr.cli.console import DataRoot, Json, Quiet, print_json, print_line
from fishr.cli.data.progress import watchers

if TYPE_CHECKING:
    from fishr.data.prepare import Prepared


def prepare(
    name: str = typer.Argument(..., metavar="NAME", help="vlcs, pacs, office-home, terra-incognita or domain-net."),
    archives: list[Path] = typer.Argument(
        ...,
        metavar="ARCHIVE...",
        help="Zip or tar archives, folders of unpacked files, Parquet files, lists (.txt) of images to leave out.",
    ),
    data_root: Path | None = DataRoot,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Build a benchmark's published layout from the archives that you bring.

    The folders of its domains may lie anywhere in the archives. The numbers of domains, classes and images are compared
    with the published ones before anything gets the benchmark's name. Archives are left as they are; one with paths or
    links that lead elsewhere is refused.

    DomainNet has images twice: bring DomainBed's list of them, domain_net_duplicates.txt, with the six archives.

    Examples:

        fishr data prepare vlcs VLCS.tar.gz

        fishr data prepare office-home OfficeHomeDataset_10072016.zip --data-root data

        fishr data prepare terra-incognita eccv_18_all_images_sm.tar.gz eccv_18_annotations.tar.gz
    """
    from fishr.data.mnist import data_root as default_root
    from fishr.data.prepare import prepare_benchmark

    with watchers(quiet=quiet) as watching:
        prepared = prepare_benchmark(
            name, [path.expanduser() for path in archives], default_root(data_root), on_files=watching.on_files
        )
    print_prepared(prepared, as_json=as_json, done="built")


def print_prepared(prepared: "Prepared", *, as_json: bool, done: str) -> None:
    """Say what is there now, and whether something was done."""
    listing, was_there = prepared
    images = {name: len(domain.labels) for name, domain in listing.domains.items()}
    if as_json:
        print_json(
            {
                "dataset": listing.name,
                "folder": str(listing.root),
                "domains": images,
                "classes": len(listing.classes),
                "was_there": was_there,
            }
        )
        return
    counts = ", ".join(f"{name} {number:,}" for name, number in images.items())
    print_line(
        f"{listing.name} {'was there already' if was_there else f'is {done}'}, complete: {listing.root}\n"
        f"{sum(images.values()):,} images ({counts}), {len(listing.classes)} classes"
    )
