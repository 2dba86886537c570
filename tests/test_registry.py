import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fishr.errors import ConfigError, FishrError
from fishr.registry import Registry, unknown


@pytest.fixture
def animals() -> Registry[int]:
    registry: Registry[int] = Registry("animal")
    for legs, name in ((6, "bee"), (8, "spider"), (6, "ant")):
        registry.register(name, legs)
    return registry


def test_names_to_objects_in_order_of_registration(animals: Registry[int]) -> None:
    assert animals["spider"] == 8
    assert list(animals) == ["bee", "spider", "ant"]
    assert "bee" in animals
    assert "bear" not in animals


@pytest.mark.parametrize(
    ("name", "hint"),
    [("spidre", "; did you mean 'spider'?"), ("BEE", ""), ("be", "; did you mean 'bee'?"), ("whale", ""), ("", "")],
)
def test_a_miss_names_the_nearest_and_all(animals: Registry[int], name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        animals[name]
    assert str(caught.value) == f"unknown animal {name!r}{hint} (known: ant, bee, spider)"
    assert caught.value.__context__ is None


def test_a_name_is_given_once(animals: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"^animal 'bee' is registered already$"):
        animals.register("bee", 7)
    assert animals["bee"] == 6


def test_registries_do_not_share_names(animals: Registry[int]) -> None:
    plants: Registry[str] = Registry("plant")
    plants.register("bee", "orchid")
    assert (animals["bee"], plants["bee"]) == (6, "orchid")


def test_an_empty_registry() -> None:
    assert list(Registry("thing")) == []
    with pytest.raises(ConfigError, match=r"^unknown thing 'x' \(known: \)$"):
        Registry("thing")["x"]


def test_unknown_is_an_error_of_ours_and_a_value_error() -> None:
    error = unknown("setting", "sped", ["speed", "size"])
    assert isinstance(error, FishrError)
    assert isinstance(error, ValueError)
    assert str(error) == "unknown setting 'sped'; did you mean 'speed'? (known: size, speed)"


# Names that other packages add

ZOO = """
LION = 4
OSTRICH = 2
GHOST = "no legs"

class Cage:
    LION = 4
"""
ENTRY_POINTS = """
[tests.animals]
lion = zoo_of_tests:LION
bee = zoo_of_tests:OSTRICH
ghost = zoo_of_tests:GHOST
dodo = zoo_of_tests:DODO
yeti = himalaya_of_tests:YETI
zoo = zoo_of_tests

[tests.plants]
orchid = zoo_of_tests:LION
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from, with a module and what an installation would leave beside it."""
    (tmp_path / "zoo_of_tests.py").write_text(ZOO)
    info = tmp_path / "zoo_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-of-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    imported = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - imported:
        del sys.modules[name]


@pytest.fixture
def open_animals(elsewhere: Path) -> Registry[int]:
    """As ``animals``, but others may add to it."""
    registry: Registry[int] = Registry("animal", "tests.animals", lambda item: isinstance(item, int))
    registry.register("bee", 6)
    registry.register("ant", 6)
    return registry


def test_an_entry_point_is_a_name(open_animals: Registry[int]) -> None:
    assert "lion" in open_animals
    assert "zoo_of_tests" not in sys.modules
    assert open_animals["lion"] == 4


def test_a_registered_name_wins_over_an_entry_point(open_animals: Registry[int]) -> None:
    assert open_animals["bee"] == 6


def test_names_that_are_registered_come_first_and_once(open_animals: Registry[int]) -> None:
    names = list(open_animals)
    assert names[:2] == ["bee", "ant"]
    assert sorted(names[2:]) == ["dodo", "ghost", "lion", "yeti", "zoo"]
    assert "zoo_of_tests" not in sys.modules


def test_entry_points_of_other_groups_are_no_names(open_animals: Registry[int]) -> None:
    assert "orchid" not in open_animals


def test_a_miss_lists_entry_points_too(open_animals: Registry[int]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^unknown animal 'loin'; did you mean 'lion'\? \(known: ant, bee, dodo, ghost, lion, yeti, zoo\)$",
    ):
        open_animals["loin"]


def test_a_name_in_a_module(open_animals: Registry[int]) -> None:
    assert open_animals["zoo_of_tests:OSTRICH"] == 2
    assert "zoo_of_tests:OSTRICH" not in open_animals
    assert "zoo_of_tests:OSTRICH" not in list(open_animals)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dodo", "AttributeError: module 'zoo_of_tests' has no attribute 'DODO'"),
        ("yeti", "ModuleNotFoundError: No module named 'himalaya_of_tests'"),
        ("zoo_of_tests:DODO", "AttributeError: module 'zoo_of_tests' has no attribute 'DODO'"),
        ("himalaya_of_tests:YETI", "ModuleNotFoundError: No module named 'himalaya_of_tests'"),
        ("himalaya_of_tests.nepal:YETI", "ModuleNotFoundError: No module named 'himalaya_of_tests'"),
        ("does_not_parse:LION", r"SyntaxError: .*\(does_not_parse.py, line 2\)"),
        ("raises:LION", "KeyError: 'lions'"),
    ],
)
def test_what_cannot_be_imported(open_animals: Registry[int], elsewhere: Path, name: str, reason: str) -> None:
    (elsewhere / "does_not_parse.py").write_text("LION = 4\nTIGER = (\n")
    (elsewhere / "raises.py").write_text("LION = {}['lions']\n")
    with pytest.raises(ConfigError, match=rf"^animal '{name}' cannot be imported as package.module:Name: {reason}$"):
        open_animals[name]


@pytest.mark.parametrize("name", [":LION", "zoo_of_tests:", ":", "./zoo_of_tests:LION", "a b:LION", "zoo_of_tests:a-b"])
def test_what_is_no_name_of_a_module_is_a_miss(open_animals: Registry[int], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown animal '{name}'"):
        open_animals[name]


def test_a_name_in_a_class_in_a_module(open_animals: Registry[int]) -> None:
    assert open_animals["zoo_of_tests:Cage.LION"] == 4


def test_an_entry_point_that_is_a_module(open_animals: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"^'zoo_of_tests' is no animal: got <module 'zoo_of_tests'"):
        open_animals["zoo"]


@pytest.mark.parametrize("name", ["ghost", "zoo_of_tests:GHOST"])
def test_what_is_of_another_kind(open_animals: Registry[int], name: str) -> None:
    with pytest.raises(ConfigError, match=r"^'zoo_of_tests:GHOST' is no animal: got 'no legs'$"):
        open_animals[name]


def test_a_registry_without_a_group_takes_no_names_of_modules(animals: Registry[int], elsewhere: Path) -> None:
    assert "lion" not in animals
    with pytest.raises(ConfigError, match=r"^unknown animal 'zoo_of_tests:LION' \(known: ant, bee, spider\)$"):
        animals["zoo_of_tests:LION"]
    assert "zoo_of_tests" not in sys.modules


def test_by_default_what_can_be_called_is_accepted(elsewhere: Path) -> None:
    registry: Registry[type] = Registry("animal", "tests.animals")
    assert registry["zoo_of_tests:Cage"].__name__ == "Cage"
    with pytest.raises(ConfigError, match=r"^'zoo_of_tests:LION' is no animal: got 4$"):
        registry["zoo_of_tests:LION"]
