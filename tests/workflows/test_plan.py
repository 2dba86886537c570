import pytest

from fishr.errors import ConfigError
from fishr.workflows.plan import Extent, duration, fit, parse_duration

ASKED = Extent(draws=3, seeds=4, steps=1000)


def seconds(extent: Extent) -> float:
    """A run takes a second for each 100 steps; draws and further seeds are runs."""
    return (extent.draws + extent.seeds - 1) * extent.steps / 100


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, (3, 4, 1000)),
        (60, (3, 4, 1000)),
        (59.9, (2, 4, 1000)),
        (50, (2, 4, 1000)),
        (40, (1, 4, 1000)),
        (39, (1, 3, 1000)),
        (20, (1, 2, 1000)),
        (19, (1, 2, 950)),
        (2.015, (1, 2, 100)),
        (2, (1, 2, 100)),
    ],
)
def test_draws_go_first_then_seeds_then_steps(budget: float | None, expected: tuple[int, int, int]) -> None:
    extent = fit(ASKED, budget, seconds)
    assert (extent.draws, extent.seeds, extent.steps) == expected
    assert budget is None or seconds(extent) <= budget


def test_less_than_the_minimum_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^the budget of 2 s is too short: the minimum \(1 draw, 2 seeds, 100 steps\) takes about 2 s; give more",
    ):
        fit(ASKED, 1.9, seconds)


def test_what_was_asked_for_may_lie_below_the_minimum() -> None:
    asked = Extent(draws=1, seeds=1, steps=50)
    assert fit(asked, 0.5, seconds) == asked
    with pytest.raises(ConfigError, match=r"the minimum \(1 draw, 1 seed, 50 steps\)"):
        fit(asked, 0.4, seconds)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2h", 7200),
        ("1h30m", 5400),
        ("90 min", 5400),
        ("90min", 5400),
        ("45s", 45),
        ("1.5 h", 5400),
        (" 1h 5m 3s ", 3903),
    ],
)
def test_parse_duration(text: str, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "90", "h", "2 days", "-1h", "0h", "1h!", "2h or so", "1e3s"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^a budget is a time such as 2h, 1h30m or 90min, got '"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min"), (360_000, "100 h 0 min")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
