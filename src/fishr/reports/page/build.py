"""From folders to the page."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from fishr.errors import RunError
from fishr.files import write_text
from fishr.records import CONFIG_FILE, Mistakes, RunHistory
from fishr.reports.analysis import (
    DOMAIN_COLUMNS,
    checkpoint_columns,
    checkpoint_rows,
    checkpoint_title,
    comparison_sentences,
    domain_rows,
    pair_columns,
    pair_rows,
    sentences,
)
from fishr.reports.figures import figures_of
from fishr.reports.page.charts import (
    held_out_name,
    hyperparameters,
    learning_curves,
    points,
    scatter_of_runs,
    styles_of,
)
from fishr.reports.page.overview import overview, title_of
from fishr.reports.page.parts import Chart, ChartGroup, Code, Confusion, Gallery, Page, Picture, Section
from fishr.reports.page.render import rendered
from fishr.reports.page.sources import Analysis, Sources, read_sources
from fishr.reports.render import Table
from fishr.reports.run_folders import OnProgress

REPORT = "report.html"

NO_MODELS = (
    "These runs kept no model: fishr report --best-configs writes the best draws as files for fishr train --config, "
    "and the report of such a run shows what its model gets wrong."
)


def write_report(file: Path, paths: Sequence[Path], on_progress: OnProgress = lambda done, total: None) -> None:
    """Write the report of what lies in folders, as HTML.

    Args:
        file: The file.
        paths: Folders of runs, of commands that make several, and of analyses.
        on_progress: Is told how many folders have been read.

    Raises:
        RunError: a path is no folder, or there is nothing to report in it.
    """
    write_text(file, rendered(page_of(paths, on_progress)))


def analysis_page(content: Mapping[str, Any], weights: pa.Table) -> str:
    """An analysis as HTML.

    Args:
        content: What :meth:`fishr.analysis.Analysis.as_dict` returns.
        weights: What :meth:`fishr.analysis.Analysis.weights` returns.
    """
    section = _of_analysis(Analysis(content, weights), 0)
    return rendered(Page(f"Analysis of {content['data']}", section.text, [replace(section, text=())]))


def page_of(paths: Sequence[Path], on_progress: OnProgress = lambda done, total: None) -> Page:
    """What is to be said of what lies in folders.

    Raises:
        RunError: as :func:`write_report`.
    """
    sources = read_sources(paths, on_progress)
    if not sources.histories and not sources.analyses:
        raise RunError("there is nothing to report: no run has a record")
    answer, tables = overview(sources)
    if not sources.histories:
        answer = [text for analysis in sources.analyses for text in _of_analysis(analysis, 0).text]
    sections = [*tables, *_of_histories(sources), *_of_mistakes(sources)]
    sections += [_of_analysis(analysis, number) for number, analysis in enumerate(sources.analyses)]
    sections.append(_how_made(sources))
    return Page(title_of(sources), answer, sections)


def _of_histories(sources: Sources) -> Iterator[Section]:
    styles = styles_of(sorted({history.algorithm for history in sources.histories}))
    train_domains = {folder: mistakes.train_domains for folder, mistakes in sources.mistakes.items()}
    curves = learning_curves(sources.histories, train_domains, styles)
    if curves:
        text = ["Accuracy over the training steps, a chart for each domain. Out-splits were not trained on."]
        yield Section("curves", "Learning curves", text, groups=curves)
    found = points(sources.histories, train_domains)
    if found:
        yield Section("seen-and-unseen", "Seen against unseen domains", groups=scatter_of_runs(found, styles))
        by_hyperparameter = hyperparameters(found, styles)
        if by_hyperparameter:
            yield Section("hyperparameters", "Hyperparameters", groups=by_hyperparameter)


def _of_mistakes(sources: Sources) -> Iterator[Section]:
    """Confusions of the models on the held-out domains, added up over runs, and pictures of one run each."""
    runs: dict[tuple[str, str, str, tuple[str, ...]], list[RunHistory]] = defaultdict(list)
    for history in sources.histories:
        if mistakes_of_run := sources.mistakes.get(history.folder):
            for domain in mistakes_of_run.domains:
                runs[history.dataset, domain, history.algorithm, tuple(mistakes_of_run.classes)].append(history)
    confusions, galleries = [], []
    for (dataset, domain, algorithm, classes), of_model in runs.items():
        mistakes = [sources.mistakes[run.folder] for run in of_model]
        counts = np.sum([each.domains[domain].confusion for each in mistakes], axis=0)
        added = f", {len(of_model)} runs added up" if len(of_model) > 1 else ""
        title = f"{algorithm} on {domain} of {dataset}"
        confusions.append(Confusion(f"{title}{added}", classes, counts.tolist()))
        galleries.append(Gallery(f"{title}, trial {of_model[0].trial}", _pictures(mistakes[0], domain)))
    if confusions:
        yield Section(
            "confusions",
            "What is taken for what in the held-out domain",
            ["Rows are true classes, columns what the model says; samples, and the share of the row."],
            confusions=confusions,
        )
        yield Section(
            "mistakes",
            "What the model is wrong about, and most sure of",
            ["Samples of the held-out domain, with the probability that the model gives to its wrong answer."],
            galleries=galleries,
        )
    elif any(history.swept for history in sources.histories):
        yield Section("mistakes", "What the models get wrong", [NO_MODELS])


def _pictures(mistakes: Mistakes, domain: str) -> list[Picture]:
    return [
        Picture(
            f"{mistake.sample}: {mistake.label}, taken for {mistake.predicted} ({mistake.probability:.0%})",
            mistake.picture,
        )
        for mistake in mistakes.domains[domain].worst
    ]


def _of_analysis(analysis: Analysis, number: int) -> Section:
    content = analysis.content
    text = [f"{model['name']}: {' '.join(sentences(content, model))}" for model in content["models"]]
    if len(content["models"]) == 2:
        text += comparison_sentences(content)
    charts = []
    for figure in figures_of(content, analysis.weights).values():
        drawn = json.loads(figure.to_json())
        layout = drawn["layout"]
        title = layout.pop("title")["text"]
        layout.pop("template", None)
        layout["margin"] = {"t": 40}
        width, height = layout.pop("width"), layout.pop("height")
        charts.append(Chart(title, title, drawn, height, width))
    names = " and ".join(model["name"] for model in content["models"])
    group = ChartGroup("Figures", "Their numbers are in the tables, and in analysis.json.", charts)
    return Section(
        f"analysis-{number}", f"Analysis of {names} on {content['data']}", text, list(_tables(content)), [group]
    )


def _tables(content: Mapping[str, Any]) -> Iterator[Table]:
    """What the figures of an analysis show, as ``fishr analyze`` prints it."""
    for model in content["models"]:
        for layer in (model["head"], *model["layers"]):
            title = f"{model['name']}, {layer['layer']}"
            yield Table(f"{title}: domains", DOMAIN_COLUMNS, domain_rows(layer, model["roles"]), [])
            yield Table(
                f"{title}: distances between domains, relative to size; in brackets what sampling alone gives",
                pair_columns(layer),
                pair_rows(layer),
                [],
            )
        if model["checkpoints"]:
            title = checkpoint_title(content, model)
            yield Table(title, checkpoint_columns(content), checkpoint_rows(content, model), [])


def _how_made(sources: Sources) -> Section:
    """Commands, versions, and the settings of one run of each algorithm."""
    code = [
        Code(
            "Command",
            f"{made['command']}\n\n# with {', '.join(f'{name} {of}' for name, of in made['versions'].items())}",
        )
        for made in sources.made_by
    ]
    first = {(run.dataset, run.algorithm): run for run in reversed(sources.histories)}
    for (dataset, algorithm), run in sorted(first.items()):
        config = _config(run)
        if config is not None:
            title = f"Settings of a run: {algorithm} on {dataset}, held out {held_out_name(run.test_domains)}"
            code.append(Code(title, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)))
    left_out = [f"{folder}: {reason}" for folder, reason in sources.problems.items()]
    text = ["Settings as in a run's config.json. On one machine's CPU the same settings give the same bits."]
    if left_out:
        text.append(f"{len(left_out)} folders count for nothing, such as {left_out[0]}.")
    return Section("reproduce", "How to make it again", text, code=code)


def _config(run: RunHistory) -> Mapping[str, object] | None:
    """Its settings; None for a run that is not ours."""
    file = Path(run.folder) / CONFIG_FILE
    return json.loads(file.read_bytes()) if file.exists() else None
