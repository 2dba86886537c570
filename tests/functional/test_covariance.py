"""The off-diagonal variant: distance between full covariances, through matrices or through Gram matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from cases import LOSSES, TOLERANCE, draw_batch, dtypes, indices_of
from fishr.functional import covariance, domain_gradient_covariance_distance, loss_residuals

# With 5 features and 1 to 4 classes the weight has at most 20 entries: 14 samples go through Gram matrices
# (of the weight with 4 classes), 60 through the matrices themselves.
FEW, MANY = (4, 7, 3), (20, 25, 15)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture
def forms(monkeypatch):
    """The names of the forms taken, in order: weight, then bias."""
    taken = []

    def spy(name):
        function = getattr(covariance, name)

        def record(*args):
            taken.append(name)
            return function(*args)

        monkeypatch.setattr(covariance, name, record)

    spy("_gram_distance")
    spy("_direct_distance")
    return taken


@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["gram", "direct"])
@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_distance_of_each_loss(name, dtype, sizes):
    batch = draw_batch(name, dtype, sizes=sizes)
    residuals = loss_residuals(batch.loss, batch.logits, batch.targets)
    actual = domain_gradient_covariance_distance(
        batch.features, residuals, batch.domains, batch.num_domains, mask=batch.mask
    )
    wide = batch.widened()
    per_sample = oracles.head_gradients(wide.loss, wide.features, wide.weight, wide.bias, wide.targets)
    expected = oracles.covariance_distance(per_sample, batch.domains, batch.num_domains, bias=True, mask=batch.mask)
    assert actual.dtype == dtype
    assert oracles.relative_error(actual, expected) <= TOLERANCE[dtype]
    ours, theirs = (torch.autograd.grad(value, batch.leaves) for value in (actual, expected))
    assert oracles.relative_error(ours, theirs) <= TOLERANCE[dtype]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 7), min_size=2, max_size=4).map(tuple),
    num_classes=st.integers(1, 4),
    num_features=st.integers(1, 6),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape(sizes, num_classes, num_features, bias, seed):
    features, residuals = draw(sum(sizes), num_features, seed=seed), draw(sum(sizes), num_classes, seed=seed + 1)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    domains = indices_of(sizes)[order]
    actual = domain_gradient_covariance_distance(features, residuals, domains, len(sizes), bias=bias)
    per_sample = oracles.outer_gradients(features, residuals, bias=bias)
    expected = oracles.covariance_distance(per_sample, domains, len(sizes), bias=bias)
    assert oracles.relative_error(actual, expected) <= 1e-10


def test_the_smaller_matrix_is_taken_for_each_tensor(forms):
    features, residuals = draw(14, 5), draw(14, 4, seed=1)
    domain_gradient_covariance_distance(features, residuals, FEW, 3)
    assert forms == ["_gram_distance", "_direct_distance"]  # 20 entries, 4 entries, 14 samples
    forms.clear()
    domain_gradient_covariance_distance(features.repeat(2, 1), residuals.repeat(2, 1), indices_of(FEW).repeat(2), 3)
    assert forms == ["_direct_distance", "_direct_distance"]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_both_forms_agree(forms, masked):
    """Repeating every sample leaves a covariance as it is, and with enough samples the other form is taken."""
    features, residuals, domains = draw(14, 5), draw(14, 4, seed=1), indices_of(FEW)
    mask = torch.arange(14) % 3 != 1 if masked else None
    results = []
    for copies in (1, 2):
        value = domain_gradient_covariance_distance(
            features.repeat(copies, 1),
            residuals.repeat(copies, 1),
            domains.repeat(copies),
            3,
            bias=False,
            mask=None if mask is None else mask.repeat(copies),
        )
        results.append([value, *torch.autograd.grad(value, (features, residuals))])
    assert forms == ["_gram_distance", "_direct_distance"]
    for gram, direct in zip(*results, strict=True):
        assert oracles.relative_error(gram, direct) <= 1e-12


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("num_features", "form"), [(5, "_gram_distance"), (2, "_direct_distance")])
def test_gradcheck(forms, num_features, form, masked):
    features, residuals = draw(7, num_features), draw(7, 2, seed=1)
    domains = torch.tensor([1, 0, 1, 1, 0, 1, 0])
    mask = torch.tensor([True, True, False, True, True, True, False]) if masked else None
    assert torch.autograd.gradcheck(
        lambda f, r: domain_gradient_covariance_distance(f, r, domains, 2, mask=mask), (features, residuals)
    )
    assert form in forms


@pytest.mark.parametrize("num_features", [5, 1], ids=["gram", "direct"])
def test_laws(num_features):
    features, residuals, domains = draw(14, num_features), draw(14, 4, seed=1), indices_of(FEW)

    def distance(features, residuals, domains):
        return domain_gradient_covariance_distance(features, residuals, domains, 3)

    expected = distance(features, residuals, domains)
    assert expected > 0
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert oracles.relative_error(distance(features[order], residuals[order], domains[order]), expected) <= 1e-12
    relabelled = torch.tensor([2, 0, 1])[domains]
    assert oracles.relative_error(distance(features, residuals, relabelled), expected) <= 1e-12
    assert oracles.relative_error(distance(features, residuals, FEW), expected) <= 1e-12
    assert oracles.relative_error(distance(features, residuals * 3, domains), expected * 3**4) <= 1e-12


@pytest.mark.parametrize(("num_samples", "form"), [(6, "_gram_distance"), (30, "_direct_distance")])
def test_equal_domains_have_no_distance(forms, num_samples, form):
    features, residuals = draw(num_samples, 5), draw(num_samples, 4, seed=1)
    value = domain_gradient_covariance_distance(
        features.repeat(3, 1), residuals.repeat(3, 1), (num_samples,) * 3, 3, bias=False
    )
    assert abs(value.item()) < 1e-14
    assert forms == [form]


@pytest.mark.parametrize("num_features", [5, 1], ids=["gram", "direct"])
def test_half_precision_features_and_autocast(num_features):
    features, residuals = draw(14, num_features, dtype=torch.bfloat16), draw(14, 4, seed=1, dtype=torch.float32)
    wide = features.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = domain_gradient_covariance_distance(features, residuals, FEW, 3)
    expected = domain_gradient_covariance_distance(wide, residuals, FEW, 3)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    (gradient,), (truth,) = torch.autograd.grad(value, features), torch.autograd.grad(expected, wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, truth.bfloat16())
