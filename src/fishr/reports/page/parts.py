"""What a page is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fishr.reports.render import Table

Figure = Mapping[str, Any]
"""``data`` and ``layout``, as plotly.js takes them. A trace whose ``meta`` is a name is shown by that toggle."""


@dataclass(frozen=True)
class Chart:
    """A figure, and the same for those who do not see it.

    Attributes:
        title: What it shows.
        description: What is on which axis, for those who do not see it.
        figure: What is drawn.
        height: In pixels.
        width: In pixels, for a figure of several panels, which scrolls on narrow screens; None for the width that is
            there.
        numbers: The figure's numbers.
    """

    title: str
    description: str
    figure: Figure
    height: int = 300
    width: int | None = None
    numbers: Table | None = None


@dataclass(frozen=True)
class Toggle:
    """How what it shows and hides is drawn."""

    color: str
    glyph: str


@dataclass(frozen=True)
class ChartGroup:
    """Charts that share their toggles.

    Attributes:
        title: What the charts have in common; the reader may fold them away.
        text: How to read them.
        charts: The charts.
        toggles: By name: each shows or hides what it names in all charts.
        folded: Whether they are folded away at first.
    """

    title: str
    text: str
    charts: Sequence[Chart]
    toggles: Mapping[str, Toggle] = field(default_factory=dict)
    folded: bool = False


@dataclass(frozen=True)
class Confusion:
    """Samples of each true class by predicted class.

    Attributes:
        title: Of which model on which domain.
        classes: Names of the classes.
        counts: A row for each true class.
    """

    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Picture:
    """A sample that a model gets wrong.

    Attributes:
        caption: What it is, and what it was taken for.
        source: The picture as a data URI; None where a sample is none.
    """

    caption: str
    source: str | None


@dataclass(frozen=True)
class Gallery:
    """Samples that a model gets wrong on a domain."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Code:
    """Something to copy."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its address in the page.
        title: Its heading.
        text: Paragraphs above the rest.
        tables: Tables; readers sort them by any column.
        groups: Charts.
        confusions: Confusion matrices.
        galleries: Pictures.
        code: Something to copy.
    """

    anchor: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    groups: Sequence[ChartGroup] = ()
    confusions: Sequence[Confusion] = ()
    galleries: Sequence[Gallery] = ()
    code: Sequence[Code] = ()


@dataclass(frozen=True)
class Page:
    """All that a report says.

    Attributes:
        title: Its heading.
        answer: What matters most, a sentence or a few.
        sections: The rest.
    """

    title: str
    answer: Sequence[str]
    sections: Sequence[Section]
