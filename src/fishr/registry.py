"""A typed registry: names to objects, with a helpful miss."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from fishr.errors import ConfigError

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """An error for a name that is not known: names the nearest, lists all."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


class Registry(Generic[T]):
    """Names to objects of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> None:
        if name in self._items:
            raise ConfigError(f"{self.kind} {name!r} is registered already")
        self._items[name] = item

    def __getitem__(self, name: str) -> T:
        """Raises ConfigError with the nearest name and the list of all."""
        try:
            return self._items[name]
        except KeyError:
            raise unknown(self.kind, name, self._items) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
