import torch

from fishr.training.best import BestWeights


def test_kept_weights_are_a_copy() -> None:
    weights = {"a": torch.tensor([1.0])}
    best = BestWeights()
    best.keep(weights, 3)
    weights["a"] += 1
    assert best.step == 3
    assert best.weights["a"].item() == 1


def test_the_state_goes_round() -> None:
    best, again = BestWeights(), BestWeights()
    assert best.state_dict() == {}
    again.load_state_dict({})
    assert again.step is None
    best.keep({"a.weight": torch.tensor([1.0, 2.0])}, 7)
    again.load_state_dict(best.state_dict())
    assert again.step == 7
    assert torch.equal(again.weights["a.weight"], torch.tensor([1.0, 2.0]))
