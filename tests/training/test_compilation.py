"""Runs with a compiled featurizer."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fishr.algorithms import ALGORITHMS, Algorithm
from fishr.cli import main
from fishr.data import DomainBatch, MultiDomainDataset
from fishr.errors import ConfigError, RunInterruptedError
from fishr.models import ModelConfig, build_model, load_model
from fishr.training import train
from fishr.training.compilation import compile_featurizer, uncompiled
from small_runs import run_config, signal_at

MANY_GRADIENTS = {"andmask", "sandmask", "iga", "mldg"}


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as always, but run by torch's own kernels: none are generated, which takes long."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod_of(nn.Module.compile, backend="aot_eager"))


def partialmethod_of(method: Callable[..., None], **given: object) -> Callable[..., None]:
    return lambda self, **options: method(self, **options, **given)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_model(folder).state_dict()


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4)


CONFIG = run_config("fishr", model=ModelConfig("mlp", {"width": 8}))


@pytest.fixture(scope="module")
def plain(digits: MultiDomainDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(CONFIG, digits, folder, device="cpu")
    return weights(folder)


def test_a_compiled_run_ends_with_the_same_weights(
    quickly: None, plain: dict[str, Tensor], digits: MultiDomainDataset, tmp_path: Path
) -> None:
    result = train(CONFIG, digits, tmp_path / "run", device="cpu", compile=True)
    close(weights(tmp_path / "run"), plain)
    assert len(result.records) == 3
    # One graph, for training batches: what is evaluated, in batches of other sizes, is not compiled.
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_a_run_is_continued_with_it_or_without(
    first: bool, then: bool, quickly: None, plain: dict[str, Tensor], digits: MultiDomainDataset, tmp_path: Path
) -> None:
    with pytest.raises(RunInterruptedError):
        train(CONFIG, digits, tmp_path, device="cpu", compile=first, observer=signal_at(5))
    assert train(CONFIG, digits, tmp_path, device="cpu", compile=then).trained
    close(weights(tmp_path), plain)
    assert not train(CONFIG, digits, tmp_path, device="cpu", compile=True).trained


def test_on_the_command_line(quickly: None, tmp_path: Path) -> None:
    options = ["--data", "colored-digits", "--subset", "40", "--steps", "2", "--quiet", "--device", "cpu"]
    main(["train", *options, "--compile", "--output", str(tmp_path / "run")])
    assert counters["stats"]["unique_graphs"] == 1
    assert (tmp_path / "run/DONE").exists()


def algorithm_of(name: str) -> Algorithm:
    torch.manual_seed(0)
    algorithm_class = ALGORITHMS[name]
    network = build_model(algorithm_class.model_config(ModelConfig("mlp", {"width": 8})), (6,), 3)
    return algorithm_class(*network, 3, algorithm_class.Config.recommended("vectors"), steps=3)


def take_steps(algorithm: Algorithm) -> None:
    optimizers = algorithm.configure_optimizers()
    for step in range(3):
        torch.manual_seed(step)
        inputs, targets = torch.randn(12, 6), torch.arange(12) % 3
        algorithm.training_step(DomainBatch(inputs, targets, (4, 4, 4)), step, optimizers)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in MANY_GRADIENTS])
def test_algorithms_learn_the_same(name: str, quickly: None) -> None:
    algorithm, compiled = algorithm_of(name), algorithm_of(name)
    compile_featurizer(compiled)
    take_steps(algorithm)
    take_steps(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    close(dict(compiled.state_dict()), dict(algorithm.state_dict()))


@pytest.mark.parametrize("name", sorted(MANY_GRADIENTS))
def test_many_gradients_through_a_pass_are_refused(name: str, digits: MultiDomainDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes more than one gradient through a pass .*: leave compilation out"):
        train(run_config(algorithm=name), digits, tmp_path, device="cpu", compile=True)


def test_fishr_on_other_layers_is_refused(digits: MultiDomainDataset, tmp_path: Path) -> None:
    config = run_config("fishr", model=ModelConfig("mlp"), hparams={"layers": "all"})
    with pytest.raises(ConfigError, match=r"^Fishr takes more than one gradient through a pass of the featurizer"):
        train(config, digits, tmp_path, device="cpu", compile=True)


def test_inside_networks_run_as_they_are_written(quickly: None) -> None:
    algorithm = algorithm_of("erm")
    compile_featurizer(algorithm)
    with uncompiled():
        algorithm(torch.randn(4, 6))
    assert counters["stats"]["unique_graphs"] == 0
    algorithm(torch.randn(4, 6))
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_it_is_said(
    digits: MultiDomainDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: object, inputs: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(nn.Module, "compile", partialmethod_of(nn.Module.compile, backend=backend))
    with pytest.raises(
        ConfigError,
        match=r"^the network cannot be compiled here \(.*no C\+\+ compiler found.*\): leave compilation out "
        r"\(--compile\); for a CPU it needs a C\+\+ compiler such as g\+\+$",
    ):
        train(CONFIG, digits, tmp_path, device="cpu", compile=True)


def test_with_generated_kernels(plain: dict[str, Tensor], digits: MultiDomainDataset, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler: neither g++ nor clang++ is on the PATH")
    train(CONFIG, digits, tmp_path, device="cpu", compile=True)
    close(weights(tmp_path), plain)
