import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag
from torch import Tensor, nn

from fishr.data import load_dataset
from fishr.data.image_format import ImageFormat, read_image
from fishr.deploy import export
from fishr.deploy.export import ExportReport, example_images, example_inputs, export_onnx, preprocessing_of
from fishr.errors import ConfigError, DataError, FishrError
from fishr.models import FEATURIZERS, ModelCard, ModelConfig, SavedModel, build_model
from fishr.models.backbone import backbone_config, load_initial_weights
from small_runs import registered

CLASSES = ("ant", "bee", "cat")
FORMAT = ImageFormat(32)


def saved_model(
    config: ModelConfig | str = "mnist-cnn", image_format: ImageFormat | None = FORMAT, seed: int = 0, **changes: Any
) -> SavedModel:
    shape = (128,) if image_format is None else (image_format.channels, image_format.size, image_format.size)
    config = ModelConfig(config) if isinstance(config, str) else config
    card = replace(ModelCard(config, shape, CLASSES, False, image_format=image_format), **changes)
    torch.manual_seed(seed)
    model = SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)
    nn.init.normal_(model.classifier.weight, std=0.3)  # probabilities that differ from image to image
    return model.eval()


def pictures(number: int = 5, size: tuple[int, int] = (32, 32)) -> Tensor:
    """Images with something to see at all scales, uint8 ``[sample, channel, row, column]``."""
    numbers = np.random.default_rng(0)
    images = np.zeros((number, *size, 3))
    for scale in (2, 5, 11, 32):
        for image in images:
            coarse = numbers.uniform(0, 64, (scale, scale, 3)).astype(np.uint8)
            image += np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    return torch.from_numpy(images.astype(np.uint8)).permute(0, 3, 1, 2)


