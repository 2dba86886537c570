import csv
import errno
import json
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fishr.data.image_dataset import image_dataset
from fishr.data.image_format import ImageFormat
from fishr.deploy import predict, prediction_file
from fishr.deploy.predict import Prediction, find_images, predict_images
from fishr.deploy.prediction_file import Columns, PredictionFile
from fishr.errors import ConfigError, DataError
from fishr.models import ModelCard, ModelConfig, SavedModel, build_model

COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
ORANGE = (255, 102, 0)


def color_model() -> SavedModel:
    """Its logits are the mean of blue, green and red, in [0, 1]."""
    card = ModelCard(
        ModelConfig("mlp", {"width": 3, "depth": 1}),
        (3, 4, 4),
        tuple(COLORS),
        binary=False,
        image_format=ImageFormat(4),
    )
    featurizer, classifier = build_model(card.model, card.input_shape, card.num_outputs)
    means = torch.eye(3).flip(0).repeat_interleave(16, dim=1) / 16
    featurizer.load_state_dict({"1.weight": means, "1.bias": torch.zeros(3)})
    classifier.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    return SavedModel(featurizer, classifier, card)


def softmax(*logits: float) -> list[float]:
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum()).tolist()


def write_images(folder: Path, **colors: tuple[int, int, int]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, color in colors.items():
        paths.append(folder / f"{name}.png")
        Image.new("RGB", (6, 5), color).save(paths[-1])
    return paths


def images_of(folder: Path, names: str) -> None:
    """Empty files, which are images by their ending or not."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(*paths: Path, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(paths)]


# Predictions


def test_labels_and_probabilities_in_the_order_of_the_paths(tmp_path: Path) -> None:
    paths = write_images(tmp_path, a=COLORS["red"], b=ORANGE, c=COLORS["blue"])
    first, second, third = predict_images(color_model(), [paths[2], paths[0], paths[1]], top_k=3, device="cpu")
    assert [p.path for p in (first, second, third)] == [paths[2], paths[0], paths[1]]
    assert [p.label for p in (first, second, third)] == ["blue", "red", "red"]
    assert [label for label, _ in third.top] == ["red", "green", "blue"]
    assert [value for _, value in third.top] == pytest.approx(softmax(1, 0.4, 0), rel=1e-6)
    assert third.probability == third.top[0][1] == float(str(np.float32(third.probability)))
    assert (third.abstain, third.error) == (False, None)


def test_only_as_many_classes_as_asked_for(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, a=ORANGE)
    for top_k in (1, 2):
        (prediction,) = predict_images(color_model(), [path], top_k=top_k, device="cpu")
        assert [label for label, _ in prediction.top] == ["red", "green"][:top_k]


def test_of_equally_probable_classes_the_first_comes_first(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, white=(255, 255, 255))
    (prediction,) = predict_images(color_model(), [path], top_k=3, device="cpu")
    assert [label for label, _ in prediction.top] == ["blue", "green", "red"]


def test_a_single_logit_tells_two_classes_apart(tmp_path: Path) -> None:
    card = ModelCard(
        ModelConfig("mlp", {"width": 1, "depth": 1}), (3, 4, 4), ("dark", "light"), binary=True,
        image_format=ImageFormat(4),
    )  # fmt: skip
    featurizer, classifier = build_model(card.model, card.input_shape, card.num_outputs)
    featurizer.load_state_dict({"1.weight": torch.full((1, 48), 1 / 48), "1.bias": torch.zeros(1)})
    classifier.load_state_dict({"weight": torch.tensor([[4.0]]), "bias": torch.tensor([-2.0])})
    paths = write_images(tmp_path, a=(0, 0, 0), b=(255, 255, 255))
    dark, light = predict_images(SavedModel(featurizer, classifier, card), paths, top_k=2, device="cpu")
    sigmoid = 1 / (1 + np.exp(-2))
    assert [label for label, _ in dark.top] == ["dark", "light"]
    assert [label for label, _ in light.top] == ["light", "dark"]
    assert [value for _, value in dark.top] == pytest.approx([sigmoid, 1 - sigmoid], rel=1e-6)


def test_below_the_threshold_it_abstains_and_the_label_stays(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, a=ORANGE)
    (sure,) = predict_images(color_model(), [path], device="cpu")
    probability = sure.probability
    assert probability is not None
    abstains = {None: False, 0.0: False, probability: False, probability + 1e-9: True, 1.0: True}
    for threshold, expected in abstains.items():
        (prediction,) = predict_images(color_model(), [path], abstain_below=threshold, device="cpu")
        assert prediction.abstain is expected, threshold
        assert prediction.top == sure.top


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_batches_change_nothing(batch_size: int, tmp_path: Path) -> None:
    colors = {f"i{index}": (20 * index, 240 - 20 * index, 128) for index in range(7)}
    paths = write_images(tmp_path, **colors)
    paths.insert(3, tmp_path / "missing.png")
    predictions = list(predict_images(color_model(), paths, batch_size=batch_size, device="cpu"))
    assert [p.path for p in predictions] == paths
    whole = list(predict_images(color_model(), paths, device="cpu"))
    assert [p.label for p in predictions] == [p.label for p in whole]
    assert [p.probability or 0 for p in predictions] == pytest.approx([p.probability or 0 for p in whole], rel=1e-6)
    assert [p.error is None for p in predictions] == [True] * 3 + [False] + [True] * 4


def test_no_paths_no_predictions() -> None:
    assert list(predict_images(color_model(), [], device="cpu")) == []


def test_what_cannot_be_read_is_told_and_the_rest_predicted(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    red = Image.new("RGB", (8, 8), COLORS["red"])
    image.save(tmp_path / "truncated.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "truncated.jpg").read_bytes()[:-300])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "sixteen.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.quantize().save(tmp_path / "palette.gif")
    red.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), COLORS["blue"])])

    rows = {p.path.name: p for p in predict_images(color_model(), find_images([tmp_path]), device="cpu")}
    assert list(rows) == sorted(rows)
    errors = {name: p.error for name, p in rows.items() if p.error is not None}
    assert errors["truncated.jpg"] == "truncated JPEG"
    assert errors["text.jpg"].startswith("not an image")
    assert errors["empty.jpg"] == "the file is empty"
    for name in errors:
        assert (rows[name].label, rows[name].probability, rows[name].top, rows[name].abstain) == (None, None, (), True)
    labels = {name: p.label for name, p in rows.items() if p.error is None}
    assert labels == {"animated.gif": "red", "cmyk.jpg": "red", "palette.gif": "red", "sixteen.png": "blue"}
    assert rows["sixteen.png"].probability == pytest.approx(1 / 3, rel=1e-5)  # white, not clipped to black


def test_probabilities_that_are_not_finite_are_no_answer(tmp_path: Path) -> None:
    model = color_model()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    (prediction,) = predict_images(model, write_images(tmp_path, a=ORANGE), device="cpu")
    assert prediction == Prediction(tmp_path / "a.png", (), True, "the network's probabilities are nan")


def test_the_network_is_put_into_eval_mode(tmp_path: Path) -> None:
    model = color_model().train()
    list(predict_images(model, write_images(tmp_path, a=ORANGE), device="cpu"))
    assert not any(module.training for module in model.modules())


def test_gradients_are_left_as_they_were_for_who_iterates(tmp_path: Path) -> None:
    for _ in predict_images(color_model(), write_images(tmp_path, a=ORANGE), device="cpu"):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"top-k must be from 1 to 3, the model's number of classes, got 0"),
        ({"top_k": 4}, r"top-k must be from 1 to 3, the model's number of classes, got 4"),
        ({"abstain_below": 1.1}, r"the probability to abstain below must be in \[0, 1\], got 1\.1"),
        ({"abstain_below": -0.1}, r"must be in \[0, 1\], got -0\.1"),
        ({"abstain_below": float("nan")}, r"must be in \[0, 1\], got nan"),
        ({"batch_size": 0}, r"batch size must be at least 1, got 0"),
        ({"device": "cdua"}, r"unknown device 'cdua'; did you mean 'cuda'\? \(known: auto, cpu, cuda, mps\)"),
    ],
)
def test_mistakes_are_told_at_the_call(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict_images(color_model(), [], **arguments)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device 'cuda' is not available here.*use 'auto' or 'cpu'"):
        predict_images(color_model(), [], device="cuda")


def test_a_model_of_something_else_than_images_is_refused() -> None:
    card = ModelCard(ModelConfig("mlp"), (2, 28, 28), ("a", "b"), binary=False)
    model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
    message = r"the model takes float32 inputs of shape 2 x 28 x 28, not image files: expected a model .* of images"
    with pytest.raises(DataError, match=message):
        predict_images(model, [])


def test_real_images_are_predicted_as_they_are_evaluated(data_root: Path, tmp_path: Path) -> None:
    root = data_root / "PACS"
    if not root.is_dir():
        pytest.skip(f"no PACS: there is no {root}")
    for folder in root.glob("*/*"):
        (tmp_path / folder.relative_to(root)).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:5]:
            (tmp_path / path.relative_to(root)).symlink_to(path)
    format = ImageFormat(24)
    dataset = image_dataset(tmp_path, image_size=format.size, cache="none")
    card = ModelCard(ModelConfig("mnist-cnn"), (3, 24, 24), dataset.classes, binary=False, image_format=format)
    torch.manual_seed(0)
    model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card).eval()
    for domain, samples in dataset.domains.items():
        inputs = samples.inputs[:]
        with torch.no_grad():
            model.classifier.bias -= model(inputs).mean(0)  # an untrained network is fond of one class
            expected = model.predict_proba(inputs).max(1)
        predictions = list(predict_images(model, find_images([tmp_path / domain]), device="cpu"))
        labels = [dataset.classes[label] for label in expected.indices]
        assert [prediction.label for prediction in predictions] == labels
        assert len(set(labels)) > 2
        assert torch.tensor([prediction.probability for prediction in predictions]).equal(expected.values)


# Reading ahead


@pytest.fixture
def fake_images(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every path is an image; counts those that are alive, after decoding and in evaluation form."""
    counts = SimpleNamespace(alive=0, peak=0, read=0)
    lock = threading.Lock()

    def release() -> None:
        with lock:
            counts.alive -= 1

    def fit(self: ImageFormat, image: np.ndarray) -> np.ndarray:
        fitted = np.zeros((4, 4, 3), np.uint8)
        with lock:
            counts.read += 1
            counts.alive += 1
            counts.peak = max(counts.peak, counts.alive)
        weakref.finalize(fitted, release)
        return fitted

    monkeypatch.setattr(predict, "read_image", lambda path, format: np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(ImageFormat, "fit", fit)
    return counts


@pytest.mark.parametrize("number", [200, 2000])
def test_memory_does_not_grow_with_the_number_of_images(number: int, fake_images: SimpleNamespace) -> None:
    taken, furthest = 0, 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        for taken in range(1, number + 1):
            yield Path(f"{taken}.png")

    given = 0
    for prediction in predict_images(color_model(), paths(), batch_size=10, device="cpu"):
        given += 1
        furthest = max(furthest, taken - given)
        assert prediction.error is None
    assert given == fake_images.read == number
    assert 10 < fake_images.peak <= 3 * 10 + 1
    assert furthest <= 2 * 10


def test_images_that_cannot_be_read_do_not_pile_up() -> None:
    paths = iter([Path("there is no such file.png")] * 1000)
    predictions = predict_images(color_model(), paths, batch_size=10, device="cpu")
    next(predictions)
    assert len(list(paths)) >= 1000 - 2 * 10
    predictions.close()


def test_the_next_batch_is_decoded_while_the_network_works(
    fake_images: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_batch_read = threading.Event()

    def read(path: Path, format: ImageFormat) -> np.ndarray:
        if path.name == "7":
            next_batch_read.set()
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(predict, "read_image", read)
    model = color_model()
    of_model = model.predict_proba
    monkeypatch.setattr(model, "predict_proba", lambda inputs: next_batch_read.wait(30) and of_model(inputs))
    predictions = predict_images(model, [Path(str(index)) for index in range(8)], batch_size=4, device="cpu")
    assert next(predictions).path == Path("0")
    predictions.close()


def test_closed_early_it_reads_no_further_and_leaves_no_threads(fake_images: SimpleNamespace) -> None:
    paths = (Path(str(index)) for index in range(10_000))
    with closing(predict_images(color_model(), paths, batch_size=4, device="cpu")) as predictions:
        next(predictions)
    assert fake_images.read <= 2 * 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fishr-predict")]


# Finding images


def test_folders_are_walked_in_the_order_of_paths(tmp_path: Path) -> None:
    images_of(tmp_path, "b/10.jpg b/9.JPG b/c/1.png b/c.png b-2/x.bmp a.tiff b.webp deep/er/and/deeper/x.jpeg")
    assert found(tmp_path, root=tmp_path) == sorted(
        ["b/10.jpg", "b/9.JPG", "b/c/1.png", "b/c.png", "b-2/x.bmp", "a.tiff", "b.webp", "deep/er/and/deeper/x.jpeg"]
    )


def test_hidden_files_and_junk_are_passed_over(tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    images_of(tmp_path, "x.jpg .hidden.jpg .git/y.jpg __MACOSX/z.jpg Thumbs.db")
    assert found(tmp_path, root=tmp_path) == ["x.jpg"]
    assert warnings_logged() == []


def test_files_with_other_endings_are_counted(tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    images_of(tmp_path, "x.jpg notes.txt below/photo.heic")
    assert found(tmp_path, root=tmp_path) == ["x.jpg"]
    (message,) = warnings_logged()
    assert message.startswith("left out files without the ending of an image: 2, such as ")


def test_what_is_named_is_taken_whatever_its_name(tmp_path: Path) -> None:
    images_of(tmp_path, "b/x.jpg photo.heic .hidden")
    named = (tmp_path / "photo.heic", tmp_path / "b", tmp_path / ".hidden", tmp_path / "photo.heic")
    assert found(*named, root=tmp_path) == ["photo.heic", "b/x.jpg", ".hidden", "photo.heic"]


def test_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_of(tmp_path, "a/b/x.jpg")
    monkeypatch.chdir(tmp_path)
    assert list(find_images([Path("a"), Path()])) == [Path("a/b/x.jpg")] * 2


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    images_of(tmp_path, "a/x.jpg elsewhere/y.jpg")
    (tmp_path / "a" / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "broken.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "a" / "itself.jpg").symlink_to(tmp_path / "a" / "itself.jpg")
    assert found(tmp_path / "a", root=tmp_path) == [
        "a/broken.jpg",
        "a/elsewhere/y.jpg",
        "a/itself.jpg",
        "a/x.jpg",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_pipes_are_not_waited_for(tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    images_of(tmp_path, "x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert found(tmp_path, root=tmp_path) == ["x.jpg"]
    assert warnings_logged() == [f"left out pipes and devices: 1, such as {tmp_path / 'pipe.jpg'}"]


def test_a_folder_is_listed_when_its_turn_comes(tmp_path: Path) -> None:
    images_of(tmp_path, "a/x.jpg b/y.jpg")
    images = find_images([tmp_path])
    assert next(images).name == "x.jpg"
    images_of(tmp_path, "b/z.jpg")
    assert [path.name for path in images] == ["y.jpg", "z.jpg"]


def test_a_folder_below_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_logged: Callable[[], list[str]]
) -> None:
    images_of(tmp_path, "a/x.jpg locked/y.jpg z.jpg")
    forbid(tmp_path / "locked", monkeypatch)
    assert found(tmp_path, root=tmp_path) == ["a/x.jpg", "locked", "z.jpg"]
    folder = tmp_path / "locked"
    assert warnings_logged() == [f"left out folders that cannot be listed (Permission denied): 1, such as {folder}"]
    (prediction,) = predict_images(color_model(), [folder], device="cpu")
    assert prediction.error == "the file cannot be read (Is a directory)"


def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    images_of(tmp_path, "x.jpg")
    missing = [tmp_path / str(index) for index in range(5)]
    with pytest.raises(DataError, match=rf"^there is no file or folder {missing[0]}$"):
        find_images([tmp_path / "x.jpg", missing[0]])
    with pytest.raises(DataError, match=rf"{missing[0]}, {missing[1]}, {missing[2]} and 2 more$"):
        find_images(missing)


def test_a_folder_without_images(tmp_path: Path) -> None:
    images_of(tmp_path, "full/x.jpg bare/notes.txt bare/.x.jpg bare/below/.keep")
    message = rf"there are no images in {tmp_path / 'bare'}: expected files that end in \.bmp, .*\.webp; others can be"
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / "full", tmp_path / "bare"])


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_of(tmp_path, "x.jpg")
    forbid(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be listed \(Permission denied\)$"):
        find_images([tmp_path])


# Tables

HARD_NAMES = ["plain.jpg", "a,b.jpg", 'say "x".jpg', "two\nlines.jpg", "car\rriage.jpg", " space ", "été 中.jpg", "-x"]
NO_UTF8 = os.fsdecode(b"caf\xe9.jpg")


def read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix.lower() == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of(number: int) -> list[Prediction]:
    return [Prediction(Path(f"{index}.jpg"), (("ant", 0.5 + index / 10_000),), False) for index in range(number)]


def write_rows(path: Path, rows: Iterable[Prediction], columns: Columns | None = None) -> None:
    with PredictionFile(path, columns or Columns()) as file:
        for row in rows:
            file.write(row)


FORMATS = pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])


@FORMATS
def test_names_survive(suffix: str, tmp_path: Path) -> None:
    names = [*HARD_NAMES, NO_UTF8]
    output = tmp_path / f"out{suffix}"
    write_rows(output, [Prediction(Path(name), (('ant, "bee"\n', 0.1),), False) for name in names])
    rows = read_table(output)
    assert [row["path"] for row in rows] == [*HARD_NAMES, "caf\\udce9.jpg"]
    assert {row["label"] for row in rows} == {'ant, "bee"\n'}


def test_columns_of_csv(tmp_path: Path) -> None:
    top = (("ant", 0.7), ("bee", 1e-07))
    rows = [
        Prediction(Path("x.jpg"), top, False),
        Prediction(Path("y.jpg"), top, True),
        Prediction(Path("z.jpg"), (), True, "truncated JPEG"),
    ]
    write_rows(tmp_path / "out.csv", rows, Columns(2, abstain=True))
    assert (tmp_path / "out.csv").read_bytes().decode() == (
        "path,label,probability,label_2,probability_2,abstain,error\n"
        "x.jpg,ant,0.7,bee,1e-07,false,\n"
        "y.jpg,ant,0.7,bee,1e-07,true,\n"
        "z.jpg,,,,,true,truncated JPEG\n"
    )
    write_rows(tmp_path / "out.csv", rows[:1])
    assert (tmp_path / "out.csv").read_text() == "path,label,probability,error\nx.jpg,ant,0.7,\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_values_have_their_types(suffix: str, tmp_path: Path) -> None:
    rows = [
        Prediction(Path("x.jpg"), (("ant", 0.7), ("bee", 0.3)), False),
        Prediction(Path("z.jpg"), (), True, "truncated JPEG"),
    ]
    write_rows(tmp_path / f"out{suffix}", rows, Columns(2, abstain=True))
    assert read_table(tmp_path / f"out{suffix}") == [
        {
            "path": "x.jpg",
            "label": "ant",
            "probability": 0.7,
            "label_2": "bee",
            "probability_2": 0.3,
            "abstain": False,
            "error": None,
        },
        {
            "path": "z.jpg",
            "label": None,
            "probability": None,
            "label_2": None,
            "probability_2": None,
            "abstain": True,
            "error": "truncated JPEG",
        },
    ]


def test_parquet_is_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_file, "ROWS_PER_GROUP", 4)
    output = tmp_path / "out.parquet"
    write_rows(output, rows_of(10))
    metadata = pyarrow.parquet.read_metadata(output)
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [4, 4, 2]
    assert [row["path"] for row in read_table(output)] == [f"{index}.jpg" for index in range(10)]


def test_parquet_has_types_also_without_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.parquet", [], Columns(1, abstain=True))
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "path": "string",
        "label": "string",
        "probability": "double",
        "abstain": "bool",
        "error": "string",
    }


@FORMATS
def test_the_file_takes_its_place_when_it_is_complete(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    output.write_text("old")
    with PredictionFile(output, Columns()) as file:
        for row in rows_of(3):
            file.write(row)
        assert output.read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {output.name, f"out.partial{suffix}"}
    assert len(read_table(output)) == 3
    assert list(tmp_path.iterdir()) == [output]


@FORMATS
@pytest.mark.parametrize("number", [1, 10])
def test_after_an_error_the_rows_so_far_are_kept(
    suffix: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(prediction_file, "ROWS_PER_GROUP", 4)
    output, partial = tmp_path / f"out{suffix}", tmp_path / f"out.partial{suffix}"
    output.write_text("old")

    def interrupted() -> Iterator[Prediction]:
        yield from rows_of(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(output, interrupted())
    assert output.read_text() == "old"
    assert [row["path"] for row in read_table(partial)] == [f"{index}.jpg" for index in range(number)]
    rows = "1 row is" if number == 1 else "10 rows are"
    assert warnings_logged() == [f"{rows} kept in {partial}"]


@FORMATS
def test_without_rows_nothing_is_kept(suffix: str, tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt), PredictionFile(tmp_path / f"out{suffix}", Columns()):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert warnings_logged() == ["no rows are kept"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("size", [200, 201, 207, 215, 333])
def test_lines_that_the_disk_took_whole_are_kept(suffix: str, size: int, tmp_path: Path) -> None:
    output, partial = tmp_path / f"out{suffix}", tmp_path / f"out.partial{suffix}"
    with pytest.raises(DataError) as caught, files_of_at_most(size):
        write_rows(output, rows_of(100))
    rows = read_table(partial)
    assert str(caught.value) == (
        f"{output} cannot be written (File too large): name a file that can be written; {len(rows)} rows are kept in "
        f"{partial}"
    )
    assert 1 < len(rows) < 30
    assert [float(row["probability"]) for row in rows] == [row.probability for row in rows_of(len(rows))]
    assert partial.read_bytes().endswith(b"\n")
    assert not output.exists()


@pytest.mark.parametrize("size", [*range(0, 5000, 500), 2])
def test_parquet_that_the_disk_did_not_take_is_removed(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_file, "ROWS_PER_GROUP", 100)
    with pytest.raises(DataError, match="File too large"), files_of_at_most(size):
        write_rows(tmp_path / "out.parquet", rows_of(1000))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = (
        r"out.csv cannot be written \(No space left on device\): free some space; 3 rows are kept in .*out.partial.csv$"
    )
    with pytest.raises(DataError, match=message):
        write_rows(tmp_path / "out.csv", rows_of(3))
    assert len(read_table(tmp_path / "out.partial.csv")) == 3


def test_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    message = rf"out.csv cannot be written \(Is a directory\): .*; 2 rows are kept in {tmp_path / 'out.partial.csv'}$"

    def rows() -> Iterator[Prediction]:
        yield from rows_of(2)
        output.mkdir()

    with pytest.raises(DataError, match=message):
        write_rows(output, rows())
    assert len(read_table(tmp_path / "out.partial.csv")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r" is a folder: name the file to write, such as .*/predictions\.csv$"),
        ("out.txt", r"out\.txt ends in '\.txt': expected one of \.csv, \.jsonl, \.parquet$"),
        ("out", r"out ends in '': expected one of"),
    ],
)
def test_paths_that_no_table_can_have(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictionFile(tmp_path / name, Columns())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out\.csv cannot be written \(No such file or directory\): name a file that"):
        PredictionFile(tmp_path / "nowhere" / "out.csv", Columns())


def test_endings_may_be_written_large(tmp_path: Path) -> None:
    write_rows(tmp_path / "OUT.PARQUET", rows_of(2))
    assert len(read_table(tmp_path / "OUT.PARQUET")) == 2
