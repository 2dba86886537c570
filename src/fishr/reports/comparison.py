"""What accuracies on held-out domains say about algorithms: differences, a verdict, and what to expect elsewhere.

Accuracies are given as ``{algorithm: {held-out domain: [accuracy of each seed]}}``, in [0, 1]. Algorithms are compared
on the same domains and seeds. A held-out domain is one observation, whatever the number of seeds: more seeds tell
more about these domains and nothing about others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

from fishr.reports.tables import markdown_table, mean_and_std, one_line

Accuracies = Mapping[str, Mapping[str, Sequence[float]]]

BASELINE = "erm"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """How much better an algorithm is than the baseline on the same domains and seeds.

    Attributes:
        mean: Mean difference of accuracy.
        low: Lower end of the confidence interval of the mean over domains.
        high: Its upper end.
        better: Pairs of domain and seed in which it is better.
        pairs: Pairs in all.
    """

    mean: float
    low: float
    high: float
    better: int
    pairs: int


@dataclass(frozen=True)
class Expectation:
    """Accuracy to expect on a domain like the held-out ones.

    Attributes:
        mean: Mean over the held-out domains.
        low: Lower end of the interval in which the accuracy on one further domain lies with probability 0.95, if
            domains vary as the held-out ones do.
        high: Its upper end.
        worst_domain: The held-out domain with the lowest accuracy.
        worst: That accuracy.
    """

    mean: float
    low: float
    high: float
    worst_domain: str
    worst: float


@dataclass(frozen=True)
class Verdict:
    """What the comparison says.

    Attributes:
        chosen: The algorithm to use: the best of those that are better than the baseline beyond doubt, else the
            baseline.
        decided: Whether that is beyond doubt: it is better than the baseline, or the baseline better than all others.
        sentence: The verdict in words.
    """

    chosen: str
    decided: bool
    sentence: str


def difference(ours: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], rivals: int) -> Difference:
    """Paired difference of two algorithms, with Student's interval of the mean over domains.

        d̄ ± t · s / √n, with d_j the mean difference in domain j over seeds, and n domains

    Args:
        ours: Accuracies of each seed in each held-out domain.
        baseline: The same of the baseline.
        rivals: Algorithms that are compared with the baseline; all their intervals together hold with probability 0.95
            (Bonferroni).
    """
    pairs = {domain: [a - b for a, b in zip(ours[domain], baseline[domain], strict=True)] for domain in ours}
    means = [fmean(values) for values in pairs.values()]
    width = _quantile(len(means), 1 - (1 - CONFIDENCE) / rivals) * stdev(means) / math.sqrt(len(means))
    flat = [value for values in pairs.values() for value in values]
    mean = fmean(means)
    return Difference(mean, mean - width, mean + width, sum(value > 0 for value in flat), len(flat))


def differences(accuracies: Accuracies) -> dict[str, Difference]:
    """The paired difference to the baseline of every other algorithm."""
    rivals = [name for name in accuracies if name != BASELINE]
    return {name: difference(accuracies[name], accuracies[BASELINE], len(rivals)) for name in rivals}


def expectation(accuracies: Mapping[str, Sequence[float]]) -> Expectation:
    """What to expect of an algorithm on one further domain: Student's prediction interval.

    m̄ ± t · s · √(1 + 1/n), with m_j the mean accuracy in domain j over seeds, and n domains; cut off at 0 and 1
    """
    means = {domain: fmean(values) for domain, values in accuracies.items()}
    mean, count = fmean(means.values()), len(means)
    width = _quantile(count, CONFIDENCE) * stdev(means.values()) * math.sqrt(1 + 1 / count)
    worst = min(means, key=lambda domain: means[domain])
    return Expectation(mean, max(0.0, mean - width), min(1.0, mean + width), worst, means[worst])


def verdict(accuracies: Accuracies, titles: Mapping[str, str]) -> Verdict:
    """Which algorithm to use, and how sure that is."""
    compared = differences(accuracies)
    baseline = titles[BASELINE]
    if not compared:
        return Verdict(BASELINE, False, f"Undecided: {baseline} was compared with nothing.")
    better = [name for name, paired in compared.items() if paired.low > 0]
    best = max(better or compared, key=lambda name: compared[name].mean)
    said = _said(compared[best])
    if better:
        return Verdict(best, True, f"{titles[best]} is better than {baseline} on domains it has not seen: {said}.")
    if all(rival.high < 0 for rival in compared.values()):
        others = "all others" if len(compared) > 1 else titles[best]
        closest = f"the best of them, {titles[best]}, differs by" if len(compared) > 1 else "the difference is"
        return Verdict(
            BASELINE, True, f"{baseline} is better than {others} on domains it has not seen: {closest} {said}."
        )
    return Verdict(
        BASELINE,
        False,
        f"Undecided whether {titles[best]} is better than {baseline} on domains it has not seen: {said}. "
        f"{baseline}, the simpler one, is chosen.",
    )


def expectation_sentence(expected: Expectation, chosen: str, num_domains: int, titles: Mapping[str, str]) -> str:
    """What to expect of the algorithm chosen on an unseen domain, in words."""
    chosen_by = "" if chosen == BASELINE else " It was chosen by these accuracies, so expect a little less."
    return (
        f"On a domain like these that it has not seen, expect of {titles[chosen]} an accuracy of about "
        f"{expected.mean:.0%}: {expected.worst:.0%} was the lowest of {num_domains} "
        f"({one_line(expected.worst_domain)}). If domains vary as these do, one more lies between {expected.low:.0%} "
        f"and {expected.high:.0%} with a probability of 95%.{chosen_by}"
    )


def comparison_cells(accuracies: Accuracies, titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracy in %, mean ± standard error over seeds, on each held-out domain and over them."""
    compared = differences(accuracies)
    domains = list(next(iter(accuracies.values())))
    header = ["held out", *domains, "mean", "worst", f"difference to {titles[BASELINE]}"]
    rows = []
    for name, of_domains in accuracies.items():
        per_seed = [fmean(values) for values in zip(*of_domains.values(), strict=True)]
        worst = expectation(of_domains)
        rows.append(
            [
                titles[name],
                *(_mean_and_error(values) for values in of_domains.values()),
                _mean_and_error(per_seed),
                f"{worst.worst * 100:.1f} ({worst.worst_domain})",
                _interval(compared[name]) if name in compared else "",
            ]
        )
    return header, rows


def comparison_table(accuracies: Accuracies, titles: Mapping[str, str]) -> str:
    """:func:`comparison_cells` as Markdown."""
    return markdown_table(*comparison_cells(accuracies, titles))


def _mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error (standard deviation over √n), in percent; of a single value itself."""
    if len(values) == 1:
        return f"{values[0] * 100:.1f}"
    return mean_and_std(fmean(values) * 100, stdev(values) / math.sqrt(len(values)) * 100)


def _said(paired: Difference) -> str:
    return (
        f"{paired.mean * 100:+.1f} points of accuracy ({CONFIDENCE:.0%} interval over domains {_ends(paired)}), "
        f"better in {paired.better} of {paired.pairs} pairs of domain and seed"
    )


def _interval(paired: Difference) -> str:
    return f"{paired.mean * 100:+.1f} ({_ends(paired)})"


def _ends(paired: Difference) -> str:
    return f"{paired.low * 100:+.1f} to {paired.high * 100:+.1f}"


def _quantile(count: int, confidence: float) -> float:
    """Student's t for a two-sided interval from ``count`` observations."""
    return float(stdtrit(count - 1, (1 + confidence) / 2))
