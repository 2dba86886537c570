import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fishr.records import MAKER, RunHistory
from fishr.reports.benchmark import Interval, Results, Row, bootstrap, results
from fishr.reports.domainbed import DATASETS, algorithm_name
from fishr.reports.render import FORMATS
from fishr.reports.run_folders import read_histories

GOLDEN = Path(__file__).parents[1] / "golden" / "domainbed_tables.txt"
"""What the published ``collect_results.py`` prints of ``domainbed_folders.write_sweep``'s folders."""

RULES = {
    "training-domain validation set": "training",
    "leave-one-domain-out cross-validation": "leave-one-out",
    "test-domain validation set (oracle)": "oracle",
}


@pytest.fixture(scope="module")
def histories(domainbed_sweep: Path) -> list[RunHistory]:
    return list(read_histories([domainbed_sweep]).histories)


def results_by(histories: Sequence[RunHistory], rule: str) -> Results:
    (of_rule,) = results(histories, rule)
    return of_rule


def published_tables() -> dict[tuple[str, str], dict[str, list[str]]]:
    """By rule and dataset (or ``averages``), the cells of each algorithm."""
    tables: dict[tuple[str, str], dict[str, list[str]]] = {}
    for block in GOLDEN.read_text(encoding="utf-8").strip().split("\n\n"):
        title, _, *rows = block.splitlines()
        dataset, rule = re.fullmatch(r"-+ (?:Dataset: (\w+)|Averages), model selection method: (.*)", title).groups()
        name = DATASETS[dataset][0] if dataset else "averages"
        cells = (re.split(r"\s{2,}", row) for row in rows)
        tables[RULES[rule], name] = {algorithm_name(algorithm): numbers for algorithm, *numbers in cells}
    return tables


@pytest.mark.parametrize("rule", RULES.values())
def test_tables_of_domainbeds_folders_are_those_that_its_own_script_prints(rule, histories):
    ours = results_by(histories, rule)
    for (of_rule, name), published in published_tables().items():
        if of_rule == rule:
            rows = ours.averages if name == "averages" else ours.datasets[name]
            said = {
                row.algorithm: [
                    *("X" if cell is None else str(cell).replace("±", "+/-") for cell in row.cells.values()),
                    "X" if row.average is None else f"{row.average:.1f}",
                ]
                for row in rows
            }
            assert said == published, name


def row(rows: Sequence[Row], algorithm: str) -> Row:
    return next(each for each in rows if each.algorithm == algorithm)


def test_what_is_missing_is_named(histories: list[RunHistory]) -> None:
    ours = results_by(histories, "training")
    assert row(ours.datasets["rotated-mnist"], "fishr").cells["75"] is None
    assert row(ours.datasets["rotated-mnist"], "fishr").average is None
    assert "fishr on 75: 0 of 3 trials" in ours.remarks["rotated-mnist"]
    assert "vrex on cartoon: 2 of 3 trials" in ours.remarks["pacs"]
    assert "vrex on sketch: a trial with 2 of 4 draws" in ours.remarks["pacs"]
    assert "27 of 336 runs are not finished, and count as they are" in ours.remarks["pacs"]
    assert ours.remarks_on_averages == [
        "rotated-mnist, fishr on 75: 0 of 3 trials",
        "pacs, vrex on cartoon: 2 of 3 trials",
    ]


def test_a_whole_sweep_has_no_remarks(histories: list[RunHistory]) -> None:
    whole = [
        replace(history, trial=0, done=True)
        for history in histories
        if (history.dataset, history.algorithm, history.trial, history.draw) == ("pacs", "fishr", 1, 0)
    ]
    assert results_by(whole, "training").remarks == {"pacs": []}


def test_an_average_without_a_domain_that_nobody_holds_out_is_none(histories: list[RunHistory]) -> None:
    some = [history for history in histories if history.dataset == "pacs" and "photo" not in history.test_domains]
    ours = results_by(some, "training")
    assert list(ours.datasets["pacs"][0].cells) == ["art_painting", "cartoon", "sketch"]
    assert [each.average for each in ours.datasets["pacs"]] == [None] * 3
    assert ours.remarks["pacs"][0] == "no run holds out photo"


