"""Image backbones of timm: the module, its config and its initial weights.

Shapes: images ``[sample, channel, size, size]``, features ``[sample, feature]``. timm is imported where it is needed,
not with this module: that takes seconds.
"""

import difflib
import hashlib
import json
import logging
import math
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fishr.errors import ConfigError, DataError
from fishr.models.batch_context import BatchDependent
from fishr.models.build import ModelConfig
from fishr.registry import unknown

_REFUSED_ARGUMENTS = frozenset(
    {
        # decided here
        *("model_name", "num_classes", "in_chans", "features_only", "device"),
        # files, and settings of the whole process
        *("checkpoint_path", "cache_dir", "pruned", "scriptable", "exportable", "no_jit"),
    }
)
_PICKLED = (".pth", ".pt", ".bin", ".tar")
_CONNECTION_TIMEOUT = 5.0
"""Seconds."""


class Backbone(nn.Module):
    """A network of timm without its classifier, on images with values in [0, 1].

    features = network((x − mean) / std), mean and std per channel.

    With ``frozen_batch_norm``, batch-norm layers always normalise with their running statistics, also in training, and
    these stay as they are; their weight and bias are trained (the protocol of DomainBed, Gulrajani and Lopez-Paz,
    arXiv 2007.01434).

    Args:
        input_shape: ``(channels, size, size)``.
        name: An architecture of timm, without the tag of its weights.
        arguments: Its keyword arguments, plain JSON values.
        mean: What is subtracted from each channel.
        std: What each channel is divided by after that.
        frozen_batch_norm: Whether batch-norm layers stay in evaluation mode.

    Attributes:
        num_features: Width of the features, measured.
        channels_last: Whether images are laid out channels last, which ``torch.func.vmap`` does not know.

    Raises:
        ConfigError: no such architecture, arguments that it does not take, or images that it cannot take.
    """

    mean: Tensor
    std: Tensor
    channels_last = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        name: str,
        arguments: Mapping[str, Any] = {},
        *,
        mean: Sequence[float],
        std: Sequence[float],
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
            raise ConfigError(f"a backbone takes images (channels, size, size), got inputs of shape {input_shape}")
        channels, size, _ = input_shape
        import timm

        _check_architecture(name)
        self.name, self.arguments, self.frozen_batch_norm = name, _plain(arguments), frozen_batch_norm
        for statistic, values in (("mean", mean), ("std", std)):
            # Not in the state: they are part of the config.
            tensor = torch.tensor(_per_channel(statistic, values, channels)).reshape(1, channels, 1, 1)
            self.register_buffer(statistic, tensor, persistent=False)
        try:
            self.network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **self.arguments)
        except Exception as error:
            raise ConfigError(
                f"backbone {name!r} cannot be built for {channels} channels with arguments {self.arguments}: "
                f"{_one_line(error)}"
            ) from error
        self.num_features = self._measure(channels, size)
        self.train()

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``[sample, feature]`` of images with values in [0, 1]."""
        # Convolutions are half as fast again in this layout on CPUs, and faster on GPUs.
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # (inputs - mean) / std in one pass over memory.
        features: Tensor = self.network(torch.addcmul(-self.mean / self.std, inputs, 1 / self.std))
        return features

    def train(self, mode: bool = True) -> "Backbone":
        """Training or evaluation mode; frozen batch-norm layers stay in evaluation mode."""
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    # Not eval(), which reaches the activations and dropout inside timm's.
                    module.training = False
        return self

    def _measure(self, channels: int, size: int) -> int:
        """Width of the features of an image; ``num_features`` of timm's own is another one in some architectures."""
        self.eval()
        try:
            # Not inference_mode: what a network caches in its first pass would stay unfit for training.
            with torch.no_grad():
                features = self(self.mean.new_zeros(1, channels, size, size))
        except Exception as error:
            raise ConfigError(
                f"backbone {self.name!r} cannot take images of {size}×{size}: {_one_line(error)}; choose another "  # noqa: RUF001
                f"--image-size, or for transformers try --backbone-arg img_size={size}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(
                f"backbone {self.name!r} with arguments {self.arguments} turns an image into {shape}, "
                "but one vector per image is needed: choose another backbone, or another --backbone-arg global_pool"
            )
        return features.shape[1]


