"""MTL and ARM: predictions that adapt to the domain of the batch."""

import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms import ARM, ERM, MTL
from fishr.data import DomainBatch, Samples
from fishr.errors import ConfigError
from fishr.models.backbone import backbone_config, load_initial_weights
from fishr.models.batch_context import ContextFeaturizer, MeanEmbedding, evaluation_order
from fishr.models.build import ModelConfig, build_model
from fishr.models.card import ModelCard, card_as_markdown
from fishr.training.evaluation import evaluate
from fishr.training.ranks import Ranks

INPUTS = torch.tensor([[1.0, 0.0], [3.0, 2.0], [10.0, 20.0]])
BATCH = DomainBatch(INPUTS, torch.tensor([0, 1, 1]), (2, 1))


def mtl(update_weight: float) -> MTL:
    """Features are the ReLU of the inputs."""
    featurizer = MeanEmbedding((2,), "mlp", {"width": 2, "depth": 1})
    with torch.no_grad():
        featurizer.inner[1].weight.copy_(torch.eye(2))
        featurizer.inner[1].bias.zero_()
    return MTL(featurizer, nn.Linear(4, 2), 2, MTL.Config(update_weight=update_weight))


def seen_by_head(algorithm: MTL | ARM) -> Tensor:
    seen: list[Tensor] = []
    hook = algorithm.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    algorithm.losses(BATCH, 0)
    hook.remove()
    return torch.cat(seen)


def test_mtl_joins_each_sample_and_the_average_of_its_domain() -> None:
    algorithm = mtl(0.5)
    # Means (2, 1) and (10, 20), half of them in a history that begins at zero.
    assert seen_by_head(algorithm).tolist() == [[1, 0, 1, 0.5], [3, 2, 1, 0.5], [10, 20, 5, 10]]
    assert algorithm.embeddings.tolist() == [[1, 0.5], [5, 10]]
    assert seen_by_head(algorithm)[:, 2:].tolist() == [[1.5, 0.75], [1.5, 0.75], [7.5, 15]]


def test_the_history_of_mtl_is_a_constant() -> None:
    algorithm = mtl(0.25)
    algorithm.losses(BATCH, 0)
    algorithm.losses(BATCH, 1).total.backward()  # a graph through the first step would be gone by now
    assert algorithm.featurizer.inner[1].weight.grad.abs().sum() > 0


def test_mtl_predicts_from_the_mean_of_the_batch_at_hand() -> None:
    algorithm = mtl(0.5).eval()
    joined = torch.cat([INPUTS, INPUTS.mean(0).expand(3, 2)], dim=1)
    assert torch.allclose(algorithm(INPUTS), algorithm.classifier(joined))
    alone = torch.cat([INPUTS[:1], INPUTS[:1]], dim=1)
    assert torch.allclose(algorithm(INPUTS[:1]), algorithm.classifier(alone))


