"""NetworkFishrPenalty: the regulariser on the gradients of any layers of a network."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from fishr.errors import ConfigError, InputError
from fishr.functional.distributed import is_distributed
from fishr.functional.domains import DomainLayout, Domains, domain_layout
from fishr.functional.penalty import Reduction, check_reduction, variance_penalty
from fishr.functional.residuals import Loss, per_sample_losses, samples_that_count
from fishr.functional.sample_gradients import chunked_gradient_variances, widened
from fishr.functional.variance import domain_gradient_variances
from fishr.nn.layer import Layer, layers_of
from fishr.nn.moving_average import MovingAverage
from fishr.nn.penalty import PUBLISHED_DECAY, Variant
from fishr.nn.recording import Recording

MIB = 2**20

HALF = (torch.float16, torch.bfloat16)

TOLERANCE = {False: 0.01, True: 0.2}
"""Relative difference from autograd above which the gradient of a sample is refused, by whether layers run in half
precision: well above what rounding makes, well below what mistakes make."""


class NetworkFishrPenalty(nn.Module):
    """Distance between the domains' variances of the per-sample gradients of all trainable weights of a network.

        penalty = 1/|E| Σ_e mean over weights of (v̂_e − mean_e v̂_e)²

    as :class:`FishrPenalty`'s, with the gradients of any layers in place of a linear head's (Rame et al., ICML 2022,
    section 3, leaves open which weights; the published experiments take the head's). It is differentiable with respect
    to all weights of the network, which takes a second backward pass through it.

    The input of each layer and the derivative of each sample's loss with respect to its output determine the gradients
    of single samples, so the forward pass that the loss is computed from is enough:

    - linear layers on ``[sample, feature]``: closed form, without gradients of single samples;
    - linear layers on ``[sample, token, feature]``, where a sample's gradient is a sum over tokens, and convolutions:
      by their rules, in chunks of samples;
    - all other weights (of norms, embeddings, modules of your own; what is used more than once): ``torch.func`` on the
      module they belong to, or the next one around it that is called once, in chunks of samples.

    Layers have to see the whole batch at once, as ``[sample, ...]``, and each sample alone: batch norm has to normalise
    with its running statistics. A module that goes through ``torch.func`` must not draw random numbers. At the first
    call the gradients of one sample are compared with autograd's, and refused where they differ.

    Args:
        network: Whose weights: those that are trainable now. Several modules go into an ``nn.ModuleList``. It is read
            and watched, not registered: the penalty has no parameters.
        num_domains: Number of training domains, at least 2.
        loss: As :class:`FishrPenalty` takes it. Default: cross-entropy, for a single logit binary cross-entropy.
        ema: Decay γ of the moving average, in [0, 1), whose history is as large as the weights times the domains.
            Default: 0.95.
        reduction: ``"mean"``, over domains and weights, or ``"sum"``, over both. Default: ``"mean"``.
        variant: ``"variance"`` or ``"second_moment"`` (not centred).
        memory: Bound in MiB on what a chunk takes: gradients of single samples, what is differentiated of them and a
            temporary, what the layer is given and what it and the modules in it return, and the gradients of that. A
            chunk has one sample at least.

    Raises:
        ConfigError: a setting that does not exist, nothing is trainable, or several ranks share batches.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> penalty = NetworkFishrPenalty(network, num_domains=2)
    >>> inputs, targets = torch.randn(10, 1, 8, 8), torch.randint(3, (10,))
    >>> with penalty.watch():
    ...     logits = network(inputs)
    >>> penalty(logits, targets, (5, 5)).ndim
    0
    """

    def __init__(
        self,
        network: nn.Module,
        num_domains: int,
        *,
        loss: Loss | None = None,
        ema: float | None = None,
        reduction: Reduction | None = None,
        variant: Variant = "variance",
        memory: int = 256,
    ) -> None:
        super().__init__()
        _check_one_rank()
        if num_domains < 2:
            raise ConfigError(f"num_domains must be at least 2, got {num_domains}")
        if variant not in ("variance", "second_moment"):
            raise ConfigError(
                f"variant must be 'variance' or 'second_moment', got {variant!r}; whole covariance matrices are "
                "compared of a linear head alone, by FishrPenalty"
            )
        reduction = reduction or "mean"
        check_reduction(reduction)
        if memory < 1:
            raise ConfigError(f"memory must be at least 1 MiB, got {memory}")
        weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        if not weights:
            raise ConfigError("the network has no trainable weight: give the layers whose gradients are to be compared")
        self.num_domains, self.loss, self.reduction, self.variant = num_domains, loss, reduction, variant
        self.memory, self.num_weights = memory, sum(weight.numel() for weight in weights.values())
        self._network = (network,)  # in a tuple, so that it is no submodule
        self._weights = tuple(weights)
        self._recording: Recording | None = None
        self._verified = False
        self.average: nn.Module = nn.Identity()
        ema = PUBLISHED_DECAY if ema is None else ema
        if ema:
            first = next(iter(weights.values()))
            self.average = MovingAverage((num_domains, self.num_weights), ema).to(first.device, first.dtype)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the network inside this block, until the penalty is called; attention is computed by its formula there.

        Fused attention cannot be differentiated twice.

        Raises:
            InputError: gradients are disabled.
            ConfigError: batch norm normalises with the statistics of the batch, or several ranks share a batch.
        """
        if not torch.is_grad_enabled():
            raise InputError("gradients of single samples need a graph: call watch() where gradients are enabled")
        _check_one_rank()
        (network,) = self._network
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ConfigError(
                    f"{name!r} normalises with the statistics of the batch, so there is no gradient of a single "
                    "sample: freeze batch norm (put it into eval(); fishr.models.Backbone: frozen_batch_norm=True; "
                    "fishr train: leave out --train-batch-norm), or take a network without it"
                )
        recording = self._recording = Recording(network)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            recording.stop()

    def forward(self, logits: Tensor, targets: Tensor, domains: Domains) -> Tensor:
        """The penalty of the batch that went through the network.

        Args:
            logits: ``[sample, class]``, computed inside :meth:`watch`. Compute them outside autocast: half-precision
                logits give residuals that are already rounded. A callable loss may take other shapes.
            targets: As the loss takes them; samples with ``ignore_index`` leave their domain.
            domains: int64 ``[sample]``, or a tuple of sizes when samples lie domain after domain.

        Returns:
            A scalar in float32 (float64 if weights or logits are).

        Raises:
            InputError: no forward pass was watched, logits of another one, or a domain without a sample.
            ConfigError: weights whose gradients of single samples cannot be told.
        """
        recording, self._recording = self._recording, None
        if recording is None:
            raise InputError("no forward pass was watched: run the network inside `with penalty.watch():` at each step")
        recording.stop()
        with torch.autocast(logits.device.type, enabled=False):
            loss = self.loss
            if loss is None:
                loss = nn.BCEWithLogitsLoss() if logits.shape[1:] == (1,) else nn.CrossEntropyLoss()
            losses = per_sample_losses(loss, logits if logits.dtype == torch.float64 else logits.float(), targets)
            if not losses.requires_grad:
                raise InputError("the logits have no graph: give those that the network returned, not detached ones")
            layers = layers_of(self._network[0], self._weights, recording.calls, len(losses))
            if not layers:
                raise ConfigError("all weights of the network are frozen: there are no gradients to compare")
            outputs = [layer.call.output for layer in layers]
            gradients = torch.autograd.grad(losses.sum(), outputs, create_graph=True, allow_unused=True)
            output_gradients = [
                losses.new_zeros(layer.call.shape) if gradient is None else gradient
                for layer, gradient in zip(layers, gradients, strict=True)
            ]
            if not self._verified:
                _verify(losses, layers, output_gradients)
                self._verified = True
            mask = samples_that_count(loss, targets)
            layout = domain_layout(domains, self.num_domains, len(losses), mask, losses, over_ranks=False)
            variances: dict[str, Tensor] = {}
            for layer, residuals in zip(layers, output_gradients, strict=True):
                if layer.is_outer_product:
                    of_layer = self._in_closed_form(layer, residuals, domains, mask)
                else:
                    of_layer = self._in_chunks(layer, residuals, layout)
                variances |= dict(zip(layer.full_names, of_layer, strict=True))
            return variance_penalty(self.average(self._joined(variances)), reduction=self.reduction)

    def _in_closed_form(
        self, layer: Layer, residuals: Tensor, domains: Domains, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        features = layer.call.inputs
        of_both = domain_gradient_variances(
            features,
            residuals,
            domains,
            self.num_domains,
            bias="bias" in layer.weights,
            centered=self.variant == "variance",
            mask=mask,
        )
        split = {"weight": of_both[..., : features.shape[1]], "bias": of_both[..., -1]}
        return tuple(split[name] for name in layer.weights)

    def _in_chunks(self, layer: Layer, residuals: Tensor, layout: DomainLayout) -> tuple[Tensor, ...]:
        rule, parameters = layer.rule()
        return chunked_gradient_variances(
            rule,
            layer.call.inputs,
            residuals,
            parameters,
            layout,
            layer.chunk(self.memory * MIB),
            centered=self.variant == "variance",
        )

    def _joined(self, variances: Mapping[str, Tensor]) -> Tensor:
        """``[domain, weight]``; zero for weights that were frozen after construction."""
        (network,) = self._network
        some = next(iter(variances.values()))
        return torch.cat(
            [
                variances[name].flatten(1)
                if name in variances
                else some.new_zeros(self.num_domains, network.get_parameter(name).numel())
                for name in self._weights
            ],
            dim=1,
        )

    def extra_repr(self) -> str:
        return (
            f"num_weights={self.num_weights}, num_domains={self.num_domains}, variant={self.variant!r}, "
            f"reduction={self.reduction!r}"
        )


def _check_one_rank() -> None:
    if is_distributed():
        raise ConfigError(
            "the gradients of whole networks are not compared over several ranks: train on one device, or compare "
            "those of the classifier alone (FishrPenalty)"
        )


def _verify(losses: Tensor, layers: Sequence[Layer], output_gradients: Sequence[Tensor]) -> None:
    """Compare the gradients of the sample with the largest loss with autograd's.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    index = int(losses.detach().argmax())
    sample = slice(index, index + 1)
    weights = [layer.module.get_parameter(name) for layer in layers for name in layer.weights]
    expected = torch.autograd.grad(losses[index], weights, retain_graph=True, materialize_grads=True)
    found: list[Tensor] = []
    with torch.no_grad():
        for layer, residuals in zip(layers, output_gradients, strict=True):
            rule, parameters = layer.rule()
            found += rule(widened(layer.call.inputs[sample]), widened(residuals[sample]), *parameters)
    half = any(residuals.dtype in HALF for residuals in output_gradients)
    names = [name for layer in layers for name in layer.full_names]
    of_all = torch.stack([gradient.norm() for gradient in expected]).norm()
    for name, actual, gradient in zip(names, found, expected, strict=True):
        if (actual[0] - gradient).norm() > TOLERANCE[half] * (gradient.norm() + 0.1 * of_all):
            raise ConfigError(
                f"the gradient of a single sample with respect to {name!r} is not what autograd finds: the weight acts "
                "outside of the calls of its module too, a layer sees other samples, or one takes another order than "
                "[sample, ...]; freeze such weights with requires_grad_(False), or leave them out of the network whose "
                "gradients are compared"
            )
