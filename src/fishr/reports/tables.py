"""Tables as text."""

from collections.abc import Sequence


def mean_and_std(mean: float, std: float) -> str:
    """``mean ± std``, one decimal each.

    >>> mean_and_std(69.46, 1.02)
    '69.5 ± 1.0'
    """
    return f"{mean:.1f} ± {std:.1f}"


def one_line(text: str) -> str:
    """Text without what breaks a line or steers a terminal, whatever somebody calls their files."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right.

    >>> print(text_table(["method", "test"], [["ERM", "14.0"]]))
    method  test
    ERM     14.0
    """
    cells = _aligned([[one_line(cell) for cell in row] for row in (header, *rows)])
    return "\n".join("  ".join(row).rstrip() for row in cells)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    >>> print(markdown_table(["method", "test"], [["ERM", "14.0"]]))
    | method | test |
    |:-------|-----:|
    | ERM    | 14.0 |
    """
    titles, *cells = _aligned([[one_line(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)])
    first, *others = ("-" * len(title) for title in titles)
    rule = f"|:{first}-|" + "".join(f"-{dashes}:|" for dashes in others)
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)])


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the package booktabs; the first column to the left, the others to the right."""
    titles, *cells = _aligned([[_in_latex(one_line(cell)) for cell in row] for row in (header, *rows)])
    lines = [f"  {' & '.join(row)} \\\\" for row in (titles, *cells)]
    return "\n".join(
        [
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            "  \\toprule",
            lines[0],
            "  \\midrule",
            *lines[1:],
            "  \\bottomrule",
            "\\end{tabular}",
        ]
    )


def _in_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _aligned(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells as wide as the widest of their column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    ]
