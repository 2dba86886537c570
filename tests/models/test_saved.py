import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fishr.data.image_format import ImageFormat
from fishr.errors import DataError, FishrError
from fishr.files import checksums
from fishr.models import FEATURIZERS, ModelCard, ModelConfig, SavedModel, build_model, load_model, save_model
from fishr.models.backbone import backbone_config
from fishr.models.card import card_as_markdown
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
    """Change the card and its checksum, as somebody would who means harm."""
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(content | changes))
    vouch_for(folder)


def vouch_for(folder: Path) -> None:
    """Write the checksums of what lies there."""
    (folder / "SHA256SUMS").write_text(checksums(folder, "model.json", "model.safetensors"))


# Round trip


@pytest.mark.parametrize("binary", [False, True])
def test_saved_and_loaded_it_is_the_same(binary: bool, tmp_path: Path) -> None:
    original = model(binary=binary, classes=("ant", "bee") if binary else ("ant", "bee", "cat"))
    save_model(tmp_path, original)
    files = ["README.md", "SHA256SUMS", "model.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
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
        "format": 2,
        "model": {"featurizer": "mlp", "options": {"width": 6}, "init": "default", "weights": None},
        "input_shape": [2, 4],
        "classes": ["ant", "bee", "cat"],
        "binary": False,
        "provenance": {"config": {"seed": 3}},
        "image_format": None,
    }
    assert (saved / "README.md").read_text() == card_as_markdown(model().card)


def test_the_format_of_images_is_on_the_card(tmp_path: Path) -> None:
    card = ModelCard(ModelConfig("mlp", {"width": 6}), (4, 8, 8), ("ant", "bee"), False, image_format=ImageFormat(8, 4))
    save_model(tmp_path, SavedModel(*build_model(card.model, card.input_shape, card.num_outputs), card))
    assert json.loads((tmp_path / "model.json").read_text())["image_format"] == {"size": 8, "channels": 4}
    assert load_model(tmp_path).card == card
    change_card(tmp_path, image_format={"size": 8, "channels": 2})
    with pytest.raises(DataError, match=r"is not a usable saved model: ConfigError: images have 1 \(gray\), 3 \(RGB\)"):
        load_model(tmp_path)
    change_card(tmp_path, image_format={"size": 8, "quality": 3})
    with pytest.raises(DataError, match=r"is not a usable saved model: ValueError: image_format must be .*'quality'"):
        load_model(tmp_path)


def test_the_model_of_a_runs_folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(saved, run / "model")
    for folder in (run, str(run), run / "model"):
        assert load_model(folder).card == load_model(saved).card
    # A model that lies in the folder itself comes first.
    save_model(run, model(width=5))
    assert load_model(run).card.model.options == {"width": 5}


def test_a_run_without_a_model_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(DataError, match=rf"^{tmp_path} is not a saved model: model.json is missing$"):
        load_model(tmp_path)


def test_bytes_are_images() -> None:
    """As they are stored and read; floats are taken to lie in [0, 1]."""
    several = model()
    images = torch.randint(0, 256, (5, 2, 4), dtype=torch.uint8)
    assert torch.equal(several(images), several(images.float() / 255))
    assert torch.equal(several.predict_proba(images), several.predict_proba(images.float() / 255))


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


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors", "SHA256SUMS"])
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
        (b"[]", "ValueError: the card must be"),
        (b"null", "ValueError: the card must be"),
        (b"{}", "ValueError: the card must be with a format"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"format": 2}', "KeyError: 'model'"),
        (b'{"format": 2, "model": {}, "input_shape": [], "classes": [], "binary": false}', "TypeError: .*featurizer"),
        (b'{"version": 3, "name": "somebody else\'s"}', "ValueError: the card must be with a format"),
    ],
)
def test_a_foreign_card(saved: Path, content: bytes, reason: str) -> None:
    (saved / "model.json").write_bytes(content)
    with pytest.raises(DataError, match=CHANGED.format(saved, "model.json")):
        load_model(saved)
    vouch_for(saved)
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: {reason}"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mlp"}, r"model must be a mapping, got 'mlp'$"),
        ({"model": {"featurizer": "mlp", "depth": 3}}, r"is not a usable saved model: TypeError: .*'depth'"),
        ({"model": {"featurizer": ["mlp"]}}, r"featurizer must be text"),
        ({"model": {"featurizer": "mlp", "options": [6]}}, r"options must be a mapping"),
        ({"model": {"featurizer": "mlp", "init": {}}}, r"init must be text"),
        ({"model": {"featurizer": "mlp", "weights": 3}}, r"weights must be text or null"),
        ({"model": {"featurizer": "timm"}}, r"KeyError: 'name'"),
        ({"model": {"featurizer": "mlp", "options": {"width": "6"}}}, r"cannot be built"),
        ({"model": {"featurizer": "mlp", "options": {"width": 10**15}}}, r"cannot be built: RuntimeError"),
        ({"model": {"featurizer": "mlp", "options": {"width": 10**30}}}, r"cannot be built"),
        ({"model": {"featurizer": "mlp", "init": "zeros"}}, r"cannot be built: init must be"),
        *(({"input_shape": value}, r"input_shape must be positive whole") for value in (8, [], [2, 0], [2.0], [True])),
        *(
            ({"classes": value}, r"classes must be two or more different names")
            for value in (None, "abc", ["a"], ["a", "a", "b"], ["a", "b", 3])
        ),
        ({"classes": ["a", "\ud800", "c"]}, r"UnicodeEncodeError"),
        ({"binary": True}, r"classes must be two different names"),
        ({"binary": 1}, r"binary must be true or false"),
        ({"image_format": 32}, r"image_format must be null, or size and channels"),
        ({"image_format": {"size": 32.5, "channels": 3}, "input_shape": [3, 32, 32]}, r"as whole numbers, got .*32\.5"),
        ({"image_format": {"size": 32, "channels": 3}, "input_shape": [3, 32, 31]}, r"must be \[3, 32, 32\], as image"),
        ({"provenance": []}, r"provenance must be a mapping"),
        ({"provenance": {"config": 3}}, r"config must be a mapping"),
        ({"provenance": {"config": {"data": ["mnist"]}}}, r"data must be text"),
        ({"provenance": {"versions": ["1"]}}, r"AttributeError"),
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
        ({"binary": True, "classes": ["ant", "bee"]}, "classifier.weight"),
        ({"input_shape": [3, 4]}, "featurizer.1.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 5}}}, "featurizer.1.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 6, "depth": 3}}}, "featurizer.5.weight"),
        ({"model": {"featurizer": "mlp", "options": {"width": 6, "depth": 1}}}, "featurizer.3.weight"),
    ],
)
def test_weights_that_do_not_fit_the_card(saved: Path, change: dict[str, Any], which: str) -> None:
    change_card(saved, **change)
    with pytest.raises(DataError, match=rf"^the weights in {saved} do not fit .* model.json: .*{which}"):
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
    vouch_for(saved)
    with pytest.raises(DataError, match=rf"^the weights in {saved} do not fit .*classifier"):
        load_model(saved)


