"""``fishr data check``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

from fishr.cli.console import DataRoot, Json, Quiet, print_json, print_line, print_table
from fishr.cli.data.progress import watchers

if TYPE_CHECKING:
    from fishr.data.check import DataReport, Kind, Severity

WRONG = 1
"""Exit code where something is wrong."""

MOST_CLASSES, MOST_DOMAINS = 20, 8
"""Up to which the number of images of every class in every domain is shown."""

LISTED = 20
"""Findings of a kind that are shown."""

TITLES: dict["Kind", tuple[str, str]] = {
    "unreadable": ("image cannot be read", "images cannot be read"),
    "missing-class": ("class is missing from a domain", "classes are missing from a domain"),
    "duplicate-across-domains": ("image is in several domains", "images are in several domains"),
    "duplicate-across-splits": ("image is in both splits of a domain", "images are in both splits of a domain"),
    "group-across-splits": ("group is in both splits", "groups are in both splits"),
    "contradictory-labels": ("image has several labels", "images have several labels"),
    "duplicate-in-domain": (
        "image is several times in a domain, and may fall into both splits",
        "images are several times in a domain, and may fall into both splits",
    ),
    "few-images": ("class has fewer than 5 images in a domain", "classes have fewer than 5 images in a domain"),
}
"""What is said of one finding of a kind, and of several."""


def check(
    data: str = typer.Argument(
        ..., metavar="PATH", help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), or a benchmark's name."
    ),
    data_root: Path | None = DataRoot,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> int:
    """Whether images are fit for training and for an honest test; exit code 1 if something is wrong.

    Wrong: images that training could not read; classes missing from a domain; the same image in two domains, or in both
    splits that a manifest fixes, be it byte for byte, re-encoded, resized or brightened; groups in both splits; the
    same bytes with different labels.

    Worth knowing, but not wrong: the same bytes several times in a domain, as random splits put them on both sides;
    fewer than 5 images of a class in a domain. The sizes of images and of classes are shown.

    Examples:

        fishr data check my/images

        fishr data check my/images.csv --json > report.json

        fishr data check pacs --data-root data
    """
    from fishr.data.check import check_images
    from fishr.data.image_dataset import listing_of

    listing = listing_of(data, data_root)
    with watchers(quiet=quiet) as shown:
        report = check_images(listing, progress=shown.on_files and partial(shown.on_files, "reading images"))
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
    return 0 if report.fit else WRONG


def _as_json(report: "DataReport") -> dict[str, Any]:
    return {
        "data": report.name,
        "root": str(report.root),
        "fit": report.fit,
        "classes": list(report.classes),
        "domains": {
            name: {
                "images": domain.images,
                "unreadable": domain.unreadable,
                "images_per_class": dict(zip(report.classes, domain.images_per_class, strict=True)),
                "smallest": domain.smallest,
                "median": domain.median,
                "largest": domain.largest,
            }
            for name, domain in report.domains.items()
        },
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "message": finding.message,
                "paths": list(finding.paths),
            }
            for finding in report.findings
        ],
    }


def _print(report: "DataReport") -> None:
    domains = report.domains
    print_table(
        ("domain", "images", "unreadable", "smallest", "median", "largest"),
        [
            (
                name,
                f"{domain.images:,}",
                f"{domain.unreadable:,}",
                *map(_size, (domain.smallest, domain.median, domain.largest)),
            )
            for name, domain in domains.items()
        ],
    )
    print_line("Sizes: width x height in pixels, by area.\n")
    if len(report.classes) <= MOST_CLASSES and len(domains) <= MOST_DOMAINS:
        rows = zip(report.classes, *(domain.images_per_class for domain in domains.values()), strict=True)
        print_table(("class", *domains), [(name, *(f"{images:,}" for images in counts)) for name, *counts in rows])
        print_line("Images of each class.\n")
    else:
        print_table(
            ("domain", "classes", "fewest", "median", "most"),
            [(name, *_balance(domain.images_per_class)) for name, domain in domains.items()],
        )
        print_line(f"Images of a class, over the {len(report.classes):,} classes.\n")
    _print_findings(report, "wrong")
    _print_findings(report, "note")
    images = f"{sum(domain.images for domain in domains.values()):,} images of {report.name}"
    print_line(f"{images}: nothing is wrong." if report.fit else f"{images}: something is wrong, see above.")


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else ""


def _balance(images_per_class: Sequence[int]) -> tuple[str, ...]:
    """How many classes there are, and the images of the one with the fewest, the median one, the one with the most."""
    counts = [images for images in images_per_class if images > 0]
    return f"{len(counts):,}", f"{min(counts):,}", f"{median(counts):,.0f}", f"{max(counts):,}"


def _print_findings(report: "DataReport", severity: "Severity") -> None:
    """The findings of a severity, kind by kind."""
    for kind, (one, several) in TITLES.items():
        messages = [
            finding.message for finding in report.findings if finding.kind == kind and finding.severity == severity
        ]
        if not messages:
            continue
        print_line(f"{severity}: {len(messages):,} {one if len(messages) == 1 else several}")
        for message in messages[:LISTED]:
            print_line(f"  {message}")
        if len(messages) > LISTED:
            print_line(f"  and {len(messages) - LISTED:,} more: --json has them all")
        print_line("")
