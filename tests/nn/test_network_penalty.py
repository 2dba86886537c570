"""NetworkFishrPenalty: what the definition says of any network, within its memory, and what it refuses."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from cases import LOSSES, indices_of
from fishr.errors import ConfigError, InputError
from fishr.models.backbone import Backbone
from fishr.models.build import ModelConfig, build_model
from fishr.nn import FishrPenalty, NetworkFishrPenalty

SIZES = (3, 2, 4)


class Pooled(nn.Module):
    """Linear layers on tokens, their mean, and a head: weights that tokens share."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(self.second(torch.tanh(self.first(tokens))).flatten(1, -2).mean(1))


class Transformer(nn.Module):
    """Weights that belong to no layer, a layer whose weights act without a call of it, words."""

    def __init__(self):
        super().__init__()
        self.words, self.position = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.layer(self.words(words) + self.position).mean(1))


class Tied(nn.Module):
    """A layer that is called twice, one whose weight acts elsewhere by another name, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.twice, self.decode, self.unused = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(2, 2)
        self.encode = nn.Module()
        self.encode.weight = self.decode.weight
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(inputs))))
        return self.head(torch.tanh(self.decode(hidden)) @ self.encode.weight @ self.decode.weight.T)


class InPlace(nn.Module):
    """Outputs of layers that are changed in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.rectify = nn.ReLU(inplace=True)

    def forward(self, inputs):
        hidden = self.rectify(self.first(inputs))
        added = self.second(hidden)
        added += hidden
        return self.head(self.rectify(added))


def images(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def convolutions(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def frozen_batch_norm():
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(50, 4, 2, 2) * 2 + 1)  # statistics that are not the initial ones
    return norm.eval()


def normed(norm):
    return convolutions(nn.Conv2d(2, 4, 2), norm, nn.Tanh())


def backbone(name, size, **arguments):
    featurizer = Backbone((3, size, size), name, arguments, mean=[0.4] * 3, std=[0.3] * 3, frozen_batch_norm=True)
    return nn.Sequential(featurizer, nn.Linear(featurizer.num_features, 3))


class Centered(nn.Module):
    """A form of a weight."""

    def forward(self, weight):
        return weight - weight.mean()


def parametrized():
    layer = parametrize.register_parametrization(nn.Linear(4, 5), "weight", Centered())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))


def own_featurizer(name, shape, **options):
    return nn.Sequential(*build_model(ModelConfig(name, options), shape, 3))


NETWORKS = {
    "mlp": (lambda: own_featurizer("mlp", (4,), width=5), images(4)),
    "mnist-cnn": (lambda: own_featurizer("mnist-cnn", (2, 6, 6)), images(2, 6, 6)),
    "resnet": (lambda: backbone("test_resnet", 16), images(3, 16, 16)),
    "vision transformer": (lambda: backbone("test_vit", 32, img_size=32), images(3, 32, 32)),
    "shared by tokens": (Pooled, images(5, 4)),
    "tokens of tokens": (Pooled, images(5, 2, 4)),
    "transformer": (Transformer, lambda n: torch.randint(7, (n, 5))),
    "tied": (Tied, images(4)),
    "in place": (InPlace, images(4)),
    "stride, padding": (lambda: convolutions(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), bias=False)), images(2, 7, 6)),
    "dilation": (lambda: convolutions(nn.Conv2d(2, 3, 2, dilation=(2, 3))), images(2, 6, 7)),
    "groups": (lambda: convolutions(nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)), images(4, 5, 5)),
    "depthwise": (lambda: convolutions(nn.Conv2d(3, 6, 3, groups=3)), images(3, 5, 5)),
    "convolution 1d": (lambda: convolutions(nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2)), images(2, 9)),
    "convolution 3d": (lambda: convolutions(nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1)), images(2, 3, 4, 3)),
    "padded by name": (lambda: convolutions(nn.Conv2d(2, 3, 3, padding="same")), images(2, 4, 4)),
    "padded circularly": (
        lambda: convolutions(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        images(2, 4, 4),
    ),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d(2, 3, 2, stride=2)), images(2, 3, 3)),
    "group norm": (lambda: normed(nn.GroupNorm(2, 4)), images(2, 4, 4)),
    "layer norm": (lambda: normed(nn.LayerNorm([4, 3, 3])), images(2, 4, 4)),
    "instance norm": (lambda: normed(nn.InstanceNorm2d(4, affine=True)), images(2, 4, 4)),
    "frozen batch norm": (lambda: normed(frozen_batch_norm()), images(2, 4, 4)),
    "parametrized": (parametrized, images(4)),
}
FEW = {"mnist-cnn": (2, 2), "resnet": (2, 1), "vision transformer": (2, 1)}
"""Sizes of domains of large networks."""


