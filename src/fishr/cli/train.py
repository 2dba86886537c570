"""``fishr train``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fishr.cli.console import DataRoot, Device, Json, Quiet, print_json, print_table, progress_of_run, stdout
from fishr.errors import ConfigError


def train(
    data: str = typer.Option(..., "--data", help="colored-digits, colored-mnist, colored-mnist-irm or rotated-mnist."),
    algorithm: str = typer.Option("fishr", "--algorithm", help="erm, irm, vrex or fishr."),
    test_domain: list[str] | None = typer.Option(
        None, "--test-domain", help="Domains held out; default: the dataset's customary one."
    ),
    steps: int = typer.Option(5000, "--steps", help="Updates to make."),
    seed: int = typer.Option(0, "--seed", help="Seed of initial weights and batches."),
    trial: int = typer.Option(0, "--trial", help="Seed of the 80/20 splits."),
    output: Path | None = typer.Option(
        None, "--output", help="Folder of the run; default runs/HASH, named by its config."
    ),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Hyperparameters, e.g. lr=1e-4."),
    precision: str = typer.Option("32", "--precision", help="32, or bf16-mixed: featurizer in bfloat16."),
    subset: int | None = typer.Option(None, "--subset", help="Samples of each domain to use, for short runs."),
    checkpoint_every: int | None = typer.Option(
        None, "--checkpoint-every", help="Updates between checkpoints; default a tenth of the run."
    ),
    data_root: Path | None = DataRoot,
    device: str = Device,
    as_json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Train one model; called again with the same settings it continues, or says that it is done.

    The folder holds config.json, metrics.jsonl, checkpoints/ while it runs, and model/ at the end.

    Examples:

        fishr train --data colored-digits --algorithm fishr --steps 500

        fishr train --data rotated-mnist --algorithm erm --test-domain 75 --steps 300 --subset 1000

        fishr train --data colored-mnist --algorithm fishr --set penalty_weight=8089 switch_on=0.85 --output runs/a
    """
    from fishr.data import load_dataset
    from fishr.training import RunConfig
    from fishr.training import train as train_run

    dataset = load_dataset(data, root=data_root, subset=subset)
    config = RunConfig.for_dataset(
        dataset,
        algorithm,
        steps=steps,
        test_domains=tuple(test_domain) if test_domain else None,
        hparams=parse_settings(settings),
        checkpoint_every=checkpoint_every,
        seed=seed,
        trial=trial,
        precision=precision,
    )
    folder = Path("runs") / config.hash if output is None else output
    with progress_of_run(f"{algorithm} on {data}", quiet=quiet) as observer:
        result = train_run(config, dataset, folder, device=device, observer=observer)
    last = result.records[-1]
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "model": str(folder / "model"),
                "trained": result.trained,
                "step": last.step,
                "held_out": list(config.test_domains),
                "accuracy": {
                    domain: {split: metrics.accuracy * 100 for split, metrics in splits.items()}
                    for domain, splits in last.domains.items()
                },
            }
        )
        return
    rows = []
    for domain, splits in last.domains.items():
        role = "held out" if domain in config.test_domains else "trained on"
        if domain in dataset.evaluation_only:
            role = "evaluation only"
        rows.append((domain, role, *(f"{metrics.accuracy * 100:.1f}" for metrics in splits.values())))
    print_table(("domain", "role", "in-split", "out-split"), rows)
    said = "Trained" if result.trained else "Done before, nothing to do"
    stdout.print(f"{said}: accuracy in % after {last.step} steps; model in {folder / 'model'}.", soft_wrap=True)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs; a value is read as JSON where it is JSON, else as text.

    >>> parse_settings(["lr=1e-4", "variant=covariance", "ema=null"])
    {'lr': 0.0001, 'variant': 'covariance', 'ema': None}
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes KEY=VALUE, got {setting!r}")
        try:
            parsed[name] = json.loads(text)
        except json.JSONDecodeError:
            parsed[name] = text
    return parsed
