"""Gradient variances per domain, in closed form, against one gradient for each sample."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from cases import LOSSES, TOLERANCE, draw_batch, dtypes, indices_of
from fishr.errors import InputError
from fishr.functional import (
    domain_gradient_covariance_distance,
    domain_gradient_variances,
    loss_residuals,
    variance_penalty,
)
from fishr.functional.variance import _chunks

SIZES = (4, 7, 3)
UNEQUAL_AND_EQUAL = pytest.mark.parametrize("sizes", [(13, 1, 20), (6, 6, 6)], ids=["unequal", "equal"])
"""Sizes of domains: equal ones are computed at once."""


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def draw_pair(sizes=SIZES, num_features=5, num_classes=4, seed=0, dtype=torch.float64):
    n = sum(sizes)
    return draw(n, num_features, seed=seed, dtype=dtype), draw(n, num_classes, seed=seed + 1, dtype=dtype)


def gradients_of(value, *leaves):
    """Gradients of a weighted sum, so that no direction is special."""
    weights = draw(*value.shape, seed=99).detach().to(value.dtype)
    return torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_variances_of_each_loss(name, dtype, centered):
    batch = draw_batch(name, dtype)
    residuals = loss_residuals(batch.loss, batch.logits, batch.targets)
    actual = domain_gradient_variances(
        batch.features, residuals, batch.domains, batch.num_domains, centered=centered, mask=batch.mask
    )
    wide = batch.widened()
    per_sample = oracles.head_gradients(wide.loss, wide.features, wide.weight, wide.bias, wide.targets)
    expected = oracles.variances(per_sample, batch.domains, batch.num_domains, centered=centered, mask=batch.mask)
    assert actual.dtype == dtype
    assert oracles.relative_error(actual, expected) <= TOLERANCE[dtype]
    ours, theirs = (gradients_of(value, *batch.leaves) for value in (actual, expected))
    assert oracles.relative_error(ours, theirs) <= TOLERANCE[dtype]


def test_the_bias_is_the_last_feature_and_only_there_with_a_bias():
    features, residuals = draw_pair()
    with_bias = domain_gradient_variances(features, residuals, SIZES, 3)
    without = domain_gradient_variances(features, residuals, SIZES, 3, bias=False)
    assert with_bias.shape == (3, 4, 6)
    assert without.shape == (3, 4, 5)
    torch.testing.assert_close(with_bias[..., :5], without)
    of_residuals = torch.stack([r.var(0, correction=0) for r in residuals.split(SIZES)])
    torch.testing.assert_close(with_bias[..., 5], of_residuals)


@st.composite
def problems(pick):
    return {
        "sizes": tuple(pick(st.lists(st.integers(1, 6), min_size=2, max_size=5))),
        "num_classes": pick(st.integers(1, 6)),
        "num_features": pick(st.integers(1, 9)),
        "dtype": pick(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "bias": pick(st.booleans()),
        "centered": pick(st.booleans()),
        "masked": pick(st.booleans()),
        "shuffled": pick(st.booleans()),
        "seed": pick(st.integers(0, 10**6)),
    }


@settings(deadline=None, derandomize=True, max_examples=60)
@given(problem=problems())
def test_any_shape_order_and_type(problem):
    sizes, dtype, seed = problem["sizes"], problem["dtype"], problem["seed"]
    num_samples, num_domains = sum(sizes), len(sizes)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    features = draw(num_samples, problem["num_features"], seed=seed, dtype=dtype)
    residuals = draw(num_samples, problem["num_classes"], seed=seed + 1, dtype=wide)
    domains, given_domains, mask = indices_of(sizes), sizes, None
    generator = torch.Generator().manual_seed(seed + 2)
    if problem["masked"]:  # the first sample of each domain stays
        mask = (torch.rand(num_samples, generator=generator) < 0.6) | (domains.diff(prepend=torch.tensor([-1])) != 0)
    if problem["shuffled"]:
        order = torch.randperm(num_samples, generator=generator)
        domains, mask = domains[order], None if mask is None else mask[order]
        given_domains = domains

    actual = domain_gradient_variances(
        features,
        residuals,
        given_domains,
        num_domains,
        bias=problem["bias"],
        centered=problem["centered"],
        mask=mask,
    )
    per_sample = oracles.outer_gradients(features.double(), residuals.double(), bias=problem["bias"])
    expected = oracles.variances(per_sample, domains, num_domains, centered=problem["centered"], mask=mask)
    # Errors are relative to the second moment: a domain of one sample has no variance to be relative to.
    moments = oracles.variances(per_sample, domains, num_domains, centered=False, mask=mask)
    assert actual.dtype == wide
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE[wide] * moments.max()
    for gradient, truth, scale in zip(
        *(gradients_of(value, features, residuals) for value in (actual, expected, moments)), strict=True
    ):
        assert gradient.dtype == truth.dtype  # the type of the leaf
        tolerance = 2**-8 if truth.dtype == torch.bfloat16 else TOLERANCE[truth.dtype]
        assert (gradient - truth).abs().max() <= tolerance * scale.abs().max()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
@pytest.mark.parametrize("num_samples", [7, 8], ids=["unequal", "equal"])
def test_gradcheck(num_samples, centered, bias, masked):
    features, residuals = draw_pair(sizes=(num_samples,), num_features=3, num_classes=2)
    domains = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0][:num_samples])
    mask = torch.tensor([True, True, False, True, True, True, False, True][:num_samples]) if masked else None
    assert torch.autograd.gradcheck(
        lambda f, r: domain_gradient_variances(f, r, domains, 2, bias=bias, centered=centered, mask=mask),
        (features, residuals),
    )


def test_a_second_derivative_is_refused_and_not_wrong():
    features, residuals = draw_pair()
    variances = domain_gradient_variances(features, residuals, SIZES, 3)
    (gradient,) = torch.autograd.grad(variances.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), features)


def test_order_within_domains_changes_nothing():
    features, residuals = draw_pair()
    expected = domain_gradient_variances(features, residuals, SIZES, 3)
    order = torch.cat([part.flip(0) for part in torch.arange(sum(SIZES)).split(SIZES)])
    actual = domain_gradient_variances(features[order], residuals[order], SIZES, 3)
    assert oracles.relative_error(actual, expected) <= 1e-12


def test_indices_in_any_order_equal_sizes():
    features, residuals = draw_pair()
    expected = domain_gradient_variances(features, residuals, SIZES, 3)
    order = torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(0))
    actual = domain_gradient_variances(features[order], residuals[order], indices_of(SIZES)[order], 3)
    assert oracles.relative_error(actual, expected) <= 1e-12
    ours, theirs = (gradients_of(value, features, residuals) for value in (actual, expected))
    assert oracles.relative_error(ours, theirs) <= 1e-12


def test_a_masked_sample_is_as_good_as_absent():
    features, residuals = draw_pair()
    mask = torch.arange(sum(SIZES)) % 3 != 1
    domains = indices_of(SIZES)
    actual = domain_gradient_variances(features, residuals, SIZES, 3, mask=mask)
    expected = domain_gradient_variances(features[mask], residuals[mask], domains[mask], 3)
    assert oracles.relative_error(actual, expected) <= 1e-12
    for gradient in gradients_of(actual, features, residuals):
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


def test_repeating_every_sample_changes_nothing():
    features, residuals = draw_pair()
    expected = domain_gradient_variances(features, residuals, SIZES, 3)
    actual = domain_gradient_variances(features.repeat(3, 1), residuals.repeat(3, 1), indices_of(SIZES).repeat(3), 3)
    assert oracles.relative_error(actual, expected) <= 1e-12


def test_equal_domains_have_equal_variances():
    features, residuals = draw_pair(sizes=(6,))
    variances = domain_gradient_variances(features.repeat(3, 1), residuals.repeat(3, 1), (6, 6, 6), 3)
    assert torch.equal(variances[0], variances[1])
    assert torch.equal(variances[0], variances[2])
    assert variances.abs().max() > 0.1


@pytest.mark.parametrize("elements", [1, 7, 10, 64])
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@UNEQUAL_AND_EQUAL
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, sizes, elements, centered, masked):
    features, residuals = draw_pair(sizes)
    mask = torch.arange(sum(sizes)) % 5 != 1 if masked else None

    def compute():
        value = domain_gradient_variances(features, residuals, sizes, 3, centered=centered, mask=mask)
        return [value, *gradients_of(value, features, residuals)]

    expected = compute()
    monkeypatch.setattr("fishr.functional.variance.CHUNK_ELEMENTS", elements)
    monkeypatch.setattr("fishr.functional.variance.CHUNK_ROWS", 1)
    for actual, whole in zip(compute(), expected, strict=True):
        assert oracles.relative_error(actual, whole) <= 1e-12


@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
@pytest.mark.parametrize("shared", [False, True], ids=["features of each", "features shared"])
@UNEQUAL_AND_EQUAL
def test_several_models_at_once_are_each_alone(sizes, centered, shared):
    features, residuals = draw(4, sum(sizes), 5), draw(4, sum(sizes), 3, seed=1)

    def of_one(f, r):
        return domain_gradient_variances(f, r, sizes, 3, centered=centered)

    if shared:
        features = draw(sum(sizes), 5)
    each = [features] * 4 if shared else features
    alone = torch.stack([of_one(f, r) for f, r in zip(each, residuals, strict=True)])
    together = torch.vmap(of_one, in_dims=(None if shared else 0, 0))(features, residuals)
    assert oracles.relative_error(together, alone) <= 1e-12
    ours, theirs = (gradients_of(value, features, residuals) for value in (together, alone))
    assert oracles.relative_error(ours, theirs) <= 1e-12


@UNEQUAL_AND_EQUAL
def test_tensors_that_are_not_contiguous(sizes):
    features, residuals = draw_pair(sizes)
    expected = domain_gradient_variances(features, residuals, sizes, 3)
    strided = [leaf.detach().T.contiguous().T.requires_grad_() for leaf in (features, residuals)]
    actual = domain_gradient_variances(*strided, sizes, 3)
    assert oracles.relative_error(actual, expected) <= 1e-12
    ours, theirs = gradients_of(actual, *strided), gradients_of(expected, features, residuals)
    assert oracles.relative_error(ours, theirs) <= 1e-12


@pytest.mark.parametrize(
    ("features", "residuals", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
@UNEQUAL_AND_EQUAL
def test_moments_are_at_least_float32(sizes, features, residuals, expected):
    features, residuals = draw(sum(sizes), 5, dtype=features), draw(sum(sizes), 4, seed=1, dtype=residuals)
    variances = domain_gradient_variances(features, residuals, sizes, 3)
    truth = domain_gradient_variances(features.double(), residuals.double(), sizes, 3)
    assert variances.dtype == expected
    assert oracles.relative_error(variances, truth) <= 1e-6
    for leaf, gradient in zip((features, residuals), gradients_of(variances, features, residuals), strict=True):
        assert gradient.dtype == leaf.dtype


def test_gradients_of_half_precision_leaves_are_rounded_once():
    features, residuals = draw(14, 5, dtype=torch.bfloat16), draw(14, 4, seed=1, dtype=torch.float32)
    wide = features.detach().float().requires_grad_()
    actual = gradients_of(domain_gradient_variances(features, residuals, SIZES, 3), features)[0]
    expected = gradients_of(domain_gradient_variances(wide, residuals, SIZES, 3), wide)[0]
    torch.testing.assert_close(actual, expected.bfloat16())


def test_autocast_changes_nothing():
    results = []
    for enabled in (False, True):
        features, residuals = draw_pair(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            variances = domain_gradient_variances(features, residuals, SIZES, 3)
            results.append([variances, *gradients_of(variances, features, residuals)])
    for without, within in zip(*results, strict=True):
        assert within.dtype == torch.float32
        assert torch.equal(without, within)


class RecordFishrOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fishr":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


def copied(argument):
    return argument.detach().clone() if isinstance(argument, torch.Tensor) else argument


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own making
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
@UNEQUAL_AND_EQUAL
def test_custom_ops_pass_the_checks_of_torch(sizes, centered, features):
    n = sum(sizes)
    features, residuals = draw(n, 5, dtype=features), draw(n, 4, seed=1, dtype=torch.float32)
    with RecordFishrOps() as recorded:
        variances = domain_gradient_variances(features, residuals, sizes, 3, centered=centered)
        gradients_of(variances, features, residuals)
    assert {op.name() for op in recorded.calls} == {"fishr::head_variances", "fishr::head_variances_backward"}
    for op, args in recorded.calls.items():
        args = [copied(argument) for argument in args]
        if op.name() == "fishr::head_variances":
            args[:2] = [argument.requires_grad_() for argument in args[:2]]
        assert set(library.opcheck(op, args).values()) == {"SUCCESS"}


# Errors. The covariance function checks its arguments at the same place.
functions = pytest.mark.parametrize("function", [domain_gradient_variances, domain_gradient_covariance_distance])
FEATURES, RESIDUALS = torch.ones(10, 5), torch.ones(10, 4)


@functions
@pytest.mark.parametrize(
    ("features", "residuals"), [((10, 5), (9, 4)), ((10, 5, 1), (10, 4)), ((10, 5), (10,)), ((10,), (10, 4))]
)
def test_features_and_residuals_that_do_not_fit(function, features, residuals):
    shapes = re.escape(f"got {list(features)} and {list(residuals)}; flatten or pool other dimensions first")
    with pytest.raises(InputError, match=rf"features must be \[sample, feature\].*{shapes}"):
        function(torch.ones(features), torch.ones(residuals), (5, 5), 2)


@functions
@pytest.mark.parametrize("num_domains", [-1, 0, 1])
def test_fewer_than_two_domains(function, num_domains):
    with pytest.raises(InputError, match=f"num_domains must be at least 2, got {num_domains}: variances are compared"):
        function(FEATURES, RESIDUALS, (10,), num_domains)


@functions
@pytest.mark.parametrize("shape", [(9,), (10, 1), ()])
def test_a_mask_of_another_shape(function, shape):
    with pytest.raises(
        InputError, match=re.escape(f"mask must be a bool tensor [sample] = [10], got bool {list(shape)}")
    ):
        function(FEATURES, RESIDUALS, (5, 5), 2, mask=torch.ones(shape, dtype=torch.bool))


@functions
@pytest.mark.parametrize(
    ("domains", "came"),
    [
        (torch.zeros(9, dtype=torch.int64), "int64 [9]"),
        (torch.zeros(10, 1, dtype=torch.int64), "int64 [10, 1]"),
        (torch.zeros(10), "float32 [10]"),
        (torch.zeros(10, dtype=torch.int32), "int32 [10]"),
    ],
)
def test_domains_of_another_shape_or_type(function, domains, came):
    message = re.escape(f"domains must be an int64 tensor [sample] = [10], got {came}")
    with pytest.raises(InputError, match=message):
        function(FEATURES, RESIDUALS, domains, 2)


@functions
@pytest.mark.parametrize("sizes", [(10,), (4, 5), (3, 3, 4), (11, -1), (0, 0), (0, 1) * 5])
def test_sizes_that_do_not_add_up(function, sizes):
    message = re.escape(
        f"domain sizes must be num_domains=2 counts that add up to the 10 samples, got {sizes}; "
        "to give the domain of each sample, pass an int64 tensor"
    )
    with pytest.raises(InputError, match=message):
        function(FEATURES, RESIDUALS, sizes, 2)


@functions
@pytest.mark.parametrize("index", [-1, 2, 7])
def test_a_domain_index_out_of_range(function, index):
    domains = torch.tensor([0, 1] * 4 + [1, index])
    message = f"domain index {index} is out of range for num_domains=2: indices run from 0 to 1"
    with pytest.raises(InputError, match=message):
        function(FEATURES, RESIDUALS, domains, 2)


@functions
@pytest.mark.parametrize("domains", [(6, 0, 4), torch.tensor([0] * 6 + [2] * 4)], ids=["sizes", "indices"])
def test_a_domain_without_a_sample_is_named(function, domains):
    message = r"domain 1 has no sample .*samples per domain: \[6, 0, 4\]\); every domain needs at least one: sample"
    with pytest.raises(InputError, match=message):
        function(FEATURES, RESIDUALS, domains, 3)


@functions
def test_an_empty_batch(function):
    with pytest.raises(InputError, match=r"domain 0, 1 has no sample"):
        function(FEATURES[:0], RESIDUALS[:0], (0, 0), 2)
    with pytest.raises(InputError, match=r"domain 0, 1 has no sample"):
        function(FEATURES[:0], RESIDUALS[:0], torch.zeros(0, dtype=torch.int64), 2)


@functions
@pytest.mark.parametrize("domains", [(6, 4), torch.tensor([0] * 6 + [1] * 4)], ids=["sizes", "indices"])
def test_a_domain_of_which_no_sample_counts_is_named(function, domains):
    mask = torch.tensor([True, False] * 3 + [False] * 4)
    with pytest.raises(InputError, match=r"domain 1 has no sample .*samples per domain: \[3, 0\]"):
        function(FEATURES, RESIDUALS, domains, 2, mask=mask)


def test_the_penalty_of_a_perfect_head_is_zero():
    variances = domain_gradient_variances(FEATURES, torch.zeros_like(RESIDUALS), (5, 5), 2)
    assert variance_penalty(variances).item() == 0


def test_a_mask_that_is_not_bool():
    with pytest.raises(InputError, match=r"mask must be a bool tensor \[sample\] = \[10\], got float32 \[10\]"):
        domain_gradient_variances(FEATURES, RESIDUALS, (5, 5), 2, mask=torch.ones(10))


def test_sizes_that_are_not_whole_numbers():
    with pytest.raises(InputError, match=r"counts that add up to the 10 samples, got \(5\.0, 5\.0\)"):
        domain_gradient_variances(FEATURES, RESIDUALS, (5.0, 5.0), 2)


def test_an_index_out_of_range_is_found_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("fishr.functional.domains.values_may_be_checked", lambda _: False)
    domains = torch.tensor([0, 1, 2, 0, 1, 0, 1, 0, 1, 0])
    with pytest.raises(InputError, match="domain index 2 is out of range for num_domains=2"):
        domain_gradient_variances(FEATURES, RESIDUALS, domains, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_chunks_of_a_rank_that_lacks_a_domain(device):
    chunks = list(_chunks([2, 0, 1], torch.zeros(3, 4, device=device)))
    assert chunks == [(0, slice(0, 2)), (2, slice(2, 3))]


def test_a_chunk_of_many_features_still_has_64_samples():
    chunks = list(_chunks([100, 30], torch.zeros(1).expand(130, 2**16)))
    assert chunks == [(0, slice(0, 64)), (0, slice(64, 100)), (1, slice(100, 130))]
