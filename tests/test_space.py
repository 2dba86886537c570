import math
from typing import Any

import numpy as np
import pytest

from fishr.space import Choice, Distribution, LogUniform, Uniform, draw

SPACE: dict[str, Distribution] = {
    "lr": LogUniform(1e-5, 1e-3),
    "ema": Uniform(0.90, 0.99),
    "batch_size": LogUniform(2**3, 2**9, integer=True),
    "dropout": Choice((0.0, 0.1, 0.5)),
}


def drawn(distribution: Distribution, count: int = 2000) -> list[Any]:
    return [draw({"x": distribution}, seed)["x"] for seed in range(count)]


def quartiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


# Distributions


def test_uniform() -> None:
    values = drawn(Uniform(-2.0, 6.0))
    assert {type(value) for value in values} == {float}
    assert -2 <= min(values) < -1.9
    assert 5.9 < max(values) < 6
    assert quartiles(values) == pytest.approx([0, 2, 4], abs=0.4)


def test_log_uniform() -> None:
    values = drawn(LogUniform(1e-6, 1e2))
    assert {type(value) for value in values} == {float}
    assert 1e-6 <= min(values) < 2e-6
    assert 50 < max(values) <= 1e2
    assert quartiles([math.log10(value) for value in values]) == pytest.approx([-4, -2, 0], abs=0.4)


def test_whole_log_uniform_rounds_down() -> None:
    """As the published ⌊2^U(3, 9)⌋."""
    values = drawn(LogUniform(2**3, 2**9, integer=True))
    assert {type(value) for value in values} == {int}
    assert (min(values), max(values) < 512) == (8, True)
    decimals = drawn(LogUniform(2**3, 2**9))
    assert values == [math.floor(value) for value in decimals]


def test_a_range_of_one_value() -> None:
    assert set(drawn(Uniform(3.0, 3.0), 5)) == {3.0}
    assert drawn(LogUniform(3.0, 3.0), 5) == pytest.approx([3.0] * 5)


def test_choice_is_even_and_returns_what_it_was_given() -> None:
    options = (0.0, None, "half")
    values = drawn(Choice(options))
    for option in options:
        assert values.count(option) / len(values) == pytest.approx(1 / 3, abs=0.05)
    assert set(drawn(Choice((7,)), 5)) == {7}


# Draws


def test_a_draw_is_a_function_of_its_seed() -> None:
    assert draw(SPACE, 1) == draw(SPACE, 1)
    assert set(draw(SPACE, 1)) == set(SPACE)
    for other in ((2,), (0, 1), (1, 1)):
        assert draw(SPACE, *other)["lr"] != draw(SPACE, 1)["lr"]
    assert draw(SPACE, 1, 2) != draw(SPACE, 2, 1)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    np.random.seed(0)  # noqa: NPY002
    first, state = draw(SPACE, 1), np.random.get_state()[1].tolist()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert draw(SPACE, 1) == first
    np.random.seed(0)  # noqa: NPY002
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


@pytest.mark.parametrize("name", SPACE)
def test_a_hyperparameter_does_not_depend_on_the_others(name: str) -> None:
    """Adding one, or putting them in another order, changes no other."""
    whole = draw(SPACE, 5)
    assert draw({name: SPACE[name]}, 5)[name] == whole[name]
    assert draw(dict(reversed(SPACE.items())), 5) == whole


def test_hyperparameters_are_drawn_independently() -> None:
    space = {"one": Uniform(0.0, 1.0), "two": Uniform(0.0, 1.0)}
    pairs = np.array([list(draw(space, seed).values()) for seed in range(1000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1


def test_draws_stay_what_they_are() -> None:
    """A sweep that is continued with a later release must draw the same."""
    assert draw(SPACE, 1, 2) == pytest.approx(
        {"lr": 4.674323607428547e-05, "ema": 0.9547537656581075, "batch_size": 35, "dropout": 0.5}, rel=1e-12
    )
