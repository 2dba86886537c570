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
    # The KeyError behind it is no news to anybody.
    assert caught.value.__suppress_context__


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
