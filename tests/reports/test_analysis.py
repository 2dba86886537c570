"""What is told and drawn of an analysis."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fishr.errors import ConfigError
from fishr.reports.analysis import (
    barrier,
    compared_domains,
    comparison_sentences,
    domain_rows,
    inconsistency,
    mean_distance,
    pair_rows,
    sentences,
)
from fishr.reports.figures import figures_of, write_images, write_page

NAMES = ("north", "south", "<b>west</b>")
ROLES = {"north": "trained on", "south": "trained on", "<b>west</b>": "held out"}
QUANTITIES = ("gradient", "variance", "fisher", "hessian")
EPSILON = 0.1


def matrix(first: float, second: float, third: float) -> list[list[float]]:
    """Of the pairs 01, 02 and 12."""
    return [[0, first, second], [first, 0, third], [second, third, 0]]


def head(scale: float = 1.0) -> dict:
    between = {
        "distance": (scale * np.array(matrix(1, 3, 4))).tolist(),
        "sampling": (scale * np.array(matrix(0.5, 0.3, 0.4))).tolist(),
        "relative": matrix(0.2, 0.6, 0.8),
    }
    return {
        "layer": "classifier",
        "weights": 2,
        "hessian": "exact",
        "domains": {
            name: {
                "samples": 1000 + index,
                "risk": 0.25 * (index + 1),
                "accuracy": 0.9,
                "norms": dict.fromkeys(QUANTITIES, 0.5),
                "correlation": None if index == 2 else 0.98765,
            }
            for index, name in enumerate(NAMES)
        },
        "distances": dict.fromkeys(QUANTITIES, between),
        "outlier": "Nobody stands out.",
        "inconsistency": {
            "diagonal": {
                "gaps": [[0, 0.25, 0.5], [-0.25, 0, 0.25], [-0.5, -0.25, 0]],
                "ratios": [[1, 2, 9], [6, 1, 9], [1, 1, 1]],
            },
            "exact": None,
        },
    }


def model(name: str, scale: float = 1.0) -> dict:
    positions = np.linspace(-1, 1, 11).tolist()
    plane = {"positions": positions, "risks": {one: (np.ones((11, 11)) * 0.5).tolist() for one in NAMES}}
    checkpoints = [{"step": step, "head": head(scale)} for step in (10, 20)]
    return {
        "name": name,
        "roles": ROLES,
        "head": head(scale),
        "layers": [],
        "checkpoints": checkpoints,
        "plane": plane,
    }


@pytest.fixture
def analysis() -> dict:
    positions = [-0.5, 0.0, 0.5, 1.0, 1.5]
    risks = {"north": [9, 1, 4, 2, 9], "south": [9, 1, 1, 3, 9], "<b>west</b>": [9, 1, 1.5, 2, 9]}
    return {
        "format": 1,
        "data": "toys",
        "epsilon": EPSILON,
        "models": [model("runs/erm"), model("runs/fishr", 0.5)],
        "line": {"positions": positions, "risks": risks},
    }


@pytest.fixture
def weights() -> pa.Table:
    """Three weights for each model and domain, one of them deeper than the head."""
    rows = [
        {
            "model": name,
            "parameter": parameter,
            "index": 0,
            "domain": domain,
            "gradient": 0.1,
            "variance": 0.1 * place,
            "fisher": 0.1,
            "hessian": 0.2 * place,
        }
        for name in ("runs/erm", "runs/fishr")
        for domain in NAMES
        for place, parameter in enumerate(("classifier.bias", "classifier.weight", "classifier.weight", "featurizer.1"))
    ]
    return pa.Table.from_pylist(rows)


def test_rows_of_domains():
    assert domain_rows(head(), ROLES)[1:] == [
        ("south", "trained on", "1,001", "0.500", "90.0", "0.5", "0.988"),
        ("<b>west</b>", "held out", "1,002", "0.750", "90.0", "0.5", ""),
    ]


def test_rows_of_pairs():
    rows = pair_rows(head())
    assert [row[0] for row in rows] == ["north – south", "north – <b>west</b>", "south – <b>west</b>"]  # noqa: RUF001
    assert [row[1] for row in rows] == ["0.20 (0.10)", "0.60 (0.06)", "0.80 (0.08)"]


def test_domains_that_training_could_align():
    content = model("x")
    assert compared_domains(content) == ["north", "south"]
    assert compared_domains({**content, "roles": {}}) == list(NAMES)
    assert compared_domains({**content, "roles": {"north": "trained on"}}) == list(NAMES)


def test_the_largest_inconsistency():
    """Of all: from north, 0.5 + 0.1 · 9. Among north and south: 0.25 + 0.1 · 2 against −0.25 + 0.1 · 6."""
    found = inconsistency(head(), "diagonal", NAMES, EPSILON)
    assert found == {"score": pytest.approx(1.4), "from": "north", "to": "<b>west</b>"}
    found = inconsistency(head(), "diagonal", NAMES[:2], EPSILON)
    assert found == {"score": pytest.approx(0.45), "from": "north", "to": "south"}
    found = inconsistency(head(), "diagonal", NAMES[:2], epsilon=0.2)
    assert found == {"score": pytest.approx(0.95), "from": "south", "to": "north"}
    assert inconsistency(head(), "exact", NAMES, EPSILON) is None


def test_mean_distance():
    assert mean_distance(head(), "variance", "distance", NAMES) == pytest.approx(8 / 3)
    assert mean_distance(head(), "variance", "distance", NAMES[:2]) == 1


def test_sentences():
    assert sentences(model("x"), EPSILON) == [
        "Nobody stands out.",
        "Inconsistency (diagonals of the Hessians, epsilon 0.1): 0.450 nats, by how much the loss of 'south' can lie "
        "above that of 'north' where the latter is content.",
    ]


def test_comparison(analysis):
    assert comparison_sentences(analysis)[1] == (
        "Hessian diagonal: runs/fishr has 0.50 times the distance between domains of runs/erm, relative to its size "
        "1.00 times (over north, south)."
    )


def test_rise_between_the_models(analysis):
    assert barrier(analysis["line"]) == {"north": 2.5, "south": 0.0, "<b>west</b>": 0.0}


def test_figures_have_what_they_are_to_show(analysis, weights):
    figures = figures_of(analysis, weights)
    assert list(figures) == ["distances", "curvature", "checkpoints", "line", "plane"]
    assert [len(figure.data) for figure in figures.values()] == [4, 6, 2 * (3 + 3), 3, 6]
    assert np.array(figures["distances"].data[0].z)[0, 2] == 0.6
    points = figures["curvature"].data[0]
    assert (list(points.x), list(points.y)) == ([0.2, 0.4], [0.1, 0.2])  # neither what is zero nor deeper layers
    assert list(figures["checkpoints"].data[3].y) == pytest.approx([0.45, 0.45])
    assert list(figures["line"].data[1].y) == [9, 1, 1, 3, 9]


def test_figures_without_data_are_left_out(analysis, weights):
    content = {**analysis, "line": None, "models": [{**analysis["models"][0], "checkpoints": [], "plane": None}]}
    assert list(figures_of(content, weights)) == ["distances", "curvature"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_needs_no_network_and_takes_names_as_text(analysis, weights, tmp_path):
    write_page(tmp_path / "page.html", figures_of(analysis, weights), "<b>Toys</b>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    assert "b" not in {tag for tag, _ in parser.found}
    assert not [attributes for _, attributes in parser.found if "src" in attributes or "href" in attributes]
    ids = {attributes.get("id") for _, attributes in parser.found}
    assert {"distances", "curvature", "checkpoints", "line", "plane"} <= ids
    assert "west" in page
    assert "<b>west" not in page


def test_images(analysis, weights, tmp_path, browser):
    figures = {"line": figures_of(analysis, weights)["line"]}
    write_images(tmp_path, figures, ["png", "svg"])
    image = np.asarray(Image.open(tmp_path / "line.png").convert("RGB"))
    assert image.shape[:2] == (460, 1000)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert "<svg" in (tmp_path / "line.svg").read_text(encoding="utf-8")[:100]


def test_images_without_a_browser(analysis, weights, tmp_path, monkeypatch):
    figures = {"line": figures_of(analysis, weights)["line"]}
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", missing_chrome)
    with pytest.raises(
        ConfigError,
        match=r"^png files cannot be drawn \(Kaleido requires Google Chrome to be installed\.\): they need pip install "
        r"'fishr\[figures\]', and Chrome or Chromium$",
    ):
        write_images(tmp_path, figures, ["png"])
    assert list(Path(tmp_path).iterdir()) == []


def missing_chrome(*_):
    raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nEither download ...")