def backbone_config(
    name: str,
    *,
    channels: int = 3,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = "hub",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    frozen_batch_norm: bool | None = None,
) -> ModelConfig:
    """The config of a backbone, with all that its weights imply written out.

    Args:
        name: An architecture of timm, or one with the tag of its weights: ``"resnet50"``, ``"resnet50.tv_in1k"``.
        channels: Channels of the images.
        arguments: Keyword arguments of the architecture.
        weights: ``"hub"``: the published ones of that tag, or of timm's default tag. A path: those in that file. None:
            drawn at random.
        mean: Of the images that the weights were trained on, one number or one per channel. Default: what
            ``config.json`` beside the weights file says, in the layout of timm's models on the hub, else what timm
            knows of the architecture's weights; for images of one channel the average over RGB, for more than three
            channels R, G and B again and again.
        std: Likewise.
        frozen_batch_norm: Default: frozen where there are weights. Without, running statistics of 0 and 1 would
            normalise nothing.

    Raises:
        ConfigError: an architecture, tag or argument that does not exist, weights that are not published, or mean and
            std that cannot be.
        DataError: a file that cannot be read.
    """
    import timm.models

    architecture, tag = timm.models.split_model_name_tag(name)
    _check_architecture(architecture)
    published = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and name not in published:
        raise unknown(f"weights of backbone {architecture!r}:", tag, [each.partition(".")[2] for each in published])
    pretrained = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    source: str | None = None
    stated: dict[str, Sequence[float]] = {"mean": pretrained.mean, "std": pretrained.std}
    if weights == "hub":
        if not pretrained.hf_hub_id:
            raise ConfigError(
                f"backbone {name!r} has no published weights: train from scratch with --no-pretrained, or give a file "
                "with --weights FILE"
            )
        source = f"hub:{pretrained.hf_hub_id}"
    elif weights is not None:
        weights = Path(weights)
        source = f"sha256:{_digest(weights)}"
        if mean is None or std is None:
            stated |= _stated_beside(weights)
    return ModelConfig(
        "timm",
        {
            "name": architecture,
            "arguments": _plain(arguments or {}),
            "mean": _spread(stated["mean"], channels) if mean is None else _given("mean", mean, channels),
            "std": _spread(stated["std"], channels) if std is None else _given("std", std, channels),
            "frozen_batch_norm": source is not None if frozen_batch_norm is None else frozen_batch_norm,
        },
        weights=source,
    )


def lay_weights(featurizer: nn.Module, device: torch.device) -> None:
    """Lay the weights of backbones out for the device: channels last on a GPU, as their images are.

    There they would be brought into that layout at every step. On a CPU that is of no account. Files hold weights
    row-major in either case.
    """
    if device.type == "cuda":
        for module in featurizer.modules():
            if isinstance(module, Backbone):
                module.to(memory_format=torch.channels_last)


def load_initial_weights(featurizer: nn.Module, weights: str, file: Path | None) -> None:
    """Load what :attr:`~fishr.models.build.ModelConfig.weights` names into a backbone.

    The classifier in it is left out. The first layer is adapted to images of another number of channels as timm does:
    summed for one channel, else repeated and scaled. Position embeddings are resampled to another image size. torch's
    random state stays as it is.

    A file is ``.safetensors`` or a PyTorch file with tensors only; nothing in it is executed. Its state dict may lie
    under ``"state_dict"`` or ``"model"``, with names that begin with ``module.`` or ``model.``.

    Args:
        featurizer: A :class:`Backbone`, or what has one inside
            (:class:`fishr.models.batch_context.BatchDependent`).
        weights: ``"hub:<id>"`` or ``"sha256:<digest>"``.
        file: Where the weights with that digest are.

    Raises:
        ConfigError: weights of another network, a file with another digest, or not a file of weights, or values that
            are not finite.
        DataError: weights that are neither in Hugging Face's cache nor can be downloaded, or a file that cannot be
            read.
    """
    if isinstance(featurizer, BatchDependent):
        featurizer = featurizer.inner
    if not isinstance(featurizer, Backbone):
        raise ConfigError(f"initial weights are for backbones of timm, got a {type(featurizer).__name__}")
    source, _, identity = weights.partition(":")
    if source == "hub":
        state, origin = _published_state(featurizer, identity), f"what is published as {identity!r}"
    elif source == "sha256":
        if file is None:
            raise ConfigError(f"the run starts from the weights in a file (SHA-256 {identity}): give it with --weights")
        if (digest := _digest(file)) != identity:
            raise ConfigError(f"{file} is not the file the run starts from: its SHA-256 is {digest}, not {identity}")
        state, origin = _stored_state(file), str(file)
    else:
        raise ConfigError(f"weights must be 'hub:<id>' or 'sha256:<digest>', got {weights!r}")
    _load(featurizer, state, origin)