@pytest.mark.parametrize(("shape", "context_shape"), [((6,), (6,)), ((2, 5, 5), (1, 5, 5))])
def test_arm_joins_the_input_and_the_mean_context_of_its_domain(
    shape: tuple[int, ...], context_shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    featurizer = ContextFeaturizer(shape, "mlp", {"width": 4})
    algorithm = ARM(featurizer, nn.Linear(4, 3), 2).eval()
    inputs = torch.randn(5, *shape)
    batch = DomainBatch(inputs, torch.tensor([0, 1, 2, 0, 1]), (2, 3))
    context = featurizer.context(inputs)
    assert context.shape[1:] == context_shape
    means = torch.cat([context[:2].mean(0).expand(2, *context_shape), context[2:].mean(0).expand(3, *context_shape)])
    logits = algorithm.classifier(featurizer.inner(torch.cat([inputs, means], dim=1)))
    expected = nn.functional.cross_entropy(logits, batch.targets)
    assert algorithm.losses(batch, 0).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_context_that_is_constant_adapts_to_nothing() -> None:
    featurizer = ContextFeaturizer((6,), "mlp", {"width": 4}).eval()
    with torch.no_grad():
        featurizer.context[-2].weight.zero_()
    inputs = torch.randn(4, 6)
    assert torch.allclose(featurizer(inputs)[:1], featurizer(inputs[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "name", "featurizer"), [(MTL, "mean-embedding", MeanEmbedding), (ARM, "context", ContextFeaturizer)]
)
def test_the_network_asked_for_lies_inside(algorithm: type[MTL | ARM], name: str, featurizer: type) -> None:
    asked = ModelConfig("mlp", {"width": 5}, init="xavier", weights="hub:some")
    config = algorithm.model_config(asked)
    assert config == ModelConfig(name, {"featurizer": "mlp", "options": {"width": 5}}, "xavier", "hub:some")
    built, _ = build_model(config, (6,), 3)
    assert isinstance(built, featurizer)
    assert ERM.model_config(asked) == asked


def test_a_backbone_takes_the_context_as_one_more_channel() -> None:
    options = {"name": "test_resnet", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    featurizer = ContextFeaturizer((3, 32, 32), "timm", options)
    assert featurizer.inner.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3, 0.0])
    assert featurizer.inner.std.flatten().tolist() == pytest.approx([0.2, 0.2, 0.2, 1.0])
    assert featurizer(torch.rand(2, 3, 32, 32)).shape == (2, featurizer.num_features)


@pytest.mark.parametrize(("algorithm", "needed"), [(MTL, "MeanEmbedding"), (ARM, "ContextFeaturizer")])
def test_another_featurizer_is_refused(algorithm: type[MTL | ARM], needed: str) -> None:
    with pytest.raises(ConfigError, match=f"needs a {needed} as featurizer, got a Identity"):
        algorithm(nn.Identity(), nn.Linear(2, 2), 2)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"update_weight must lie in \(0, 1\], got 0"):
        MTL.Config(update_weight=0.0)


def test_arm_takes_small_batches_of_images() -> None:
    assert [ARM.Config.default(kind).batch_size for kind in ("vectors", "small_images", "images")] == [64, 64, 8]


@pytest.mark.parametrize("featurizer", ["mean-embedding", "context"])
def test_what_lies_inside_sees_each_sample_alone(featurizer: str) -> None:
    inside = {"featurizer": "context", "options": {"featurizer": "mlp", "options": {}}}
    with pytest.raises(ConfigError, match="the featurizer inside must see each sample alone, got 'context'"):
        build_model(ModelConfig(featurizer, inside), (6,), 3)


def test_the_card_names_the_network_inside() -> None:
    model = ModelConfig("mean-embedding", {"featurizer": "mlp"})
    card = ModelCard(model, (6,), ("a", "b"), binary=False)
    assert card.depends_on_batch
    assert "| network | mean-embedding around mlp, not pre-trained |" in card_as_markdown(card)
    assert not ModelCard(ModelConfig("mlp"), (6,), ("a", "b"), binary=False).depends_on_batch


def test_data_that_lie_class_by_class_are_evaluated_in_another_order() -> None:
    order = evaluation_order(mtl(1.0).featurizer, 100)
    assert sorted(order.tolist()) == list(range(100))
    assert 20 < (order[:50] < 50).sum() < 30
    assert torch.equal(order, evaluation_order(mtl(1.0).featurizer, 100))
    assert evaluation_order(nn.Identity(), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_batch_of_one_class_is_not_what_accuracy_is_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head tells classes by where a sample lies against the mean of its batch."""
    algorithm = mtl(1.0)
    with torch.no_grad():
        algorithm.classifier.weight.copy_(torch.tensor([[-1.0, 0, 1, 0], [1, 0, -1, 0]]))
        algorithm.classifier.bias.zero_()
    inputs = torch.tensor([[1.0, 0.0]] * 100 + [[2.0, 0.0]] * 100)
    samples = Samples(inputs, torch.tensor([0] * 100 + [1] * 100))
    monkeypatch.setattr("fishr.training.evaluation.BATCH_SIZE", 50)
    assert evaluate(algorithm, samples, Ranks("cpu", "32")).accuracy == 1.0


def test_initial_weights_are_those_of_the_backbone_inside() -> None:
    config = backbone_config("test_resnet", weights=None)
    with pytest.raises(ConfigError, match=r"weights must be 'hub:<id>' or 'sha256:<digest>', got 'none'"):
        load_initial_weights(ContextFeaturizer((3, 32, 32), "timm", config.options), "none", None)
