"""Empirical risk minimization: the baseline that every other algorithm is compared with."""

from fishr.algorithms.base import Algorithm, Losses, Reference
from fishr.data.base import DomainBatch


class ERM(Algorithm):
    """Minimise the mean loss over the samples of all domains.

    objective = 1/n Σ_i ℓ_i

    Domains play no part: it learns whatever lowers the loss, also what holds in these domains alone.
    """

    title = "ERM"
    reference = Reference("Vapnik", "Statistical Learning Theory", 1998, venue="Wiley")

    def losses(self, batch: DomainBatch, step: int) -> Losses:
        risk = self.sample_losses(self.logits(self.features(batch)), batch.targets).mean()
        return Losses(risk + self.l2_term(), {"risk": risk})
