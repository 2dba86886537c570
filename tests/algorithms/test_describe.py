import dataclasses
import re
from dataclasses import dataclass
from datetime import date
from typing import Self

import pytest

from fishr.algorithms import ALGORITHMS, ERM, Algorithm, AlgorithmConfig, Reference
from fishr.algorithms.describe import Description, Hyperparameter, describe
from fishr.data.base import Kind
from fishr.errors import ConfigError
from fishr.space import Choice, Distribution, Uniform

KINDS = ("vectors", "small_images", "images")
MARKUP = re.compile(r"`|:\w+:|\\")


@pytest.fixture(scope="module")
def described() -> dict[str, Description]:
    return {name: describe(name) for name in ALGORITHMS}


# Every algorithm


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_describes_itself(described: dict[str, Description], name: str) -> None:
    description = described[name]
    assert description.name == name
    assert description.title
    assert 1950 < description.year <= date.today().year
    assert re.fullmatch(r"[A-Z].{10,98}\.", description.idea), "the idea is one sentence that fits in a line"
    assert description.text, "the objective follows the idea"
    assert str(description.year) in description.reference


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_hyperparameter_is_described(described: dict[str, Description], name: str) -> None:
    config = ALGORITHMS[name].Config
    hyperparameters = described[name].hyperparameters
    assert sorted(each.name for each in hyperparameters) == sorted(field.name for field in dataclasses.fields(config))
    for each in hyperparameters:
        assert re.fullmatch(r"\S.+\.", each.meaning), (
            f"{each.name} needs a sentence in Attributes, has {each.meaning!r}"
        )
        for kind in KINDS:
            assert each.defaults[kind] == getattr(config.default(kind), each.name)
            assert each.recommended[kind] == getattr(config.recommended(kind), each.name)
        assert set(each.spaces) == {kind for kind in KINDS if each.name in config.space(kind)}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_no_markup_is_left(described: dict[str, Description], name: str) -> None:
    description = described[name]
    for text in (description.idea, description.text, *(each.meaning for each in description.hyperparameters)):
        assert not MARKUP.search(text), text
        assert not re.search(r"^[ \t]", text, re.MULTILINE), "indentation is that of the source"


def test_titles_tell_algorithms_apart(described: dict[str, Description]) -> None:
    titles = [each.title for each in described.values()]
    assert len(set(titles)) == len(titles)


# By hand


def hyperparameter(description: Description, name: str) -> Hyperparameter:
    (found,) = (each for each in description.hyperparameters if each.name == name)
    return found


def test_fishr_by_hand(described: dict[str, Description]) -> None:
    fishr = described["fishr"]
    assert (fishr.title, fishr.year) == ("Fishr", 2022)
    assert fishr.idea == "Equal variances of the per-sample gradients in all domains."
    first, _, rest = fishr.text.partition("\n\n")
    assert first == "objective = 1/n Σ_i ℓ_i + λ · 1/|E| Σ_e ‖v_e − v̄‖² (scaled as reduction says)"  # noqa: RUF001
    assert rest.startswith("with v_e the variance over the samples of domain e of the head's gradient, ")
    assert "closed form by\nfishr.nn.FishrPenalty, v̄ the mean over domains." in rest
    assert fishr.reference == str(ALGORITHMS["fishr"].reference)
    own = ["penalty_weight", "strength", "switch_on", "weight_before", "rescale", "reset_optimizer"]
    own += ["ema", "reduction", "variant", "layers"]
    shared = ["lr", "weight_decay", "batch_size", "l2", "dropout"]
    assert [each.name for each in fishr.hyperparameters] == own + shared

    weight = hyperparameter(fishr, "penalty_weight")
    assert weight.meaning == "λ, the weight from the switch-on step on."
    assert weight.defaults == weight.recommended == dict.fromkeys(KINDS, 1000.0)
    assert weight.spaces == dict.fromkeys(KINDS, "log-uniform 10 to 10000")

    strength = hyperparameter(fishr, "strength")
    assert strength.meaning.endswith("as a multiple of the risk's; where it is given, penalty_weight is not used.")
    assert strength.defaults == dict.fromkeys(KINDS)
    assert strength.recommended == dict.fromkeys(KINDS, 0.5)
    assert strength.spaces == {}

    lr = hyperparameter(fishr, "lr")
    assert lr.defaults == {"vectors": 1e-3, "small_images": 1e-3, "images": 5e-5}
    small = "log-uniform 3.1623e-05 to 0.0031623"
    assert lr.spaces == {"vectors": small, "small_images": small, "images": "log-uniform 1e-05 to 0.00031623"}

    assert hyperparameter(fishr, "dropout").spaces == {"images": "one of 0, 0.1, 0.5"}
    assert hyperparameter(fishr, "ema").meaning == "Decay γ of the moving average; null for the variant's own."  # noqa: RUF001
    assert hyperparameter(fishr, "reduction").meaning.startswith('"mean" (DomainBed) or "sum" (')


