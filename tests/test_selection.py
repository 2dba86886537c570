"""The three rules on runs made by hand; ``tests/reports/test_benchmark.py`` compares them with the published script."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fishr.records import SPLITS, RunHistory
from fishr.selection import (
    RULES,
    Selected,
    best_draw,
    leave_one_domain_out,
    select_checkpoints,
    training_domain_validation,
)

DOMAINS = ("a", "b", "c")


def history(
    test_domains: str = "a", *, draw: int = 0, steps: tuple[int, ...] = (0, 100), **accuracies: list[float]
) -> RunHistory:
    """A run that holds out the domains named by letters; ``a_in=[0.5, 0.6]`` are accuracies, others are not known."""
    values = np.full((len(SPLITS), len(steps), len(DOMAINS)), np.nan)
    for name, of_checkpoints in accuracies.items():
        domain, split = name.split("_")
        values[SPLITS.index(split), :, DOMAINS.index(domain)] = of_checkpoints
    hparams: Mapping[str, Any] = {}
    return RunHistory(
        "run",
        "data",
        "erm",
        tuple(test_domains),
        True,
        draw,
        0,
        hparams,
        {},
        DOMAINS,
        np.array(steps),
        values,
        0.0,
        True,
    )


def chosen(selected: Selected | None) -> tuple[int, float, float] | None:
    return None if selected is None else (selected.step, round(selected.validation, 12), selected.accuracy)


def test_training_domain_validation_is_the_mean_of_the_training_domains_out_splits() -> None:
    run = history(a_in=[0.1, 0.2], a_out=[0.9, 0.0], b_out=[0.5, 0.6], c_out=[0.5, 0.5], b_in=[1, 0])
    assert chosen(training_domain_validation([run], "a")) == (100, 0.55, 0.2)


def test_the_first_of_equal_checkpoints_is_chosen() -> None:
    run = history(steps=(0, 100, 200), a_in=[0.1, 0.2, 0.3], b_out=[0.4, 0.6, 0.5], c_out=[0.6, 0.6, 0.7])
    assert chosen(training_domain_validation([run], "a")) == (100, 0.6, 0.2)


def test_domains_that_are_never_validated_take_no_part() -> None:
    run = history(a_in=[0.1, 0.2], b_out=[0.5, 0.4], c_in=[0.0, 1.0])
    assert chosen(training_domain_validation([run], "a")) == (0, 0.5, 0.1)


def test_a_run_that_holds_out_a_pair_counts_only_for_leave_one_out() -> None:
    pair = history("ab", a_in=[0.1, 0.2], b_in=[0.3, 0.4], c_out=[0.5, 0.5])
    assert all(rule([pair], "a") is None for rule in RULES.values())


def test_leave_one_domain_out_is_the_mean_of_the_domains_left_out_too() -> None:
    runs = [
        history("a", a_in=[0.1, 0.2], b_out=[0.9, 0.1], c_out=[0.9, 0.1]),
        history("ab", a_in=[0.0, 0.0], b_in=[0.3, 0.4], c_out=[0.9, 0.9]),
        history("ac", a_in=[0.0, 0.0], c_in=[0.5, 0.5], b_out=[0.9, 0.9]),
    ]
    assert chosen(leave_one_domain_out(runs, "a")) == (100, 0.45, 0.2)


def test_leave_one_domain_out_leaves_out_steps_that_a_run_lacks() -> None:
    alone = history("a", a_in=[0.1, 0.2], b_out=[0.5, 0.5], c_out=[0.5, 0.5])
    first = history("ab", b_in=[0.3, 0.9], c_out=[0.5, 0.5])
    cut = history("ac", steps=(0,), c_in=[0.5], b_out=[0.5])
    assert chosen(leave_one_domain_out([alone, first, cut], "a")) == (0, 0.4, 0.1)
    assert leave_one_domain_out([alone, first], "a") is None
    assert leave_one_domain_out([first, cut], "a") is None


def test_leave_one_domain_out_leaves_out_steps_that_two_runs_have() -> None:
    alone = history("a", a_in=[0.1, 0.2], b_out=[0.5, 0.5], c_out=[0.5, 0.5])
    again = history("a", steps=(0,), a_in=[0.7], b_out=[0.5], c_out=[0.5])
    pairs = [history("ab", b_in=[0.9, 0.3], c_out=[0.5, 0.5]), history("ac", c_in=[0.9, 0.3], b_out=[0.5, 0.5])]
    assert chosen(leave_one_domain_out([alone, again, *pairs], "a")) == (100, 0.3, 0.2)


def test_the_oracle_looks_at_the_last_checkpoint_only() -> None:
    run = history(a_in=[0.9, 0.2], a_out=[0.9, 0.3], b_out=[0.5, 0.5])
    assert chosen(RULES["oracle"]([run], "a")) == (100, 0.3, 0.2)


def test_the_last_checkpoint_is_that_with_the_highest_step() -> None:
    """DomainBed writes on in the same file when a run is started again."""
    run = history(steps=(0, 100, 0), a_in=[0.1, 0.2, 0.3], a_out=[0.1, 0.3, 0.9], b_out=[0.5] * 3)
    assert chosen(RULES["oracle"]([run], "a")) == (100, 0.3, 0.2)


def test_the_oracle_says_nothing_of_a_run_that_has_not_come_to_the_out_split() -> None:
    assert RULES["oracle"]([history(a_in=[0.9, 0.2], a_out=[np.nan, np.nan], b_out=[0.5, 0.5])], "a") is None


def test_a_trial_is_its_best_draw_and_the_last_of_equals() -> None:
    runs = [
        history(draw=draw, a_in=[accuracy, accuracy], b_out=[validation] * 2, c_out=[validation] * 2)
        for draw, accuracy, validation in ((2, 0.2, 0.5), (0, 0.1, 0.7), (1, 0.3, 0.7))
    ]
    selected = select_checkpoints(training_domain_validation, runs, "a")
    assert [each.run.draw for each in selected] == [0, 1, 2]
    assert chosen(best_draw(selected)) == (0, 0.7, 0.3)


def test_draws_that_do_not_say_are_left_out() -> None:
    runs = [history(draw=0, a_in=[0.1, 0.2]), history(draw=1, a_in=[0.3, 0.4], b_out=[0.5, 0.5])]
    assert [each.run.draw for each in select_checkpoints(training_domain_validation, runs, "a")] == [1]
