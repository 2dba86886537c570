"""The page as HTML: styles, scripts and data in one file."""

import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fishr.reports.page.parts import Confusion, Page

MOST_CLASSES = 30
"""Classes of a confusion matrix that is shown as a whole."""
MOST_CONFUSIONS = 20
"""The most frequent mistakes, shown in its place."""


def rendered(page: Page, version: str = "") -> str:
    """The page; with a version it asks its server whether there is another one."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"json": _as_json, "confusion_table": _shares, "most_frequent": _most_frequent}
    template = environment.from_string(_asset("template.html"))
    return template.render(
        page=page,
        version=version,
        style=Markup(_asset("style.css")),
        script=Markup(_asset("script.js")),
        plotly=Markup(get_plotlyjs()),
        most_classes=MOST_CLASSES,
    )


def _asset(name: str) -> str:
    return files("fishr.reports.page").joinpath(name).read_text(encoding="utf-8")


def _as_json(value: object) -> Markup:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _shares(confusion: Confusion) -> list[tuple[str, list[tuple[int, float]]]]:
    """Of each true class its counts, with their shares of the row."""
    rows = []
    for name, counts in zip(confusion.classes, confusion.counts, strict=True):
        total = sum(counts)
        rows.append((name, [(count, count / total if total else 0.0) for count in counts]))
    return rows


def _most_frequent(confusion: Confusion) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: true class, predicted class, samples."""
    mistakes = [
        (true, predicted, count)
        for true, counts in zip(confusion.classes, confusion.counts, strict=True)
        for predicted, count in zip(confusion.classes, counts, strict=True)
        if true != predicted and count > 0
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:MOST_CONFUSIONS]
