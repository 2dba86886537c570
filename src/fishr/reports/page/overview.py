"""The answer first: which algorithm, and how sure that is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fishr.records import RunHistory
from fishr.reports.benchmark import Results, results, selections
from fishr.reports.comparison import (
    BASELINE,
    Expectation,
    comparison_cells,
    expectation_sentence,
    verdict,
)
from fishr.reports.page.charts import split_of
from fishr.reports.page.parts import Section
from fishr.reports.page.sources import Sources
from fishr.reports.render import TITLES, Table, caption, tables
from fishr.reports.tables import mean_and_std
from fishr.selection import RULES, best_draw

OF_RESTARTS = {
    "train_accuracy": "training domains",
    "unseen_accuracy": "unseen domain",
    "gray_accuracy": "without color",
}
"""Accuracies of a run on colored digits, and what they are on."""

MOST_SENTENCES = 4
"""Runs that are told of one by one."""


def title_of(sources: Sources) -> str:
    """What the page is about."""
    if sources.histories:
        return "Runs on " + ", ".join(dict.fromkeys(history.dataset for history in sources.histories))
    return "Analysis of " + ", ".join(dict.fromkeys(analysis.content["data"] for analysis in sources.analyses))


def overview(sources: Sources) -> tuple[list[str], list[Section]]:
    """What matters most, in sentences, and the tables that it rests on."""
    answer: list[str] = []
    sections: list[Section] = []
    for content in sources.results:
        said, section = _of_comparison(content) if "verdict" in content else _of_restarts(content)
        answer += said
        sections.append(section)
    of_sweeps = [history for history in sources.histories if history.swept]
    if of_sweeps:
        said, tables_of_sweeps = _of_sweeps(of_sweeps)
        answer += said
        sections += tables_of_sweeps
    if sources.kept and not sources.results:
        answer += _of_runs(sources)
    if sources.kept:
        sections.append(_runs(sources))
    if not answer:
        answer = ["No run is finished yet."] if sources.histories else []
    return answer, sections


def _of_comparison(content: Mapping[str, Any]) -> tuple[list[str], Section]:
    accuracies = content["accuracies"]
    titles = content.get("titles", {name: name for name in accuracies})
    chosen = content["verdict"]["chosen"]
    expected = expectation_sentence(Expectation(**content["unseen_domain"]), chosen, len(accuracies[chosen]), titles)
    header, rows = comparison_cells(accuracies, titles)
    text = [
        "Accuracy in % on the in-split of the held-out domain, mean ± standard error over seeds; hyperparameters were "
        "chosen on the training domains alone. The difference is paired over domains and seeds, with its 95 % interval "
        "over domains."
    ]
    section = Section("comparison", "Comparison with each domain held out", text, [Table("", header, rows, [])])
    return [content["verdict"]["sentence"], expected], section


def _of_restarts(content: Mapping[str, Any]) -> tuple[list[str], Section]:
    unseen: dict[str, list[float]] = {}
    for run in content["runs"]:
        unseen.setdefault(run["algorithm"], []).append(run["unseen_accuracy"])
    best = max(unseen, key=lambda name: fmean(unseen[name]))
    others = [name for name in unseen if name != best]
    said = f"On the unseen domain, where color misleads, {best} has the highest accuracy: {fmean(unseen[best]):.1f} %"
    if others:
        said += ", " + ", ".join(f"{name} {fmean(unseen[name]):.1f} %" for name in others)
        apart = min(unseen[best]) > max(value for name in others for value in unseen[name])
        seeds = len(unseen[best])
        sure = (
            f"its lowest of {seeds} seeds lies above the highest of all others"
            if apart
            else f"some of its {seeds} seeds lie below some of the others"
        )
        said += f"; {sure if seeds > 1 else 'a single seed says little'}"
    header = ["method", "seeds", *OF_RESTARTS.values()]
    rows = [
        [name, str(len(unseen[name])), *(mean_and_std(of[column]["mean"], of[column]["std"]) for column in OF_RESTARTS)]
        for name, of in content["summary"].items()
    ]
    text = ["Accuracy in %, mean ± standard deviation over seeds."]
    return [f"{said}."], Section("methods", "Methods", text, [Table("", header, rows, [])])


def _of_sweeps(histories: Sequence[RunHistory]) -> tuple[list[str], list[Section]]:
    rules = [rule for rule in RULES if selections(histories, rule)]
    of_rules = results(histories, *rules)
    sections = [
        Section(
            f"selection-{each.rule}",
            TITLES[each.rule].capitalize(),
            [caption(each)],
            list(tables(each)),
        )
        for each in of_rules
    ]
    return _verdicts(histories, of_rules[0]) if of_rules else [], sections


def _verdicts(histories: Sequence[RunHistory], found: Results) -> list[str]:
    """What the first rule says of each dataset."""
    selected = selections(histories, found.rule)
    said = []
    for dataset, rows in found.datasets.items():
        accuracies = {
            row.algorithm: {
                domain: {
                    trial: best_draw(draws).accuracy
                    for trial, draws in selected.get((dataset, row.algorithm, domain), {}).items()
                }
                for domain in row.cells
            }
            for row in rows
        }
        trials = set.intersection(*(set(of) for domains in accuracies.values() for of in domains.values()))
        names = list(accuracies)
        if BASELINE not in accuracies or len(names) < 2:
            said.append(f"{dataset}: {', '.join(names)} alone, there is nothing to compare with.")
        elif not trials or len(rows[0].cells) < 2:
            missing = "one domain is held out" if trials else "no trial has all runs"
            said.append(f"{dataset}: no verdict, as {missing}; the tables say what there is.")
        else:
            paired = {
                name: {domain: [of[trial] for trial in sorted(trials)] for domain, of in domains.items()}
                for name, domains in accuracies.items()
            }
            said.append(f"{dataset}: {verdict(paired, {name: name for name in names}).sentence}")
    return said


def _of_runs(sources: Sources) -> list[str]:
    """What single runs say."""
    said = []
    for history in sources.histories:
        if history.folder in sources.kept and not history.swept:
            kept = sources.kept[history.folder]
            reached = [
                f"{100 * kept.domains[domain]['in'].accuracy:.1f} % on {domain}" for domain in history.test_domains
            ]
            said.append(
                f"{history.algorithm} on {history.dataset}, trial {history.trial}: "
                + (f"{' and '.join(reached)}, held out" if reached else "trained on all domains")
                + "."
            )
    if len(said) > MOST_SENTENCES:
        said = [f"{len(said)} runs; the table below has each."]
    if len(said) == 1:
        said.append("One run and one seed: how far another seed would lie from that is not known.")
    return said


def _runs(sources: Sources) -> Section:
    """The runs of no sweep, each with the accuracies of the model that it kept."""
    runs = [history for history in sources.histories if history.folder in sources.kept]
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    rows = []
    for run in runs:
        kept = sources.kept[run.folder]
        cells = []
        for domain in domains:
            metrics = kept.domains.get(domain, {}).get(split_of(run, domain))
            mark = " (held out)" if domain in run.test_domains else ""
            cells.append("" if metrics is None else f"{100 * metrics.accuracy:.1f}{mark}")
        rows.append([run.algorithm, run.dataset, Path(run.folder).name, str(kept.step), *cells])
    header = ["algorithm", "data", "folder", "step kept", *domains]
    text = [
        "Accuracy in % of the model kept: on the out-splits of the domains that it was trained on (the in-splits where "
        "there is no out-split), on the in-split of others."
    ]
    return Section("runs", "Runs", text, [Table("", header, rows, [])])
