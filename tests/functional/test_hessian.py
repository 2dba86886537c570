"""Gradient and Hessian of the head in closed form, against torch's double backward."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishr.errors import InputError
from fishr.functional import loss_residuals
from fishr.functional.hessian import (
    head_gradients,
    hessian_diagonal_estimates,
    hessian_diagonals,
    hessian_distance,
    hessian_vector_products,
    hessians,
)
from oracles import relative_error

HEADS = pytest.mark.parametrize(
    ("num_outputs", "bias"), [(1, True), (1, False), (3, True), (4, False)], ids=lambda value: str(value)
)
FEW, MANY = (2, 4, 3), (25, 10, 15)  # fewer samples than the heads have weights, and more


class Problem:
    """Samples, and a head whose weights are [class, feature] with the bias as the last feature."""

    def __init__(self, num_outputs: int, bias: bool, sizes: tuple[int, ...], num_features: int = 9) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.bias = sizes, bias
        n = sum(sizes)
        self.features = torch.randn(n, num_features, generator=generator, dtype=torch.float64).requires_grad_()
        self.weights = torch.randn(num_outputs, num_features + bias, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(max(num_outputs, 2), (n,), generator=generator)

    @property
    def logits(self) -> Tensor:
        return self.apply(self.weights, self.features)

    def apply(self, weights: Tensor, features: Tensor) -> Tensor:
        bias = weights[:, -1] if self.bias else None
        return F.linear(features, weights[:, : features.shape[1]], bias)

    def residuals(self) -> Tensor:
        loss = nn.BCEWithLogitsLoss() if len(self.weights) == 1 else nn.CrossEntropyLoss()
        return loss_residuals(loss, self.logits, self.targets)

    def risk(self, domain: int):
        """The mean loss of a domain as a function of the head's weights."""
        features, targets = self.features.split(self.sizes)[domain], self.targets.split(self.sizes)[domain]

        def of(weights: Tensor) -> Tensor:
            logits = self.apply(weights, features)
            if logits.shape[1] == 1:
                return F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())
            return F.cross_entropy(logits, targets)

        return of

    def gradients(self) -> Tensor:
        weights = self.weights.clone().requires_grad_()
        return torch.stack([torch.autograd.grad(self.risk(e)(weights), weights)[0] for e in range(len(self.sizes))])

    def hessians(self) -> Tensor:
        """[domain, weight, weight]."""
        size = self.weights.numel()
        hessians = [
            torch.autograd.functional.hessian(self.risk(e), self.weights, create_graph=True)
            for e in range(len(self.sizes))
        ]
        return torch.stack([hessian.reshape(size, size) for hessian in hessians])

    def distance(self) -> Tensor:
        hessians = self.hessians()
        mean = sum(hessians) / len(hessians)
        return sum((hessian - mean).square().sum() for hessian in hessians) / len(hessians)


@HEADS
def test_gradients(num_outputs: int, bias: bool) -> None:
    problem = Problem(num_outputs, bias, FEW)
    actual = head_gradients(problem.features, problem.residuals(), FEW, bias=bias)
    assert relative_error(actual, problem.gradients()) < 1e-12


@HEADS
def test_products_with_a_vector_of_each_domain(num_outputs: int, bias: bool) -> None:
    problem = Problem(num_outputs, bias, FEW)
    vectors = torch.randn(len(FEW), *problem.weights.shape, generator=torch.manual_seed(1), dtype=torch.float64)
    actual = hessian_vector_products(problem.features, problem.logits, FEW, vectors, bias=bias)
    expected = (problem.hessians() @ vectors.flatten(1).unsqueeze(2)).reshape(vectors.shape)
    assert relative_error(actual, expected) < 1e-12


@HEADS
def test_whole_hessians_and_their_diagonals(num_outputs: int, bias: bool) -> None:
    problem = Problem(num_outputs, bias, FEW)
    whole = hessians(problem.features, problem.logits, FEW, bias=bias)
    assert whole.shape == (len(FEW), *problem.weights.shape, *problem.weights.shape)
    expected = problem.hessians()
    assert relative_error(whole.reshape(expected.shape), expected) < 1e-12
    diagonals = hessian_diagonals(problem.features, problem.logits, FEW, bias=bias)
    assert relative_error(diagonals.flatten(1), expected.diagonal(dim1=1, dim2=2)) < 1e-12


@HEADS
def test_diagonal_estimates_of_given_signs(num_outputs: int, bias: bool) -> None:
    problem = Problem(num_outputs, bias, FEW)
    signs = torch.randint(2, (5, *problem.weights.shape), generator=torch.manual_seed(1)) * 2 - 1
    actual = hessian_diagonal_estimates(problem.features, problem.logits, FEW, signs, bias=bias)
    estimates = [
        torch.stack([v * (hessian @ v) for v in signs.double().flatten(1)]).mean(0) for hessian in problem.hessians()
    ]
    assert relative_error(actual, torch.stack(estimates).reshape(actual.shape)) < 1e-12


@pytest.mark.parametrize(("num_outputs", "bias"), [(1, True), (2, False), (3, True)])
def test_all_signs_give_the_diagonal(num_outputs: int, bias: bool) -> None:
    problem = Problem(num_outputs, bias, FEW, num_features=2)
    shape = problem.weights.shape
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=problem.weights.numel())), dtype=torch.float64)
    actual = hessian_diagonal_estimates(problem.features, problem.logits, FEW, signs.reshape(-1, *shape), bias=bias)
    expected = problem.hessians().diagonal(dim1=1, dim2=2).reshape(actual.shape)
    assert relative_error(actual, expected) < 1e-12


