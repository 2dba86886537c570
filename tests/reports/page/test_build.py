"""What the HTML report says, from folders of runs."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from fishr.errors import RunError
from fishr.reports.page import write_report
from fishr.reports.page.build import page_of
from fishr.reports.page.charts import MOST_POINTS
from fishr.reports.page.render import MOST_CLASSES, rendered
from runs_to_show import DOMAINS, mistakes_of, write_run, write_sweep


class Text(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.text += data


def section(page, anchor):
    return next(each for each in page.sections if each.anchor == anchor)


def test_a_sweep_answers_first(tmp_path):
    page = page_of([write_sweep(tmp_path)])
    assert page.title == "Runs on toys"
    assert page.answer == [
        "toys: fishr is better than erm on domains it has not seen: +6.0 points of accuracy (95% interval over domains "
        "+3.5 to +8.5), better in 6 of 6 pairs of domain and seed."
    ]
    anchors = [each.anchor for each in page.sections]
    assert anchors == [
        "selection-training",
        "curves",
        "seen-and-unseen",
        "hyperparameters",
        "mistakes",
        "reproduce",
    ]
    (table,) = section(page, "selection-training").tables
    assert [row[:5] for row in table.rows] == [
        ["erm", "40.5 ± 0.4", "50.5 ± 0.4", "60.5 ± 0.4", "50.5"],
        ["fishr", "45.5 ± 0.4", "56.5 ± 0.4", "67.5 ± 0.4", "56.5"],
    ]
    assert "fishr report --best-configs" in section(page, "mistakes").text[0]


@pytest.mark.parametrize(
    ("algorithms", "held_out", "answer"),
    [
        (["erm"], DOMAINS, "toys: erm alone, there is nothing to compare with."),
        (["fishr", "irm"], DOMAINS, "toys: fishr, irm alone, there is nothing to compare with."),
        (["erm", "fishr"], ("west",), "toys: no verdict, as one domain is held out; the tables say what there is."),
    ],
)
def test_a_sweep_that_decides_nothing_says_so(tmp_path, algorithms, held_out, answer):
    for algorithm in algorithms:
        for name in held_out:
            write_run(tmp_path / f"{algorithm}-{name}", algorithm, held_out=(name,))
    assert page_of([tmp_path]).answer == [answer]


def test_a_sweep_whose_runs_are_missing_gives_no_verdict(tmp_path):
    write_sweep(tmp_path, trials=1)
    for folder in tmp_path.glob("fishr-south-*"):
        (folder / "metrics.jsonl").unlink()
    page = page_of([tmp_path])
    assert page.answer == ["toys: no verdict, as trials of fishr are missing; see the tables."]
    assert "folders count for nothing" in section(page, "reproduce").text[1]


def test_learning_curves_are_means_with_bands(tmp_path):
    write_run(tmp_path / "a", "erm", trial=0, accuracies=(0.4, 0.6))
    write_run(tmp_path / "b", "erm", trial=1, accuracies=(0.5, 0.8))
    (group,) = section(page_of([tmp_path]), "curves").groups
    assert group.title == "toys, held out: west"
    assert [chart.title for chart in group.charts] == [
        "west (held out)",
        "north (trained on, out-split)",
        "south (trained on, out-split)",
    ]
    low, high, mean = group.charts[0].figure["data"]
    assert [low["y"], mean["y"], high["y"]] == [
        pytest.approx([30, 50]),
        pytest.approx([35, 60]),
        pytest.approx([40, 70]),
    ]
    assert mean["x"] == [10, 20]
    assert group.charts[1].numbers.rows == [
        ["erm", "10", "45.0", "40.0", "50.0"],
        ["erm", "20", "70.0", "60.0", "80.0"],
    ]


def test_seen_against_unseen_is_at_the_last_checkpoint(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.9, 0.6))
    (group,) = section(page_of([tmp_path]), "seen-and-unseen").groups
    (chart,) = group.charts
    marks = chart.figure["data"][1]
    assert (marks["x"], marks["y"]) == (pytest.approx([60]), pytest.approx([50]))
    assert chart.numbers.rows == [["erm", "held out west, trial 0, draw 0", "60.0", "50.0"]]


def test_hyperparameters_that_differ_are_drawn(tmp_path):
    write_sweep(tmp_path)
    (group,) = section(page_of([tmp_path]), "hyperparameters").groups
    (chart,) = group.charts
    assert chart.title == "lr"
    assert chart.figure["layout"]["xaxis"]["type"] == "log"
    assert group.toggles.keys() == {"erm", "fishr"}


def test_many_runs_are_thinned_out_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("fishr.reports.page.charts.MOST_POINTS", 5)
    assert MOST_POINTS == 2_000
    page = page_of([write_sweep(tmp_path)])
    (group,) = section(page, "seen-and-unseen").groups
    assert sum(len(trace["x"]) for trace in group.charts[0].figure["data"][1:]) == 5
    assert group.text.endswith("5 of 24 runs are shown.")


def test_single_runs_show_what_their_models_get_wrong(tmp_path):
    for trial in range(2):
        run = write_run(tmp_path / f"run-{trial}", draw=None, trial=trial)
        (run / "mistakes.json").write_text(mistakes_of().to_json())
    page = page_of([tmp_path])
    assert page.answer == [
        "erm on toys, trial 0: 50.0 % on west, held out.",
        "erm on toys, trial 1: 50.0 % on west, held out.",
    ]
    (table,) = section(page, "runs").tables
    assert table.rows[0] == ["erm", "toys", "run-0", "20", "60.0", "60.0", "50.0 (held out)"]
    (confusion,) = section(page, "confusions").confusions
    assert (confusion.title, confusion.counts) == ("erm on west of toys, 2 runs added up", [[2, 6], [0, 2]])
    (gallery,) = section(page, "mistakes").galleries
    assert gallery.pictures[0].caption == "0.png: cat, taken for dog (97%)"
    text = Text(rendered(page)).text
    assert "6 75 %" in text


def test_one_run_says_that_it_is_one(tmp_path):
    page = page_of([write_run(tmp_path / "run", draw=None)])
    assert page.answer[1] == "One run and one seed: how far another seed would lie from that is not known."


def test_many_classes_are_told_by_their_largest_confusions(tmp_path):
    classes = tuple(f"class {number}" for number in range(MOST_CLASSES + 1))
    run = write_run(tmp_path / "run", draw=None)
    (run / "mistakes.json").write_text(mistakes_of(classes=classes).to_json())
    text = Text(rendered(page_of([run]))).text
    assert "31 classes; the most frequent mistakes:" in text
    assert "class 0, taken for class 1: 3" in text


def test_a_comparison_says_its_verdict(tmp_path):
    accuracies = {
        "erm": {name: [0.5, 0.52] for name in DOMAINS},
        "fishr": {name: [0.51, 0.6] for name in DOMAINS},
    }
    content = {
        "data": "toys",
        "extent": {"draws": 1, "seeds": 2, "steps": 20},
        "accuracies": accuracies,
        "titles": {"erm": "ERM", "fishr": "Fishr"},
        "verdict": {"chosen": "fishr", "decided": True, "sentence": "Fishr is better."},
        "unseen_domain": {"mean": 0.55, "low": 0.5, "high": 0.6, "worst_domain": "west", "worst": 0.51},
    }
    write_run(tmp_path / "runs" / "a", draw=None)
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = page_of([tmp_path])
    assert page.title == "Comparison on toys"
    assert page.answer[0] == "Fishr is better."
    assert page.answer[1].startswith(
        "On a domain like these that it has not seen, expect of Fishr an accuracy of about 55%"
    )
    (table,) = section(page, "results-0").tables
    assert [row[0] for row in table.rows] == ["ERM", "Fishr"]
    assert "hyperparameters are the recommended ones" in section(page, "results-0").text[0]


@pytest.mark.parametrize(
    ("unseen", "sure"),
    [
        ({"erm": [10, 20], "fishr": [60, 70]}, "; its lowest of 2 seeds lies above the highest of all others."),
        ({"erm": [10, 65], "fishr": [60, 70]}, "; not all of its 2 seeds lie above all of the others."),
        ({"erm": [10], "fishr": [60]}, "; a single seed says little."),
        ({"fishr": [60, 70]}, "highest accuracy: 65.0 %."),
    ],
)
def test_restarts_say_which_method_and_how_sure(tmp_path, unseen, sure):
    runs = [{"algorithm": name, "unseen_accuracy": value} for name, values in unseen.items() for value in values]
    spread = {name: {"mean": 1.0, "std": 0.5} for name in ("train_accuracy", "unseen_accuracy", "gray_accuracy")}
    write_run(tmp_path / "a", draw=None)
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs, "summary": dict.fromkeys(unseen, spread)}))
    page = page_of([tmp_path])
    assert page.answer[0].startswith("On the unseen domain, where color misleads, fishr has the highest accuracy")
    assert page.answer[0].endswith(sure)


def test_how_to_make_it_again(tmp_path):
    write_run(tmp_path / "run")
    made_by = {"command": "fishr sweep run --output x", "versions": {"fishr": "0.1.0", "torch": "2.15.0"}}
    (tmp_path / "made_by.json").write_text(json.dumps(made_by))
    command, settings = section(page_of([tmp_path]), "reproduce").code
    assert command.text == "fishr sweep run --output x\n\n# with fishr 0.1.0, torch 2.15.0"
    assert settings.title == "Settings of a run: erm on toys, held out west"
    assert "lr: 0.001" in settings.text


def test_who_made_it_that_is_damaged_is_named(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "made_by.json").write_text("{}")
    with pytest.raises(RunError, match=r"made_by\.json cannot be read \(KeyError: 'command'\)"):
        page_of([tmp_path])


def test_a_run_on_all_domains_has_nothing_held_out_to_show(tmp_path):
    page = page_of([write_run(tmp_path / "run", held_out=(), draw=None)])
    assert page.answer[0] == "erm on toys, trial 0: trained on all domains."
    assert "mistakes" not in [each.anchor for each in page.sections]


def test_a_run_that_has_begun_is_shown(tmp_path):
    page = page_of([write_run(tmp_path / "run", draw=None, done=False)])
    assert page.answer == ["So far, with 0 of 1 runs finished:", "nothing can be said yet."]
    assert section(page, "curves")


def test_nothing_to_report(tmp_path):
    with pytest.raises(RunError, match=f"there is no run in {re.escape(str(tmp_path))}"):
        page_of([tmp_path])
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="there is nothing to report: no run has a record"):
        page_of([tmp_path])


def test_damaged_results_are_named(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "results.json").write_text('{"runs": [')
    with pytest.raises(RunError, match=r"results\.json cannot be read .*: make it anew, or delete it"):
        page_of([tmp_path])
    (tmp_path / "results.json").write_text('{"accuracy": 1.0}')  # of something else
    assert page_of([tmp_path]).sections


@pytest.mark.parametrize("name", ["mistakes.json", "DONE"])
def test_damaged_files_of_a_run_are_named(tmp_path, name):
    run = write_run(tmp_path / "run", draw=None)
    (run / name).write_text('{"classes"')
    with pytest.raises(
        RunError, match=rf"run/{name} cannot be read \(JSONDecodeError: .*\): make it anew, or delete it"
    ):
        page_of([run])


def test_an_algorithm_without_all_trials_is_left_out_of_the_verdict(tmp_path):
    write_sweep(tmp_path / "sweep")
    write_run(tmp_path / "stray", "irm")
    page = page_of([tmp_path])
    assert page.answer[0].startswith("toys: fishr is better than erm")
    assert page.answer[0].endswith(" Left out, as trials are missing: irm.")


def test_runs_that_differ_in_their_domains_are_drawn_where_they_have_them(tmp_path):
    write_run(tmp_path / "a", "erm")
    write_run(tmp_path / "b", "fishr", domains=(*DOMAINS, "east"))
    (group,) = section(page_of([tmp_path]), "curves").groups
    assert [chart.title for chart in group.charts][-1] == "east (trained on, out-split)"
    assert [len(chart.figure["data"]) for chart in group.charts] == [2, 2, 2, 1]


def test_many_domains_have_a_chart_each_where_they_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fishr.reports.page.charts.MOST_CURVES", 8)
    groups = section(page_of([write_sweep(tmp_path)]), "curves").groups
    assert [[chart.title for chart in group.charts] for group in groups] == [[f"{name} (held out)"] for name in DOMAINS]


def test_curves_are_means_of_the_same_runs_at_each_step(tmp_path):
    write_run(tmp_path / "a", trial=0, accuracies=(0.4, 0.6))
    write_run(tmp_path / "b", trial=1, accuracies=(0.5, 0.8, 0.9))
    (group,) = section(page_of([tmp_path]), "curves").groups
    assert group.charts[0].figure["data"][2]["x"] == [10, 20]


def test_models_of_other_classes_are_not_added_up(tmp_path):
    for trial, classes in enumerate((("cat", "dog"), ("dog", "cat"), ("cat", "dog", "eel"))):
        run = write_run(tmp_path / f"run-{trial}", draw=None, trial=trial)
        (run / "mistakes.json").write_text(mistakes_of(classes=classes).to_json())
    confusions = section(page_of([tmp_path]), "confusions").confusions
    assert [confusion.classes for confusion in confusions] == [("cat", "dog"), ("dog", "cat"), ("cat", "dog", "eel")]


def test_accuracies_that_are_not_finite_are_left_out(tmp_path):
    write_run(tmp_path / "run", draw=None, done=False, accuracies=(0.5, math.inf))
    page = page_of([tmp_path])
    assert section(page, "curves").groups[0].charts[0].figure["data"][0]["x"] == [10]
    assert rendered(page)


def test_restarts_are_told_apart_by_their_method(tmp_path):
    spread = {name: {"mean": 1.0, "std": 0.5} for name in ("train_accuracy", "unseen_accuracy", "gray_accuracy")}
    methods = ("fishr", "fishr-covariance")
    for method in methods:
        write_run(tmp_path / f"{method}-0", "fishr", draw=None)
    runs = [{"algorithm": method, "unseen_accuracy": 50.0} for method in methods]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs, "summary": dict.fromkeys(methods, spread)}))
    page = page_of([tmp_path])
    assert [row[0] for row in section(page, "runs").tables[0].rows] == list(methods)
    assert section(page, "curves").groups[0].toggles.keys() == set(methods)


def test_the_same_folder_twice_is_one(tmp_path):
    write_run(tmp_path / "run", draw=None)
    page = page_of([tmp_path, tmp_path / "run" / "..", tmp_path / "run"])
    assert len(section(page, "runs").tables[0].rows) == 1


def test_the_file_needs_nothing_else(tmp_path):
    write_sweep(tmp_path / "sweep")
    write_report(tmp_path / "report.html", [tmp_path / "sweep"])
    page = Text((tmp_path / "report.html").read_text(encoding="utf-8"))
    used = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [value for value in used if not value.startswith(("#", "data:"))] == []
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_accuracies_that_were_not_evaluated_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del records[-1]["domains"]["west"]["in"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = page_of([run])
    west = section(page, "curves").groups[0].charts[0]
    assert west.figure["data"][0]["x"] == [10]
    assert not any(math.isnan(value) for value in west.figure["data"][0]["y"])
    assert "seen-and-unseen" not in [each.anchor for each in page.sections]
