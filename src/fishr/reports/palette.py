"""Colors, dashes and symbols of what is drawn."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#888888")
"""Colours that colour-blind readers tell apart (Okabe and Ito, 2002), with gray for their black, which does not show on
a dark page."""

DASHES = ("solid", "dash", "dot", "dashdot")

GLYPHS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "x": "✖",
    "triangle-down": "▼",
    "star": "★",
    "pentagon": "⬟",
}
"""Symbols of plotly, and what they look like; one more than colors, so that both together come again late."""
