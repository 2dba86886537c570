"""The answer first: which algorithm, and how sure that is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fishr.records import RunHistory, RunRecord
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

CHOSEN_BY = "hyperparameters were chosen on the training domains alone"

MOST_SENTENCES = 4
"""Runs that are told of one by one."""


def title_of(sources: Sources) -> str:
    """What the page is about."""
    compared = [content["data"] for content in sources.results if "verdict" in content and "data" in content]
    if compared:
        return "Comparison on " + ", ".join(dict.fromkeys(compared))
    if sources.histories:
        return "Runs on " + ", ".join(dict.fromkeys(history.dataset for history in sources.histories))
    return "Analysis of " + ", ".join(dict.fromkeys(analysis.content["data"] for analysis in sources.analyses))


def overview(sources: Sources) -> tuple[list[str], list[Section]]:
    """What matters most, in sentences, and the tables that it rests on."""
    answer: list[str] = []
    sections: list[Section] = []
    unfinished = sum(not history.done for history in sources.histories)
    if unfinished:
        finished = len(sources.histories) - unfinished
        answer.append(f"So far, with {finished:,} of {len(sources.histories):,} runs finished:")
    for number, content in enumerate(sources.results):
        of_content = _of_comparison if "verdict" in content else _of_restarts
        said, section = of_content(content, f"results-{number}")
        answer += said
        sections.append(section)
    of_sweeps = [history for history in sources.histories if history.swept]
    if of_sweeps:
        said, tables_of_sweeps = _of_sweeps(of_sweeps)
        answer += said
        sections += tables_of_sweeps
    of_runs = [history for history in sources.histories if history.folder in sources.kept and not history.swept]
    if of_runs and not sources.results:
        answer += _of_runs(of_runs, sources.kept)
    if of_runs:
        sections.append(_runs(of_runs, sources.kept))
    if sources.histories and len(answer) == bool(unfinished):
        answer.append("nothing can be said yet." if unfinished else "The runs hold out no domain alone.")
    return answer, sections


def _of_comparison(content: Mapping[str, Any], anchor: str) -> tuple[list[str], Section]:
    accuracies = content["accuracies"]
    titles = content.get("titles", {name: name for name in accuracies})
    chosen = content["verdict"]["chosen"]
    expected = expectation_sentence(Expectation(**content["unseen_domain"]), chosen, len(accuracies[chosen]), titles)
    header, rows = comparison_cells(accuracies, titles)
    draws = content.get("extent", {}).get("draws")
    chosen_by = "hyperparameters are the recommended ones" if draws == 1 else CHOSEN_BY
    text = [
        f"Accuracy in % on the in-split of the held-out domain, mean ± standard error over seeds; {chosen_by}. The "
        "difference is paired over domains and seeds, with its interval over domains; all intervals together hold with "
        "probability 95 %."
    ]
    section = Section(
        anchor,
        f"Comparison on {content.get('data', 'the data')}, each domain held out",
        text,
        [Table("", header, rows, [])],
    )
    return [content["verdict"]["sentence"], expected], section


def _of_restarts(content: Mapping[str, Any], anchor: str) -> tuple[list[str], Section]:
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
            else f"not all of its {seeds} seeds lie above all of the others"
        )
        said += f"; {sure if seeds > 1 else 'a single seed says little'}"
    dataset = content.get("setting", {}).get("data", "colored digits")
    header = ["method", "seeds", *OF_RESTARTS.values()]
    rows = [
        [name, str(len(unseen[name])), *(mean_and_std(of[column]["mean"], of[column]["std"]) for column in OF_RESTARTS)]
        for name, of in content["summary"].items()
    ]
    text = ["Accuracy in %, mean ± standard deviation over seeds."]
    return [f"{said}."], Section(anchor, f"Methods on {dataset}", text, [Table("", header, rows, [])])


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
    """What a rule says of each dataset, of the algorithms that have the same trials on all its held-out domains."""
    selected = selections(histories, found.rule)
    said = []
    for dataset, rows in found.datasets.items():
        trials = {
            row.algorithm: {
                domain: {trial: best_draw(draws).accuracy for trial, draws in of_cell.items()}
                for domain in row.cells
                if (of_cell := selected.get((dataset, row.algorithm, domain)))
            }
            for row in rows
        }
        present = {name: of_domains for name, of_domains in trials.items() if of_domains}
        if BASELINE not in present or len(present) < 2:
            said.append(f"{dataset}: {', '.join(present)} alone, there is nothing to compare with.")
            continue
        domains, wanted = list(rows[0].cells), set.union(*map(set, present[BASELINE].values()))
        complete = {
            name: {domain: [of_domains[domain][trial] for trial in sorted(wanted)] for domain in domains}
            for name, of_domains in present.items()
            if all(wanted <= of_domains.get(domain, {}).keys() for domain in domains)
        }
        left_out = [name for name in present if name not in complete]
        if len(domains) < 2:
            said.append(f"{dataset}: no verdict, as one domain is held out; the tables say what there is.")
        elif BASELINE not in complete or len(complete) < 2:
            said.append(f"{dataset}: no verdict, as trials of {', '.join(left_out)} are missing; see the tables.")
        else:
            missing = f" Left out, as trials are missing: {', '.join(left_out)}." if left_out else ""
            said.append(f"{dataset}: {verdict(complete, {name: name for name in complete}).sentence}{missing}")
    return said


def _of_runs(runs: Sequence[RunHistory], kept: Mapping[str, RunRecord]) -> list[str]:
    """What single runs say."""
    if len(runs) > MOST_SENTENCES:
        return [f"{len(runs)} runs; the table below has each."]
    said = []
    for run in runs:
        reached = [
            f"{100 * kept[run.folder].domains[domain]['in'].accuracy:.1f} % on {domain}" for domain in run.test_domains
        ]
        outcome = f"{' and '.join(reached)}, held out" if reached else "trained on all domains"
        said.append(f"{run.algorithm} on {run.dataset}, trial {run.trial}: {outcome}.")
    if len(said) == 1:
        said.append("One run and one seed: how far another seed would lie from that is not known.")
    return said


def _runs(runs: Sequence[RunHistory], kept: Mapping[str, RunRecord]) -> Section:
    """The runs of no sweep, each with the accuracies of the model that it kept."""
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    rows = []
    for run in runs:
        record = kept[run.folder]
        cells = []
        for domain in domains:
            metrics = record.domains.get(domain, {}).get(split_of(run, domain)) if domain in run.domains else None
            mark = " (held out)" if domain in run.test_domains else ""
            cells.append("" if metrics is None else f"{100 * metrics.accuracy:.1f}{mark}")
        rows.append([run.algorithm, run.dataset, Path(run.folder).name, str(record.step), *cells])
    header = ["algorithm", "data", "folder", "step kept", *domains]
    text = [
        "Accuracy in % of the model kept: on the out-splits of the domains that it was trained on (the in-splits where "
        "there is no out-split), on the in-split of others."
    ]
    return Section("runs", "Runs", text, [Table("", header, rows, [])])
