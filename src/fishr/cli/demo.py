"""``fishr demo``."""

from pathlib import Path

import typer

from fishr.cli import options
from fishr.cli.analyze import CONTENT, write_analysis
from fishr.cli.console import Device, Json, LiveRuns, Quiet, print_if_done_before, print_json, print_line, print_table
from fishr.cli.page import leave_report


def demo(
    output: Path = typer.Option(Path("runs/demo"), "--output", help="Folder of the runs and of results.json."),
    seeds: int = typer.Option(3, "--seeds", min=1, help="Seeds of each method."),
    steps: int = typer.Option(500, "--steps", min=10, help="Updates of each run."),
    track: str | None = options.Track,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """ERM against Fishr on real scanned digits: embedded, offline, under two minutes.

    Digits are colored so that color tells the label in the training domains and misleads in the unseen one.
    A run that is done is not made again: called again after a stop, the demo continues.

    Examples:

        fishr demo

        fishr demo --seeds 1 --output /tmp/demo --json
    """
    from fishr.reports.tables import mean_and_std
    from fishr.workflows import colored
    from fishr.workflows import demo as workflow

    setting = workflow.setting(steps)
    with LiveRuns(colored.TITLES, num_runs=seeds * len(workflow.METHODS), quiet=quiet) as watcher:
        runs = colored.run_methods(setting, workflow.METHODS, range(seeds), output, watcher, device=device, track=track)
    content = colored.write_results(output, runs, setting)
    _analyze(output, device)
    if as_json:
        print_json(content)
    else:
        spreads = colored.summaries(runs)
        rows = [
            (colored.TITLES[method], *map(mean_and_std, spread.mean, spread.std)) for method, spread in spreads.items()
        ]
        print_table(("accuracy in %", "train", "unseen", "gray"), rows)
        print_line(workflow.conclusion(spreads["erm"], spreads["fishr"]))
        print_line(f"Mean ± standard deviation over seeds (here {seeds}); written to {output / 'results.json'}.")
        print_if_done_before(watcher, output)
    leave_report(output, made=watcher.trained > 0, quiet=as_json)


def _analyze(output: Path, device: str) -> None:
    """Put the domains side by side in the two models of the first seed, once."""
    from fishr.analysis import analyze
    from fishr.data import load_dataset

    folder = output / "analysis"
    if not (folder / CONTENT).exists():
        dataset = load_dataset("colored-digits", seed=0)
        write_analysis(folder, analyze([output / "erm-0", output / "fishr-0"], dataset, device=device))