def cut(content: bytes) -> bytes:
    return content[:-1]


def without_header(content: bytes) -> bytes:
    return content[8:]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def other_header(content: bytes) -> bytes:
    return content.replace(b"F32", b"F99", 1)


CHANGED = r"^{}: {} is not the file that was saved: it was changed or damaged$"


@pytest.mark.parametrize("tamper", [cut, without_header, longer, other_header, lambda _: b"", lambda _: b"x" * 100])
def test_weights_that_are_damaged(saved: Path, tamper: Any) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(tamper(file.read_bytes()))
    with pytest.raises(DataError, match=CHANGED.format(saved, "model.safetensors")):
        load_model(saved)
    vouch_for(saved)
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: SafetensorError"):
        load_model(saved)


def test_a_flipped_bit_anywhere_in_the_weights_is_found(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    for place in (9, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(DataError, match=CHANGED.format(saved, "model.safetensors")):
            load_model(saved)
    file.write_bytes(content)
    load_model(saved)


def test_weights_of_another_model_of_the_same_shape_are_found(saved: Path) -> None:
    weights = {name: value + 1 for name, value in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(DataError, match=CHANGED.format(saved, "model.safetensors")):
        load_model(saved)


def test_an_edited_card_is_found(saved: Path) -> None:
    """Also where it would load."""
    file = saved / "model.json"
    written = file.read_text()
    for edited in (written.replace('"ant"', '"bee"', 1).replace('"bee"', '"ant"', 2), written + " "):
        assert edited != written
        file.write_text(edited)
        with pytest.raises(DataError, match=CHANGED.format(saved, "model.json")):
            load_model(saved)
    file.write_text(written)
    load_model(saved)


@pytest.mark.parametrize("content", [b"", b"no sums\n", b"\xff\xfe\x00"])
def test_damaged_checksums(saved: Path, content: bytes) -> None:
    (saved / "SHA256SUMS").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{saved}(: model.json is not the file| is not a usable .*UnicodeDecode)"):
        load_model(saved)


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_another_format_version_is_said_before_anything_else(saved: Path, version: object) -> None:
    """Whatever else that version has or lacks."""
    for name in ("SHA256SUMS", "model.safetensors"):
        (saved / name).unlink()
    (saved / "model.json").write_text(json.dumps({"format": version}))
    message = rf"^{saved}/model.json is of another format version; this version reads format 2$"
    with pytest.raises(DataError, match=message):
        load_model(saved)


CONFIG: dict[str, Any] = {
    "data": "pacs",
    "data_options": {"seed": 0},
    "test_domains": ["sketch"],
    "algorithm": "erm",
    "hparams": {},
    "steps": 5,
    "seed": 0,
    "trial": 0,
    "average": None,
    "select": True,
    "out_fraction": 0.2,
}
PROVENANCE: dict[str, Any] = {
    "config": CONFIG,
    "step": 5,
    "train_domains": ["photo"],
    "accuracy": {"photo": {"in": 0.5}},
    "versions": {"fishr": "1"},
}


@pytest.mark.parametrize("key", [name for name in PROVENANCE if name not in ("train_domains", "versions")])
def test_provenance_of_a_run_is_whole(saved: Path, key: str) -> None:
    change_card(saved, provenance=PROVENANCE)
    assert load_model(saved).card.provenance == PROVENANCE
    change_card(saved, provenance={name: value for name, value in PROVENANCE.items() if name != key})
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: .*{key}"):
        load_model(saved)


@pytest.mark.parametrize("key", CONFIG)
def test_config_of_a_run_is_whole(saved: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    change_card(saved, provenance={**PROVENANCE, "config": config})
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: .*(that of a run|'{key}')"):
        load_model(saved)


@pytest.mark.parametrize(
    ("provenance", "config"),
    [
        ({"train_domains": "photo"}, {}),
        ({"train_domains": [3]}, {}),
        ({"accuracy": [0.5]}, {}),
        ({"accuracy": {"photo": 0.5}}, {}),
        ({"accuracy": {"photo": {"in": "half"}}}, {}),
        ({}, {"data": 3}),
        ({}, {"data_options": ["seed"]}),
        ({}, {"test_domains": "sketch"}),
        ({}, {"test_domains": [None]}),
        ({}, {"hparams": 3}),
        ({}, {"average": "sma"}),
    ],
    ids=repr,
)
def test_provenance_of_another_kind(saved: Path, provenance: dict[str, Any], config: dict[str, Any]) -> None:
    change_card(saved, provenance={**PROVENANCE, "config": {**CONFIG, **config}, **provenance})
    with pytest.raises(DataError, match=rf"^{saved} is not a usable saved model: [^\n]+$"):
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
    vouch_for(saved)
    with pytest.raises(DataError, match="is not a usable saved model"):
        load_model(saved)
    assert not executed.exists()
    # The bait is real.
    pickle.loads(content)
    assert executed.is_dir()


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A saved backbone."""
    config = backbone_config("test_resnet", weights=None)
    card = ModelCard(config, (3, 32, 32), ("ant", "bee"), False, image_format=ImageFormat(32))
    save_model(tmp_path, SavedModel(*build_model(config, card.input_shape, card.num_outputs), card))
    return tmp_path


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the network nor a file with tensors can be reached."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("socket.socket.connect", "socket.getaddrinfo", "torch.load", "torch.hub.load_state_dict_from_url"):
        monkeypatch.setattr(name, refuse)


@pytest.mark.usefixtures("sealed")
def test_a_saved_backbone_needs_nothing_else(backbone: Path) -> None:
    change_options(backbone, weights="hub:nobody/nothing")
    loaded = load_model(backbone)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert loaded(images).shape == (2, 2)
    assert not any(module.training for module in loaded.modules())


def change_options(folder: Path, weights: str | None = None, **options: Any) -> None:
    content = json.loads((folder / "model.json").read_text())["model"]
    change_card(folder, model={**content, "weights": weights, "options": {**content["options"], **options}})


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    "name",
    [
        "hf_hub:timm/test_resnet.r160_in1k",
        "hf-hub:timm/test_resnet.r160_in1k",
        "local-dir:{bait}",
        "local_dir:{bait}",
        "{bait}",
        "test_resnet.r160_in1k",
        "",
    ],
)
def test_a_card_that_names_a_backbone_elsewhere(backbone: Path, bait: tuple[Path, Path], name: str) -> None:
    folder, executed = bait
    change_options(backbone, name=name.format(bait=folder))
    with pytest.raises(
        DataError, match=rf"^the architecture in {backbone}/model.json cannot be built: unknown backbone"
    ):
        load_model(backbone)
    assert not executed.exists()


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_path", "{bait}/pytorch_model.bin"),
        ("pretrained", True),
        ("pretrained_cfg", {"file": "{bait}/pytorch_model.bin"}),
        ("pretrained_cfg_overlay", {"file": "{bait}/pytorch_model.bin"}),
        ("cache_dir", "{bait}"),
        ("features_only", True),
        ("scriptable", True),
    ],
)
def test_a_card_with_arguments_that_reach_elsewhere(
    backbone: Path, bait: tuple[Path, Path], name: str, value: Any
) -> None:
    folder, executed = bait
    value = json.loads(json.dumps(value).replace("{bait}", str(folder)))
    change_options(backbone, arguments={name: value})
    with pytest.raises(
        DataError, match=rf"^the architecture in {backbone}/model.json cannot be built: .* cannot have {name}: "
    ):
        load_model(backbone)
    assert not executed.exists()


@pytest.fixture
def bait(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder as timm's models on the hub, whose weights make another folder when they are unpickled; that folder."""
    folder = tmp_path_factory.mktemp("bait")
    executed = folder / "executed"
    monkeypatch.setenv("FISHR_TEST_EXECUTED", str(executed))
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 2}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    return folder, executed


def test_a_torch_file_is_never_executed(saved: Path) -> None:
    torch.save(model().state_dict(), saved / "model.safetensors")
    vouch_for(saved)
    with pytest.raises(DataError, match="is not a usable saved model: SafetensorError"):
        load_model(saved)
