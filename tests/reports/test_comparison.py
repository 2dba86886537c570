from statistics import fmean, stdev

import pytest

from fishr.reports.comparison import (
    Difference,
    comparison_table,
    difference,
    differences,
    expectation,
    verdict,
)

TITLES = {"erm": "ERM", "fishr": "Fishr", "vrex": "V-REx"}

T_3 = 3.182446305284263
"""Student's t of tables for 95 % and 3 degrees of freedom."""


def shifted(accuracies: dict[str, list[float]], *points: float) -> dict[str, list[float]]:
    """Accuracies that are better by so many points, one number for each domain."""
    moved = zip(accuracies.items(), points, strict=True)
    return {domain: [value + by / 100 for value in values] for (domain, values), by in moved}


ERM = {"a": [0.60, 0.62], "b": [0.70, 0.71], "c": [0.80, 0.80], "d": [0.90, 0.88]}


def test_the_difference_is_paired_and_its_interval_is_over_domains() -> None:
    fishr = {"a": [0.62, 0.62], "b": [0.73, 0.70], "c": [0.83, 0.81], "d": [0.90, 0.92]}
    by_domain = [0.01, 0.01, 0.02, 0.02]
    width = T_3 * stdev(by_domain) / 2
    paired = difference(fishr, ERM, rivals=1)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.015, 0.015 - width, 0.015 + width))
    assert (paired.better, paired.pairs) == (5, 8)


def test_more_seeds_that_say_the_same_make_no_interval_narrower() -> None:
    fishr = shifted(ERM, 1, 2, 3, 4)
    more = difference({k: v * 5 for k, v in fishr.items()}, {k: v * 5 for k, v in ERM.items()}, rivals=1)
    once = difference(fishr, ERM, rivals=1)
    assert (more.low, more.high) == pytest.approx((once.low, once.high))


def test_intervals_of_several_rivals_are_wider() -> None:
    """Bonferroni: 97.5 % each for two; t of 3 degrees of freedom at 1 - 0.0125 is 4.1765."""
    fishr = shifted(ERM, 1, 2, 3, 4)
    paired = differences({"erm": ERM, "fishr": fishr, "vrex": ERM})["fishr"]
    assert paired.high - paired.mean == pytest.approx(4.176535 * stdev([0.01, 0.02, 0.03, 0.04]) / 2)


def test_equal_algorithms_differ_by_nothing() -> None:
    assert difference(ERM, ERM, rivals=1) == Difference(0.0, 0.0, 0.0, 0, 8)


def test_expectation_is_a_prediction_for_one_more_domain() -> None:
    expected, means = expectation(ERM), [0.61, 0.705, 0.80, 0.89]
    assert expected.mean == pytest.approx(fmean(means))
    width = T_3 * stdev(means) * (1 + 1 / 4) ** 0.5
    assert (expected.low, expected.high) == pytest.approx((fmean(means) - width, 1.0))
    assert (expected.worst_domain, expected.worst) == ("a", pytest.approx(0.61))


def test_expectation_ends_at_zero_and_one() -> None:
    expected = expectation({"a": [0.0], "b": [1.0]})
    assert (expected.low, expected.mean, expected.high) == (0.0, 0.5, 1.0)


def test_verdict_better() -> None:
    said = verdict({"erm": ERM, "fishr": shifted(ERM, 2.0, 2.1, 1.9, 2.0)}, TITLES)
    assert (said.chosen, said.decided) == ("fishr", True)
    assert said.sentence == (
        "Fishr is better than ERM on domains it has not seen: +2.0 points of accuracy (95% interval over domains +1.9 "
        "to +2.1), better in 8 of 8 pairs of domain and seed."
    )


def test_verdict_worse() -> None:
    said = verdict({"erm": ERM, "fishr": shifted(ERM, -2.0, -2.1, -1.9, -2.0)}, TITLES)
    assert (said.chosen, said.decided) == ("erm", True)
    assert said.sentence.startswith(
        "ERM is better than Fishr on domains it has not seen: the difference is -2.0 points"
    )


def test_verdict_undecided() -> None:
    said = verdict({"erm": ERM, "fishr": shifted(ERM, 8.0, -1.0, 3.0, -2.0)}, TITLES)
    assert (said.chosen, said.decided) == ("erm", False)
    assert said.sentence == (
        "Undecided whether Fishr is better than ERM on domains it has not seen: +2.0 points of accuracy (95% interval "
        "over domains -5.2 to +9.2), better in 4 of 8 pairs of domain and seed. ERM, the simpler one, is chosen."
    )


@pytest.mark.parametrize(
    ("fishr", "vrex", "chosen", "decided"),
    [
        ((2, 2.1, 1.9, 2), (1, 1.1, 0.9, 1), "fishr", True),
        ((1, 1.1, 0.9, 1), (2, 2.1, 1.9, 2), "vrex", True),
        ((2, 2.1, 1.9, 2), (-9, 9, -9, 9), "fishr", True),
        ((-2, -2.1, -1.9, -2), (-9, 9, -9, 9), "erm", False),
        ((-2, -2.1, -1.9, -2), (-1, -1.1, -0.9, -1), "erm", True),
    ],
)
def test_verdict_on_several(fishr: tuple[float, ...], vrex: tuple[float, ...], chosen: str, decided: bool) -> None:
    said = verdict({"erm": ERM, "fishr": shifted(ERM, *fishr), "vrex": shifted(ERM, *vrex)}, TITLES)
    assert (said.chosen, said.decided) == (chosen, decided)


def test_a_sure_one_is_chosen_though_an_unsure_one_has_the_higher_mean() -> None:
    """As the docstring of ``Verdict.chosen`` says."""
    said = verdict({"erm": ERM, "fishr": shifted(ERM, 2, 2.1, 1.9, 2), "vrex": shifted(ERM, 30, -10, 20, -10)}, TITLES)
    assert (said.chosen, said.decided) == ("fishr", True)


def test_verdict_on_erm_alone() -> None:
    said = verdict({"erm": ERM}, TITLES)
    assert (said.chosen, said.decided, said.sentence) == ("erm", False, "Undecided: ERM was compared with nothing.")


def test_table() -> None:
    table = comparison_table({"erm": ERM, "fishr": shifted(ERM, 1, 1, 1, 1)}, TITLES).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "held out", "a", "b", "c", "d", "mean", "worst", "difference to ERM",
    ]  # fmt: skip
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "ERM", "61.0 ± 1.0", "70.5 ± 0.5", "80.0 ± 0.0", "89.0 ± 1.0", "75.1 ± 0.1", "61.0 (a)", "",
    ]  # fmt: skip
    assert [cell.strip() for cell in table[3].split("|")[1:-1]][-1] == "+1.0 (+1.0 to +1.0)"
