"""Forms of a strength of Fishr's penalty that needs no tuning, on Colored Digits and PACS, every domain held out.

follow: λ follows the gradients (``strength`` of the library). once: λ is measured before the switch-on step and stays.
relative: the distance of the variances relative to their mean, (v_e − v̄)² / v̄², with a fixed λ. The values for PACS
were fixed on Colored Digits, before any run on PACS. Runs lie in ``--runs`` and continue where they were cut.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # sets torch's allocator up: before torch
import pacs
import torch
from torch import Tensor

from fishr.algorithms import ALGORITHMS, Fishr
from fishr.algorithms.base import Losses
from fishr.data import DomainBatch, load_dataset
from fishr.records import RunRecord
from fishr.reports.comparison import difference
from fishr.reports.tables import markdown_table
from fishr.training import RunConfig, train

METHOD = """Colored Digits: the library's MLP, batches of 64, Adam, lr 1e-3, the last step. PACS: as pacs.py says, the
last step and the checkpoint with the best validation accuracy on the training domains. λ, or its ramp, from 30 % of the
run on. Held-out accuracy in %, mean over seeds; differences to ERM are paired over domains and seeds, with Student's
95% interval over domains."""

SEEDS = (0, 1, 2)
DIGITS_STEPS = (100, 500, 1500)
DIGITS_SETTINGS: Mapping[str, Sequence[float]] = {"follow": (0.5, 1.0), "once": (0.5, 1.0), "relative": (1.0, 10.0)}
PACS_SETTINGS: Mapping[str, Sequence[float]] = {"follow": (0.5,), "once": (0.5,)}
NAMES = {
    "follow": ("fishr", "strength"),
    "once": ("fishr-once", "strength"),
    "relative": ("fishr-relative", "penalty_weight"),
}
"""Algorithm of each form, and the hyperparameter that says how strong it is."""


class FishrOnce(Fishr):
    """λ stays what it was at the switch-on step."""

    measured: Tensor

    def setup(self) -> None:
        super().setup()
        self.register_buffer("measured", torch.zeros(()))

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        if self.balance is not None and step == self.switch_on_step:
            self.measured.copy_(self.balance.weight())
        return super().losses(batch, step)

    def weight(self, step: int) -> Tensor | float:
        if step < self.switch_on_step:
            return 0.0
        return self.measured * min(1.0, (step - self.switch_on_step + 1) / self.ramp)


class FishrRelative(Fishr):
    """The squared distance of the variances to their mean, over the mean's square."""

    averaged: Tensor

    def setup(self) -> None:
        super().setup()
        self.penalty.average.register_forward_hook(self._keep)

    def _keep(self, _: torch.nn.Module, __: tuple[Tensor, ...], averaged: Tensor) -> None:
        self.averaged = averaged.detach()

    def risk_and_penalty(self, features: Tensor, batch: DomainBatch) -> tuple[Tensor, Tensor]:
        risk, penalty = super().risk_and_penalty(features, batch)
        return risk, penalty / self.averaged.mean(0).square().mean()


ALGORITHMS.register("fishr-once", FishrOnce)
ALGORITHMS.register("fishr-relative", FishrRelative)


@dataclass(frozen=True)
class Form:
    """A form of the penalty and how strong it is; ERM has neither."""

    name: str
    value: float

    @property
    def algorithm(self) -> str:
        return NAMES[self.name][0]

    @property
    def hparams(self) -> dict[str, float]:
        return {NAMES[self.name][1]: self.value}

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


def forms(settings: Mapping[str, Sequence[float]]) -> Iterator[Form]:
    for name, values in settings.items():
        for value in values:
            yield Form(name, value)


def accuracies(records: Mapping[str, Mapping[int, RunRecord]]) -> dict[str, list[float]]:
    """Held-out accuracy of each domain and seed."""
    return {
        domain: [pacs.held_out(of_seed[seed], domain) for seed in sorted(of_seed)]
        for domain, of_seed in records.items()
    }


