"""Which algorithm to use on one's own data, and what to expect of it on the next domain.

Each domain is held out in turn. For each algorithm a few settings of its hyperparameters are tried with the first seed;
the one chosen, by the training domains alone, is run with further seeds. The held-out domain takes no part in any
choice that its accuracy depends on.
"""

import json
import logging
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol, get_args

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.penalized import RECOMMENDED_STRENGTH
from fishr.data.base import Kind, MultiDomainDataset
from fishr.deploy import keep_mistakes
from fishr.errors import ConfigError, NonFiniteLossError, RunError
from fishr.files import new_folder, write_text
from fishr.models.build import ModelConfig
from fishr.models.saved import SavedModel, load_model, save_model
from fishr.records import MADE_BY_FILE, RunRecord, settings_that_differ
from fishr.registry import unknown
from fishr.reports.comparison import (
    BASELINE,
    Accuracies,
    Expectation,
    Verdict,
    comparison_table,
    differences,
    expectation,
    expectation_sentence,
    verdict,
)
from fishr.reports.page import REPORT
from fishr.reports.tables import one_line
from fishr.space import Distribution, LogUniform, draw
from fishr.training import AverageConfig, Observer, RunConfig, RunCost, RunResult, measure_cost, train
from fishr.training.config import Precision
from fishr.workflows.plan import Extent, fit

logger = logging.getLogger(__name__)

SelectBy = Literal["training", "leave-one-out"]

FIXED = ("batch_size", "penalty_weight", "ib_weight", "switch_on", "ib_switch_on", "burn_in")
"""Hyperparameters that draws leave as they are: how long a run takes depends on the first, weights of penalties are not
portable, and when something is switched on is a share of the run."""

STRENGTHS = LogUniform(RECOMMENDED_STRENGTH / 4, RECOMMENDED_STRENGTH * 4)
"""Where the strength of penalties is drawn from, when domains that were left out choose it."""

CHECKPOINTS = 5
PLAN, RUNS = "plan.json", "runs"
FORMAT = 1

