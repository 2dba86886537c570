"""Results of a benchmark: what a selection rule makes of the histories of its runs, as DomainBed reports it.

A trial's result on a held-out domain is that of its best draw. Means are over trials, ± standard error (population
standard deviation over √n), in percent. Averages are of unrounded means.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fishr.records import MAKER, RunHistory, flat_settings
from fishr.reports.comparison import BASELINE, CONFIDENCE
from fishr.reports.domainbed import DATASETS
from fishr.selection import LEAVE_ONE_OUT, RULES, Selected, best_draw, select_checkpoints

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over trials.

    Attributes:
        mean: In percent.
        error: Its standard error, in percent.
        trials: Over so many trials.
    """

    mean: float
    error: float
    trials: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.error:.1f}"


@dataclass(frozen=True)
class Interval:
    """A difference to the baseline.

    Attributes:
        mean: In points of accuracy.
        low: Lower end of its 95 % interval; None where a domain has a single trial.
        high: Upper end.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" if self.low is None else f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class Row:
    """What an algorithm reached.

    Attributes:
        algorithm: Its name.
        cells: Accuracy by column: a held-out domain, or a dataset. None where no trial has a result.
        average: Mean of the cells, in percent; None where one is missing.
        difference: To the baseline; None for the baseline, and where a held-out domain has no pair of trials.
        hours: Time that its runs trained for.
    """

    algorithm: str
    cells: Mapping[str, Estimate | None]
    average: float | None
    difference: Interval | None
    hours: float


@dataclass(frozen=True)
class Results:
    """What one selection rule makes of the runs.

    Attributes:
        rule: Name of the rule.
        draws: Numbers of the hyperparameter draws that there are.
        datasets: The rows of each dataset, a cell for each held-out domain.
        averages: Rows with a cell for each dataset.
        ranks: Mean rank of each algorithm over all held-out domains of all datasets, 1 is best; without those that lack
            a result.
        remarks: What is to be known of each dataset's rows, above all what is missing.
        remarks_on_averages: Likewise.
    """

    rule: str
    draws: Sequence[int]
    datasets: Mapping[str, Sequence[Row]]
    averages: Sequence[Row]
    ranks: Mapping[str, float]
    remarks: Mapping[str, Sequence[str]]
    remarks_on_averages: Sequence[str]


Selections = Mapping[tuple[str, str, str], Mapping[int, Sequence[Selected]]]
"""By dataset, algorithm and held-out domain, of each trial: the checkpoint selected of each draw."""


def selections(histories: Sequence[RunHistory], rule: str) -> Selections:
    """What one of :data:`fishr.selection.RULES` selects, of those trials of which it says something."""
    runs: dict[tuple[str, str, str], dict[int, list[RunHistory]]] = defaultdict(lambda: defaultdict(list))
    for history in histories:
        for domain in history.test_domains:
            runs[history.dataset, history.algorithm, domain][history.trial].append(history)
    selected: dict[tuple[str, str, str], dict[int, Sequence[Selected]]] = defaultdict(dict)
    for cell, trials in runs.items():
        for trial, of_trial in sorted(trials.items()):
            if of_draws := select_checkpoints(RULES[rule], of_trial, cell[-1]):
                selected[cell][trial] = of_draws
    return selected


def results(histories: Sequence[RunHistory], *rules: str) -> list[Results]:
    """The results of a benchmark by each of some of :data:`fishr.selection.RULES`."""
    runs = _Runs(histories)
    return [_OfRule(runs, rule).results() for rule in rules]


class _Runs:
    """Runs by what they are of."""

    def __init__(self, histories: Sequence[RunHistory]) -> None:
        self.histories = histories
        present = {history.dataset for history in histories}
        published = [name for name, _ in DATASETS.values() if name in present]
        self.datasets = [*published, *sorted(present.difference(published))]
        names = sorted({history.algorithm for history in histories})
        self.algorithms = sorted(names, key=lambda name: name != BASELINE)

    @cached_property
    def of_dataset(self) -> Mapping[str, Sequence[RunHistory]]:
        runs: dict[str, list[RunHistory]] = defaultdict(list)
        for history in self.histories:
            runs[history.dataset].append(history)
        return runs

    @cached_property
    def held_out(self) -> Mapping[str, Sequence[str]]:
        """Domains of each dataset that a run holds out alone, in the dataset's order; those of pairs if none does."""
        return {
            dataset: _of_runs([run for run in runs if len(run.test_domains) == 1] or runs, lambda run: run.test_domains)
            for dataset, runs in self.of_dataset.items()
        }

    @cached_property
    def never_held_out(self) -> Mapping[str, Sequence[str]]:
        """Domains of each dataset that runs train on, and none holds out so."""
        return {
            dataset: [
                domain
                for domain in _of_runs(runs, lambda run: run.validated_domains)
                if domain not in self.held_out[dataset]
            ]
            for dataset, runs in self.of_dataset.items()
        }

    @cached_property
    def hours(self) -> Mapping[tuple[str, str], float]:
        """Training time by dataset and algorithm."""
        hours: dict[tuple[str, str], float] = defaultdict(float)
        for run in self.histories:
            hours[run.dataset, run.algorithm] += run.hours
        return hours

    @cached_property
    def remarks(self) -> Mapping[str, Sequence[str]]:
        """What is to be known of each dataset's runs, whatever the rule."""
        return {
            dataset: [
                *self._unfinished(dataset),
                *self._made_twice(dataset),
                *self._protocols_that_differ(dataset),
            ]
            for dataset in self.datasets
        }

    def missing_domains(self, dataset: str) -> list[str]:
        """Domains that nobody holds out: an average without them is none."""
        domains = self.never_held_out[dataset]
        return [f"no run holds out {', '.join(domains)}"] if domains else []

    def _unfinished(self, dataset: str) -> list[str]:
        runs = self.of_dataset[dataset]
        count = sum(not run.done for run in runs)
        return [f"{count:,} of {len(runs):,} runs are not finished, and count as they are"] if count else []

    def _made_twice(self, dataset: str) -> list[str]:
        """Runs that say to be the same one: their checkpoints are taken for those of one run."""
        folders: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for run in self.of_dataset[dataset]:
            folders[run.algorithm, run.test_domains, run.draw, run.trial].append(run.folder)
        twice = [of_run for of_run in folders.values() if len(of_run) > 1]
        if not twice:
            return []
        return [
            f"{len(twice):,} runs lie in two folders or more, and count together (such as {', '.join(twice[0][:2])})"
        ]

    def _protocols_that_differ(self, dataset: str) -> list[str]:
        runs = self.of_dataset[dataset]
        protocols = [flat_settings(protocol) for protocol in {id(run.protocol): run.protocol for run in runs}.values()]
        makers = list(dict.fromkeys(protocol[MAKER] for protocol in protocols))
        said = [f"runs were made by {' and by '.join(makers)}, whose draws are not the same"] if len(makers) > 1 else []
        for maker in makers:
            of_maker = [protocol for protocol in protocols if protocol[MAKER] == maker]
            for name in dict.fromkeys(name for protocol in of_maker for name in protocol):
                values = list(dict.fromkeys(str(protocol.get(name, "not set")) for protocol in of_maker))
                if len(values) > 1:
                    said.append(f"runs differ in {name}: {', '.join(values)}")
        return said


