"""An analysis of models and runs as a whole."""

import json
from pathlib import Path

import pytest

from fishr.analysis import analyze
from fishr.analysis.head import head_statistics
from fishr.analysis.statistics import DIAGONALS, QUANTITIES
from fishr.data import MultiDomainDataset, Samples, load_dataset
from fishr.errors import ConfigError, DataError
from fishr.models import ModelConfig, load_model, save_model
from fishr.training import RunConfig, train
from oracles import relative_error
from small_models import CLASSES, small_model, small_samples
from small_runs import write_pictures

STEPS = 6


@pytest.fixture(scope="module")
def digits() -> MultiDomainDataset:
    return load_dataset("colored-digits", subset=60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for algorithm in ("erm", "fishr"):
        model = ModelConfig("mlp", {"width": 8, "depth": 2})
        config = RunConfig.for_dataset(digits, algorithm, steps=STEPS, checkpoint_every=2, model=model)
        train(config, digits, folder / algorithm, device="cpu", snapshots=True)
    return {name: folder / name for name in ("erm", "fishr")}


@pytest.fixture(scope="module")
def both(runs, digits):
    return analyze(list(runs.values()), digits, device="cpu")


def saved(folder: Path, **options) -> Path:
    folder.mkdir()
    save_model(folder, small_model(**options).float())
    return folder


def toys(**sizes: int) -> MultiDomainDataset:
    samples = {name: small_samples(small_model(), size, seed) for seed, (name, size) in enumerate(sizes.items())}
    domains = {name: Samples(inputs.float(), targets) for name, (inputs, targets) in samples.items()}
    return MultiDomainDataset("toys", "vectors", domains, CLASSES[:3])


def test_the_statistics_are_those_of_all_samples(both, runs, digits):
    model = load_model(runs["fishr"])
    for name, samples in digits.domains.items():
        expected = head_statistics(model, samples, batch_size=100)
        found = both.models[1].head.domains[name]
        assert found.samples == len(samples.targets)
        for quantity in QUANTITIES:
            assert relative_error(found.of(quantity), expected.of(quantity)) < 1e-5


def test_roles_are_those_of_the_training(both):
    assert both.models[0].roles == {
        "+80%": "trained on",
        "+90%": "trained on",
        "-90%": "held out",
        "gray": "evaluation only",
    }


def test_the_last_checkpoint_is_the_model(both):
    for model in both.models:
        assert list(model.checkpoints) == [2, 4, STEPS]
        assert model.checkpoints[STEPS] == model.head.as_dict(both.epsilon)
        assert model.checkpoints[2] != model.head.as_dict(both.epsilon)


def test_the_line_is_that_of_the_two_models(both):
    assert list(both.line.risks) == list(both.models[0].head.domains)
    assert both.models[0].plane is None


def test_models_without_snapshots_have_no_checkpoints(tmp_path):
    found = analyze([saved(tmp_path / "model")], toys(north=9, south=8), device="cpu")
    assert found.models[0].checkpoints == {}
    assert found.models[0].roles == {}
    assert found.line is None


def test_a_plane_where_it_is_asked_for(tmp_path):
    found = analyze([saved(tmp_path / "model")], toys(north=9, south=8), device="cpu", plane=True)
    assert found.models[0].plane.risks["south"].shape == (11, 11)


def test_rows_of_weights(tmp_path):
    found = analyze([saved(tmp_path / "model")], toys(north=9, south=8), layers=["featurizer.3"], device="cpu")
    head, layer = found.models[0].head, found.models[0].layers[0]
    table = found.weights()
    assert table.num_rows == 2 * (18 + 30)
    assert set(table["parameter"].to_pylist()) == {
        "classifier.weight",
        "classifier.bias",
        "featurizer.3.weight",
        "featurizer.3.bias",
    }
    for part in (head, layer):
        rows = [row for row in table.to_pylist() if row["domain"] == "south" and row["parameter"] in part.parameters]
        for quantity in DIAGONALS:
            assert [row[quantity] for row in rows] == part.domains["south"].of(quantity).tolist()
    model = load_model(tmp_path / "model")
    bias = next(row for row in rows if row["parameter"] == "featurizer.3.bias" and row["index"] == 4)
    assert model.get_parameter("featurizer.3.bias").numel() == 5
    assert bias["gradient"] == layer.domains["south"].gradient[-1].item()


def test_it_is_deterministic(tmp_path):
    folder = saved(tmp_path / "model")
    one, again, other = (
        analyze([folder], toys(north=9, south=8), layers=["featurizer"], device="cpu", seed=seed).as_dict()
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one["models"][0]["head"] == other["models"][0]["head"]  # nothing of it is random
    assert one["models"][0]["layers"] != other["models"][0]["layers"]


def test_what_is_compared(both, runs, digits, tmp_path):
    assert both.compared == ["+80%", "+90%"]
    assert analyze([saved(tmp_path / "model")], toys(north=9, south=8), device="cpu").compared == ["north", "south"]
    model = ModelConfig("mlp", {"width": 8, "depth": 2})
    config = RunConfig.for_dataset(digits, "erm", steps=1, test_domains=("+80%",), model=model)
    train(config, digits, tmp_path / "run", device="cpu")
    assert analyze([runs["erm"], tmp_path / "run"], digits, device="cpu").compared == list(digits.domains)


def test_different_networks_have_no_line(tmp_path):
    models = [saved(tmp_path / "one"), saved(tmp_path / "other", width=6)]
    assert analyze(models, toys(north=9, south=8), device="cpu").line is None


def test_it_can_be_written_as_json(both):
    json.dumps(both.as_dict(), allow_nan=False)


def test_estimated_hessians_have_no_inconsistency(tmp_path):
    found = analyze([saved(tmp_path / "model")], toys(north=9, south=8), layers=["featurizer.3"], device="cpu")
    content = found.models[0].layers[0].as_dict(0.01)
    assert content["inconsistency"] == {"diagonal": None, "exact": None}
    assert content["distances"]["hessian"]["sampling"] is None
    assert content["domains"]["north"]["correlation"] is None
    assert content["domains"]["north"]["hessian_error"] > 0


def test_images_of_a_folder(tmp_path):
    write_pictures(tmp_path / "pictures", domains=("lab", "shop", "street"), each=3)
    dataset = load_dataset(str(tmp_path / "pictures"), image_size=16, cache="ram")
    config = RunConfig.for_dataset(dataset, "erm", steps=1, test_domains=("street",), model=ModelConfig("mnist-cnn"))
    train(config, dataset, tmp_path / "run", device="cpu")
    found = analyze([tmp_path / "run"], dataset, device="cpu")
    assert [domain.samples for domain in found.models[0].head.domains.values()] == [6, 6, 6]


@pytest.mark.parametrize(
    ("names", "data", "options", "error", "message"),
    [
        ([], {"a": 3, "b": 3}, {}, ConfigError, r"^give one model, or two different ones, got none$"),
        (["x", "x"], {"a": 3, "b": 3}, {}, ConfigError, r"^give one model, or two different ones, got .*x, .*x$"),
        (["x"], {"a": 3}, {}, DataError, r"^an analysis compares domains, and 'toys' has but one, 'a'$"),
        (["x"], {"a": 3, "b": 1}, {}, DataError, r"^domain 'b' of 'toys' has one sample; at least 2 are needed$"),
        (
            ["x"],
            {"a": 3, "b": 3},
            {"epsilon": -1.0},
            ConfigError,
            r"^epsilon and seed must be at least 0 and .* got -1\.0, 0 and 1024$",
        ),
        (["x"], {"a": 3, "b": 3}, {"batch_size": 0}, ConfigError, r"batch_size at least 1, got 0\.01, 0 and 0$"),
        (["x"], {"a": 3, "b": 3}, {"epsilon": float("nan")}, ConfigError, r"got nan, 0 and 1024$"),
        (["x"], {"a": 3, "b": 3}, {"seed": -1}, ConfigError, r"got 0\.01, -1 and 1024$"),
        (
            ["x"],
            {"a": 3, "b": 3},
            {"layers": ["classifier"]},
            ConfigError,
            r"^classifier\.weight is in classifier and in ",
        ),
        (
            ["x"],
            {"a": 3, "b": 3},
            {"layers": ["featurizer", "featurizer.3"]},
            ConfigError,
            r"^featurizer\.3\.weight is in featurizer\.3 and in featurizer: layers must not overlap, and the head is",
        ),
        (["x"], {"a": 3, "b": 3}, {"layers": ["y"]}, ConfigError, r"^unknown layer 'y'"),
        (["y"], {"a": 3, "b": 3}, {}, DataError, r"y is not a saved model: model\.json is missing$"),
    ],
)
def test_bad_input(tmp_path, names, data, options, error, message):
    saved(tmp_path / "x")
    with pytest.raises(error, match=message):
        analyze([tmp_path / name for name in names], toys(**data), device="cpu", **options)


def test_layers_of_a_network_that_sees_the_batch(tmp_path, digits):
    config = RunConfig.for_dataset(digits, "mtl", steps=1, model=ModelConfig("mlp", {"width": 8, "depth": 1}))
    train(config, digits, tmp_path / "run", device="cpu")
    assert analyze([tmp_path / "run"], digits, device="cpu").models[0].head.domains["gray"].samples == 60
    with pytest.raises(ConfigError, match=r"^what the model predicts for a sample depends on its batch, so that no"):
        analyze([tmp_path / "run"], digits, device="cpu", layers=["featurizer"])
