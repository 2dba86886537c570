"""The moving average of DomainBed's code: an uncorrected sum from zero, scaled by 1/(1 − γ)."""

import pytest
import torch
from torch import nn

import oracles
from fishr.errors import ConfigError
from fishr.nn import MovingAverage


def draw_steps(num_steps=5, shape=(2, 3, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num_steps)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_matches_the_published_sum(decay):
    steps = draw_steps()
    average = MovingAverage(steps[0].shape, decay)
    for t, value in enumerate(steps):
        expected = oracles.moving_average([step.double() for step in steps[: t + 1]], decay)
        assert oracles.relative_error(average(value), expected) <= 1e-6


def test_starts_at_zero_and_returns_the_first_value_itself():
    (value,) = draw_steps(1)
    average = MovingAverage(value.shape, 0.9)
    assert torch.equal(average.history, torch.zeros_like(value))
    assert torch.equal(average(value), value)
    torch.testing.assert_close(average.history, value * 0.1)


def test_a_constant_grows_to_one_over_one_minus_decay():
    average = MovingAverage((1,), 0.9)
    values = [average(torch.ones(1)).item() for _ in range(200)]
    assert values[:3] == pytest.approx([1, 1.9, 2.71])
    assert values[-1] == pytest.approx(10)


def test_the_gradient_is_that_of_the_value_and_the_history_has_none():
    steps = [step.requires_grad_() for step in draw_steps(3)]
    average = MovingAverage(steps[0].shape, 0.9)
    _, second, third = (average(step) for step in steps)
    assert not average.history.requires_grad
    third.sum().backward()
    assert steps[0].grad is None
    assert steps[1].grad is None
    assert torch.equal(steps[2].grad, torch.ones_like(steps[2]))
    second.sum().backward()  # its graph is still whole, though the history has moved on
    assert torch.equal(steps[1].grad, torch.ones_like(steps[1]))


def test_the_gradient_through_a_nonlinear_use_is_taken_at_the_averaged_value():
    steps = [step.requires_grad_() for step in draw_steps(3)]
    average = MovingAverage(steps[0].shape, 0.9)
    averaged = [average(step) for step in steps]
    for value, step in zip(averaged, steps, strict=True):
        value.square().sum().backward()
        torch.testing.assert_close(step.grad, 2 * value.detach())


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_calls_outside_training_leave_the_history(how):
    first, second, third = draw_steps(3)
    average = MovingAverage(first.shape, 0.9)
    average(first)
    before = average.history.clone()
    if how == "eval":
        average.eval()
        observed = average(second)
        average.train()
    else:
        with getattr(torch, how)():
            observed = average(second)
    assert torch.equal(average.history, before)
    torch.testing.assert_close(observed, second + 9 * before)
    average(third)
    assert not torch.equal(average.history, before)


def test_state_goes_on_in_a_fresh_module_bit_for_bit():
    *steps, last = draw_steps()
    average = MovingAverage(last.shape, 0.95)
    for step in steps:
        average(step)
    fresh = MovingAverage(last.shape, 0.95)
    assert fresh.load_state_dict(average.state_dict(), strict=True) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(fresh(last), average(last))
    assert torch.equal(fresh.history, average.history)


def test_state_of_another_shape_or_name_is_refused():
    average = MovingAverage((2, 3), 0.95)
    with pytest.raises(RuntimeError, match="size mismatch for history"):
        average.load_state_dict(MovingAverage((2, 4), 0.95).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*history"):
        average.load_state_dict({})


def test_double_keeps_a_history_in_double():
    steps = draw_steps(dtype=torch.float64)
    average = MovingAverage(steps[0].shape, 0.95).double()
    for t, value in enumerate(steps):
        averaged = average(value)
        assert averaged.dtype == torch.float64
        assert oracles.relative_error(averaged, oracles.moving_average(steps[: t + 1], 0.95)) <= 1e-13


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_decay_outside_its_bounds(decay):
    with pytest.raises(ConfigError, match=rf"decay of a moving average must lie in \[0, 1\), got {decay}"):
        MovingAverage((1,), decay)


def test_the_history_is_never_half_precision():
    average = MovingAverage((2, 3), 0.9).bfloat16()
    assert average.history.dtype == torch.float32
    assert average.double().history.dtype == torch.float64


def test_compiled_gradients_are_those_of_eager_steps():
    eager, compiled = MovingAverage((2, 3), 0.9), MovingAverage((2, 3), 0.9)
    function = torch.compile(lambda value: compiled(value).square().sum(), backend="aot_eager", fullgraph=True)
    for step in range(3):
        values = [torch.full((2, 3), float(step + 1), requires_grad=True) for _ in range(2)]
        eager(values[0]).square().sum().backward()
        function(values[1]).backward()
        torch.testing.assert_close(values[1].grad, values[0].grad)


def test_casting_to_half_precision_keeps_the_history_as_it_was():
    average = MovingAverage((2,), 0.9)
    average.history.copy_(torch.tensor([100000.123, 1 / 3]))
    kept = average.history.clone()
    torch.testing.assert_close(average.half().history, kept, rtol=0, atol=0)