class _OfRule:
    """What a rule makes of the runs."""

    def __init__(self, runs: _Runs, rule: str) -> None:
        self.runs, self.rule = runs, rule
        self.selected = selections(runs.histories, rule)
        self.accuracies = {
            cell: {trial: best_draw(of_draws).accuracy for trial, of_draws in trials.items()}
            for cell, trials in self.selected.items()
        }

    def results(self) -> Results:
        runs = self.runs
        return Results(
            self.rule,
            sorted({history.draw for history in runs.histories}),
            {dataset: [self._row_of_dataset(dataset, name) for name in runs.algorithms] for dataset in runs.datasets},
            [self._row_of_averages(name) for name in runs.algorithms],
            self._ranks(),
            {
                dataset: [
                    *runs.missing_domains(dataset),
                    *self._missing_trials(dataset),
                    *self._missing_draws(dataset),
                    *runs.remarks[dataset],
                ]
                for dataset in runs.datasets
            },
            [
                f"{dataset}, {said}"
                for dataset in runs.datasets
                for said in (*runs.missing_domains(dataset), *self._missing_trials(dataset))
            ],
        )

    def trials(self, dataset: str, algorithm: str, domain: str) -> Mapping[int, float]:
        """Of each trial the accuracy of its best draw."""
        return self.accuracies.get((dataset, algorithm, domain), {})

    def _row_of_dataset(self, dataset: str, algorithm: str) -> Row:
        held_out = self.runs.held_out[dataset]
        cells = {domain: _estimate(self.trials(dataset, algorithm, domain).values()) for domain in held_out}
        return Row(
            algorithm,
            cells,
            None if self.runs.never_held_out[dataset] else _average(cells.values()),
            self._difference([dataset], algorithm),
            self.runs.hours[dataset, algorithm],
        )

    def _row_of_averages(self, algorithm: str) -> Row:
        cells = {}
        for dataset in self.runs.datasets:
            of_trials: dict[int, list[float]] = defaultdict(list)
            for domain in self.runs.held_out[dataset]:
                for trial, accuracy in self.trials(dataset, algorithm, domain).items():
                    of_trials[trial].append(accuracy)
            cells[dataset] = _estimate([float(np.mean(accuracies)) for _, accuracies in sorted(of_trials.items())])
        return Row(
            algorithm,
            cells,
            _average(cells.values()),
            self._difference(self.runs.datasets, algorithm),
            sum(self.runs.hours[dataset, algorithm] for dataset in self.runs.datasets),
        )

    def _difference(self, datasets: Iterable[str], algorithm: str) -> Interval | None:
        """Difference of the averages to the baseline's, of the trials that both have; None where a domain has none."""
        if algorithm == BASELINE:
            return None
        pairs = []
        for dataset in datasets:
            of_dataset = []
            for domain in self.runs.held_out[dataset]:
                ours, theirs = (self.trials(dataset, name, domain) for name in (algorithm, BASELINE))
                of_domain = [100 * (ours[trial] - theirs[trial]) for trial in ours if trial in theirs]
                if not of_domain:
                    return None
                of_dataset.append(np.array(of_domain))
            pairs.append(of_dataset)
        return bootstrap(pairs)

    def _ranks(self) -> dict[str, float]:
        """Mean rank over all held-out domains, of algorithms that have a result on each; equals share their ranks."""
        means = {
            name: [
                _estimate(self.trials(dataset, name, domain).values())
                for dataset in self.runs.datasets
                for domain in self.runs.held_out[dataset]
            ]
            for name in self.runs.algorithms
        }
        complete = {
            # Rounded, as equal results of different order of addition are a tie.
            name: [round(estimate.mean, 9) for estimate in estimates if estimate is not None]
            for name, estimates in means.items()
            if None not in estimates
        }
        if len(complete) < 2:
            return {}
        reached = np.array(list(complete.values()))
        better = (reached > reached[:, np.newaxis]).sum(axis=1)
        equal = (reached == reached[:, np.newaxis]).sum(axis=1) - 1
        return dict(zip(complete, (1 + better + equal / 2).mean(axis=1).tolist(), strict=True))

    def _missing_trials(self, dataset: str) -> list[str]:
        """Trials that others of the dataset have."""
        if self.rule == LEAVE_ONE_OUT and all(len(run.test_domains) == 1 for run in self.runs.of_dataset[dataset]):
            return ["no run holds out two domains, as this rule needs: fishr sweep run --leave-one-out"]
        num_trials = len({run.trial for run in self.runs.of_dataset[dataset]})
        counts = {
            (name, domain): len(self.selected.get((dataset, name, domain), {}))
            for name in self.runs.algorithms
            for domain in self.runs.held_out[dataset]
        }
        return _sentences({of: f"{count} of {num_trials} trials" for of, count in counts.items() if count < num_trials})

    def _missing_draws(self, dataset: str) -> list[str]:
        """Draws that others of the dataset have."""
        num_draws = len({run.draw for run in self.runs.of_dataset[dataset]})
        fewest = {
            (name, domain): min(map(len, trials.values()))
            for (of_dataset, name, domain), trials in self.selected.items()
            if of_dataset == dataset
        }
        return _sentences(
            {of: f"a trial with {few} of {num_draws} draws" for of, few in fewest.items() if few < num_draws}
        )


