"""The mathematics of Fishr as pure functions on tensors.

Shapes in words: features ``[sample, feature]``, residuals and logits ``[sample, class]``, variances
``[domain, class, feature]`` (with one more feature, the last, when the head has a bias).
"""

from fishr.functional.covariance import domain_gradient_covariance_distance
from fishr.functional.penalty import variance_penalty
from fishr.functional.residuals import loss_residuals, per_sample_losses, samples_that_count
from fishr.functional.variance import domain_gradient_variances

__all__ = [
    "domain_gradient_covariance_distance",
    "domain_gradient_variances",
    "loss_residuals",
    "per_sample_losses",
    "samples_that_count",
    "variance_penalty",
]