def draw(name, *, sizes=SIZES, seed=0):
    """A network in float64 with weights that are not special, inputs and targets."""
    make, inputs_of = NETWORKS[name]
    torch.manual_seed(seed)
    network, inputs = make().double(), inputs_of(sum(sizes))
    with torch.no_grad():
        network(inputs)  # widths that are known only now
        for weight in network.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return network, inputs, torch.randint(3, (sum(sizes),))


def watched(penalty, network, inputs, targets, domains=SIZES):
    with penalty.watch():
        logits = network(inputs)
    return penalty(logits, targets, domains)


def trainable(network):
    return [weight for weight in network.parameters() if weight.requires_grad]


def expected_statistics(network, inputs, targets, *, weights=None, loss=None, domains=SIZES, mask=None, centered=True):
    """v_e ``[domain, weight]`` from one gradient for each sample."""
    weights = trainable(network) if weights is None else weights
    with sdpa_kernel(SDPBackend.MATH):
        gradients = oracles.network_gradients(loss or nn.CrossEntropyLoss(), network, weights, inputs, targets)
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    domains = domains if isinstance(domains, torch.Tensor) else indices_of(domains)
    return oracles.variances(flat, domains, int(domains.max()) + 1, centered=centered, mask=mask)


def gradients_of(value, network):
    return torch.autograd.grad(value, trainable(network), retain_graph=True, materialize_grads=True)


def assert_same(actual, expected, network, tolerance=1e-10):
    """Value, and gradient with respect to all weights."""
    assert oracles.relative_error(actual, expected) <= tolerance
    assert oracles.relative_error(gradients_of(actual, network), gradients_of(expected, network)) <= tolerance


# What the definition says


@pytest.mark.parametrize("name", NETWORKS)
def test_penalty_of_each_network(name):
    sizes = FEW.get(name, SIZES)
    network, inputs, targets = draw(name, sizes=sizes)
    actual = watched(NetworkFishrPenalty(network, len(sizes), ema=0), network, inputs, targets, sizes)
    expected = oracles.penalty(expected_statistics(network, inputs, targets, domains=sizes), "mean")
    assert actual.dtype == torch.float64
    assert_same(actual, expected, network)


@pytest.mark.parametrize("layers", ["closed form", "chunks"])
@pytest.mark.parametrize("name", LOSSES)
def test_penalty_of_each_loss(name, layers):
    case, generator = LOSSES[name], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if layers == "closed form":
        network, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, case.num_classes)), torch.randn(9, 4)
    else:
        network, inputs = convolutions(nn.Conv1d(2, 3, 2)), torch.randn(9, 2, 4)
        network[-1] = nn.Linear(9, case.num_classes)
    network, inputs = network.double(), inputs.double()
    targets, loss = case.targets(generator, 9, torch.float64), case.loss(torch.float64)
    mask = None if case.ignore_index is None else targets != case.ignore_index
    actual = watched(NetworkFishrPenalty(network, 3, loss=loss, ema=0), network, inputs, targets)
    expected = oracles.penalty(expected_statistics(network, inputs, targets, loss=loss, mask=mask), "mean")
    assert_same(actual, expected, network)