def _of_runs(runs: Sequence[RunHistory], domains_of: Callable[[RunHistory], Collection[str]]) -> list[str]:
    """Domains that any of the runs names, in the dataset's order."""
    order = dict.fromkeys(chain.from_iterable(dict.fromkeys(run.domains for run in runs)))
    named = {*chain.from_iterable({tuple(domains_of(run)) for run in runs})}
    return [domain for domain in order if domain in named]


def _estimate(accuracies: Iterable[float]) -> Estimate | None:
    """Of accuracies in [0, 1]; None where there are none."""
    values = np.array(list(accuracies))
    if len(values) == 0:
        return None
    return Estimate(100 * float(np.mean(values)), 100 * float(np.std(values / np.sqrt(len(values)))), len(values))


def _sentences(gaps: Mapping[tuple[str, str], str]) -> list[str]:
    """Of algorithms and held-out domains, those domains together that lack the same."""
    domains: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (algorithm, domain), gap in gaps.items():
        domains[algorithm, gap].append(domain)
    return [f"{algorithm} on {', '.join(of)}: {gap}" for (algorithm, gap), of in domains.items()]


def _average(cells: Collection[Estimate | None]) -> float | None:
    means = [cell.mean for cell in cells if cell is not None]
    return sum(means) / len(means) if len(means) == len(cells) else None


def bootstrap(pairs: Sequence[Sequence[NDArray[np.float64]]]) -> Interval:
    """Mean over datasets of the mean over domains of the mean of paired differences, with its bootstrap interval.

    The pairs of each domain are resampled, seeded. As resampling n pairs varies less than n new ones would, deviations
    are multiplied by √(n / (n − 1)) (Rao and Wu, Resampling Inference with Complex Survey Data, JASA 1988).

    Args:
        pairs: Differences of trials ``[trial]``, by dataset and domain.
    """

    def mean(of_domains: Callable[[NDArray[np.float64]], Any]) -> Any:
        return np.mean([np.mean([of_domains(domain) for domain in dataset], axis=0) for dataset in pairs], axis=0)

    def resampled(differences: NDArray[np.float64]) -> NDArray[np.float64]:
        number = len(differences)
        deviations = generator.choice(differences - differences.mean(), (RESAMPLES, number)).mean(axis=1)
        stretched: NDArray[np.float64] = differences.mean() + deviations * np.sqrt(number / (number - 1))
        return stretched

    estimate = float(mean(np.mean))
    if any(len(domain) < 2 for dataset in pairs for domain in dataset):
        return Interval(estimate)
    generator = np.random.default_rng(0)
    low, high = np.quantile(mean(resampled), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(estimate, float(low), float(high))
