"""Backbones of timm: the module, its config, its initial weights. Nothing here needs the network."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fishr.errors import ConfigError, DataError
from fishr.models import ModelConfig, build_model
from fishr.models.backbone import Backbone, backbone_config, lay_weights, load_initial_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB_ID = "timm/test_resnet.r160_in1k"


def backbone(name: str = "test_resnet", size: int = 32, channels: int = 3, **options: Any) -> Backbone:
    options = {"mean": [0.5] * channels, "std": [0.25] * channels, **options}
    return Backbone((channels, size, size), name, **options)


def network_of(name: str, **arguments: Any) -> nn.Module:
    """A whole network of timm, every number of it drawn."""
    network = timm.create_model(name, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return network


def load_from(file: Path, featurizer: nn.Module) -> None:
    load_initial_weights(featurizer, f"sha256:{sha256(file.read_bytes()).hexdigest()}", file)


def assert_has_weights(featurizer: Backbone, expected: dict[str, Tensor]) -> None:
    own = featurizer.network.state_dict()
    assert own.keys() <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in own.items())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights of a whole network in a file."""
    state = network_of("test_resnet").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", state


# The module


@pytest.mark.parametrize(
    ("name", "size", "arguments", "width"),
    [
        ("resnet18", 32, {}, 512),
        ("mobilenetv2_100", 40, {"pad_type": "same"}, 1280),
        ("mobilenetv3_small_100", 32, {}, 1024),  # 576 before its head, as num_features of timm says
        ("convnext_atto", 32, {}, 320),
        ("test_vit", 48, {"img_size": 48}, 64),
        ("test_byobnet", 32, {}, 256),
    ],
)
def test_features_are_those_of_timm(name: str, size: int, arguments: dict[str, Any], width: int) -> None:
    ours = backbone(name, size, arguments=arguments, mean=IMAGENET_MEAN, std=IMAGENET_STD).eval()
    theirs = timm.create_model(name, num_classes=0, **arguments).eval()
    theirs.load_state_dict(ours.network.state_dict())
    images = torch.rand(2, 3, size, size)
    normalised = torch.stack([(images[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)
    features = ours(images)
    assert features.shape == (2, width) == (2, ours.num_features)
    assert torch.allclose(features, theirs(normalised), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int) -> None:
    network = backbone(channels=channels)
    assert network(torch.rand(2, channels, 32, 32)).shape == (2, network.num_features)


def test_it_trains_and_the_normalisation_does_not() -> None:
    network = backbone()
    assert all(module.training for module in network.modules())
    network(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert {name.partition(".")[0] for name in network.state_dict()} == {"network"}


def test_convolutions_meet_channels_last_images_and_weights_as_stored() -> None:
    network = backbone()
    layouts = []
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    network(torch.rand(2, 3, 32, 32))
    assert layouts == [True]
    assert all(parameter.is_contiguous() for parameter in network.parameters())


def test_building_draws_from_torchs_random_state_alone() -> None:
    def built(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(backbone().parameters())

    assert torch.equal(built(0), built(0))
    assert not torch.equal(built(0), built(1))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])  # nn.BatchNorm2d, and timm's own BatchNormAct2d
def test_frozen_batch_norm(name: str, frozen: bool) -> None:
    network = backbone(name, frozen_batch_norm=frozen)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [module.running_mean.clone() for module in norms]
    outer = nn.Sequential(network).eval().train()  # as an algorithm does it
    outer(torch.rand(4, 3, 32, 32)).square().sum().backward()
    others = [module for module in network.modules() if module not in norms]
    assert all(module.training for module in others)
    assert all(module.training is not frozen for module in norms)
    moved = [not torch.equal(module.running_mean, old) for module, old in zip(norms, before, strict=True)]
    assert any(moved) is not frozen
    assert all(module.weight.grad is not None and module.bias.grad is not None for module in norms)


def test_by_its_name_in_the_registry() -> None:
    config = backbone_config("test_resnet", weights=None)
    featurizer, classifier = build_model(config, (3, 32, 32), 5)
    assert isinstance(featurizer, Backbone)
    assert classifier.weight.shape == (5, featurizer.num_features)


# What cannot be built


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet81",
            r"^unknown backbone 'resnet81'; did you mean 'resnet\w+' or .* \(timm.list_models\(\) lists all \d+",
        ),
        ("tv_resnet50", r"^unknown backbone 'tv_resnet50'; did you mean 'resnet50.tv_in1k'\? "),
        ("", r"^unknown backbone '' \(timm"),
        ("hf-hub:timm/resnet18.a1_in1k", r"^unknown backbone 'hf-hub:timm/resnet18"),
        ("hf_hub:timm/resnet18", r"^unknown backbone 'hf_hub:timm/resnet18'"),
        ("local-dir:/tmp", r"^unknown backbone 'local-dir:/tmp'"),
        ("/tmp", r"^unknown backbone '/tmp'"),
        ("timm/resnet18", r"^unknown backbone 'timm/resnet18'"),
    ],
)
def test_other_names_never_reach_timm(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: object, **options: object) -> None:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(timm, "create_model", called)
    with pytest.raises(ConfigError, match=message):
        backbone(name)
    with pytest.raises(ConfigError, match=message):
        backbone_config(name)


