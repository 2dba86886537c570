"""Search spaces: distributions of hyperparameters and named, seeded draws from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import numpy as np


class Distribution(Protocol):
    """Something a hyperparameter can be drawn from."""

    def sample(self, generator: np.random.Generator) -> Any: ...


@dataclass(frozen=True)
class Uniform:
    """U(low, high)."""

    low: float
    high: float

    def sample(self, generator: np.random.Generator) -> float:
        return float(generator.uniform(self.low, self.high))

    def __str__(self) -> str:
        return f"uniform {self.low:.5g} to {self.high:.5g}"


@dataclass(frozen=True)
class LogUniform:
    """exp U(log low, log high); with ``integer`` rounded down to a whole number."""

    low: float
    high: float
    integer: bool = False

    def sample(self, generator: np.random.Generator) -> float | int:
        value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return int(value) if self.integer else value

    def __str__(self) -> str:
        return f"log-uniform {self.low:.5g} to {self.high:.5g}{', whole' if self.integer else ''}"


@dataclass(frozen=True)
class Choice:
    """One of several values, each as likely."""

    options: tuple[Any, ...]

    def sample(self, generator: np.random.Generator) -> Any:
        return self.options[int(generator.integers(len(self.options)))]

    def __str__(self) -> str:
        return f"one of {', '.join(f'{each:g}' if isinstance(each, float) else str(each) for each in self.options)}"


def draw(space: Mapping[str, Distribution], *seed: int) -> dict[str, Any]:
    """One value for each hyperparameter, seeded by ``seed`` and its name: adding one changes no other.

    >>> space = {"lr": LogUniform(1e-5, 1e-3)}
    >>> draw(space, 1)["lr"] == draw({"ema": Uniform(0.9, 0.99), **space}, 1)["lr"]
    True
    """
    return {
        name: distribution.sample(np.random.default_rng((*seed, crc32(name.encode()))))
        for name, distribution in space.items()
    }
