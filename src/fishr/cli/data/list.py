"""``fishr data list``."""

from dataclasses import asdict
from pathlib import Path

from fishr.cli.console import DataRoot, Json, print_json, print_line, print_table


def list_datasets(data_root: Path | None = DataRoot, as_json: bool = Json) -> None:
    """The datasets that have a name: what they are, whether they are there, how to get them.

    Images of those that are there are counted, domain by domain where published counts are known.

    Examples:

        fishr data list

        fishr data list --data-root data --json
    """
    from fishr.data.inventory import dataset_statuses
    from fishr.data.mnist import data_root as default_root

    root = default_root(data_root)
    statuses = dataset_statuses(root)
    if as_json:
        print_json({"data_root": str(root), "datasets": [asdict(status) for status in statuses]})
        return
    rows = [
        (
            status.name,
            ", ".join(status.domains),
            " or ".join(f"{images:,}" for images in status.images),
            str(status.classes),
            status.state,
        )
        for status in statuses
    ]
    print_table(("dataset", "domains", "images", "classes", "there"), rows)
    print_line(f"Data root: {root}")
    for status in statuses:
        if status.state == "wrong":
            print_line(f"{status.name} is not as it should be: {status.problem}")
        elif status.state == "missing":
            print_line(f"{status.name}: {status.source}")