CAPTION = (
    "Accuracy in % on the in-split of the held-out domain, mean ± standard error over seeds. Difference: paired over "
    "domains and seeds, with its interval over domains; all intervals together hold with probability 95%."
)


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        algorithms: Names of the algorithms; ERM is always among them.
        asked: How much to do, before a budget.
        budget: Seconds that all of it may take; None for as many as it takes.
        select_by: Hyperparameters are chosen by the accuracy on the out-splits of the training domains
            (``"training"``), or on training domains that are left out in turn (``"leave-one-out"``): then the strength
            of penalties is drawn too, which the former would always choose too low.
        model: The network; None for the customary one.
        hparams: Hyperparameters that are the same in all runs, of those algorithms that have them.
        precision: As in :class:`fishr.training.RunConfig`, like the three that follow.
        average: How weights are averaged.
        select: Whether the best checkpoint is kept.
        class_balanced: Whether classes are drawn as often.

    Raises:
        ConfigError: an algorithm or a way to select that does not exist, or an extent below one.
    """

    algorithms: Sequence[str]
    asked: Extent
    budget: float | None = None
    select_by: SelectBy = "training"
    model: ModelConfig | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "32"
    average: AverageConfig | None = None
    select: bool = False
    class_balanced: bool = False

    def __post_init__(self) -> None:
        for name in self.algorithms:
            ALGORITHMS[name]
        object.__setattr__(self, "algorithms", tuple(dict.fromkeys((BASELINE, *self.algorithms))))
        if self.select_by not in get_args(SelectBy):
            raise ConfigError(f"select_by must be one of {', '.join(get_args(SelectBy))}, got {self.select_by!r}")
        few = [f"{name} must be at least 1, got {value}" for name, value in asdict(self.asked).items() if value < 1]
        if few:
            raise ConfigError("; ".join(few))


@dataclass(frozen=True)
class Plan:
    """How much will be done, and how long it takes.

    Attributes:
        extent: Draws, seeds and steps.
        runs: Trainings in all, the last one on all domains.
        seconds: How long they take together, by the measured costs.
        costs: What was measured of each algorithm.
    """

    extent: Extent
    runs: int
    seconds: float
    costs: Mapping[str, RunCost]


@dataclass(frozen=True)
class Choice:
    """The hyperparameters chosen for one algorithm and held-out domain.

    Attributes:
        draw: The draw.
        hparams: The hyperparameters.
        scores: What each draw was chosen by; None for one that diverged.
        held_out: Accuracy of the held-out domain with each draw, which nothing was chosen by; None likewise.
    """

    draw: int
    hparams: Mapping[str, Any]
    scores: Sequence[float | None]
    held_out: Sequence[float | None]


@dataclass(frozen=True)
class Outcome:
    """A finished comparison.

    Attributes:
        accuracies: Of each algorithm, held-out domain and seed.
        choices: Of each algorithm and held-out domain.
        hints: What the runs of an algorithm said about its penalty's weight.
        verdict: Which algorithm to use.
        expectation: What to expect of it on an unseen domain.
        model: Folder of the model trained on all domains.
    """

    accuracies: Accuracies
    choices: Mapping[str, Mapping[str, Choice]]
    hints: Mapping[str, Sequence[str]]
    verdict: Verdict
    expectation: Expectation
    model: Path


class Watcher(Protocol):
    """Somebody who watches a comparison."""

    def on_images(self, done: int, total: int) -> None:
        """So many of the images are decoded."""

    def on_measure(self, algorithm: str) -> None:
        """It is about to be measured how long a run takes."""

    def on_plan(self, plan: Plan, asked: Extent) -> None:
        """It is known what will be done."""

    def run(self, name: str) -> AbstractContextManager[Observer]:
        """Watch one run; it may have been made before."""

    def on_result(self, name: str, config: RunConfig, result: RunResult) -> None:
        """A run is finished."""


def compare(
    dataset: MultiDomainDataset,
    setting: Setting,
    folder: Path,
    watcher: Watcher,
    *,
    weights: Path | None = None,
    device: str = "auto",
    track: str | None = None,
) -> Outcome:
    """Compare algorithms with ERM on held-out domains, and train the one to use on all domains.

    Runs lie in ``folder/runs`` and are continued where they were cut; ``plan.json`` holds what was planned, so that a
    continued comparison is the same one. Asked for more or less, it plans anew and makes the runs that are
    missing. At the end the folder holds ``results.json``, ``results.md`` and ``model/``.

    Args:
        dataset: The data.
        setting: What is compared.
        folder: Where runs and results are put.
        watcher: Is told what happens.
        weights: File with the initial weights, where the setting's model names one by its digest.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        track: Who is told of each run, as :func:`fishr.training.train` takes it.

    Raises:
        ConfigError: too few domains, or a budget that is too short.
        RunError: the folder holds a comparison of other data or networks.
        FishrError: as :func:`fishr.training.train`.
    """
    return _Comparison(dataset, setting, folder, watcher, weights, device, track).outcome()


@dataclass
class _Comparison:
    dataset: MultiDomainDataset
    setting: Setting
    folder: Path
    watcher: Watcher
    weights: Path | None
    device: str
    track: str | None
    results: dict[str, tuple[RunConfig, RunResult]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.domains = self.dataset.trainable_domains
        left_out = 2 if self.setting.select_by == "leave-one-out" else 1
        least = max(ALGORITHMS[name].min_domains for name in self.setting.algorithms)
        if len(self.domains) - left_out < least:
            leaving = f", as --select-by leave-one-out leaves out {left_out} at once" if left_out > 1 else ""
            raise ConfigError(
                f"{', '.join(self.setting.algorithms)} can be compared on {least + left_out} domains or more{leaving}, "
                f"dataset {self.dataset.name!r} has {len(self.domains)}: {', '.join(self.domains)}"
            )
        known = {name for algorithm in self.setting.algorithms for name in self.hparams(algorithm, 0)}
        for name in self.setting.hparams:
            if name not in known:
                raise unknown(f"hyperparameter of {', '.join(self.setting.algorithms)}", name, known)

    def outcome(self) -> Outcome:
        self.watcher.on_plan(self.plan, self.setting.asked)
        choices: dict[str, dict[str, Choice]] = {name: {} for name in self.setting.algorithms}
        for domain in self.domains:
            for name in self.setting.algorithms:
                choices[name][domain] = self.choose(name, domain)
        accuracies: dict[str, dict[str, list[float]]] = {name: {} for name in self.setting.algorithms}
        for domain in self.domains:
            for name in self.setting.algorithms:
                accuracies[name][domain] = [
                    self.held_out(name, choices[name][domain].draw, seed, domain)
                    for seed in range(self.plan.extent.seeds)
                ]
                chosen = self.run(name, choices[name][domain].draw, 0, (domain,))
                keep_mistakes(chosen.folder, self.dataset, device=self.device)
        said = verdict(accuracies, titles(accuracies))
        expected = expectation(accuracies[said.chosen])
        outcome = Outcome(accuracies, choices, self.hints(), said, expected, self.folder / "model")
        self.keep(outcome)
        return outcome

    # The plan

    @cached_property
    def plan(self) -> Plan:
        """What was planned when the comparison began, or a new plan."""
        began = time.monotonic()
        identity = self._identity()
        earlier = self._earlier_plan(identity)
        costs = {} if earlier is None else earlier.costs
        if earlier is not None and earlier.identity == identity:
            return self._planned(earlier.extent, costs)
        self.dataset.open(self.watcher.on_images)
        costs = {name: costs.get(name) or self.cost(name) for name in self.setting.algorithms}
        spent = time.monotonic() - began
        extent = fit(
            self.setting.asked, self.setting.budget, lambda extent: spent + self._planned(extent, costs).seconds
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            **identity,
            "extent": asdict(extent),
            "costs": {name: asdict(cost) for name, cost in costs.items()},
        }
        write_text(self.folder / PLAN, json.dumps(content, indent=2) + "\n")
        return self._planned(extent, costs)

    def _earlier_plan(self, identity: Mapping[str, Any]) -> "_EarlierPlan | None":
        """The plan in the folder.

        Raises:
            RunError: it is of another comparison, or the folder is something else.
        """
        file = self.folder / PLAN
        if file.exists():
            earlier = _read_plan(file)
            changed = settings_that_differ(earlier.identity["compared"], identity["compared"])
            if changed:
                raise RunError(
                    f"{self.folder} holds another comparison ({'; '.join(changed)}): choose another --output, or "
                    "delete the folder"
                )
            return earlier
        if self.folder.exists() and (
            not self.folder.is_dir() or any(not _is_of_comparison(item) for item in self.folder.iterdir())
        ):
            raise RunError(f"{self.folder} exists and is not a comparison (it has no {PLAN}): choose another --output")
        return None

    def cost(self, algorithm: str) -> RunCost:
        self.watcher.on_measure(algorithm)
        config = self.config(algorithm, 0, 0, self.domains[:1], self.setting.asked)
        return measure_cost(config, self.dataset, weights=self.weights, device=self.device)

    def _identity(self) -> dict[str, Any]:
        """What makes this comparison another one than others, as JSON has it."""
        setting = self.setting
        asked = {"algorithms": sorted(setting.algorithms), **asdict(setting.asked), "budget": setting.budget}
        compared = {
            **self.config(BASELINE, 0, 0, (), setting.asked).identity(),
            "select_by": setting.select_by,
        }
        for name in ("steps", "checkpoint_every", "hparams", "algorithm", "seed", "trial", "test_domains"):
            del compared[name]
        compared["given"] = setting.hparams
        content: dict[str, Any] = json.loads(json.dumps({"compared": compared, "asked": asked}))
        return content

    def _planned(self, extent: Extent, costs: Mapping[str, RunCost]) -> Plan:
        held_out = len(self.domains) * (extent.draws + extent.seeds - 1)
        pairs = len(self._pairs()) * extent.draws if self._leaves_out(extent) else 0
        runs = (held_out + pairs) * len(costs) + 1
        each = [cost.seconds(extent.steps, _checkpoint_every(extent)) for cost in costs.values()]
        on_all_domains = max(each) * len(self.domains) / (len(self.domains) - 1)
        return Plan(extent, runs, (held_out + pairs) * sum(each) + on_all_domains, costs)

    def _leaves_out(self, extent: Extent) -> bool:
        """Whether training domains are left out: only to choose among several draws."""
        return self.setting.select_by == "leave-one-out" and extent.draws > 1

    def _pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.domains, 2))

    # Runs

    def config(self, algorithm: str, draw: int, seed: int, held_out: Sequence[str], extent: Extent) -> RunConfig:
        setting = self.setting
        return RunConfig.for_dataset(
            self.dataset,
            algorithm,
            steps=extent.steps,
            test_domains=tuple(held_out),
            hparams=self.hparams(algorithm, draw),
            model=setting.model,
            checkpoint_every=_checkpoint_every(extent),
            seed=seed,
            trial=seed,
            precision=setting.precision,
            average=setting.average,
            select=setting.select,
            class_balanced=setting.class_balanced,
        )

    def hparams(self, algorithm: str, number: int) -> dict[str, Any]:
        drawn = hyperparameters_of_draw(algorithm, self.dataset.kind, number, self.setting.select_by)
        given = {name: value for name, value in self.setting.hparams.items() if name in drawn}
        if "penalty_weight" in given and "strength" in drawn:
            given.setdefault("strength", None)
        return drawn | given

    def run(self, algorithm: str, draw: int, seed: int, held_out: Sequence[str]) -> RunResult:
        config = self.config(algorithm, draw, seed, held_out, self.plan.extent)
        if config.hash in self.results:
            return self.results[config.hash][1]
        name = f"{title(algorithm)}, held out {' and '.join(held_out) or 'none'}, draw {draw}, seed {seed}"
        with self.watcher.run(name) as observer:
            result = train(
                config,
                self.dataset,
                self.folder / RUNS / config.hash,
                weights=self.weights,
                device=self.device,
                observer=observer,
                track=self.track,
            )
        self.results[config.hash] = config, result
        self.watcher.on_result(name, config, result)
        return result

    def held_out(self, algorithm: str, draw: int, seed: int, domain: str) -> float:
        """Accuracy on the held-out domain."""
        return self.run(algorithm, draw, seed, (domain,)).kept.domains[domain]["in"].accuracy

    def choose(self, algorithm: str, domain: str) -> Choice:
        """The draw with the best score, the first of equals; one that diverges is out."""
        scores: list[float | None] = []
        held_out: list[float | None] = []
        for number in range(self.plan.extent.draws):
            try:
                kept = self.run(algorithm, number, 0, (domain,)).kept
                score = self._score(algorithm, number, domain, kept)
            except NonFiniteLossError as error:
                if number == 0:  # its settings are not random: something else is wrong
                    raise
                logger.warning("draw %d of %s is out, held out %s: %s", number, title(algorithm), domain, error)
                scores.append(None)
                held_out.append(None)
            else:
                scores.append(score)
                held_out.append(kept.domains[domain]["in"].accuracy)
        best = _first_of_best(scores)
        return Choice(best, self.hparams(algorithm, best), scores, held_out)

    def _score(self, algorithm: str, number: int, domain: str, kept: RunRecord) -> float:
        if self._leaves_out(self.plan.extent):
            return self._left_out_score(algorithm, number, domain)
        return self._validation(kept, domain)

    def _validation(self, record: RunRecord, held_out: str) -> float:
        """Mean accuracy on the out-splits of the training domains."""
        return fmean(record.domains[name]["out"].accuracy for name in self.domains if name != held_out)

    def _left_out_score(self, algorithm: str, number: int, domain: str) -> float:
        """Mean accuracy on the training domains, each left out of a run that holds out ``domain`` too."""
        scores = []
        for pair in self._pairs():
            if domain in pair:
                other = pair[pair[0] == domain]
                scores.append(self.run(algorithm, number, 0, pair).kept.domains[other]["in"].accuracy)
        return fmean(scores)

    def hints(self) -> dict[str, list[str]]:
        hints: dict[str, list[str]] = {name: [] for name in self.setting.algorithms}
        for config, result in self.results.values():
            hints[config.algorithm] += result.hints
        return hints

    # What is kept

    def keep(self, outcome: Outcome) -> None:
        """Train the chosen algorithm on all domains and write its model and the results."""
        chosen = outcome.verdict.chosen
        scores = [choice.scores for choice in outcome.choices[chosen].values()]
        means = [None if None in of_draw else fmean(of_draw) for of_draw in zip(*scores, strict=True)]
        final = self.run(chosen, _first_of_best(means), 0, ())
        saved = load_model(final.folder / "model")
        provenance = {**saved.card.provenance, "unseen_domain": asdict(outcome.expectation)}
        with new_folder(outcome.model) as aside:
            card = replace(saved.card, provenance=provenance)
            save_model(aside, SavedModel(saved.featurizer, saved.classifier, card))
        write_text(self.folder / "results.md", self.as_markdown(outcome))
        write_text(self.folder / "results.json", json.dumps(self.as_json(outcome), indent=2) + "\n")

    def as_json(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "data": self.dataset.name,
            **self._identity(),
            "extent": asdict(self.plan.extent),
            "accuracies": outcome.accuracies,
            "choices": {
                name: {domain: asdict(choice) for domain, choice in of_domains.items()}
                for name, of_domains in outcome.choices.items()
            },
            "differences": {name: asdict(value) for name, value in differences(outcome.accuracies).items()},
            "titles": titles(outcome.accuracies),
            "verdict": asdict(outcome.verdict),
            "unseen_domain": asdict(outcome.expectation),
            "hints": outcome.hints,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("fishr", "torch")}},
        }

    def as_markdown(self, outcome: Outcome) -> str:
        extent = self.plan.extent
        reduced = "" if extent == self.setting.asked else f" instead of {self.setting.asked}, for the budget"
        if extent.draws == 1:
            hyperparameters = "Hyperparameters are the recommended ones."
        elif self.setting.select_by == "training":
            hyperparameters = "Hyperparameters were chosen by accuracy on the out-splits of the training domains."
        else:
            hyperparameters = "Hyperparameters were chosen by accuracy on training domains left out in turn."
        paragraphs = [
            f"# Comparison on {one_line(self.dataset.name)}",
            outcome.verdict.sentence,
            expectation_of(outcome),
            comparison_table(outcome.accuracies, titles(outcome.accuracies)),
            f"{CAPTION} Every run: {extent}{reduced}. {hyperparameters}",
        ]
        return "\n\n".join(paragraphs) + "\n"


def hyperparameters_of_draw(
    algorithm: str, kind: Kind, number: int, select_by: SelectBy = "training"
) -> dict[str, Any]:
    """Of draw 0 the recommended ones, of others random ones, which are the same where algorithms share them."""
    config = ALGORITHMS[algorithm].Config
    recommended = config.recommended(kind).as_dict()
    space: dict[str, Distribution] = {
        name: distribution for name, distribution in config.space(kind).items() if name not in FIXED
    }
    if select_by == "leave-one-out" and "strength" in recommended:
        space["strength"] = STRENGTHS
    return recommended | (draw(space, number) if number > 0 else {})


def title(algorithm: str) -> str:
    """An algorithm's name for readers."""
    return ALGORITHMS[algorithm].title


