"""A typed registry: names to objects, with a helpful miss."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, TypeVar

from fishr.errors import ConfigError

T = TypeVar("T")

MODULE_AND_NAME = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """An error for a name that is not known: names the nearest, lists all."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


class Registry(Generic[T]):
    """Names to objects of one kind.

    Args:
        kind: What they are, for messages.
        group: Group of entry points by which other packages add to it. With one, ``package.module:Name`` is a name too,
            of what can be imported by it.
        accepts: Whether an object from elsewhere is of that kind.
    """

    def __init__(self, kind: str, group: str | None = None, accepts: Callable[[object], bool] = callable) -> None:
        self.kind, self.group, self.accepts = kind, group, accepts
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> None:
        if name in self._items:
            raise ConfigError(f"{self.kind} {name!r} is registered already")
        self._items[name] = item

    def __getitem__(self, name: str) -> T:
        """What has that name.

        Raises:
            ConfigError: nothing has; it names the nearest and lists all. Or what has it cannot be imported, or is of
                another kind.
        """
        if name in self._items:
            return self._items[name]
        if name in (elsewhere := self._elsewhere()):
            return self._loaded(elsewhere[name])
        if self.group is not None and MODULE_AND_NAME.fullmatch(name):
            with _modules_of_working_directory():
                return self._loaded(EntryPoint(name, name, self.group))
        raise unknown(self.kind, name, self)

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._elsewhere()

    def __iter__(self) -> Iterator[str]:
        yield from self._items
        yield from (name for name in self._elsewhere() if name not in self._items)

    def _elsewhere(self) -> dict[str, EntryPoint]:
        """What other packages add, by name."""
        return {} if self.group is None else {point.name: point for point in entry_points(group=self.group)}

    def _loaded(self, point: EntryPoint) -> T:
        try:
            item: T = point.load()
        except Exception as error:  # a module may raise anything
            raise ConfigError(
                f"{self.kind} {point.name!r} cannot be imported as package.module:Name: {type(error).__name__}: {error}"
            ) from error
        if not self.accepts(item):
            raise ConfigError(f"{point.value!r} is no {self.kind}: got {item!r}")
        return item


@contextmanager
def _modules_of_working_directory() -> Iterator[None]:
    """Import from the working directory too, last, so that it hides nothing.

    Not for longer than that: any folder in it, such as ``onnx``, would pass for a package.
    """
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
