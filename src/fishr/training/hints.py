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

    Signs are, of a given λ, a weighted penalty λ · P that is :data:`FAR` above or below the risk in half of the records
    after the switch-on step; and a validation accuracy (mean over the out-splits of the training domains) that ends
    :data:`FALL` below its best. Records from before they held λ have none.

    Args:
        records: All records of the run, oldest first.
        config: The run.
        train_domains: Names of its training domains.
    """
    hparams = config.hparams
    if not isinstance(hparams, PenalizedConfig) or any("penalty_weight" not in record.losses for record in records):
        return []
    switch_on = hparams.switch_on_step(config.steps)
    starts = [0, *(record.step for record in records)]
    after = [record for start, record in zip(starts, records, strict=False) if start >= switch_on]
    if not after:
        return []
    weight = after[-1].losses["penalty_weight"]
    hints = []
    if hparams.strength is None:
        weaker, stronger = (
            f"penalty_weight={changed:.3g} or strength={RECOMMENDED_STRENGTH}" for changed in (weight / 10, weight * 10)
        )
        share = median(_share(record) for record in after)
        far = f"with λ = {weight:.3g} the weighted penalty is {share:.3g} times the loss"
        if share > FAR:
            hints.append(f"{far}: it may be too strong; try {weaker}")
        elif share < 1 / FAR:
            hints.append(f"{far} and hardly acts; try {stronger}")
    else:
        weaker = f"strength={hparams.strength / 2:g}"
    *earlier, last = [_validation(record, train_domains) for record in records]
    best = max(earlier, default=last)
    if last < best - FALL:
        step = records[earlier.index(best)].step
        hints.append(
            f"validation accuracy fell from {best:.1%} at step {step} to {last:.1%}, with the penalty switched on at "
            f"step {switch_on}: λ = {weight:.3g} may be too large; try {weaker}"
        )
    return hints


def _share(record: RunRecord) -> float:
    """The weighted penalty as a multiple of the risk."""
    weighted = abs(record.losses["penalty_weight"] * record.losses["penalty"])
    return weighted / record.losses["risk"] if record.losses["risk"] > 0 else float("inf")


def _validation(record: RunRecord, train_domains: Sequence[str]) -> float:
    """Mean accuracy over the out-splits of the training domains; 0 without out-splits."""
    splits = [record.domains[domain] for domain in train_domains]
    return fmean(each["out"].accuracy if "out" in each else 0.0 for each in splits)
