import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fishr.errors import DataError, FishrError
from fishr.models import FEATURIZERS, ModelCard, ModelConfig, SavedModel, build_model, load_model, save_model
from small_runs import registered


def model(*, binary: bool = False, classes: tuple[str, ...] = ("ant", "bee", "cat"), **options: Any) -> SavedModel:
    card = ModelCard(ModelConfig("mlp", {"width": 6, **options}), (2, 4), classes, binary, {"config": {"seed": 3}})
    torch.manual_seed(0)
    return SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path, model())
    return tmp_path


def change_card(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(content | changes))


# Round trip


@pytest.mark.parametrize("binary", [False, True])
def test_saved_and_loaded_it_is_the_same(binary: bool, tmp_path: Path) -> None:
    original = model(binary=binary, classes=("ant", "bee") if binary else ("ant", "bee", "cat"))
    save_model(tmp_path, original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    loaded = load_model(tmp_path)
    inputs = torch.randn(20, 2, 4)
    assert torch.equal(loaded(inputs), original(inputs))
    assert loaded(inputs).shape == (20, 1 if binary else 3)
    assert loaded.card == original.card
    assert original.training
    assert not any(module.training for module in loaded.modules())


def test_a_path_may_be_text(saved: Path) -> None:
    assert load_model(str(saved)).card == load_model(saved).card


def test_the_global_random_state_does_not_matter(saved: Path) -> None:
    torch.manual_seed(99)
    one = load_model(saved).state_dict()
    torch.manual_seed(98)
    assert all(torch.equal(value, one[name]) for name, value in load_model(saved).state_dict().items())


def test_the_card_is_for_people_too(saved: Path) -> None:
    assert json.loads((saved / "model.json").read_text()) == {
        "format": 1,
        "model": {"featurizer": "mlp", "options": {"width": 6}, "init": "default"},
        "input_shape": [2, 4],
        "classes": ["ant", "bee", "cat"],
        "binary": False,
        "provenance": {"config": {"seed": 3}},
    }


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, input_shape: tuple[int, ...]) -> None:
            super().__init__()
            self.num_features = 4
            self.one = nn.Linear(4, 4)
            self.again = self.one

    card = ModelCard(ModelConfig("tied"), (4,), ("a", "b"), False)
    with registered(FEATURIZERS, "tied", Tied):
        save_model(tmp_path, SavedModel(*build_model(card.model, (4,), 2), card))
        load_model(tmp_path)


# Probabilities


def test_probabilities_of_one_logit_are_two_columns() -> None:
    binary = model(binary=True, classes=("no", "yes"))
    inputs = torch.randn(7, 2, 4)
    probabilities = binary.predict_proba(inputs)
    assert probabilities.shape == (7, 2)
    assert torch.allclose(probabilities[:, 1], 1 / (1 + (-binary(inputs)[:, 0]).exp()))
    assert torch.allclose(probabilities.sum(1), torch.ones(7))
    assert torch.equal(probabilities.argmax(1), (binary(inputs)[:, 0] > 0).long())


def test_probabilities_of_several_logits() -> None:
    several = model()
    inputs = torch.randn(7, 2, 4)
    exponentials = several(inputs).exp()
    assert torch.allclose(several.predict_proba(inputs), exponentials / exponentials.sum(1, keepdim=True))


# Not a model


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_a_missing_file(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(DataError, match=rf"^{saved} is not a saved model: {missing} is missing$"):
        load_model(saved)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/nowhere is not a saved model: model.json is missing$"):
        load_model(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder(saved: Path) -> None:
    with pytest.raises(DataError, match="is not a saved model"):
        load_model(saved / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b"null", "AttributeError"),
        (b"{}", "KeyError: 'format'"),
        (b'{"format": 1}', "KeyError: 'model'"),
        (b'{"version": 3, "name": "somebody else\'s"}', "KeyError: 'format'"),
    ],
)
def test_a_foreign_card(saved: Path, content: bytes, reason: str) -> None:
    (saved / "model.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: {reason}"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"model.json is of another format version; this version reads format 1$"),
        ({"model": "mlp"}, r"is not a usable saved model: TypeError"),
        ({"model": {"featurizer": "mlp", "depth": 3}}, r"is not a usable saved model: TypeError: .*'depth'"),
        ({"input_shape": 8}, r"is not a usable saved model: TypeError"),
        ({"classes": None}, r"is not a usable saved model: TypeError"),
    ],
)
def test_a_card_that_says_something_else(saved: Path, change: dict[str, Any], message: str) -> None:
    change_card(saved, **change)
    with pytest.raises(DataError, match=message):
        load_model(saved)


def test_a_card_that_names_an_unknown_network(saved: Path) -> None:
    change_card(saved, model={"featurizer": "os.system", "options": {"command": "true"}})
    with pytest.raises(FishrError, match=r"unknown featurizer 'os.system'"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "which"),
    [
        ({"classes": ["ant", "bee"]}, "classifier.weight"),
        ({"binary": True}, "classifier.weight"),
        ({"input_shape": [3, 4]}, "featurizer.1.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 5}}}, "featurizer.1.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 6, "depth": 3}}}, "featurizer.5.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 6, "depth": 1}}}, "featurizer.3.weight"),
    ],
)
def test_weights_that_do_not_fit_the_card(saved: Path, change: dict[str, Any], which: str) -> None:
    change_card(saved, **change)
    with pytest.raises(DataError, match=rf"(?s)^the weights in {saved} do not fit .* model.json: .*{which}"):
        load_model(saved)


@pytest.mark.parametrize("change", ["remove", "add", "reshape"])
def test_other_weights_than_the_cards(saved: Path, change: str) -> None:
    weights = load_file(saved / "model.safetensors")
    if change == "remove":
        del weights["classifier.bias"]
    elif change == "add":
        weights["classifier.extra"] = torch.zeros(1)
    else:
        weights["classifier.bias"] = torch.zeros(4)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(DataError, match=rf"(?s)^the weights in {saved} do not fit .*classifier"):
        load_model(saved)


def cut(content: bytes) -> bytes:
    return content[:-1]


def without_header(content: bytes) -> bytes:
    return content[8:]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def other_header(content: bytes) -> bytes:
    return content.replace(b"F32", b"F99", 1)


@pytest.mark.parametrize("tamper", [cut, without_header, longer, other_header, lambda _: b"", lambda _: b"x" * 100])
def test_weights_that_are_damaged(saved: Path, tamper: Any) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(tamper(file.read_bytes()))
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: SafetensorError"):
        load_model(saved)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FISHR_TEST_EXECUTED"],)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_executed(saved: Path, name: str, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = saved.parent / f"{saved.name}-executed"
    monkeypatch.setenv("FISHR_TEST_EXECUTED", str(executed))
    content = pickle.dumps({"format": Malicious()}, protocol=protocol)
    (saved / name).write_bytes(content)
    with pytest.raises(DataError, match="is not a usable saved model"):
        load_model(saved)
    assert not executed.exists()
    # The bait is real.
    pickle.loads(content)
    assert executed.is_dir()


def test_a_torch_file_is_never_executed(saved: Path) -> None:
    torch.save(model().state_dict(), saved / "model.safetensors")
    with pytest.raises(DataError, match="is not a usable saved model: SafetensorError"):
        load_model(saved)
