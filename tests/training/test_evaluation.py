import math

import pytest
import torch
from torch import Tensor, nn

from fishr.algorithms import ERM
from fishr.data import MultiDomainDataset, Samples
from fishr.training import evaluation
from fishr.training.evaluation import evaluate
from fishr.training.ranks import Ranks

CPU = Ranks("cpu", "32")


def reading_logits(num_outputs: int, loss: nn.Module | None = None) -> ERM:
    """An algorithm whose logits are its inputs."""
    head = nn.Linear(num_outputs, num_outputs, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(num_outputs))
    return ERM(nn.Identity(), head, 2, loss=loss)


def test_binary_by_hand() -> None:
    logits = [math.log(3), math.log(3), -math.log(3), 0.0]
    metrics = evaluate(reading_logits(1), Samples(torch.tensor(logits).unsqueeze(1), torch.tensor([1, 0, 0, 1])), CPU)
    # Probabilities of class 1 are 3/4, 3/4, 1/4, 1/2; a logit of zero counts as class 0.
    losses = [-math.log(3 / 4), -math.log(1 / 4), -math.log(3 / 4), -math.log(1 / 2)]
    assert metrics.accuracy == 2 / 4
    assert metrics.loss == pytest.approx(sum(losses) / 4)


def test_several_classes_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [4.0, 1.0, 1.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0]]).log()
    logits[logits.isinf()] = -1e9
    metrics = evaluate(reading_logits(3), Samples(logits, torch.tensor([2, 1, 0, 2, 0])), CPU)
    losses = [-math.log(5 / 8), -math.log(2 / 8), -math.log(4 / 6), 0, 0]
    assert metrics.accuracy == 4 / 5
    assert metrics.loss == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize("size", [1, 9, 10, 11, 25])
def test_more_samples_than_a_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    samples = Samples(torch.randn(size, 4), torch.randint(4, (size,)))
    at_once = evaluate(reading_logits(4), samples, CPU)
    batches = []

    class Watching(nn.Identity):
        def forward(self, inputs: Tensor) -> Tensor:
            batches.append(len(inputs))
            return inputs

    in_parts = reading_logits(4)
    in_parts.featurizer = Watching()
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 10)
    metrics = evaluate(in_parts, samples, CPU)
    assert metrics.accuracy == at_once.accuracy
    assert metrics.loss == pytest.approx(at_once.loss)
    assert (sum(batches), max(batches), len(batches)) == (size, min(size, 10), math.ceil(size / 10))


@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_images_come_in_smaller_batches(
    size: int, pictures: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = pictures.domains["lab"].subset(torch.arange(size) * 2)
    batches = []

    class Watching(nn.Flatten):
        def forward(self, inputs: Tensor) -> Tensor:
            assert inputs.dtype == torch.float32
            batches.append(len(inputs))
            return super().forward(inputs)

    torch.manual_seed(0)
    algorithm = ERM(Watching(), nn.Linear(3 * 16 * 16, 2), 2)
    monkeypatch.setattr(evaluation, "IMAGE_BATCH_SIZE", 4)
    metrics = evaluate(algorithm, samples, CPU)
    assert batches == [4] * (size // 4) + [size % 4] * (size % 4 > 0)
    at_once = evaluate(algorithm, Samples(samples.inputs[:].float() / 255, samples.targets), CPU)
    assert metrics.accuracy == at_once.accuracy
    assert metrics.loss == pytest.approx(at_once.loss)


def test_the_loss_is_the_algorithms() -> None:
    weighted = reading_logits(2, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    metrics = evaluate(weighted, Samples(torch.zeros(2, 2), torch.tensor([0, 1])), CPU)
    assert metrics.loss == pytest.approx((1 + 3) / 2 * math.log(2))


@pytest.mark.parametrize("training", [True, False])
def test_in_eval_mode_and_back(training: bool) -> None:
    modes = []

    class Watching(nn.Identity):
        def forward(self, inputs: Tensor) -> Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return inputs

    algorithm = reading_logits(2)
    algorithm.featurizer = Watching()
    algorithm.train(training)
    evaluate(algorithm, Samples(torch.zeros(3, 2), torch.tensor([0, 1, 1])), CPU)
    assert modes == [(False, False)]
    assert algorithm.training == algorithm.featurizer.training == algorithm.classifier.training == training


def test_a_module_kept_in_eval_mode_stays_there() -> None:
    """Such as frozen batch normalization."""
    algorithm = reading_logits(2)
    algorithm.featurizer = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    evaluate(algorithm, Samples(torch.zeros(3, 2), torch.tensor([0, 1, 1])), CPU)
    assert [module.training for module in algorithm.featurizer] == [False, True]


def test_batch_statistics_are_not_touched() -> None:
    algorithm = reading_logits(2)
    algorithm.featurizer = nn.BatchNorm1d(2)
    evaluate(algorithm, Samples(torch.randn(30, 2) + 5, torch.ones(30).long()), CPU)
    assert torch.equal(algorithm.featurizer.running_mean, torch.zeros(2))