def picture(size: tuple[int, int] = (60, 80)) -> Image.Image:
    return Image.fromarray(pictures(1, size)[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedModel, ExportReport]:
    """A model and what its export said."""
    model = saved_model()
    before = copy.deepcopy(model.train())
    report = export_onnx(model, tmp_path_factory.mktemp("exported") / "deep" / "ants.onnx", pictures())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    return model.eval(), report


def session_of(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


# What is written


def test_the_report(exported):
    _, report = exported
    assert report.samples == 5
    assert 0 <= report.max_difference < 1e-5
    assert report.labels_equal


def test_two_files_are_written_and_nothing_else(exported):
    _, report = exported
    assert sorted(path.name for path in report.file.parent.iterdir()) == ["ants.onnx", "ants.preprocessing.json"]
    assert (report.file.name, report.preprocessing.name) == ("ants.onnx", "ants.preprocessing.json")


def test_the_graph(exported):
    session = session_of(exported[1].file)
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
    assert (inputs.name, inputs.type, inputs.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    assert (outputs.name, outputs.type, outputs.shape[1:]) == ("probabilities", "tensor(float)", [3])
    assert isinstance(inputs.shape[0], str)
    assert outputs.shape[0] == inputs.shape[0]


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_the_graph_takes_batches_of_any_size(exported, size):
    model, report = exported
    images = pictures(size)
    found = session_of(report.file).run(None, {"images": images.numpy().astype(np.float32) / 255})[0]
    expected = model.predict_proba(images).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 0.05 or size == 1  # not the same for all images


# Preprocessing


def follow(description: dict[str, Any], path: Path) -> NDArray[np.float32]:
    """A file as input of the graph, made by nothing but what the description says."""
    with Image.open(path) as file:
        pixels: Image.Image = file
        if file.mode.startswith("I"):
            pixels = Image.fromarray(np.round(np.asarray(file) / 257).astype(np.uint8))
        pixels = pixels.convert(description["mode"])
        width, height = pixels.size
        scale = description["shorter_side"] / min(width, height)
        if scale < 1:
            pixels = pixels.resize(
                (round(scale * width), round(scale * height)),
                Image.Resampling.BICUBIC,
                reducing_gap=description["reducing_gap"],
            )
        pixels = ImageOps.exif_transpose(pixels)
        pixels = pixels.resize((description["size"], description["size"]), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, np.float32).reshape(description["size"], description["size"], -1) / 255
    return array.transpose(2, 0, 1)[np.newaxis]


def write_pictures(folder: Path) -> list[Path]:
    """Files of many kinds."""
    image = picture()
    exif = Image.Exif()
    exif[ExifTag.Orientation] = 6
    image.save(folder / "a.jpg")
    image.save(folder / "b.jpg", exif=exif)
    picture((700, 500)).save(folder / "c.jpg")
    picture((20, 90)).save(folder / "d.png")
    image.convert("CMYK").save(folder / "e.jpg")
    image.quantize(16).save(folder / "f.png", transparency=3)
    image.putalpha(image.getchannel(0))
    image.save(folder / "g.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257 + 100).save(folder / "h.png")
    image.convert("1").save(folder / "i.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_preprocessing_is_described_so_that_it_can_be_followed(tmp_path, channels):
    image_format = ImageFormat(32, channels)
    card = saved_model(image_format=image_format).card
    description = json.loads(json.dumps(preprocessing_of(card)))
    for path in write_pictures(tmp_path):
        expected = np.moveaxis(image_format.fit(read_image(path, image_format)), 2, 0)
        difference = np.abs(follow(description, path)[0] * 255 - expected)
        if path.name == "c.jpg":  # decoded at half its size
            assert difference.mean() < 2
        else:
            assert difference.max() < 1e-4, path


def test_the_description_of_an_export(exported):
    model, report = exported
    description = json.loads(report.preprocessing.read_text())
    assert description == preprocessing_of(model.card)
    assert description["classes"] == list(CLASSES)
    assert description["input"] == {"name": "images", "type": "float32", "shape": ["batch", 3, 32, 32]}
    assert description["output"] == {"name": "probabilities", "type": "float32", "shape": ["batch", 3]}
    assert (description["size"], description["mode"], description["shorter_side"]) == (32, "RGB", 45)
    assert all(isinstance(step, str) for step in description["steps"])
    text = " ".join(description["steps"])
    for number in ("32 x 32", "45 pixels", "s = 45 /", "least 90 pixels"):
        assert number in text


def test_the_description_for_four_channels():
    text = " ".join(preprocessing_of(saved_model(image_format=ImageFormat(32, 4)).card)["steps"])
    assert "In both resizes, resize each channel on its own" in text
    assert "channel (R, G, B, A)" in text


# Models of other kinds


def test_a_binary_model_without_images(tmp_path):
    model = saved_model("mlp", None, classes=("no", "yes"), binary=True)
    dataset = load_dataset("colored-digits", subset=40)
    inputs = example_inputs(dataset)
    assert inputs.shape == (64, 128)
    report = export_onnx(model, tmp_path / "digits.onnx", inputs)
    found = session_of(report.file).run(None, {"inputs": inputs.numpy()})[0]
    np.testing.assert_allclose(found, model.predict_proba(inputs).detach().numpy(), atol=1e-5)
    description = json.loads(report.preprocessing.read_text())
    assert description["input"] == {"name": "inputs", "type": "float32", "shape": ["batch", 128]}
    assert description["output"]["shape"] == ["batch", 2]
    assert description["steps"] == ["The model takes no image files, but float32 numbers as its data set has them."]


def test_a_real_backbone_on_real_images(tmp_path, data_root):
    weights = data_root / "weights" / "mobilenetv2_100_imagenet.safetensors"
    config = backbone_config("mobilenetv2_100", weights=weights)
    image_format = ImageFormat(64)
    model = saved_model(config, image_format)
    load_initial_weights(model.featurizer, config.weights, weights)
    images = example_images([data_root / "PACS"], image_format)
    report = export_onnx(model, tmp_path / "model.onnx", images)
    assert report.samples == 64
    assert report.labels_equal

    session, description = session_of(report.file), json.loads(report.preprocessing.read_text())
    paths = sorted((data_root / "PACS").glob("*/*/*"))[::500]
    found = [session.run(None, {"images": follow(description, path)})[0][0] for path in paths]
    with torch.no_grad():
        expected = model.predict_proba(example_images(paths, image_format)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    labels = np.argmax(found, 1)
    assert labels.tolist() == expected.argmax(1).tolist()
    assert len(set(labels.tolist())) > 1


# What cannot be exported


class MeanSubtracted(nn.Module):
    """Features that depend on the batch."""

    num_features = 3

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs.mean((2, 3))
        return features - features.mean(0)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_model_that_depends_on_its_batch(tmp_path, number):
    with registered(FEATURIZERS, "mean-subtracted", MeanSubtracted):
        model = saved_model("mean-subtracted")
    with pytest.raises(
        ConfigError,
        match=r"^the model cannot be exported: its prediction for a sample depends on the others in the batch "
        r"\(probabilities change by up to 0\.\d+\), and .* every batch size; use 'fishr predict', or train",
    ):
        export_onnx(model, tmp_path / "model.onnx", pictures(number))
    assert not list(tmp_path.iterdir())


class Counted(MeanSubtracted):
    """Features that depend on the batch's size alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean((2, 3)) * len(inputs)


def test_a_model_that_depends_on_the_size_of_its_batch(tmp_path):
    with registered(FEATURIZERS, "counted", Counted):
        model = saved_model("counted")
    with pytest.raises(ConfigError, match="its prediction for a sample depends on the others in the batch"):
        export_onnx(model, tmp_path / "model.onnx", pictures(4))


class Branching(MeanSubtracted):
    """Features whose computation depends on values."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean((2, 3)) if inputs.sum() > 0 else inputs.amax((2, 3))


def test_a_network_that_onnx_cannot_express(tmp_path):
    with registered(FEATURIZERS, "branching", Branching):
        model = saved_model("branching")
    with pytest.raises(
        ConfigError, match=r"^the network cannot be exported to ONNX with a batch of any size \(.+\): a newer version"
    ) as caught:
        export_onnx(model, tmp_path / "model.onnx", pictures())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_kept(tmp_path, exported, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"an older export")
    monkeypatch.setattr(export, "_write_onnx", lambda model, inputs, name, file: shutil.copy(exported[1].file, file))
    with pytest.raises(
        FishrError,
        match=r"^the exported model differs from the original: probabilities of 5 samples by up to 0\.\d+ in "
        r"onnxruntime, expected at most 0\.0001; nothing was written",
    ):
        export_onnx(saved_model(seed=1), file, pictures())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older export"]


@pytest.mark.parametrize(("error", "kept"), [(0.8e-4, True), (1.2e-4, False), (np.nan, False)])
def test_the_tolerance(tmp_path, exported, monkeypatch, error, kept):
    model, report = exported
    monkeypatch.setattr(export, "_write_onnx", lambda model, inputs, name, file: shutil.copy(report.file, file))
    run = onnxruntime.InferenceSession.run

    def run_with_error(session: Any, outputs: Any, inputs: dict[str, NDArray[np.float32]]) -> list[Any]:
        found = run(session, outputs, inputs)[0]
        found[-1, 0] += error if len(found) == 2 else 0
        return [found]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run_with_error)
    if kept:
        assert export_onnx(model, tmp_path / "model.onnx", pictures()).max_difference == pytest.approx(error, rel=0.1)
    else:
        with pytest.raises(FishrError, match="differs from the original"):
            export_onnx(model, tmp_path / "model.onnx", pictures())
    assert (tmp_path / "model.onnx").exists() == kept


def test_labels_that_differ_are_told(tmp_path, exported, monkeypatch):
    model, report = exported
    monkeypatch.setattr(export, "_write_onnx", lambda model, inputs, name, file: shutil.copy(report.file, file))
    tied = copy.deepcopy(model)
    with torch.no_grad():
        for value in (tied.classifier.weight, tied.classifier.bias):
            value[1:] = value[0]
    found = [np.full((5, 3), 1 / 3, np.float32) + np.float32([0, 1e-6, 0])]
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda _, __, inputs: [found[0][: len(next(iter(inputs.values())))]]
    )
    assert not export_onnx(tied, tmp_path / "model.onnx", pictures()).labels_equal


def test_probabilities_that_are_not_finite(tmp_path):
    model = saved_model()
    nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(DataError, match="the model's probabilities are not finite"):
        export_onnx(model, tmp_path / "model.onnx", pictures())


def test_inputs_of_another_shape(tmp_path):
    for images, came in ((torch.zeros(2, 1, 32, 32), r"\[1, 32, 32\] \(2 of"), (pictures(1)[:0], r".* \(0 of")):
        with pytest.raises(DataError, match=rf"at least one input of shape \[3, 32, 32\], got {came} them"):
            export_onnx(saved_model(), tmp_path / "model.onnx", images)


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(ConfigError, match=rf"^{tmp_path} is a folder: name the file to write, such as .*/model\.onnx$"):
        export_onnx(saved_model(), tmp_path, pictures())


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["onnxruntime"], "exporting needs onnxruntime, which is not installed: pip install 'fishr[onnx]'"),
        (["onnx", "onnxscript"], "exporting needs onnx and onnxscript, which are not installed: pip install 'fishr[on"),
    ],
)
def test_packages_that_are_not_installed(tmp_path, monkeypatch, missing, message):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ConfigError) as caught:
        export_onnx(saved_model(), tmp_path / "model.onnx", pictures())
    assert str(caught.value).startswith(message)


