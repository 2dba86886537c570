"""What a run's model gets wrong where it was held out."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishr.data import load_dataset
from fishr.deploy import evaluate_model, keep_mistakes
from fishr.models.saved import load_model
from fishr.records import Mistakes
from fishr.training import RunConfig, train
from small_runs import noisy_registered, picture_config, write_pictures


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = load_dataset("colored-digits")
    config = RunConfig.for_dataset(dataset, "erm", steps=20)
    return train(config, dataset, tmp_path_factory.mktemp("runs") / "digits").folder


def pixels(picture: str | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))


def test_the_surest_mistakes_on_the_held_out_domain(digits_run: Path) -> None:
    dataset = load_dataset("colored-digits")
    keep_mistakes(digits_run, dataset)
    kept = Mistakes.from_json((digits_run / "mistakes.json").read_text(encoding="utf-8"))
    assert (kept.classes, kept.train_domains) == (["digit 5-9", "digit 0-4"], ["+80%", "+90%"])
    (domain,) = kept.domains.values()
    evaluated = evaluate_model(load_model(digits_run / "model"), dataset).domains["-90%"]
    assert domain.confusion == evaluated.confusion.tolist()
    inputs, targets = dataset.domains["-90%"]
    wrong = evaluated.predictions != targets.numpy()
    assert wrong.sum() > 24
    surest = np.sort(evaluated.confidences[wrong])[::-1][:24]
    assert [mistake.probability for mistake in domain.worst] == pytest.approx(surest.tolist())
    for mistake in domain.worst:
        index = int(mistake.sample.removeprefix("sample "))
        assert mistake.label == dataset.classes[targets[index]]
        assert {mistake.label, mistake.predicted} == set(dataset.classes)
        red, green, blue = np.moveaxis(pixels(mistake.picture), 2, 0) / 255
        expected = inputs[index].reshape(2, 8, 8).numpy()
        np.testing.assert_allclose([red, green], expected, atol=0.5 / 255 + 1e-6)
        assert not blue.any()


def test_they_are_kept_once(digits_run: Path) -> None:
    (digits_run / "mistakes.json").write_text("as it was")
    keep_mistakes(digits_run, load_dataset("colored-digits"))
    assert (digits_run / "mistakes.json").read_text() == "as it was"


@pytest.mark.parametrize("test_domains", [("street",), ()], ids=["held out", "trained on all"])
def test_image_files(tmp_path: Path, test_domains: tuple[str, ...]) -> None:
    dataset = load_dataset(str(write_pictures(tmp_path / "data")), image_size=200, cache="none")
    with noisy_registered():
        config = replace(picture_config(dataset), test_domains=test_domains)
        run = train(config, dataset, tmp_path / "run").folder
        keep_mistakes(run, dataset)
    if not test_domains:
        assert not (run / "mistakes.json").exists()
        return
    content = json.loads((run / "mistakes.json").read_text(encoding="utf-8"))
    worst = content["domains"]["street"]["worst"]
    assert worst
    for mistake in worst:
        assert mistake["picture"].startswith("data:image/jpeg;base64,")
        assert pixels(mistake["picture"]).shape == (160, 160, 3)
