"""What is told and drawn of an analysis."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fishr.analysis import analyze
from fishr.data import MultiDomainDataset, Samples
from fishr.errors import ConfigError
from fishr.models import save_model
from fishr.reports.analysis import (
    barrier,
    checkpoint_columns,
    checkpoint_rows,
    checkpoint_title,
    comparison_sentences,
    domain_rows,
    inconsistency,
    inconsistency_kind,
    mean_distance,
    pair_columns,
    pair_rows,
    sentences,
)
from fishr.reports.figures import figures_of, write_images
from fishr.reports.page import analysis_page
from small_models import CLASSES, small_model, small_samples

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
                "accuracy": 0.9 - 0.1 * index,
                "norms": dict.fromkeys(QUANTITIES, 0.5),
                "correlation": None if index == 2 else 0.98765,
                "hessian_error": 0.0,
            }
            for index, name in enumerate(NAMES)
        },
        "distances": dict.fromkeys(QUANTITIES, between) | {"hessian": {**between, "sampling": None}},
        "outlier": "Nobody stands out.",
        "inconsistency": {
            "diagonal": {"ratios": matrix(1, 2, 3), "scores": [[0.1, 0.45, 1.4], [0.35, 0.1, 1.15], [-0.4, 0.2, 0.1]]},
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
        "damping": 1e-3,
        "compared": ["north", "south"],
        "models": [model("runs/erm"), model("runs/fishr", 0.5)],
        "line": {"positions": positions, "risks": risks},
    }


@pytest.fixture
def weights() -> pa.Table:
    """Weights for each model and domain, one of them deeper than the head."""
    rows = [
        {
            "model": name,
            "layer": layer,
            "parameter": "weight",
            "index": place,
            "domain": domain,
            "gradient": 0.1,
            "variance": 0.1 * place,
            "fisher": 0.1,
            "hessian": 0.2 * place,
        }
        for name in ("runs/erm", "runs/fishr")
        for domain in NAMES
        for place, layer in enumerate(("classifier", "classifier", "classifier", "featurizer.1"))
    ]
    return pa.Table.from_pylist(rows)


def test_rows_of_domains():
    assert domain_rows(head(), ROLES)[1:] == [
        ("south", "trained on", "1,001", "0.500", "80.0", "0.5", "0.988"),
        ("<b>west</b>", "held out", "1,002", "0.750", "70.0", "0.5", ""),
    ]


def test_rows_of_pairs():
    assert pair_columns(head()) == ["domains", "gradient", "gradient variance", "Fisher diagonal", "Hessian diagonal"]
    rows = pair_rows(head())
    assert [row[0] for row in rows] == ["north – south", "north – <b>west</b>", "south – <b>west</b>"]  # noqa: RUF001
    assert [row[1] for row in rows] == ["0.20 (0.10)", "0.60 (0.06)", "0.80 (0.08)"]
    assert [row[4] for row in rows] == ["0.20", "0.60", "0.80"]  # what sampling gives is not known


def test_rows_of_checkpoints(analysis):
    assert checkpoint_columns(analysis)[:2] == ["step", "<b>west</b>"]
    assert checkpoint_title(analysis, analysis["models"][1]) == (
        "runs/fishr over its checkpoints: accuracy on <b>west</b>; distances, not relative, and inconsistency "
        "(diagonal) of north, south"
    )
    assert checkpoint_rows(analysis, analysis["models"][1]) == [
        ("10", "70.0", "0.5", "0.5", "0.450"),
        ("20", "70.0", "0.5", "0.5", "0.450"),
    ]


def test_many_checkpoints_are_told_in_few_rows(analysis):
    checkpoints = [{"step": step, "head": head()} for step in range(100)]
    rows = checkpoint_rows(analysis, {**analysis["models"][0], "checkpoints": checkpoints})
    assert len(rows) == 10
    assert (rows[0][0], rows[-1][0]) == ("0", "99")


def test_the_largest_inconsistency():
    found = {"score": 1.4, "from": "north", "to": "<b>west</b>"}
    assert inconsistency(head(), "diagonal", NAMES) == found
    assert inconsistency(head(), "diagonal", NAMES[:2]) == {"score": 0.45, "from": "north", "to": "south"}


def test_exact_scores_are_told_where_all_models_have_them(analysis):
    assert inconsistency_kind(analysis) == "diagonal"
    for model in analysis["models"]:
        model["head"]["inconsistency"]["exact"] = model["head"]["inconsistency"]["diagonal"]
    assert inconsistency_kind(analysis) == "exact"


def test_mean_distance():
    assert mean_distance(head(), "variance", "distance", NAMES) == pytest.approx(8 / 3)
    assert mean_distance(head(), "variance", "distance", NAMES[:2]) == 1


def test_sentences(analysis):
    assert sentences(analysis, analysis["models"][0]) == [
        "Nobody stands out.",
        "Inconsistency among north, south by diagonals of the Hessians: 0.450 nats. So far can the loss of 'south' lie "
        "above that of 'north' within a step that raises the latter by at most 0.1.",
    ]


def test_comparison(analysis):
    assert comparison_sentences(analysis)[1] == (
        "Hessian diagonals of north, south lie 0.50 times as far apart in runs/fishr as in runs/erm, relative to their "
        "size 1.00 times."
    )


def test_nothing_is_compared_with_no_distance(analysis):
    analysis["models"][0]["head"]["distances"]["variance"] = {
        "distance": matrix(0, 0, 0),
        "sampling": matrix(0, 0, 0),
        "relative": matrix(0, 0, 0),
    }
    assert len(comparison_sentences(analysis)) == 1


def test_rise_between_the_models(analysis):
    assert barrier(analysis["line"]) == {"north": 2.5, "south": 0.0, "<b>west</b>": 0.0}


def test_figures_have_what_they_are_to_show(analysis, weights):
    figures = figures_of(analysis, weights)
    assert list(figures) == ["distances", "curvature", "checkpoints", "line", "plane"]
    assert [len(figure.data) for figure in figures.values()] == [4, 6, 2 * 5, 3, 6]
    assert np.array(figures["distances"].data[0].z)[0, 2] == 0.6
    points = figures["curvature"].data[0]
    assert (list(points.x), list(points.y)) == ([0.2, 0.4], [0.1, 0.2])  # neither what is zero nor deeper layers
    assert [list(figures["checkpoints"].data[index].y) for index in (1, 2)] == [[0.7, 0.7], [0.45, 0.45]]
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
    page = analysis_page(analysis | {"data": "<b>Toys</b>"}, weights)
    parser = Tags()
    parser.feed(page)
    assert "b" not in {tag for tag, _ in parser.found}
    used = [attributes.get("src") or attributes.get("href") for _, attributes in parser.found]
    assert not [address for address in used if address and not address.startswith("#")]
    plots = [attributes["aria-label"] for _, attributes in parser.found if attributes.get("class") == "plot"]
    assert plots == [
        "Distance between domains, relative to size",
        "Gradient variance and curvature of each weight of the head",
        "Over the checkpoints of the run",
        "Risk along the line between the models",
        "Risk in a random plane; the network is in its middle",
    ]
    assert "west" in page
    assert "<b>west" not in page


def test_images(analysis, weights, tmp_path, browser):
    figures = {"line": figures_of(analysis, weights)["line"]}
    write_images(tmp_path, figures, ["png", "svg"])
    image = np.asarray(Image.open(tmp_path / "line.png").convert("RGB"))
    assert image.shape[:2] == (460, 1000)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert "<svg" in (tmp_path / "line.svg").read_text(encoding="utf-8")[:100]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nEither"),
            "Kaleido requires .* installed.",
        ),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_images_without_a_browser(analysis, weights, tmp_path, monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    figures = {"line": figures_of(analysis, weights)["line"]}
    monkeypatch.setattr("plotly.io.write_images", fail)
    with pytest.raises(
        ConfigError,
        match=rf"^figures cannot be drawn as png \({reason}\): it needs pip install 'fishr\[figures\]', and Chrome",
    ):
        write_images(tmp_path, figures, ["png"])
    assert list(Path(tmp_path).iterdir()) == []


def test_risks_that_are_not_finite(analysis, weights):
    analysis["models"][0]["plane"]["risks"]["north"][0][0] = None
    analysis["line"]["risks"]["north"][0] = None
    figures = figures_of(analysis, weights)
    assert np.isnan(figures["plane"].data[0].z[0][0])
    assert figures["plane"].data[0].contours.start == pytest.approx(np.log10(0.5))
    assert barrier(analysis["line"])["north"] == 2.5


def test_what_an_analysis_gives_can_be_told_and_drawn(tmp_path):
    """The hand-made content above has the form of the real one."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, small_model().float())
    samples = {name: small_samples(small_model(), 9, seed) for seed, name in enumerate(NAMES)}
    domains = {name: Samples(inputs.float(), targets) for name, (inputs, targets) in samples.items()}
    found = analyze([folder], MultiDomainDataset("toys", "vectors", domains, CLASSES[:3]), device="cpu", plane=True)
    content, made = found.as_dict(), model("x")
    assert content["models"][0].keys() == made.keys()
    assert content["models"][0]["head"].keys() == made["head"].keys()
    assert content["models"][0]["head"]["domains"]["north"].keys() == made["head"]["domains"]["north"].keys()
    assert list(figures_of(content, found.weights())) == ["distances", "curvature", "plane"]
    assert len(sentences(content, content["models"][0])) == 3
