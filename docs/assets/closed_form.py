"""Draws closed-form.svg: the variance of a head's per-sample gradients from two matrix products.

    python docs/assets/closed_form.py

Cells are colored by the values of a small domain, for which both ways to the variance must agree.
"""

from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PICTURE = Path(__file__).with_name("closed-form.svg")

SAMPLES, CLASSES, FEATURES = 6, 3, 4
CELL = 18
WIDTH, HEIGHT = 940, 610
PAPER, INK, MUTED, WARNING = "#f7f8fa", "#1f2933", "#55606e", "#b3261e"
POSITIVE, NEGATIVE = np.array([29, 95, 168]), np.array([200, 101, 27])

Matrix = NDArray[np.float64]


def small_domain() -> tuple[Matrix, Matrix]:
    """Residuals of cross-entropy ``[sample, class]``, and features with a 1 for the bias ``[sample, feature + 1]``."""
    odds = np.exp(1.5 * np.sin(1 + 5 * np.arange(SAMPLES * CLASSES))).reshape(SAMPLES, CLASSES)
    onehot = np.eye(CLASSES)[np.arange(SAMPLES) % CLASSES]
    features = np.maximum(0.5 + np.cos(2.3 * np.arange(SAMPLES * FEATURES)), 0).reshape(SAMPLES, FEATURES)
    return odds / odds.sum(1, keepdims=True) - onehot, np.hstack([features, np.ones((SAMPLES, 1))])


def text(x: float, y: float, words: str, *, size: int = 14, color: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(words)}</text>'


def cells(x: float, y: float, values: Matrix, name: str) -> str:
    """A matrix as a grid with its left edge at x, centered at y, its name above."""
    rows, columns = values.shape
    top, largest = y - rows * CELL / 2, np.abs(values).max()
    drawn = [text(x + columns * CELL / 2, top - 10, name, size=16)]
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        shade = 255 + (0.06 + 0.94 * abs(value) / largest) * ((POSITIVE if value >= 0 else NEGATIVE) - 255)
        fill = "#" + "".join(f"{round(channel):02x}" for channel in shade)
        drawn.append(
            f'<rect x="{x + column * CELL:g}" y="{top + row * CELL:g}" width="{CELL}" height="{CELL}" fill="{fill}" '
            'stroke="#ffffff"/>'
        )
    frame = f'width="{columns * CELL}" height="{rows * CELL}" fill="none" stroke="{INK}"'
    return "\n".join([*drawn, f'<rect x="{x:g}" y="{top:g}" {frame}/>'])


def equation(y: float, left: Matrix, right: Matrix, result: Matrix, names: tuple[str, str, str]) -> str:
    """A row centered at y: left · right / n = result."""
    return "\n".join(
        [
            cells(60, y, left, names[0]),
            text(186, y + 6, "·", size=22),
            cells(204, y, right, names[1]),
            text(330, y + 6, "/ n  =", size=18),
            cells(366, y, result, names[2]),
        ]
    )


def never_formed(residuals: Matrix, features: Matrix) -> str:
    """The gradient of one sample as an outer product, and the stack of all of them, crossed out."""
    y, left, step = 130.0, 500, 11
    slices = [
        f'<rect x="{left + step * i}" y="{y - 50 + step * (SAMPLES - 1 - i) / 2:g}" width="{(FEATURES + 1) * CELL}" '
        f'height="{CLASSES * CELL}" fill="{PAPER}" stroke="{MUTED}" stroke-dasharray="4 3"/>'
        for i in reversed(range(SAMPLES))
    ]
    right, top, bottom = left + step * (SAMPLES - 1) + (FEATURES + 1) * CELL, y - 56, y + 38
    return "\n".join(
        [
            cells(60, y, residuals[:1].T, "rᵢ"),
            text(100, y + 6, "⊗", size=20),
            cells(122, y, features[:1], "hᵢ"),
            text(236, y + 6, "=", size=18),
            cells(260, y, np.outer(residuals[0], features[0]), "gᵢ"),
            text(420, y + 6, "for every i:", size=16),
            *slices,
            f'<path d="M{left - 8} {bottom} L{right + 8} {top}" stroke="{WARNING}" stroke-width="3"/>',
            text(right + 26, y - 16, "[sample, class, feature]", anchor="start"),
            text(right + 26, y + 6, "n · c · (d + 1) numbers:", anchor="start"),
            text(right + 26, y + 28, "never formed", color=WARNING, anchor="start"),
        ]
    )


def two_products(residuals: Matrix, features: Matrix, variance: Matrix) -> str:
    means, seconds = residuals.T @ features / SAMPLES, (residuals**2).T @ features**2 / SAMPLES
    upper, lower = 356.0, 502.0
    middle = (upper + lower) / 2
    return "\n".join(
        [
            equation(upper, residuals.T, features, means, ("Rᵀ", "H", "m")),
            equation(lower, (residuals**2).T, features**2, seconds, ("(R∘R)ᵀ", "H∘H", "s")),
            text(472, upper + 5, "mean of gᵢ", color=MUTED, anchor="start"),
            text(472, lower + 5, "mean of gᵢ∘gᵢ", color=MUTED, anchor="start"),
            f'<path d="M586 {upper} H616 V{lower} H586 M616 {middle} H644" fill="none" stroke="{INK}"/>',
            cells(660, middle, variance, "v = s - m∘m"),
            text(764, middle - 6, "variance of gᵢ,", color=MUTED, anchor="start"),
            text(764, middle + 14, "class by feature", color=MUTED, anchor="start"),
            text(644, middle + 58, "one v for each domain:", color=MUTED, anchor="start"),
            text(644, middle + 78, "the penalty is how far they lie apart", color=MUTED, anchor="start"),
        ]
    )


def picture() -> str:
    residuals, features = small_domain()
    gradients = residuals[:, :, None] * features[:, None, :]
    variance = (residuals**2).T @ features**2 / SAMPLES - (residuals.T @ features / SAMPLES) ** 2
    np.testing.assert_allclose(variance, gradients.var(0), atol=1e-12)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, Helvetica, Arial, sans-serif" role="img">',
            "<title>The variance of per-sample gradients from two matrix products</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
            text(60, 46, "The definition: the gradient of each sample, residual times input", size=18, anchor="start"),
            never_formed(residuals, features),
            f'<path d="M60 218 H{WIDTH - 60}" stroke="#cfd5dc"/>',
            text(60, 256, "The closed form: two matrix products for each domain", size=18, anchor="start"),
            two_products(residuals, features, variance),
            text(
                60,
                HEIGHT - 18,
                "n samples, c classes, d features; the last feature is the 1 of the bias. "
                "Blue is positive, orange negative, darker is larger.",
                size=12,
                color=MUTED,
                anchor="start",
            ),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
