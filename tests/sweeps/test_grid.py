import dataclasses
from itertools import pairwise

import pytest

from fishr.algorithms import ALGORITHMS
from fishr.data import load_dataset
from fishr.errors import ConfigError
from fishr.space import Uniform
from fishr.sweeps.grid import Grid, Source, configs, hyperparameters_of_draw
from small_runs import numbered

DIGITS = load_dataset("colored-digits", subset=60)


def test_every_combination_is_one_run() -> None:
    runs = configs(Grid(("erm", "fishr"), draws=3, trials=2), DIGITS, None)
    combinations = {(run.algorithm, run.test_domains, run.draw, run.trial) for run in runs}
    assert len(runs) == len(combinations) == 2 * 3 * 3 * 2
    assert len({run.hash for run in runs}) == len(runs)
    assert {run.test_domains for run in runs} == {("+80%",), ("+90%",), ("-90%",)}


def test_the_first_draws_come_first() -> None:
    draws = [run.draw for run in configs(Grid(("erm", "fishr"), draws=3, trials=2), DIGITS, None)]
    assert all(one <= next_one for one, next_one in pairwise(draws))


def test_leave_one_out_adds_the_pairs() -> None:
    runs = configs(Grid(("erm",), draws=1, trials=1, leave_one_out=True), DIGITS, None)
    assert sorted(run.test_domains for run in runs) == [
        ("+80%",), ("+80%", "+90%"), ("+80%", "-90%"), ("+90%",), ("+90%", "-90%"), ("-90%",)
    ]  # fmt: skip


def test_of_one_test_domain_only_its_pairs() -> None:
    grid = Grid(("erm",), test_domains=("-90%",), draws=1, trials=1, leave_one_out=True)
    assert sorted(run.test_domains for run in configs(grid, DIGITS, None)) == [
        ("+80%", "-90%"), ("+90%", "-90%"), ("-90%",)
    ]  # fmt: skip


def test_more_draws_and_trials_leave_the_others_as_they_are() -> None:
    few = {run.hash for run in configs(Grid(("fishr",), draws=2, trials=1), DIGITS, None)}
    more = {run.hash for run in configs(Grid(("fishr", "erm"), draws=4, trials=3), DIGITS, None)}
    assert few < more


def test_draw_0_is_the_default_of_every_trial() -> None:
    runs = configs(Grid(("fishr",), draws=1, trials=3, test_domains=("-90%",)), DIGITS, None)
    assert {run.hparams for run in runs} == {ALGORITHMS["fishr"].Config.default(DIGITS.kind)}
    assert len({run.seed for run in runs}) == 3


def test_draws_differ_between_trials_and_not_between_domains() -> None:
    runs = configs(Grid(("fishr",), draws=2, trials=2), DIGITS, None)
    drawn = {(run.trial, run.hparams) for run in runs if run.draw == 1}
    assert len(drawn) == 2


def test_another_hyperparameter_changes_no_drawn_value(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hyperparameters_of_draw("fishr", DIGITS, 3, 1)
    config = ALGORITHMS["fishr"].Config
    original = config.space

    def with_another(kind: str) -> dict[str, object]:
        return {"another": Uniform(0, 1), **original(kind)}

    monkeypatch.setattr(config, "space", with_another)
    after = hyperparameters_of_draw("fishr", DIGITS, 3, 1)
    assert after.pop("another") != 0
    assert after == before


def test_drawn_values_are_those_that_the_run_gets() -> None:
    (run,) = [
        run for run in configs(Grid(("fishr",), draws=3, trials=2, test_domains=("-90%",)), DIGITS, None)
        if (run.draw, run.trial) == (2, 1)
    ]  # fmt: skip
    drawn = hyperparameters_of_draw("fishr", DIGITS, 2, 1)
    assert {"lr", "penalty_weight", "switch_on", "ema", "batch_size"} <= drawn.keys()
    assert {name: getattr(run.hparams, name) for name in drawn} == drawn


def test_given_hyperparameters_hold_in_all_draws_of_those_that_have_them() -> None:
    runs = configs(Grid(("erm", "fishr"), draws=3, trials=1, hparams={"penalty_weight": 7.0, "lr": 0.01}), DIGITS, None)
    assert {run.hparams.lr for run in runs} == {0.01}
    assert {run.hparams.penalty_weight for run in runs if run.algorithm == "fishr"} == {7.0}


def test_batches_of_domain_net_are_drawn_smaller() -> None:
    images = dataclasses.replace(numbered(), kind="images", name="domain-net")
    drawn = [hyperparameters_of_draw("erm", images, number, 0)["batch_size"] for number in range(1, 60)]
    assert 8 <= min(drawn) <= max(drawn) < 32
    others = dataclasses.replace(images, name="pacs")
    assert max(hyperparameters_of_draw("erm", others, number, 0)["batch_size"] for number in range(1, 60)) > 32


@pytest.mark.parametrize(("name", "steps", "expected"), [
    ("colored-mnist", 5001, 100), ("pacs", 5001, 300), ("domain-net", 5001, 1000), ("pacs", 20, 20)
])  # fmt: skip
def test_checkpoints_are_as_published(name: str, steps: int, expected: int) -> None:
    dataset = dataclasses.replace(numbered(), name=name)
    assert configs(Grid(("erm",), draws=1, trials=1, steps=steps), dataset, None)[0].checkpoint_every == expected


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"algorithms": ("erm", "fisr")}, "unknown algorithm 'fisr'; did you mean 'fishr'?"),
        ({"algorithms": ()}, "a sweep needs an algorithm or more"),
        ({"draws": 0, "trials": -1}, "draws must be at least 1, got 0; trials must be at least 1, got -1"),
        ({"test_domains": ("+85%",)}, "unknown test domain of 'colored-digits' '\\+85%'; did you mean '\\+8"),
        ({"hparams": {"lrr": 1}}, "unknown hyperparameter of erm 'lrr'; did you mean 'lr'?"),
        (
            {"algorithms": ("coral",), "leave_one_out": True},
            "coral needs 4 domains, 2 of them held out; dataset 'colored-digits' has 3",
        ),
    ],
)
def test_mistakes(grid: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs(Grid(**{"algorithms": ("erm",), **grid}), DIGITS, None)


def test_a_source_loads_what_it_names() -> None:
    loaded = Source("colored-digits", options={"subset": 60}).load()
    assert loaded.options == DIGITS.options