def digits(
    steps: int, form: Form | None, seeds: Sequence[int], runs: Path, subset: int | None
) -> dict[str, list[float]]:
    records: dict[str, dict[int, RunRecord]] = {}
    for seed in seeds:
        dataset = load_dataset("colored-digits", seed=seed, subset=subset)
        for domain in dataset.trainable_domains:
            config = RunConfig.for_dataset(
                dataset,
                form.algorithm if form else "erm",
                steps=steps,
                test_domains=(domain,),
                hparams=form.hparams if form else {},
                checkpoint_every=max(1, steps // 5),
                seed=seed,
                trial=seed,
            )
            result = train(config, dataset, runs / config.hash, device="cpu")
            records.setdefault(domain, {})[seed] = result.records[-1]
    return accuracies(records)


def on_digits(seeds: Sequence[int], runs: Path, *, quick: bool) -> dict[str, Any]:
    results = {}
    for steps in (4,) if quick else DIGITS_STEPS:
        of_steps = {"ERM": digits(steps, None, seeds, runs, 30 if quick else None)}
        for form in forms(DIGITS_SETTINGS):
            of_steps[str(form)] = digits(steps, form, seeds, runs, 30 if quick else None)
            common.progress.print(f"{steps} steps, {form}: {of_steps[str(form)]}", markup=False)
        results[f"Colored Digits, {steps} steps"] = of_steps
    return results


def on_pacs(comparison: pacs.Comparison, seeds: Sequence[int]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for form in (None, *forms(PACS_SETTINGS)):
        runs = {
            domain: {
                seed: comparison.run(
                    pacs.Job(form.algorithm if form else "erm", domain, seed, form.hparams if form else {})
                )
                for seed in seeds
            }
            for domain in comparison.dataset.trainable_domains
        }
        name = str(form) if form else "ERM"
        last[name] = accuracies(
            {domain: {seed: run.records[-1] for seed, run in of.items()} for domain, of in runs.items()}
        )
        best[name] = accuracies({domain: {seed: run.kept for seed, run in of.items()} for domain, of in runs.items()})
    return {"PACS, last step": last, "PACS, best by validation": best}


def table(results: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    parts = []
    for data, of_forms in results.items():
        rows = []
        for form, of_domains in of_forms.items():
            means = [statistics.fmean(values) for values in of_domains.values()]
            paired = "" if form == "ERM" else _difference(of_domains, of_forms["ERM"])
            rows.append([form, *(f"{mean * 100:.1f}" for mean in (*means, statistics.fmean(means))), paired])
        header = [data, *next(iter(of_forms.values())), "mean", "difference to ERM"]
        parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def _difference(ours: Mapping[str, Sequence[float]], erm: Mapping[str, Sequence[float]]) -> str:
    paired = difference(ours, erm, rivals=1)
    return f"{paired.mean * 100:+.1f} ({paired.low * 100:+.1f} to {paired.high * 100:+.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder with PACS (default: $FISHR_DATA, else the cache folder)")
    parser.add_argument("--weights", type=Path, help="ImageNet weights, as pacs.py takes them; without, no PACS")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=common.RESULTS, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that the script works")
    arguments = parser.parse_args(argv)
    seeds = SEEDS[:2] if arguments.quick else SEEDS
    arguments.repeats = len(seeds)
    results = on_digits(seeds, arguments.runs / "digits", quick=arguments.quick)
    if arguments.weights is not None:
        size = pacs.QUICK if arguments.quick else pacs.FULL
        dataset = load_dataset("pacs", root=arguments.data_root, image_size=size.image_size, subset=size.subset)
        comparison = pacs.Comparison(dataset, size, arguments.weights, arguments.runs / "pacs")
        results |= on_pacs(comparison, seeds)
    setup = common.describe_setup(arguments, ["torch", "torchvision", "timm", "scipy", "fishr"], METHOD)
    common.write_results(arguments.output, "strength", setup, json.loads(json.dumps(results)), [], table(results))


if __name__ == "__main__":
    main()
