from dataclasses import replace

import pytest

from fishr.records import Metrics, RunRecord
from fishr.training import RunConfig
from fishr.training.hints import penalty_hints
from small_runs import numbered_config

TRAIN_DOMAINS = ("a", "b")


def config(**hparams: float) -> RunConfig:
    """Switched on at step 15 of 30."""
    return numbered_config("fishr", hparams={"penalty_weight": 4.0, "switch_on": 15, **hparams})


def record(step: int, *, share: float = 1.0, validation: float = 0.8, weight: float = 4.0) -> RunRecord:
    """A record in which the weighted penalty is ``share`` times the risk."""
    losses = {"loss": 1.0, "risk": 0.5, "penalty": share * 0.5 / weight, "penalty_weight": weight}
    split = {"out": Metrics(validation - 0.1, 1.0)}, {"out": Metrics(validation + 0.1, 1.0)}
    return RunRecord(step, losses, {"a": split[0], "b": split[1], "c": {"in": Metrics(0.0, 9.0)}}, 1.0)


def hints(*records: RunRecord, **hparams: float) -> list[str]:
    return penalty_hints(records, config(**hparams), TRAIN_DOMAINS)


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert hints(record(10), record(20), record(30)) == []


@pytest.mark.parametrize("share", [150.0, -150.0])
def test_a_penalty_far_above_the_loss(share: float) -> None:
    assert hints(record(20), record(25, share=share), record(30, share=share)) == [
        "with λ = 4 the weighted penalty is 150 times the loss: it may be too strong; "
        "try penalty_weight=0.4 or strength=0.5"
    ]


def test_a_penalty_far_below_the_loss() -> None:
    assert hints(record(20), record(25, share=1e-3), record(30, share=1e-3)) == [
        "with λ = 4 the weighted penalty is 0.001 times the loss and hardly acts; try penalty_weight=40 or strength=0.5"
    ]


def test_a_penalty_that_is_far_off_for_a_short_while_only() -> None:
    assert hints(record(15), record(16, share=1e4), record(20), record(30)) == []


def test_before_the_switch_on_the_penalty_may_be_anything() -> None:
    assert hints(record(5, share=1e6), record(10, share=1e6), record(15, share=1e6), record(20), record(30)) == []


def test_validation_that_falls() -> None:
    assert hints(record(5, validation=0.5), record(10), record(20), record(30, validation=0.7)) == [
        "validation accuracy fell from 80.0% at step 10 to 70.0%, with the penalty switched on at step 15: "
        "λ = 4 may be too large; try penalty_weight=0.4 or strength=0.5"
    ]
    assert "from 90.0% at step 20 to 70.0%" in hints(record(20, validation=0.9), record(30, validation=0.7))[0]


def test_validation_that_falls_a_little_or_recovers() -> None:
    assert hints(record(10), record(20, validation=0.5), record(30, validation=0.79)) == []


def test_of_a_measured_weight_only_validation_tells() -> None:
    assert hints(record(10), record(20, share=200.0), record(30, share=200.0), strength=0.5) == []
    said = hints(record(10), record(20, weight=44.4), record(30, weight=44.4, validation=0.7), strength=0.5)
    assert said[0].endswith("λ = 44.4 may be too large; try strength=0.25")


def test_a_record_from_both_sides_of_the_switch_on_is_not_judged() -> None:
    assert hints(record(10), record(20, share=1e6)) == []


def test_records_without_the_weight_have_no_hints() -> None:
    assert hints(*(replace(each, losses={"risk": 1.0, "penalty": 1e9}) for each in (record(20), record(30)))) == []


def test_a_risk_of_zero_is_far_below() -> None:
    without_risk = replace(record(30), losses={"risk": 0.0, "penalty": 1.0, "penalty_weight": 1.0})
    assert "inf times the loss" in hints(record(20), without_risk)[0]


def test_without_out_splits_validation_is_not_looked_at() -> None:
    records = [
        replace(r, domains={d: {"in": Metrics(a, 1.0)} for d in "abc"})
        for r, a in ((record(10), 0.9), (record(30), 0.1))
    ]
    assert hints(*records) == []


def test_other_algorithms_and_penalties_that_never_act_have_none() -> None:
    assert penalty_hints([record(30, share=1e9)], numbered_config("erm"), TRAIN_DOMAINS) == []
    assert hints(record(10, share=1e9), switch_on=40) == []