def test_one_draw_estimates_the_distance_of_whole_hessians() -> None:
    """On average over all signs: of the entries beside the diagonal it has 1/K, the variance of the estimate."""
    problem = Problem(2, False, FEW, num_features=2)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64).reshape(-1, 1, 2, 2)
    distances = []
    for one in signs:
        estimates = hessian_diagonal_estimates(problem.features, problem.logits, FEW, one, bias=False)
        distances.append((estimates - estimates.mean(0)).square().sum() / len(FEW))
    assert relative_error(torch.stack(distances).mean(), problem.distance()) < 1e-12


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["pairs of samples", "whole Hessians"])
@HEADS
def test_distance_and_its_gradient(num_outputs: int, bias: bool, sizes: tuple[int, ...]) -> None:
    problem = Problem(num_outputs, bias, sizes)
    actual = hessian_distance(problem.features, problem.logits, sizes, bias=bias)
    expected = problem.distance()
    assert relative_error(actual, expected) < 1e-11
    gradients = [torch.autograd.grad(value, problem.features)[0] for value in (actual, expected)]
    assert relative_error(*gradients) < 1e-10


def test_distance_by_pencil_and_paper() -> None:
    """One feature, no bias, logit 0: p (1 − p) = 1/4, so H_e = mean x² / 4, which is 1/4 and 9/4."""
    features = torch.tensor([[1.0], [3.0]])
    assert hessian_distance(features, torch.zeros(2, 1), (1, 1), bias=False).item() == 1.0
    # Two classes are the matrix (1, −1; −1, 1) / 4 · x²: four entries that are as far apart.
    assert hessian_distance(features, torch.zeros(2, 2), (1, 1), bias=False).item() == 4.0


@pytest.mark.parametrize(("certainty", "misalignment"), [(1.0, 1e-4), (12.0, 1.0)])
def test_distance_keeps_its_digits(certainty: float, misalignment: float) -> None:
    """Nearly aligned domains, and predictions that are nearly certain, in float32."""
    torch.manual_seed(0)
    features, logits = torch.randn(8, 64), torch.randn(8, 5)
    logits[:, 0] += certainty
    features = torch.cat([features, features + misalignment * torch.randn(8, 64)])
    logits = torch.cat([logits, logits + misalignment * torch.randn(8, 5)])
    p, h = logits.double().softmax(1), torch.cat([features, torch.ones(16, 1)], dim=1).double()
    hessians = [
        torch.einsum("ncd,ni,nj->cidj", torch.diag_embed(p_e) - p_e[:, :, None] * p_e[:, None], h_e, h_e) / 8
        for p_e, h_e in zip(p.split(8), h.split(8), strict=True)
    ]
    expected = ((hessians[0] - hessians[1]) / 2).square().sum()
    assert relative_error(hessian_distance(features, logits, (8, 8)), expected) < 1e-5


@pytest.mark.parametrize("num_features", [3, 50], ids=["whole Hessians", "pairs of samples"])
def test_copies_of_a_domain_have_no_distance(num_features: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(10, num_features).repeat(3, 1).requires_grad_()
    logits = torch.randn(10, 4).repeat(3, 1)
    distance = hessian_distance(features, logits, (10, 10, 10))
    assert 0 <= distance < 1e-10
    (gradient,) = torch.autograd.grad(distance, features)
    assert gradient.abs().max() < 1e-6


def test_a_head_of_many_classes_and_features() -> None:
    """Each Hessian would have 706,905² entries."""
    torch.manual_seed(0)
    features = torch.randn(24, 2048, requires_grad=True)
    logits = torch.randn(24, 345)
    distance = hessian_distance(features, logits, (8, 8, 8))
    distance.backward()
    assert distance > 0
    assert features.grad.isfinite().all()


def test_a_batch_of_many_samples() -> None:
    """One entry for each pair of samples would take 20 GB."""
    torch.manual_seed(0)
    features = torch.randn(50_000, 8, requires_grad=True)
    distance = hessian_distance(features, features[:, :1], (30_000, 20_000))
    distance.backward()
    assert distance > 0
    assert features.grad.isfinite().all()


def test_half_precision_is_widened() -> None:
    torch.manual_seed(0)
    features, logits = torch.randn(9, 6, dtype=torch.bfloat16), torch.randn(9, 3)
    for actual, expected in (
        (head_gradients(features, logits, FEW), head_gradients(features.float(), logits, FEW)),
        (hessian_distance(features, logits, FEW), hessian_distance(features.float(), logits, FEW)),
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [(((5, 2, 1), (5, 3)), (2, 3)), (((5, 2), (4, 3)), (2, 3)), (((5, 2), (5, 3)), (2, 2)), (((5, 2), (5, 3)), (5, 0))],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> None:
    features, logits = map(torch.zeros, shapes)
    for function in (head_gradients, hessian_distance):
        with pytest.raises(InputError, match=r"features must be \[sample, feature\] and logits or residuals"):
            function(features, logits, sizes)


def test_vectors_and_signs_that_do_not_fit() -> None:
    features, logits = torch.zeros(5, 2), torch.zeros(5, 3)
    with pytest.raises(InputError, match=r"vectors must be \[domain, class, feature\] = \[2, 3, 3\], got \[2, 3, 2\]"):
        hessian_vector_products(features, logits, (2, 3), torch.zeros(2, 3, 2))
    with pytest.raises(InputError, match=r"signs must be .* = \[at least 1, 3, 2\], got \[0, 3, 2\]"):
        hessian_diagonal_estimates(features, logits, (2, 3), torch.zeros(0, 3, 2), bias=False)