def test_what_leave_one_out_needs_is_said(histories: list[RunHistory]) -> None:
    alone = [history for history in histories if len(history.test_domains) == 1]
    assert results_by(alone, "leave-one-out").remarks["pacs"][0] == (
        "no run holds out two domains, as this rule needs: fishr sweep run --leave-one-out"
    )
    assert not any("two domains" in remark for remark in results_by(histories, "leave-one-out").remarks["pacs"])


def test_runs_that_say_to_be_the_same_are_named(histories: list[RunHistory]) -> None:
    run = histories[0]
    twice = [*histories, replace(run, folder="elsewhere")]
    assert (
        f"1 runs lie in two folders or more, and count together (such as {run.folder}, elsewhere)"
        in (results_by(twice, "training").remarks[run.dataset])
    )


def test_runs_that_should_share_a_setting_and_do_not_are_named(histories: list[RunHistory]) -> None:
    run = histories[0]
    longer = [replace(run, protocol={**run.protocol, "steps": 5001, "average": {"name": "swad"}}), *histories[1:]]
    remarks = results_by(longer, "training").remarks[run.dataset]
    assert [remark for remark in remarks if "differ" in remark] == [
        "runs differ in steps: 5001, 601",
        "runs differ in average.name: swad, not set",
    ]


def test_domainbeds_runs_beside_ours_are_named(histories: list[RunHistory]) -> None:
    ours = replace(histories[0], protocol={MAKER: "fishr", "steps": 5001, "seed": 3})
    remarks = results_by([ours, *histories[1:]], "training").remarks[ours.dataset]
    assert "runs were made by fishr and by DomainBed, whose draws are not the same" in remarks
    assert not any("differ" in remark for remark in remarks)


def test_pairs_of_held_out_domains_add_no_columns(histories: list[RunHistory]) -> None:
    of_sketch = [run for run in histories if run.dataset == "pacs" and "sketch" in run.test_domains]
    ours = results_by(of_sketch, "leave-one-out")
    assert list(ours.datasets["pacs"][0].cells) == ["sketch"]
    assert all(row.cells["sketch"] is not None for row in ours.datasets["pacs"])
    assert ours.remarks["pacs"][0] == "no run holds out art_painting, cartoon, photo"
    pairs = [run for run in of_sketch if len(run.test_domains) == 2]
    assert list(results_by(pairs, "training").datasets["pacs"][0].cells) == [
        "art_painting",
        "cartoon",
        "photo",
        "sketch",
    ]


def test_the_difference_is_paired_and_its_mean_that_of_the_averages(histories: list[RunHistory]) -> None:
    ours = results_by(histories, "training")
    fishr, erm = (row(ours.datasets["colored-mnist"], name) for name in ("fishr", "erm"))
    assert erm.difference is None
    assert fishr.difference is not None
    assert fishr.average is not None
    assert erm.average is not None
    assert fishr.difference.mean == pytest.approx(fishr.average - erm.average)
    assert fishr.difference.low < fishr.difference.mean < fishr.difference.high


def test_there_is_no_difference_where_a_domain_has_no_result(histories: list[RunHistory]) -> None:
    ours = results_by(histories, "training")
    assert row(ours.datasets["rotated-mnist"], "fishr").difference is None
    assert row(ours.averages, "fishr").difference is None
    assert row(ours.datasets["rotated-mnist"], "vrex").difference is not None


@pytest.mark.parametrize(("domains", "trials", "least"), [(1, 40, 0.90), (4, 3, 0.88), (6, 2, 0.85)])
def test_the_interval_covers_the_mean_about_as_often_as_it_says(domains: int, trials: int, least: float) -> None:
    """With few trials less often: a bootstrap knows no Student's t."""
    generator = np.random.default_rng(0)
    effects = np.linspace(-5.0, 5.0, domains)
    covered = []
    for _ in range(200):
        interval = bootstrap([[generator.normal(effect, 2.0, trials) for effect in effects]])
        assert interval.low is not None
        assert interval.high is not None
        covered.append(interval.low < effects.mean() < interval.high)
    assert least <= np.mean(covered) <= 0.99


def test_datasets_count_alike_and_so_do_their_domains() -> None:
    first = [np.array([1.0, 1.0, 1.0, 1.0]), np.array([3.0, 3.0])]
    assert bootstrap([first, [np.array([6.0, 6.0])]]) == Interval(4.0, 4.0, 4.0)


