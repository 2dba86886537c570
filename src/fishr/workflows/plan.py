"""How much of a comparison fits into the time there is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from fishr.errors import ConfigError

MIN_DRAWS, MIN_SEEDS, MIN_STEPS = 1, 2, 100
"""What a budget never takes away."""


@dataclass(frozen=True)
class Extent:
    """How much is done.

    Attributes:
        draws: Hyperparameter settings of each algorithm that are tried with the first seed.
        seeds: Seeds of the setting chosen.
        steps: Updates of each run.
    """

    draws: int
    seeds: int
    steps: int

    def __str__(self) -> str:
        return f"{count(self.draws, 'draw')}, {count(self.seeds, 'seed')}, {self.steps:,} steps"


def fit(asked: Extent, budget: float | None, seconds: Callable[[Extent], float]) -> Extent:
    """The most of what was asked for that takes no longer than the budget.

    Draws go first, then seeds, then steps, each down to its minimum (:data:`MIN_DRAWS`, :data:`MIN_SEEDS`,
    :data:`MIN_STEPS`) or to what was asked for, if that is less.

    Args:
        asked: What was asked for.
        budget: Seconds there are; None for as many as it takes.
        seconds: How long an extent takes; more of anything takes longer.

    Raises:
        ConfigError: the minimum takes longer than the budget.
    """
    if budget is None or seconds(asked) <= budget:
        return asked
    least = Extent(min(asked.draws, MIN_DRAWS), min(asked.seeds, MIN_SEEDS), min(asked.steps, MIN_STEPS))
    if seconds(least) > budget:
        raise ConfigError(
            f"the budget of {duration(budget)} is too short: the minimum ({least}) takes about "
            f"{duration(seconds(least))}; give more time, or fewer algorithms, smaller images or a smaller network"
        )
    extent = asked
    for name in ("draws", "seeds"):
        while getattr(extent, name) > getattr(least, name):
            extent = replace(extent, **{name: getattr(extent, name) - 1})
            if seconds(extent) <= budget:
                return extent
    enough, too_many = least.steps, extent.steps
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if seconds(replace(extent, steps=middle)) <= budget:
            enough = middle
        else:
            too_many = middle
    return replace(extent, steps=enough)


def parse_duration(text: str) -> float:
    """Seconds of ``2h``, ``1h30m``, ``90 min``, ``45s`` or ``1.5 h``.

    Raises:
        ConfigError: something else.

    >>> parse_duration("1h30m")
    5400.0
    """
    units = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
    parts = re.findall(r"\s*(\d+(?:\.\d+)?)\s*(h|min|m|s)\s*", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if not re.fullmatch(r"(?:\s*\d+(?:\.\d+)?\s*(?:h|min|m|s)\s*)+", text) or seconds <= 0:
        raise ConfigError(f"a budget is a time such as 2h, 1h30m or 90min, got {text!r}")
    return seconds


def duration(seconds: float) -> str:
    """A time for a reader.

    >>> duration(5400), duration(90), duration(7)
    ('1 h 30 min', '2 min', '7 s')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