# Another package's


@dataclass(frozen=True)
class ShyConfig(AlgorithmConfig):
    """Hyperparameters; ``shyness`` is explained.

    Attributes:
        shyness: How far it keeps from the data, as a multiple of :class:`fishr.space.Uniform`'s
            upper end; ``0`` for not at all.
        lr: Learning rate of its own.

    Raises:
        secret: this is no hyperparameter's meaning.
    """

    shyness: float = 0.5
    secret: int = 3

    @classmethod
    def default(cls, kind: Kind) -> Self:
        return cls(shyness=2.0 if kind == "images" else 0.5)

    @classmethod
    def recommended(cls, kind: Kind) -> Self:
        return cls(shyness=0.0)

    @classmethod
    def space(cls, kind: Kind) -> dict[str, Distribution]:
        return {"shyness": Uniform(0.0, 1.0)} if kind == "images" else {"shyness": Choice((0, 0.25))}


class Shy(Algorithm):
    """Keep away from :math:`x`,
    and from ``y``.

    objective = 0 · ``risk``

        indented
    """

    title = "Shy"
    reference = Reference("Doe", "On shyness", 1999, venue="JMLR")
    Config = ShyConfig


def test_another_packages_algorithm() -> None:
    name = f"{__name__}:Shy"
    description = describe(name)
    assert (description.name, description.title, description.year) == (name, "Shy", 1999)
    assert description.idea == "Keep away from x, and from y."
    assert description.text == "objective = 0 · risk\n\n    indented"
    assert description.reference == "Doe: On shyness, JMLR 1999"
    assert description.step_costs == {}
    assert [each.name for each in description.hyperparameters][:3] == ["shyness", "secret", "lr"]
    assert description.hyperparameters[0] == Hyperparameter(
        "shyness",
        "How far it keeps from the data, as a multiple of fishr.space.Uniform's upper end; 0 for not at all.",
        {"vectors": 0.5, "small_images": 0.5, "images": 2.0},
        dict.fromkeys(KINDS, 0.0),
        {"vectors": "one of 0, 0.25", "small_images": "one of 0, 0.25", "images": "uniform 0 to 1"},
    )
    assert hyperparameter(description, "secret").meaning == ""
    assert hyperparameter(description, "lr").meaning == "Learning rate of its own."
    assert hyperparameter(description, "l2").meaning.startswith("Weight of Σ‖w‖²")


class WithoutDocstring(ERM):
    pass


def test_a_docstring_is_not_that_of_the_base() -> None:
    description = describe(f"{__name__}:WithoutDocstring")
    assert (description.title, description.idea, description.text) == ("ERM", "", "")


class Untitled(Algorithm):
    """It minimises nothing."""

    reference = Reference("Doe", "On nothing", 1999)


class WithoutReference(Algorithm):
    """It minimises nothing."""


def test_the_title_is_the_name_of_the_class_where_none_is_given() -> None:
    assert describe(f"{__name__}:Untitled").title == "Untitled"


def test_what_does_not_say_where_it_comes_from() -> None:
    with pytest.raises(ConfigError, match=r":WithoutReference' does not describe itself: it has no reference$"):
        describe(f"{__name__}:WithoutReference")


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"^unknown algorithm 'fisher'; did you mean 'fishr'\? \(known: andmask, "):
        describe("fisher")


def test_the_cost_of_a_step_is_known_of_every_algorithm(described: dict[str, Description]) -> None:
    """As a multiple of ERM's; where it is missing or of other cases, benchmarks/algorithms.py has to be run."""
    cases = described["fishr"].step_costs.keys()
    assert len(cases) == 2
    for name, description in described.items():
        assert description.step_costs.keys() == (cases if name != "erm" else set()), name
        assert all(0.5 < cost < 100 for cost in description.step_costs.values())
