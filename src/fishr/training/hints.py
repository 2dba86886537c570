"""Signs in a run's records that the penalty is too strong or too weak, in words."""

from collections.abc import Sequence
from statistics import fmean, median

from fishr.algorithms.penalized import RECOMMENDED_STRENGTH, PenalizedConfig
from fishr.records import RunRecord
from fishr.training.config import RunConfig

FAR = 100.0
"""A weighted penalty that is as many times the loss, or as small a part of it, does harm or nothing."""

FALL = 0.02
"""A loss of validation accuracy that is no accident."""


def penalty_hints(records: Sequence[RunRecord], config: RunConfig, train_domains: Sequence[str]) -> list[str]:
    """What to change about the weight of the penalty, one sentence for each sign; empty if nothing is wrong with it.

    Signs are a weighted penalty λ · P that is :data:`FAR` above or below the risk in half of the records after the
    switch-on step, and a validation accuracy (mean over the out-splits of the training domains) that ends
    :data:`FALL` below that at the switch-on.

    Args:
        records: All records of the run, oldest first.
        config: The run.
        train_domains: Names of its training domains.
    """
    hparams = config.hparams
    if not isinstance(hparams, PenalizedConfig):
        return []
    switch_on = hparams.switch_on_step(config.steps)
    before = [record for record in records if record.step <= switch_on]
    after = [record for record in records if record.step > switch_on]
    if not after:
        return []
    weight = after[-1].losses["penalty_weight"]
    setting = f"λ = {weight:.3g}"
    weaker, stronger = (
        (f"strength={hparams.strength / 10:g}", f"strength={hparams.strength * 10:g}")
        if hparams.strength is not None
        else (
            f"penalty_weight={weight / 10:.3g} or strength={RECOMMENDED_STRENGTH}",
            f"penalty_weight={weight * 10:.3g} or strength={RECOMMENDED_STRENGTH}",
        )
    )
    hints = []
    share = median(_share(record) for record in after)
    if share > FAR:
        hints.append(
            f"with {setting} the weighted penalty is {share:.0f} times the loss: it may be too strong; try {weaker}"
        )
    elif share < 1 / FAR:
        hints.append(
            f"with {setting} the weighted penalty is {share:.1g} times the loss and hardly acts; try {stronger}"
        )
    if before:
        at_switch_on, at_end = (_validation(run[-1], train_domains) for run in (before, after))
        if at_switch_on is not None and at_end is not None and at_end < at_switch_on - FALL:
            hints.append(
                f"validation accuracy fell from {at_switch_on:.1%} at step {before[-1].step}, before the penalty was "
                f"switched on, to {at_end:.1%}: {setting} may be too large; try {weaker}"
            )
    return hints


def _share(record: RunRecord) -> float:
    """The weighted penalty as a multiple of the risk."""
    weighted = abs(record.losses["penalty_weight"] * record.losses["penalty"])
    return weighted / record.losses["risk"] if record.losses["risk"] > 0 else float("inf")


def _validation(record: RunRecord, train_domains: Sequence[str]) -> float | None:
    """Mean accuracy over the out-splits of the training domains; None without out-splits."""
    if not all("out" in record.domains[domain] for domain in train_domains):
        return None
    return fmean(record.domains[domain]["out"].accuracy for domain in train_domains)