# What it is compared on


def test_images_are_spread_over_the_folder(tmp_path):
    for index in range(130):
        shade = Image.new("RGB", (4, 4), (index, index, index))
        shade.save(tmp_path / f"{index:03}.png")
    images = example_images([tmp_path], ImageFormat(2))
    assert images.shape == (64, 3, 2, 2)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [index * 130 // 64 for index in range(64)]
    two = example_images([tmp_path / "007.png", tmp_path / "003.png"], ImageFormat(2))
    assert two[:, 0, 0, 0].tolist() == [7, 3]


def test_images_that_cannot_be_read_are_left_out(tmp_path, warnings_logged):
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    assert len(example_images([tmp_path], FORMAT)) == 1
    assert warnings_logged() == [f"left out {tmp_path / 'b.png'}: the file is empty"]
    with pytest.raises(DataError, match=r"^none of the images to compare on can be read: name others with --images$"):
        example_images([tmp_path / "b.png"], FORMAT)


def test_inputs_are_spread_over_the_domains():
    dataset = load_dataset("colored-digits", subset=40)
    inputs = example_inputs(dataset)
    for index, samples in enumerate(dataset.domains.values()):
        part = inputs[16 * index : 16 * (index + 1)]
        assert torch.equal(part, samples.inputs[[position * 40 // 16 for position in range(16)]])