def test_a_single_trial_has_no_interval() -> None:
    assert bootstrap([[np.array([2.0, 4.0]), np.array([1.0])]]) == Interval(2.0)
    assert str(Interval(2.0)) == "+2.0"


def test_ranks_are_means_over_held_out_domains(histories: list[RunHistory]) -> None:
    colored = [history for history in histories if history.dataset == "colored-mnist"]
    # +90%: 68.2, 62.1, 68.2; +80%: 74.2, 71.2, 71.2; -90%: 53.0, 68.2, 83.3 (ERM, Fishr, V-REx, as published)
    expected = {"erm": (1.5 + 1 + 3) / 3, "fishr": (3 + 2.5 + 2) / 3, "vrex": (1.5 + 2.5 + 1) / 3}
    assert results_by(colored, "training").ranks == pytest.approx(expected)
    assert "fishr" not in results_by(histories, "training").ranks


def test_hours_are_those_of_all_runs(histories: list[RunHistory]) -> None:
    ours = results_by(histories, "training")
    expected = sum(history.hours for history in histories if history.algorithm == "vrex")
    assert row(ours.averages, "vrex").hours == pytest.approx(expected)
    total = sum(row.hours for rows in ours.datasets.values() for row in rows)
    assert total == pytest.approx(sum(history.hours for history in histories))


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format_says_all_numbers(output_format: str, histories: list[RunHistory]) -> None:
    text = FORMATS[output_format](results(histories, *RULES.values()))
    numbers = {"csv": "89.39393939393939", "json": "89.39393939393939", "latex": r"89.4 $\pm$ 4.9"}
    assert numbers.get(output_format, "89.4 ± 4.9") in text
    for name in ("erm", "fishr", "vrex", "pacs"):
        assert name in text


def test_csv_has_all_numbers(histories: list[RunHistory]) -> None:
    ours = results_by(histories, "training")
    lines = list(csv.DictReader(FORMATS["csv"]([ours]).splitlines()))

    def line(dataset: str, held_out: str, algorithm: str) -> dict[str, str]:
        (found,) = [
            each
            for each in lines
            if (each["dataset"], each["held_out"], each["algorithm"]) == (dataset, held_out, algorithm)
        ]
        return found

    cell = line("pacs", "photo", "erm")
    assert (f"{float(cell['accuracy']):.1f}", f"{float(cell['error']):.1f}", cell["trials"]) == ("80.3", "4.9", "3")
    of_dataset = line("pacs", "", "vrex")
    assert (f"{float(of_dataset['accuracy']):.1f}", f"{float(of_dataset['error']):.1f}") == ("68.9", "4.1")
    # Of the trials that both have, in 22nds: 8 - 8 + 0, -4 + 0, 0 + 2 - 8, -2 + 6 + 2; the domains' means are averaged.
    by_hand = 100 / 22 * (0 - 4 / 2 - 6 / 3 + 6 / 3) / 4
    assert float(of_dataset["difference"]) == pytest.approx(by_hand)
    average = line("", "", "vrex")
    assert f"{float(average['accuracy']):.1f}" == "74.8"
    assert float(average["rank"]) == pytest.approx(ours.ranks["vrex"])
    assert float(average["hours"]) == pytest.approx(row(ours.averages, "vrex").hours)
    assert line("rotated-mnist", "75", "fishr")["accuracy"] == ""


def test_ranks_are_in_the_last_table(histories: list[RunHistory]) -> None:
    colored = [history for history in histories if history.dataset == "colored-mnist"]
    assert "mean rank" in FORMATS["text"](results(colored, "training"))
    assert FORMATS["text"](results(histories, "training")).count("mean rank") == 1


def test_json_reads_back(histories: list[RunHistory]) -> None:
    content = json.loads(FORMATS["json"](results(histories, *RULES.values())))
    assert list(content) == list(RULES.values())
    (erm, *_) = content["oracle"]["averages"]
    assert f"{erm['average']:.1f}" == "78.1"


def test_latex_escapes_what_is_special_in_it(histories: list[RunHistory]) -> None:
    text = FORMATS["latex"](results(histories, "training"))
    assert r"+90\%" in text
    assert r"art\_painting" in text
    outside_comments = [line for line in text.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%_#±]", "\n".join(outside_comments))