@pytest.mark.parametrize("by", ["sizes", "indices"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variant", ["variance", "second_moment"])
@pytest.mark.parametrize("name", ["mlp", "groups", "transformer"])
def test_penalty_of_each_setting(name, variant, reduction, by):
    network, inputs, targets = draw(name)
    domains = SIZES if by == "sizes" else indices_of(SIZES)[torch.randperm(len(inputs))]
    penalty = NetworkFishrPenalty(network, 3, ema=0, reduction=reduction, variant=variant)
    actual = watched(penalty, network, inputs, targets, domains)
    statistics = expected_statistics(network, inputs, targets, domains=domains, centered=variant == "variance")
    assert_same(actual, oracles.penalty(statistics, reduction), network)


def test_of_a_head_alone_it_is_the_other_penalty():
    network, inputs, targets = draw("mlp")
    featurizer, head = network
    features = featurizer(inputs)
    head_penalty = FishrPenalty(head.double(), 3, ema=0)(features, head(features), targets, SIZES)
    penalty = NetworkFishrPenalty(head, 3, ema=0)
    with penalty.watch():
        logits = head(featurizer(inputs))
    assert_same(penalty(logits, targets, SIZES), head_penalty, network)


def test_layers_of_several_modules():
    network, inputs, targets = draw("shared by tokens")
    layers = nn.ModuleList([network.head, network.first])
    actual = watched(NetworkFishrPenalty(layers, 3, ema=0), network, inputs, targets)
    expected = expected_statistics(network, inputs, targets, weights=list(layers.parameters()))
    assert_same(actual, oracles.penalty(expected, "mean"), network)


def test_a_loss_of_tokens():
    network, inputs, targets = nn.Linear(4, 3).double(), torch.randn(9, 5, 4).double(), torch.randint(3, (9, 5))

    def loss(logits, targets):
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)

    actual = watched(NetworkFishrPenalty(network, 3, loss=loss, ema=0), network, inputs, targets)
    expected = oracles.penalty(expected_statistics(network, inputs, targets, loss=loss), "mean")
    assert_same(actual, expected, network)


def test_a_loss_with_constant_residuals():
    """Gradients of single samples with respect to a bias are then constants."""
    network, inputs, targets = draw("layer norm")
    network.insert(len(network), nn.LayerNorm(3).double())
    network[-1].weight.requires_grad_(False)

    def loss(logits, targets):
        return -logits.gather(1, targets.unsqueeze(1)).squeeze(1)

    actual = watched(NetworkFishrPenalty(network, 3, loss=loss, ema=0), network, inputs, targets)
    expected = oracles.penalty(expected_statistics(network, inputs, targets, loss=loss), "mean")
    assert_same(actual, expected, network)


def test_the_moving_average_of_some_steps():
    network, _, _ = draw("stride, padding")
    penalty, statistics = NetworkFishrPenalty(network, 3, ema=0.9), []
    for step in range(3):
        inputs, targets = NETWORKS["stride, padding"][1](9), torch.randint(3, (9,))
        actual = watched(penalty, network, inputs, targets)
        statistics.append(expected_statistics(network, inputs, targets))
        assert_same(actual, oracles.penalty(oracles.moving_average(statistics, 0.9), "mean"), network)
        if step == 1:
            restored = NetworkFishrPenalty(network, 3, ema=0.9)
            restored.load_state_dict(penalty.state_dict())
            penalty = restored


def test_frozen_weights_have_no_part():
    network, inputs, targets = draw("groups")
    network[0].bias.requires_grad_(False)
    penalty = NetworkFishrPenalty(network, 3, ema=0)
    actual = watched(penalty, network, inputs, targets)
    assert_same(actual, oracles.penalty(expected_statistics(network, inputs, targets), "mean"), network)


def test_weights_frozen_later_have_variance_zero():
    network, inputs, targets = draw("groups")
    penalty, num_weights = NetworkFishrPenalty(network, 3, ema=0), sum(w.numel() for w in network.parameters())
    network[0].requires_grad_(False)
    actual = watched(penalty, network, inputs, targets)
    expected = oracles.penalty(expected_statistics(network, inputs, targets), "sum") / (3 * num_weights)
    assert_same(actual, expected, network)


@pytest.mark.parametrize("name", ["mlp", "mnist-cnn", "vision transformer"])
def test_layers_in_bfloat16(name):
    sizes = FEW.get(name, SIZES)
    network, inputs, targets = draw(name, sizes=sizes)
    network, inputs = network.float(), inputs.float()
    penalty = NetworkFishrPenalty(network, len(sizes), ema=0)
    full = watched(penalty, network, inputs, targets, sizes)
    with penalty.watch():
        with torch.autocast("cpu", torch.bfloat16):
            features = network[0](inputs)
        logits = network[1](features.float())
    mixed = penalty(logits, targets, sizes)
    assert full.dtype == mixed.dtype == torch.float32
    assert oracles.relative_error(mixed, full) <= 0.05
    assert oracles.relative_error(gradients_of(mixed, network), gradients_of(full, network)) <= 0.1


# Memory


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


CHUNKED = ["shared by tokens", "groups", "depthwise", "group norm", "transformer", "tied"]


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("memory", [1, 2000, 10_000])
def test_chunks_change_nothing(name, memory, monkeypatch):
    network, inputs, targets = draw(name)
    whole = watched(NetworkFishrPenalty(network, 3, ema=0), network, inputs, targets)
    monkeypatch.setattr("fishr.nn.network_penalty.MIB", memory)
    penalty = NetworkFishrPenalty(network, 3, ema=0, memory=1)
    assert_same(watched(penalty, network, inputs, targets), whole, network, 1e-12)


def wide(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))


