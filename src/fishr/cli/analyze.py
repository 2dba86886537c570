"""``fishr analyze``."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from fishr.cli.console import DataRoot, Device, Json, Quiet, print_json, print_line, print_table, stderr
from fishr.errors import ConfigError
from fishr.reports.analysis import (
    DOMAIN_COLUMNS,
    barrier,
    checkpoint_columns,
    checkpoint_rows,
    checkpoint_title,
    comparison_sentences,
    domain_rows,
    pair_columns,
    pair_rows,
    sentences,
)

if TYPE_CHECKING:
    from fishr.analysis import Analysis

CONTENT, WEIGHTS, PAGE = "analysis.json", "weights.parquet", "figures.html"

IMAGE_KINDS = ("png", "svg")


def analyze(
    models: list[Path] = typer.Argument(..., metavar="MODEL...", help="Folder of a model or of a run; or two of them."),
    data: str = typer.Argument(
        ..., metavar="DATA", help="A folder DOMAIN/CLASS/image, a manifest (CSV or Parquet), or a dataset's name."
    ),
    output: Path | None = typer.Option(
        None, "--output", help=f"Folder for {CONTENT}, {WEIGHTS} and {PAGE}; default: nothing is written."
    ),
    figures: list[str] = typer.Option(
        [], "--figures", metavar="[png|svg]", help="Figures as files of these kinds too; needs Chrome or Chromium."
    ),
    layers: list[str] = typer.Option(
        [], "--layers", help="Deeper layers besides the head, such as featurizer.1; named as in the network."
    ),
    memory: int = typer.Option(1024, "--memory", help="Bound in MiB on what deeper layers take."),
    draws: int = typer.Option(16, "--draws", help="Random vectors that estimate the Hessian's diagonal of these."),
    plane: bool = typer.Option(False, "--plane", help="Risks in a random plane too: 121 passes over some samples."),
    epsilon: float = typer.Option(0.01, "--epsilon", help="Rise of a domain's loss that counts as none, in nats."),
    subset: int | None = typer.Option(None, "--subset", help="Samples of each domain to use."),
    seed: int = typer.Option(0, "--seed", help="Seed of the halves, the plane and the estimates."),
    batch_size: int | None = typer.Option(
        None, "--batch-size", help="Samples that go through the network together; default 64 images, 1024 of others."
    ),
    data_root: Path | None = DataRoot,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Why a model fails on a domain: gradients, curvature and loss landscape of each domain, side by side.

    Of the linear head, exactly: the mean and the variance of per-sample gradients, the diagonals of Fisher information
    and Hessian, how far the domains lie apart in each, and the inconsistency score. Two models are compared, and the
    risks along the line between them. Runs trained with --snapshots are followed over their checkpoints.

    Examples:

        fishr analyze runs/first my/images

        fishr analyze runs/erm runs/fishr colored-digits --output runs/analysis --figures png

        fishr analyze runs/first pacs --layers featurizer.network.conv_head --memory 2000 --subset 500
    """
    from fishr.analysis import analyze as analyze_models
    from fishr.deploy.evaluate import load_data_for
    from fishr.models import load_model

    for kind in figures:
        if kind not in IMAGE_KINDS:
            raise ConfigError(f"--figures must be png or svg, got {kind!r}")
    if figures and output is None:
        raise ConfigError("--figures needs --output, the folder for them")
    if plane and output is None and not as_json:
        raise ConfigError("--plane needs --output or --json: it is a matrix, or a figure")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    dataset = load_data_for(load_model(models[0]).card, data, root=data_root, subset=subset, cache="disk")
    with _status(drawn=stderr.is_terminal and not quiet) as progress:
        found = analyze_models(
            models,
            dataset,
            layers=layers,
            memory=memory,
            draws=draws,
            plane=plane,
            epsilon=epsilon,
            seed=seed,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
        content = found.as_dict()
    if as_json:
        print_json(content)
    else:
        _print(content)
    if output is not None:
        write_analysis(output, found, figures)
        if not as_json:
            print_line(f"\nNumbers and figures: {output / PAGE}, {CONTENT} and {WEIGHTS} beside it.")


def write_analysis(folder: Path, analysis: "Analysis", kinds: Sequence[str] = ()) -> None:
    """Write numbers, the page with all figures, and figures of each kind, png or svg, into a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fishr.files import write_bytes, write_text
    from fishr.reports.figures import figures_of, write_images
    from fishr.reports.page import analysis_page

    content, weights = analysis.as_dict(), analysis.weights()
    buffer = pa.BufferOutputStream()
    pq.write_table(weights, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, buffer.getvalue())
    write_text(folder / CONTENT, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(folder / PAGE, analysis_page(content, weights))
    write_images(folder, figures_of(content, weights), kinds)


def _print(content: Mapping[str, Any]) -> None:
    for model in content["models"]:
        for layer in (model["head"], *model["layers"]):
            print_line(f"\n{model['name']}: {layer['layer']}, {layer['weights']:,} weights")
            print_table(DOMAIN_COLUMNS, domain_rows(layer, model["roles"]), left=2)
            print_line("Distances between domains, relative to size; in brackets what sampling alone gives:")
            print_table(pair_columns(layer), pair_rows(layer))
            errors = [domain["hessian_error"] for domain in layer["domains"].values()]
            if max(errors) > 0:
                print_line(f"Hessian diagonal: {layer['hessian']}, with an error of {max(errors):.0%} of its norm.")
            else:
                for sentence in sentences(content, model):
                    print_line(sentence)
        if model["checkpoints"]:
            print_line(f"\n{checkpoint_title(content, model)}:")
            print_table(checkpoint_columns(content), checkpoint_rows(content, model), left=0)
    if len(content["models"]) == 2:
        print_line("")
        for sentence in comparison_sentences(content):
            print_line(sentence)
        if content["line"] is None:
            print_line("No line runs between the two: they are different networks, or tell other classes apart.")
        else:
            rises = ", ".join(f"{name} {rise:.3f}" for name, rise in barrier(content["line"]).items())
            print_line(f"Rise of the risk between the models above a straight line, in nats: {rises}.")
    print_line(
        "\nRisk in nats, accuracy in %. Gradient: its norm. Correlation: over weights, of gradient variance with "
        "Hessian diagonal."
    )


@contextmanager
def _status(*, drawn: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is done next."""
    if not drawn:
        yield lambda stage: None
        return
    with stderr.status("loading") as status:
        yield lambda stage: status.update(Text(stage))  # what users call their folders is no markup
