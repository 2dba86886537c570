"""``fishr reproduce``."""

from pathlib import Path

import typer

from fishr.cli import options
from fishr.cli.console import DataRoot, Device, Json, LiveRuns, Quiet, print_if_done_before, print_json, print_line
from fishr.cli.page import leave_report

reproduce_app = typer.Typer(no_args_is_help=True, help="Reproduce published experiments.")


@reproduce_app.callback()
def _group() -> None: ...


@reproduce_app.command("colored-mnist")
def colored_mnist(
    methods: list[str] = typer.Option(
        ["erm", "irm", "vrex", "fishr"],
        "--methods",
        help="erm, irm, vrex, fishr, fishr-second-moment, fishr-covariance (the last two: Table 6).",
    ),
    layers: list[str] = typer.Option(
        ["classifier"], "--layers", help="Whose gradients Fishr compares: classifier, featurizer, all."
    ),
    restarts: int = typer.Option(10, "--restarts", min=1, help="Seeds of each method; the paper has 10."),
    label_flip: float = typer.Option(0.25, "--label-flip", help="Share of flipped labels; 0 is Table 5."),
    precision: str = typer.Option("bf16-mixed", "--precision", help="32, or bf16-mixed: hidden layers in bfloat16."),
    stack: bool = typer.Option(
        False, "--stack", help="Train the restarts of a method together, as stacked models: much faster on a GPU."
    ),
    output: Path = typer.Option(Path("runs/colored-mnist"), "--output", help="Folder of the runs and results."),
    track: str | None = options.Track,
    data_root: Path | None = DataRoot,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Table 2 of the Fishr paper on real MNIST, measured beside published.

    Each restart is a run of its own that can be cut and continued; a run that is done is not made again.
    Writes results.json and results.md.

    Examples:

        fishr reproduce colored-mnist --restarts 3

        fishr reproduce colored-mnist --stack

        fishr reproduce colored-mnist --methods erm fishr --label-flip 0 --output runs/table-5

        fishr reproduce colored-mnist --methods fishr fishr-second-moment fishr-covariance --output runs/table-6

        fishr reproduce colored-mnist --methods fishr --layers classifier featurizer all --output runs/layers
    """
    from typing import cast

    from fishr.training.config import Precision
    from fishr.workflows import colored
    from fishr.workflows import reproduce as workflow

    methods = colored.on_layers(methods, layers)
    setting = workflow.setting(label_flip, cast(Precision, precision))
    with LiveRuns(colored.TITLES, num_runs=restarts * len(methods), quiet=quiet) as watcher:
        runs = colored.run_methods(
            setting,
            methods,
            range(restarts),
            output,
            watcher,
            data_root=data_root,
            device=device,
            track=track,
            stack=stack,
        )
    content = colored.write_results(output, runs, setting)
    table = workflow.write_table(output, runs, setting)
    if as_json:
        print_json(content)
    else:
        print_line(table)
        print_line(f"Accuracy in %, mean ± standard deviation over restarts; written to {output}.")
        print_if_done_before(watcher, output)
    leave_report(output, made=watcher.trained > 0, quiet=as_json)
