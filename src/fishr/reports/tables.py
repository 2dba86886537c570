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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    >>> print(markdown_table(["method", "test"], [["ERM", "14.0"]]))
    | method | test |
    |:-------|-----:|
    | ERM    | 14.0 |
    """
    header, *rows = ([one_line(cell).replace("|", "\\|") for cell in cells] for cells in (header, *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|:" + "-" * (widths[0] + 1) + "".join(f"|{'-' * (width + 1)}:" for width in widths[1:]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