def _check_architecture(name: str) -> None:
    """Only names in timm's registry: others make timm read files or download."""
    import timm.models

    known = timm.list_models()
    if name in known:
        return
    renamed = timm.models.get_deprecated_models().get(name)
    near = [renamed] if renamed else difflib.get_close_matches(str(name), known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ConfigError(f"unknown backbone {name!r}{hint} (timm.list_models() lists all {len(known)})")


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they read back from JSON."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a backbone's arguments must be plain JSON values, got {arguments!r}: {error}") from None
    if refused := [name for name in plain if name in _REFUSED_ARGUMENTS or name.startswith("pretrained")]:
        raise ConfigError(f"a backbone's arguments cannot have {', '.join(refused)}: they are not the architecture's")
    return plain


def _per_channel(name: str, values: Sequence[float], channels: int) -> list[float]:
    """Checked values of mean or std."""
    least = -math.inf if name == "mean" else 0.0
    if (
        not isinstance(values, Sequence)
        or len(values) != channels
        or not all(isinstance(value, Real) and least < value < math.inf for value in values)
    ):
        kind = "numbers" if name == "mean" else "positive numbers"
        raise ConfigError(f"{name} must be {channels} {kind}, one per channel, got {values!r}")
    return [float(value) for value in values]


def _given(name: str, values: float | Sequence[float], channels: int) -> list[float]:
    """Mean or std as somebody gave it, per channel."""
    numbers = values if isinstance(values, Sequence) else [values]
    return _per_channel(name, [*numbers] * channels if len(numbers) == 1 else numbers, channels)


def _spread(values: Sequence[float], channels: int) -> list[float]:
    """Mean or std of the weights' images for another number of channels, as the weights themselves are adapted."""
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(channels)]


def _stated_beside(weights: Path) -> dict[str, Sequence[float]]:
    """Mean and std in the ``config.json`` beside a weights file; empty where it says nothing of them."""
    path = weights.with_name("config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}, where mean and std of the weights beside it may be, cannot be read ({_one_line(error)}): "
            "give --mean and --std"
        ) from None
    pretrained = content.get("pretrained_cfg") if isinstance(content, dict) else None
    if not isinstance(pretrained, dict):
        return {}
    stated = {name: pretrained[name] for name in ("mean", "std") if name in pretrained}
    for name, values in stated.items():
        try:
            stated[name] = _per_channel(name, values, len(values))
        except (TypeError, ConfigError):
            raise ConfigError(f"{name} in {path} must be a list of numbers, got {values!r}") from None
    return stated


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"the weights {file} cannot be read: {error.strerror}") from None


def _published_state(backbone: Backbone, hub_id: str) -> dict[str, Tensor]:
    """Weights of timm on the hub as timm itself loads them, from Hugging Face's cache or the network."""
    import timm.models

    published = timm.models.get_arch_pretrained_cfgs(backbone.name)
    tags = {pretrained.hf_hub_id: tag for tag, pretrained in published.items() if pretrained.hf_hub_id}
    if hub_id not in tags:
        raise unknown(f"weights of backbone {backbone.name!r}:", hub_id, tags)
    pretrained = published[tags[hub_id]]
    filename = {"filename": pretrained.hf_hub_filename} if pretrained.hf_hub_filename else {}
    ways_out = "give a file with --weights FILE, or train from scratch with --no-pretrained"
    try:
        with _warnings_of_hub_off():
            _connect_unless_cached(hub_id)
            state = timm.models.load_state_dict_from_hf(hub_id, weights_only=True, **filename)
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(
            f"the weights of {hub_id!r} in Hugging Face's cache are damaged ({_one_line(error)}): remove them there, "
            f"or {ways_out}"
        ) from error
    except Exception as error:
        raise DataError(
            f"the weights of {hub_id!r} are not in the cache and cannot be downloaded "
            f"({_one_line(error.__cause__ or error)}): connect once, or {ways_out}"
        ) from error
    try:
        # A whole network, with the classifier and for RGB, because only then timm insists that all weights are there.
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(
                tags[hub_id], pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **backbone.arguments
            )
    except Exception as error:
        raise ConfigError(
            f"the weights {hub_id!r} do not fit backbone {backbone.name!r} with arguments {backbone.arguments}: "
            f"{_one_line(error)}"
        ) from error
    loaded: dict[str, Tensor] = network.state_dict()
    return loaded