def test_a_tag_belongs_to_the_weights() -> None:
    with pytest.raises(ConfigError, match=r"unknown backbone 'resnet18.a1_in1k'; did you mean 'resnet18'"):
        backbone("resnet18.a1_in1k")


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"pretrained_strict": False},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"model_name": "hf-hub:timm/resnet18"},
        *({name: 1} for name in ("num_classes", "in_chans", "features_only", "scriptable", "exportable", "no_jit")),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_are_not_the_architectures(arguments: dict[str, Any]) -> None:
    message = rf"^a backbone's arguments cannot have {next(iter(arguments))}: they are not the architecture's$"
    with pytest.raises(ConfigError, match=message):
        backbone(arguments=arguments)
    with pytest.raises(ConfigError, match=message):
        backbone_config("test_resnet", weights=None, arguments=arguments)


@pytest.mark.parametrize("value", [nn.ReLU, float("nan"), b"x", Path("x")])
def test_arguments_are_plain_values(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^a backbone's arguments must be plain JSON values, got "):
        backbone(arguments={"act_layer": value})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"depth": 3}, r"cannot be built for 3 channels with arguments {'depth': 3}: .*unexpected keyword .*'depth'$"),
        ({"cardinality": "two"}, r"cannot be built for 3 channels with arguments {'cardinality': 'two'}: "),
        ({"act_layer": "nothing"}, r"cannot be built for 3 channels with arguments {'act_layer': 'nothing'}: "),
        (
            {"global_pool": ""},
            r"turns an image into \(1, 512, 1, 1\), but one vector per image is needed: .*global_pool",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^backbone 'resnet18' .*{reason}"):
        backbone("resnet18", arguments=arguments)


def test_images_that_it_cannot_take() -> None:
    message = (
        r"^backbone 'vit_tiny_patch16_224' cannot take images of 96×96: .*224.*; choose another --image-size, "  # noqa: RUF001
        r"or for transformers try --backbone-arg img_size=96$"
    )
    with pytest.raises(ConfigError, match=message):
        backbone("vit_tiny_patch16_224", 96)
    assert backbone("vit_tiny_patch16_224", 96, arguments={"img_size": 96}).num_features == 192


@pytest.mark.parametrize("shape", [(392,), (32, 32), (3, 32, 64), (1, 3, 32, 32)])
def test_it_takes_nothing_but_square_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^a backbone takes images \(channels, size, size\), got inputs of shape"):
        Backbone(shape, "test_resnet", mean=[0.0], std=[1.0])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mean", [0.5], r"^mean must be 3 numbers, one per channel, got \[0.5\]$"),
        ("mean", [0.5, 0.5, float("nan")], r"^mean must be 3 numbers, one per channel"),
        ("mean", "abc", r"^mean must be 3 numbers, one per channel, got 'abc'$"),
        ("std", [1.0, 1.0, 0.0], r"^std must be 3 positive numbers, one per channel, got \[1.0, 1.0, 0.0\]$"),
        ("std", None, r"^std must be 3 positive numbers"),
    ],
)
def test_mean_and_std_that_cannot_be(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone(**{option: value})


# The config


def test_published_weights_are_named_by_their_tag() -> None:
    config = backbone_config("mobilenetv2_100")
    assert config == ModelConfig(
        "timm",
        {
            "name": "mobilenetv2_100",
            "arguments": {},
            "mean": [*IMAGENET_MEAN],
            "std": [*IMAGENET_STD],
            "frozen_batch_norm": True,
        },
        weights="hub:timm/mobilenetv2_100.ra_in1k",
    )
    assert backbone_config("mobilenetv2_100.ra_in1k") == config
    assert json.loads(json.dumps(config.options)) == config.options


def test_another_tag_than_the_default() -> None:
    config = backbone_config("vit_base_patch16_224.augreg_in21k", arguments={"img_size": (224, 224)})
    assert config.options["name"] == "vit_base_patch16_224"
    assert config.options["mean"] == [0.5, 0.5, 0.5]
    assert config.options["arguments"] == {"img_size": [224, 224]}
    assert config.weights == "hub:timm/vit_base_patch16_224.augreg_in21k"


def test_without_weights() -> None:
    config = backbone_config("resnet18.a1_in1k", weights=None)
    assert config.weights is None
    assert config.options["frozen_batch_norm"] is False
    assert config.options["mean"] == [*IMAGENET_MEAN]
    assert backbone_config("resnet18", weights=None, frozen_batch_norm=True).options["frozen_batch_norm"] is True
    assert backbone_config("resnet18", frozen_batch_norm=False).options["frozen_batch_norm"] is False


def test_mean_and_std_for_other_channels() -> None:
    gray = backbone_config("resnet18", channels=1).options
    assert gray["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert gray["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    assert backbone_config("resnet18", channels=4).options["mean"] == [0.485, 0.456, 0.406, 0.485]


def test_mean_and_std_that_are_given() -> None:
    options = backbone_config("resnet18", mean=0.5, std=[0.1, 0.2, 0.3]).options
    assert (options["mean"], options["std"]) == ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    assert backbone_config("resnet18", channels=2, mean=[0.5]).options["mean"] == [0.5, 0.5]
    for refused in ({"mean": [0.5, 0.5]}, {"std": 0.0}):
        with pytest.raises(ConfigError, match=r"^(mean|std) must be 3 (positive )?numbers, one per channel, got"):
            backbone_config("resnet18", **refused)


def test_a_files_digest_and_what_lies_beside_it(saved: tuple[Path, Any]) -> None:
    file, _ = saved
    config = backbone_config("test_resnet", weights=file)
    assert config.weights == f"sha256:{sha256(file.read_bytes()).hexdigest()}"
    assert backbone_config("test_resnet", weights=str(file)) == config
    assert config.options["frozen_batch_norm"] is True
    assert config.options["std"] == [0.5, 0.5, 0.5]  # what timm knows
    beside = file.with_name("config.json")
    beside.write_text('{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 1}}')
    config = backbone_config("test_resnet", weights=file)
    assert (config.options["mean"], config.options["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert backbone_config("test_resnet", weights=file, channels=1).options["mean"] == pytest.approx([0.2])
    assert backbone_config("test_resnet", weights=file, mean=0.9).options["mean"] == [0.9, 0.9, 0.9]
    beside.write_text('{"model_type": "something else"}')
    assert backbone_config("test_resnet", weights=file).options["mean"] == [0.5, 0.5, 0.5]


def test_damage_in_what_lies_beside_a_file(saved: tuple[Path, Any]) -> None:
    file, _ = saved
    beside = file.with_name("config.json")
    beside.write_text('{"pretrained_cfg": ')
    with pytest.raises(DataError, match=rf"^{beside}, where mean and std .* cannot be read .*: give --mean and --std$"):
        backbone_config("test_resnet", weights=file)
    assert backbone_config("test_resnet", weights=file, mean=0.5, std=0.5).weights is not None
    beside.write_text('{"pretrained_cfg": {"std": ["0.1", 0.2, 0.3]}}')
    with pytest.raises(ConfigError, match=rf"^std in {beside} must be a list of numbers, got \['0.1', 0.2, 0.3\]$"):
        backbone_config("test_resnet", weights=file)


def test_weights_that_are_not_published() -> None:
    message = r"^backbone 'botnet50ts_256' has no published weights: .*--no-pretrained, or .*--weights FILE$"
    with pytest.raises(ConfigError, match=message):
        backbone_config("botnet50ts_256")
    assert backbone_config("botnet50ts_256", weights=None).weights is None
    with pytest.raises(
        ConfigError, match=r"^unknown weights of backbone 'resnet18': 'a1_in2k'; did you mean 'a1_in1k'"
    ):
        backbone_config("resnet18.a1_in2k")


# Weights from a file


def test_the_weights_of_a_file(saved: tuple[Path, dict[str, Tensor]]) -> None:
    file, state = saved
    network = backbone()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_from(file, network)
    assert_has_weights(network, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training


WRAPPED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"state_dict": {f"model.module.{name}": value for name, value in state.items()}},
    "without classifier": lambda state: {name: value for name, value in state.items() if "fc." not in name},
    "without counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".PTH"])
def test_pytorch_files(suffix: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.save(saved[1], file)
    network = backbone()
    load_from(file, network)
    assert_has_weights(network, saved[1])


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_forms_of_a_state_dict(wrapped: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    file, network = tmp_path / "weights.pth", backbone()
    torch.save(WRAPPED[wrapped](saved[1]), file)
    load_from(file, network)
    assert_has_weights(network, saved[1])


def test_a_classifier_with_more_than_a_linear_layer(tmp_path: Path) -> None:
    """Its batch normalization goes with it."""
    state = network_of("efficientvit_m0").state_dict()
    assert "head.bn.weight" in state
    save_file(state, tmp_path / "weights.safetensors")
    network = backbone("efficientvit_m0", 224)
    load_from(tmp_path / "weights.safetensors", network)
    assert_has_weights(network, state)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_first_layer_on_other_channels(name: str, tmp_path: Path) -> None:
    """Gray images count as RGB ones with three equal channels; channel 4 gets the weights of channel 1."""
    state = network_of(name).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    rgb, gray, four = (backbone(name, 160, channels=channels).eval() for channels in (3, 1, 4))
    for network in (rgb, gray, four):
        load_from(tmp_path / "weights.safetensors", network)
    images = torch.rand(2, 1, 160, 160)
    assert torch.allclose(gray(images), rgb(images.expand(2, 3, 160, 160)), rtol=1e-3)
    first = "conv1.0.weight" if name == "test_resnet" else "patch_embed.proj.weight"
    expected = state[first][:, [0, 1, 2, 0]] * 3 / 4
    assert torch.allclose(four.network.state_dict()[first], expected)


def test_weights_for_gray_images_are_taken_as_they_are(tmp_path: Path) -> None:
    state = network_of("test_resnet", in_chans=1).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    network = backbone(channels=1)
    load_from(tmp_path / "weights.safetensors", network)
    assert_has_weights(network, state)


def test_position_embeddings_for_another_image_size(tmp_path: Path) -> None:
    state = network_of("test_vit").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    network = backbone("test_vit", 64, arguments={"img_size": 64})
    load_from(tmp_path / "weights.safetensors", network)
    theirs = timm.create_model("test_vit", True, pretrained_cfg_overlay={"state_dict": state}, img_size=64)
    assert state["pos_embed"].shape != theirs.pos_embed.shape
    assert_has_weights(network, theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "test_resnet",
            {"block_args": {"attn_layer": "se"}},
            r"test_resnet': it lacks layer1\.\S+, \S+, \S+ and \d+ more$",
        ),
        (
            "test_resnet",
            {"stem_type": ""},
            r"test_resnet': it lacks conv1\.weight, .*; it also has conv1\.0\.weight, .* more$",
        ),
        ("test_byobnet", {}, r"test_byobnet': it lacks stem\..* and \d+ more; it also has .* and \d+ more$"),
    ],
)
def test_weights_of_another_network(
    name: str, arguments: dict[str, Any], message: str, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    file, _ = saved
    network = backbone(name, arguments=arguments)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"^{file} does not hold weights of backbone '{message}"):
        load_from(file, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_weights_of_a_larger_network(saved: tuple[Path, dict[str, Tensor]]) -> None:
    file, state = saved
    save_file({**state, "layer5.0.conv1.weight": torch.zeros(1)}, file)
    message = rf"^{file} does not hold weights of backbone 'test_resnet': it also has layer5.0.conv1.weight$"
    with pytest.raises(ConfigError, match=message):
        load_from(file, backbone())


def test_weights_of_another_width(tmp_path: Path) -> None:
    file, network = tmp_path / "weights.safetensors", backbone("mobilenetv2_050")
    save_file(network_of("mobilenetv2_035").state_dict(), file)
    message = (
        rf"^{file} does not hold weights of backbone 'mobilenetv2_050' with arguments {{}}: blocks.1.0.conv_pwl.weight "
        r"has another shape, \(8, 48, 1, 1\) and not \(16, 48, 1, 1\), as 186 more do; "
        r"give the arguments it was made with by --backbone-arg$"
    )
    with pytest.raises(ConfigError, match=message):
        load_from(file, network)


def test_weights_of_another_patch_size_are_not_stretched(tmp_path: Path) -> None:
    save_file(network_of("test_vit").state_dict(), tmp_path / "weights.safetensors")
    network = backbone("test_vit", 64, arguments={"patch_size": 8, "img_size": 64})
    with pytest.raises(ConfigError, match=r"patch_embed.proj.weight has another shape"):
        load_from(tmp_path / "weights.safetensors", network)


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_code_in_a_file_is_not_executed(suffix: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    file, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    torch.save({**saved[1], "extra": Attack(trace)}, file)
    with pytest.raises(
        ConfigError, match=rf"^{file} is not loaded: .* objects other than tensors.*could run code$"
    ) as error:
        load_from(file, backbone())
    assert "\n" not in str(error.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # it would have


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "damage", [cut, lambda _: b"", lambda _: b"some text\n" * 20], ids=["truncated", "empty", "text"]
)
def test_damaged_files(suffix: str, damage: Callable[[bytes], bytes], saved: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / f"damaged{suffix}"
    if suffix == ".pth":
        torch.save(saved[1], file)
        content = file.read_bytes()
    else:
        content = saved[0].read_bytes()
    file.write_bytes(damage(content))
    with pytest.raises(ConfigError, match=rf"^{file} (is no file of weights|is not loaded)") as error:
        load_from(file, backbone())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"state_dict": {}}, {"epoch": 3}, {"a": 1, "b": torch.zeros(1)}, {"state_dict": {1: torch.zeros(1)}}],
)
def test_files_without_weights(content: object, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(ConfigError, match=rf"^{file} holds no weights: names with a tensor each were expected$"):
        load_from(file, backbone())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(value: float, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    _, state = saved
    broken = {name: weight.double() if weight.is_floating_point() else weight for name, weight in state.items()}
    for name in ("layer2.0.conv1.weight", "layer4.0.conv1.weight"):
        broken[name][0, 0, 0, 0] = value
    file = tmp_path / "broken.pt"
    torch.save(broken, file)
    network = backbone()
    before = {name: weight.clone() for name, weight in network.network.state_dict().items()}
    message = rf"^{file} has weights that are not finite, first in layer2\.0\.conv1\.weight: "
    with pytest.raises(ConfigError, match=message):
        load_from(file, network)
    assert_has_weights(network, before)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pth"
    for read in (
        lambda file: backbone_config("test_resnet", weights=file),
        lambda file: load_initial_weights(backbone(), "sha256:00", file),
    ):
        with pytest.raises(DataError, match=rf"^the weights {missing} cannot be read: No such file or directory$"):
            read(missing)
        with pytest.raises(DataError, match=rf"^the weights {tmp_path} cannot be read: Is a directory$"):
            read(tmp_path)
    text = tmp_path / "weights.txt"
    text.touch()
    with pytest.raises(ConfigError, match=rf"^weights are read from .safetensors, .pth, .pt, .bin, .tar; got {text}$"):
        load_from(text, backbone())


def test_the_file_is_the_one_of_the_config(saved: tuple[Path, Any]) -> None:
    file, _ = saved
    digest = sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=rf"^{file} is not the file the run starts from: .* is {digest}, not 00$"):
        load_initial_weights(backbone(), "sha256:00", file)
    with pytest.raises(ConfigError, match=r"^the run starts from the weights in a file \(SHA-256 00\): .*--weights$"):
        load_initial_weights(backbone(), "sha256:00", None)
    with pytest.raises(ConfigError, match=r"^weights must be 'hub:<id>' or 'sha256:<digest>', got 'imagenet'$"):
        load_initial_weights(backbone(), "imagenet", file)
    with pytest.raises(ConfigError, match=r"^initial weights are for backbones of timm, got a Linear$"):
        load_initial_weights(nn.Linear(1, 1), f"sha256:{digest}", file)


# Weights from the hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that may not download."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    yield tmp_path / "hub"
    close_session()


def put_into(cache: Path, hub_id: str, state: dict[str, Tensor]) -> Path:
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    save_file(state, snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


def test_published_weights_in_the_cache(hub_cache: Path) -> None:
    state = network_of("test_resnet").state_dict()
    put_into(hub_cache, HUB_ID, state)
    config = backbone_config("test_resnet")
    assert config.weights == f"hub:{HUB_ID}"
    featurizer, _ = build_model(config, (3, 32, 32), 2)
    assert isinstance(featurizer, Backbone)
    before = torch.get_rng_state()
    load_initial_weights(featurizer, config.weights, None)
    assert_has_weights(featurizer, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_published_weights_for_gray_images_and_another_size(hub_cache: Path) -> None:
    state = network_of("test_vit").state_dict()
    put_into(hub_cache, "timm/test_vit.r160_in1k", state)
    network = backbone("test_vit", 64, channels=1, arguments={"img_size": 64})
    load_initial_weights(network, "hub:timm/test_vit.r160_in1k", None)
    overlay = {"state_dict": state}
    theirs = timm.create_model("test_vit", True, pretrained_cfg_overlay=overlay, img_size=64, in_chans=1)
    assert_has_weights(network, theirs.state_dict())


def test_published_weights_that_do_not_fit_the_arguments(hub_cache: Path) -> None:
    put_into(hub_cache, HUB_ID, network_of("test_resnet").state_dict())
    message = (
        rf"^the weights '{HUB_ID}' do not fit backbone 'test_resnet' with arguments {{'stem_width': 8}}: .*mismatch"
    )
    with pytest.raises(ConfigError, match=message) as error:
        load_initial_weights(backbone(arguments={"stem_width": 8}), f"hub:{HUB_ID}", None)
    assert "\n" not in str(error.value)


def test_published_weights_of_which_some_are_missing(hub_cache: Path) -> None:
    state = network_of("test_resnet").state_dict()
    del state["layer2.0.conv1.weight"]
    put_into(hub_cache, HUB_ID, state)
    message = rf"^the weights '{HUB_ID}' do not fit backbone 'test_resnet' .*Missing .*layer2\.0\.conv1\.weight"
    with pytest.raises(ConfigError, match=message):
        load_initial_weights(backbone(), f"hub:{HUB_ID}", None)


def test_published_weights_of_another_backbone(hub_cache: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown weights of backbone 'test_resnet': 'somebody/else' \(known: timm/"
    ):
        load_initial_weights(backbone(), "hub:somebody/else", None)


def test_damaged_weights_in_the_cache(hub_cache: Path) -> None:
    file = put_into(hub_cache, HUB_ID, network_of("test_resnet").state_dict())
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(DataError, match=rf"^the weights of '{HUB_ID}' in Hugging Face's cache are damaged \(.*remove"):
        load_initial_weights(backbone(), f"hub:{HUB_ID}", None)


NOT_TO_BE_HAD = (
    rf"^the weights of '{HUB_ID}' are not in the cache and cannot be downloaded \(.+\): "
    r"connect once, or give a file with --weights FILE, or train from scratch with --no-pretrained$"
)


def test_offline_with_an_empty_cache(hub_cache: Path) -> None:
    with pytest.raises(DataError, match=NOT_TO_BE_HAD):
        load_initial_weights(backbone(), f"hub:{HUB_ID}", None)


def test_without_a_network_it_gives_up_at_once_in_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        started = time.monotonic()
        with pytest.raises(DataError, match=NOT_TO_BE_HAD):
            load_initial_weights(backbone(), f"hub:{HUB_ID}", None)
    assert time.monotonic() - started < 6
    assert capfd.readouterr() == ("", "")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has one file, refuses, or breaks off."""

    content: bytes | None = None
    refuse = False
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == f"/{HUB_ID}/resolve/main/model.safetensors" and self.content is not None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.send_header("ETag", f'"{sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(self.content)
        elif self.refuse or self.content is not None:
            self.send_error(403)
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine in place of the real one."""
    handler = type("Handler", (Hub,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield handler
        server.shutdown()
        thread.join()


def test_published_weights_are_downloaded_once(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = network_of("test_resnet").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    hub.content = (tmp_path / "weights.safetensors").read_bytes()
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        network = backbone()
        load_initial_weights(network, f"hub:{HUB_ID}", None)
        assert_has_weights(network, state)


@pytest.mark.parametrize("refuse", [True, False])
def test_a_hub_that_refuses_or_breaks_off(refuse: bool, hub: type[Hub]) -> None:
    hub.refuse = refuse
    with pytest.raises(DataError, match=NOT_TO_BE_HAD) as error:
        load_initial_weights(backbone(), f"hub:{HUB_ID}", None)
    assert hub.asked[0] == "/"
    # Who breaks off is not asked again.
    assert (f"/{HUB_ID}/resolve/main/model.safetensors" in hub.asked) is refuse
    assert ("403" in str(error.value)) is refuse
    assert "\n" not in str(error.value)


# Real weights, real photos


PHOTOS = {
    "dog/056_0002.jpg": "whippet",
    "dog/056_0004.jpg": "miniature pinscher",
    "elephant/064_0003.jpg": "African elephant",
    "elephant/064_0005.jpg": "African elephant",
    "guitar/063_0001.jpg": "electric guitar",
    "guitar/063_0002.jpg": "electric guitar",
    "horse/105_0002.jpg": "sorrel",
}


def test_real_weights_know_what_is_in_photos(data_root: Path) -> None:
    file = data_root / "weights" / "mobilenetv2_100_imagenet.safetensors"
    config = backbone_config("mobilenetv2_100", arguments={"pad_type": "same"}, weights=file, mean=0.5, std=0.5)
    featurizer, _ = build_model(config, (3, 224, 224), 7)
    assert isinstance(featurizer, Backbone)
    assert config.weights is not None
    load_initial_weights(featurizer.eval(), config.weights, file)
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(load_file(file))
    photos = []
    for name in PHOTOS:
        with Image.open(data_root / "PACS" / "photo" / name) as photo:
            photos.append(
                torch.from_numpy(np.array(photo.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)))
            )
    images = torch.stack(photos).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = featurizer(images)
        expected = whole.forward_head(whole.forward_features((images - 0.5) / 0.5), pre_logits=True)
        answers = whole.classifier(features).argmax(1)
    assert torch.allclose(features, expected, atol=1e-4)
    labels = (data_root / "weights" / "imagenet_labels.txt").read_text().splitlines()
    assert [labels[answer].split(",")[0] for answer in answers] == list(PHOTOS.values())


# Layout of the weights


def layouts(network: nn.Module) -> set[bool]:
    """Whether weights with a layout, those with space, lie channels last."""
    weights = [weight for weight in network.parameters() if weight.ndim == 4 and weight.shape[2:] != (1, 1)]
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.shape[1] > 1}


@pytest.mark.parametrize("wrap", [False, True])
def test_on_a_gpu_weights_lie_as_images_do(wrap: bool) -> None:
    options = {"name": "test_resnet", "mean": [0.5] * 3, "std": [0.2] * 3}
    config = ModelConfig("timm", options)
    if wrap:
        config = ModelConfig("mean-embedding", {"featurizer": "timm", "options": options})
    featurizer, _ = build_model(config, (3, 32, 32), 2)
    featurizer.eval()
    images = torch.rand(2, 3, 32, 32)
    before, expected = {name: value.clone() for name, value in featurizer.state_dict().items()}, featurizer(images)
    lay_weights(featurizer, torch.device("cpu"))
    assert layouts(featurizer) == {False}
    lay_weights(featurizer, torch.device("cuda"))
    assert layouts(featurizer) == {True}
    assert all(torch.equal(value, before[name]) for name, value in featurizer.state_dict().items())
    torch.testing.assert_close(featurizer(images), expected)


def test_weights_of_other_networks_stay_as_they_lie() -> None:
    featurizer, _ = build_model(ModelConfig("mnist-cnn"), (2, 8, 8), 2)
    lay_weights(featurizer, torch.device("cuda"))
    assert layouts(featurizer) == {False}