WIDE = {
    "closed form": (lambda: wide(nn.Linear(60, 80)), images(60)),
    "tokens": (lambda: wide(nn.Linear(60, 80)), images(2, 60)),
    "convolution": (lambda: wide(nn.Conv2d(20, 24, 3)), images(20, 3, 3)),
    "torch.func": (lambda: wide(nn.ConvTranspose2d(24, 20, 3)), images(24, 1, 1)),
}
"""Networks with many more weights than activations."""


@pytest.mark.parametrize("name", WIDE)
def test_gradients_of_all_samples_never_exist_at_once(name, monkeypatch):
    num_samples, bound = 64, 200_000  # bytes; about 1.5 of what a sample of a chunk takes
    monkeypatch.setattr("fishr.nn.network_penalty.MIB", bound)
    make, inputs_of = WIDE[name]
    network, inputs, targets = make(), inputs_of(num_samples).float(), torch.randint(2, (num_samples,))
    network(inputs)
    num_weights = network[0].weight.numel()
    assert 4 * num_samples * num_weights > 5 * bound
    with LargestTensor() as largest:
        penalty = watched(NetworkFishrPenalty(network, 2, memory=1), network, inputs, targets, (32, 32))
        penalty.backward()
    assert 4 * num_weights <= 4 * largest.numel <= bound


# What it is refused for


def refused(network, inputs, match, *, num_classes=3, sizes=(2, 2)):
    penalty = NetworkFishrPenalty(network, 2)
    with pytest.raises(ConfigError, match=match):
        watched(penalty, network, inputs, torch.arange(4) % num_classes, sizes)


def test_batch_norm_that_trains():
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    refused(network, torch.randn(4, 4), "'1' normalises with the statistics of the batch, .* freeze batch norm")
    network.eval()
    assert torch.isfinite(
        watched(NetworkFishrPenalty(network, 2), network, torch.randn(4, 4), torch.zeros(4).long(), (2, 2))
    )
    without = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).eval()
    refused(without, torch.randn(4, 4), "'1' normalises with the statistics of the batch")


class OneByOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs):
        return torch.cat([self.layer(part) for part in inputs.split(2)])


def test_a_network_that_is_called_for_each_domain():
    network = nn.Linear(4, 3)
    penalty = NetworkFishrPenalty(nn.ModuleList([network]), 2)
    with penalty.watch():
        logits = torch.cat([network(part) for part in torch.randn(4, 4).split(2)])
    message = (
        r"'0.weight' cannot be told: '0' was called 2 times, .* tensor of \[4, ...\], .* the whole batch .* one call"
    )
    with pytest.raises(ConfigError, match=message):
        penalty(logits, torch.zeros(4).long(), (2, 2))


def test_a_module_around_a_layer_stands_in_for_it():
    network, inputs, targets = OneByOne().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    actual = watched(NetworkFishrPenalty(network, 3, ema=0), network, inputs, targets)
    assert_same(actual, oracles.penalty(expected_statistics(network, inputs, targets), "mean"), network)


class Dropping(nn.Module):
    """Random numbers between weights of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        return F.dropout(inputs * self.scale, 0.5, self.training)


def test_random_numbers_inside_a_module_of_ones_own():
    network = nn.Sequential(nn.Linear(4, 4), Dropping(), nn.Linear(4, 3))
    refused(
        network, torch.randn(4, 4), "with respect to '1.scale' through the Dropping '1': vmap: called random operation"
    )


def test_dropout_between_layers_is_that_of_the_forward_pass():
    network, inputs, targets = draw("mlp")
    network.insert(1, nn.Dropout(0.5))
    torch.manual_seed(1)
    actual = watched(NetworkFishrPenalty(network, 3, ema=0), network, inputs, targets)
    torch.manual_seed(1)
    features = network[0](inputs)
    dropped = F.dropout(torch.ones_like(features), 0.5)

    def of_sample(sample):
        (index,) = [index for index, other in enumerate(inputs) if torch.equal(other, sample[0])]
        return network[2](network[0](sample) * dropped[index])

    gradients = oracles.network_gradients(nn.CrossEntropyLoss(), of_sample, trainable(network), inputs, targets)
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    assert_same(actual, oracles.penalty(oracles.variances(flat, indices_of(SIZES), 3), "mean"), network)


class UsesTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.second(self.first(inputs) @ self.first.weight)


class Mixing(nn.Module):
    """A sample's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.layer(inputs))
        return self.head(hidden - hidden.mean(0))