def _connect_unless_cached(hub_id: str) -> None:
    """Ask the hub for a sign of life, once, if nothing of ``hub_id`` is in the cache; raises what the attempt raises.

    Without it, huggingface_hub would retry for most of a minute where there is no network.
    """
    import huggingface_hub

    try:
        cached = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        if any(file.suffix == ".safetensors" or file.suffix in _PICKLED for file in cached.iterdir()):
            return
    except huggingface_hub.errors.LocalEntryNotFoundError:
        pass
    # Any answer will do, a refusal too: the download says more.
    huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_CONNECTION_TIMEOUT)


@contextmanager
def _warnings_of_hub_off() -> Iterator[None]:
    """Errors are raised; its progress bar stays."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stored_state(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, without what wrappers add to the names."""
    suffix = file.suffix.lower()
    if suffix != ".safetensors" and suffix not in _PICKLED:
        raise ConfigError(f"weights are read from .safetensors, {', '.join(_PICKLED)}; got {file}")
    content: Any
    try:
        if suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"the weights {file} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{file} is not loaded: it is no PyTorch file, or holds objects other than tensors, which could run code"
        ) from None
    except Exception as error:  # torch's reader fails in many ways on what is no such file
        raise ConfigError(f"{file} is no file of weights, or is damaged: {_one_line(error)}") from error
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not (
        isinstance(content, dict)
        and content
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise ConfigError(f"{file} holds no weights: names with a tensor each were expected")
    while wrapper := next((each for each in ("module.", "model.") if all(k.startswith(each) for k in content)), None):
        content = {name.removeprefix(wrapper): value for name, value in content.items()}
    state: dict[str, Tensor] = content
    return state


def _load(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load weights into a backbone once all are found in their shapes; ``origin`` names them in errors."""
    own = backbone.network.state_dict()
    # Counters of batch normalization are of no use; some files have none.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked") or name in own}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    known: Mapping[str, Any] = getattr(backbone.network, "pretrained_cfg", {})
    head = {name.partition(".")[0] for name in _names(known.get("classifier"))}
    unexpected = [name for name in state if name not in own and name.partition(".")[0] not in head]
    if missing or unexpected:
        problems = [
            f"it {verb} {_few(names)}" for verb, names in (("lacks", missing), ("also has", unexpected)) if names
        ]
        raise ConfigError(f"{origin} does not hold weights of backbone {backbone.name!r}: {'; '.join(problems)}")
    channels = backbone.mean.shape[1]
    fitting = {name: _for_channels(state[name], own[name], channels) for name in own if name in state}
    if any("pos" in name and value.shape != own[name].shape for name, value in fitting.items()):
        fitting |= _resampled_positions(backbone.network, fitting)
    if reshaped := [name for name, value in fitting.items() if value.shape != own[name].shape]:
        name, more = reshaped[0], f", as {len(reshaped) - 1} more do" if len(reshaped) > 1 else ""
        raise ConfigError(
            f"{origin} does not hold weights of backbone {backbone.name!r} with arguments {backbone.arguments}: {name} "
            f"has another shape, {tuple(fitting[name].shape)} and not {tuple(own[name].shape)}{more}; give the "
            "arguments it was made with by --backbone-arg"
        )
    # In float32, as they will be: what overflows there is not finite either.
    if broken := next((name for name, value in fitting.items() if not value.float().isfinite().all()), None):
        raise ConfigError(
            f"{origin} has weights that are not finite, first in {broken}: the file is damaged or diverged"
        )
    backbone.network.load_state_dict(fitting, strict=False)


def _for_channels(value: Tensor, own: Tensor, channels: int) -> Tensor:
    """The weight of a first layer on RGB, adapted to other channels; any other tensor as it is.

    First layers are told by their shape, since arguments may give an architecture another stem: their inputs are to
    those of the backbone's as 3 to ``channels``.
    """
    if value.ndim != 4 or value.shape == own.shape or value.shape[1] * channels != own.shape[1] * 3:
        return value
    import timm.models

    try:
        adapted: Tensor = timm.models.adapt_input_conv(channels, value)
    except NotImplementedError:
        return value
    return adapted


def _resampled_positions(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings for the network's image size, by timm's function for its architecture."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return {}
    try:
        converted = convert(dict(state), network)
    except Exception:  # the error that names the shapes says more
        return {}
    return {name: value for name, value in converted.items() if name in state and "pos" in name}


def _names(names: str | Sequence[str] | None) -> Sequence[str]:
    """One name, several or none."""
    return [names] if isinstance(names, str) else names or []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