def titles(algorithms: Iterable[str]) -> dict[str, str]:
    return {name: title(name) for name in algorithms}


def expectation_of(outcome: Outcome) -> str:
    """What to expect on an unseen domain, in words."""
    chosen = outcome.verdict.chosen
    return expectation_sentence(
        outcome.expectation, chosen, len(outcome.accuracies[chosen]), titles(outcome.accuracies)
    )


def _first_of_best(scores: Sequence[float | None]) -> int:
    values = [-math.inf if score is None else score for score in scores]
    return values.index(max(values))


def _checkpoint_every(extent: Extent) -> int:
    return max(1, extent.steps // CHECKPOINTS)


@dataclass(frozen=True)
class _EarlierPlan:
    identity: Mapping[str, Any]
    extent: Extent
    costs: Mapping[str, RunCost]


def _read_plan(file: Path) -> _EarlierPlan:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            return _EarlierPlan(
                {name: dict(content[name]) for name in ("compared", "asked")},
                Extent(**content["extent"]),
                {name: RunCost(**cost) for name, cost in content["costs"].items()},
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise RunError(f"{file} cannot be read: choose another --output, or delete the file to plan anew")


def _is_of_comparison(path: Path) -> bool:
    """What stays when somebody deletes the plan, or a process was killed while it wrote the plan."""
    known = (RUNS, "results.json", "results.md", "model", MADE_BY_FILE, REPORT)
    return path.name in known or path.name.startswith(".")