class TokensFirst(nn.Module):
    """As many tokens as samples, and these behind them."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.layer(inputs.transpose(0, 1))).mean(0))


@pytest.mark.parametrize(
    ("network", "shape", "weight"),
    [
        (UsesTwice, (4, 4), "first.weight"),
        (Mixing, (4, 4), "layer.weight"),
        (TokensFirst, (4, 4, 4), "layer.weight"),
    ],
)
def test_gradients_that_autograd_does_not_find(network, shape, weight):
    torch.manual_seed(0)
    refused(network(), torch.randn(shape), f"single sample with respect to '{weight}' is not what autograd finds")


def test_several_ranks(monkeypatch):
    penalty = NetworkFishrPenalty(nn.Linear(4, 3), 2)
    monkeypatch.setattr("fishr.nn.network_penalty.is_distributed", lambda: True)
    message = "not compared over several ranks: train on one device, or compare those of the classifier alone"
    with pytest.raises(ConfigError, match=message):
        NetworkFishrPenalty(nn.Linear(4, 3), 2)
    with pytest.raises(ConfigError, match=message), penalty.watch():
        pass


def test_weights_that_are_all_frozen():
    with pytest.raises(ConfigError, match="the network has no trainable weight"):
        NetworkFishrPenalty(nn.Linear(4, 3).requires_grad_(False), 2)
    network = nn.Linear(4, 3)
    penalty = NetworkFishrPenalty(network, 2)
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match="all weights of the network are frozen"):
        watched(penalty, network, torch.randn(4, 4, requires_grad=True), torch.zeros(4).long(), (2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "covariance"}, "variant must be 'variance' or 'second_moment', got 'covariance'; .* FishrPenalty"),
        ({"num_domains": 1}, "num_domains must be at least 2, got 1"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum', got 'max'"),
        ({"ema": 1.0}, re.escape("must lie in [0, 1), got 1.0")),
        ({"memory": 0}, "memory must be at least 1 MiB, got 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        NetworkFishrPenalty(nn.Linear(4, 3), **{"num_domains": 2, **settings})


def test_calls_in_another_order():
    network, inputs, targets = draw("mlp")
    penalty = NetworkFishrPenalty(network, 3)
    with pytest.raises(
        InputError, match=r"no forward pass was watched: run the network inside `with penalty.watch\(\):`"
    ):
        penalty(network(inputs), targets, SIZES)
    watched(penalty, network, inputs, targets)
    with pytest.raises(InputError, match="no forward pass was watched"):
        penalty(network(inputs), targets, SIZES)
    with penalty.watch():
        logits = network(inputs)
    with pytest.raises(InputError, match="the logits have no graph"):
        penalty(logits.detach(), targets, SIZES)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match="call watch\\(\\) where gradients are enabled"),
        penalty.watch(),
    ):
        pass


# As a module


def test_it_reads_the_network_and_leaves_it_as_it_is():
    network, inputs, targets = draw("groups")
    penalty = NetworkFishrPenalty(network, 3)
    assert list(penalty.parameters()) == []
    assert {name: value.shape for name, value in penalty.state_dict().items()} == {
        "average.history": (3, sum(weight.numel() for weight in network.parameters()))
    }
    watched(penalty, network, inputs, targets).backward()
    with penalty.watch():
        pass
    assert not any(module._forward_hooks for module in network.modules())


def test_evaluation_leaves_the_moving_average():
    network, inputs, targets = draw("mlp")
    penalty = NetworkFishrPenalty(network, 3).eval()
    watched(penalty, network, inputs, targets)
    assert not penalty.average.history.any()


def test_a_copy_watches_its_own_network():
    pair = nn.ModuleDict({"network": draw("mlp")[0]})
    pair["penalty"] = NetworkFishrPenalty(pair["network"], 3, ema=0)
    other = copy.deepcopy(pair)
    inputs, targets = torch.randn(9, 4).double(), torch.randint(3, (9,))
    values = [watched(each["penalty"], each["network"], inputs, targets) for each in (pair, other)]
    assert torch.equal(*values)


def test_a_second_derivative_is_refused_and_not_wrong():
    network, inputs, targets = draw("stride, padding")
    value = watched(NetworkFishrPenalty(network, 3, ema=0), network, inputs, targets)
    gradients = torch.autograd.grad(value, network[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()
