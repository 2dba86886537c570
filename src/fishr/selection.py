"""Model selection: which checkpoint of which hyperparameter draw a result is that of.

The three rules of DomainBed (Gulrajani and Lopez-Paz, arXiv 2007.01434, section 3.3), as pure functions over the
histories of runs. What is reported is always the accuracy on the in-split of the held-out domain.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fishr.records import SPLITS, RunHistory

IN, OUT = SPLITS.index("in"), SPLITS.index("out")


@dataclass(frozen=True)
class Selected:
    """The checkpoint that a rule chose.

    Attributes:
        run: Its run.
        step: Updates made until then.
        validation: The accuracy that it was chosen by.
        accuracy: Accuracy on the in-split of the held-out domain.
    """

    run: RunHistory
    step: int
    validation: float
    accuracy: float


Rule = Callable[[Sequence[RunHistory], str], Selected | None]
"""``(runs, held-out domain)`` to the checkpoint chosen; None where the runs do not say.

The runs are those of one dataset, algorithm, trial and draw that hold the domain out, alone or with another one.
"""


def training_domain_validation(runs: Sequence[RunHistory], held_out: str) -> Selected | None:
    """The checkpoint with the best mean accuracy on the out-splits of the training domains; of equals the first."""
    return _first_of_best(
        _best_checkpoint(run, held_out, np.ascontiguousarray(run.accuracies[OUT][:, others]).mean(axis=1))
        for run, others in _alone(runs, held_out)
    )


def leave_one_domain_out(runs: Sequence[RunHistory], held_out: str) -> Selected | None:
    """The checkpoint with the best mean accuracy over the other domains, each left out of a run of its own.

    At each step, validation is the mean over every other domain v of v's in-accuracy at that step in the run that holds
    out v too. Steps that one of those runs lacks do not count; of equals the first is chosen.
    """
    left_out: dict[int, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if len(run.test_domains) == 2:
            other = run.domains.index(next(domain for domain in run.test_domains if domain != held_out))
            left_out[other].update(zip(run.steps.tolist(), run.accuracies[IN][:, other].tolist(), strict=True))

    alone = _alone(runs, held_out)
    times = Counter(step for run, _ in alone for step in run.steps.tolist())

    def validation(run: RunHistory, others: Sequence[int]) -> NDArray[np.float64]:
        missing = dict.fromkeys(step for step, count in times.items() if count > 1)
        of_others = [[(left_out[other] | missing).get(step) for step in run.steps.tolist()] for other in others]
        means: NDArray[np.float64] = np.array(of_others, dtype=np.float64).T.copy().mean(axis=1)
        return means

    return _first_of_best(_best_checkpoint(run, held_out, validation(run, others)) for run, others in alone)


def test_domain_validation(runs: Sequence[RunHistory], held_out: str) -> Selected | None:
    """The last checkpoint, with its accuracy on the out-split of the held-out domain itself: an oracle."""
    last = []
    for run, _ in _alone(runs, held_out):
        checkpoint = len(run.steps) - 1 - int(run.steps[::-1].argmax())
        validation = run.accuracy(held_out, "out")[checkpoint]
        if not np.isnan(validation):
            last.append(_selected(run, held_out, checkpoint, validation))
    return max(reversed(last), key=lambda selected: selected.step, default=None)


LEAVE_ONE_OUT = "leave-one-out"
RULES: Mapping[str, Rule] = {
    "training": training_domain_validation,
    LEAVE_ONE_OUT: leave_one_domain_out,
    "oracle": test_domain_validation,
}


def select_checkpoints(rule: Rule, runs: Iterable[RunHistory], held_out: str) -> list[Selected]:
    """The checkpoint that a rule chooses of each draw, in the order of draws, but for those that do not say.

    Args:
        rule: One of :data:`RULES`.
        runs: Those of one dataset, algorithm and trial that hold the domain out, alone or with another one.
        held_out: The held-out domain.
    """
    draws: dict[int, list[RunHistory]] = defaultdict(list)
    for run in runs:
        draws[run.draw].append(run)
    selected = (rule(draws[draw], held_out) for draw in sorted(draws))
    return [each for each in selected if each is not None]


def best_draw(selected: Sequence[Selected]) -> Selected:
    """The result of a trial: that of the draw with the best validation; of equals the last."""
    return max(reversed(selected), key=lambda each: each.validation)


def _alone(runs: Sequence[RunHistory], held_out: str) -> list[tuple[RunHistory, list[int]]]:
    """Runs that hold out no other domain, each with the columns of the other domains whose out-split was evaluated."""
    found = []
    for run in runs:
        if len(run.test_domains) == 1:
            others = [run.domains.index(domain) for domain in run.validated_domains if domain != held_out]
            if others:
                found.append((run, others))
    return found


def _best_checkpoint(run: RunHistory, held_out: str, validation: NDArray[np.float64]) -> Selected | None:
    """The first of the best checkpoints, of those that have a validation at all."""
    missing = np.isnan(validation)
    if missing.all():
        return None
    best = int(np.where(missing, -np.inf, validation).argmax())
    return _selected(run, held_out, best, validation[best])


def _selected(run: RunHistory, held_out: str, checkpoint: int, validation: float) -> Selected:
    reported = run.accuracy(held_out, "in")[checkpoint]
    return Selected(run, int(run.steps[checkpoint]), float(validation), float(reported))


def _first_of_best(selected: Iterable[Selected | None]) -> Selected | None:
    return max((each for each in selected if each is not None), key=lambda each: each.validation, default=None)
