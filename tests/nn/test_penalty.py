"""FishrPenalty: what the published code computes, what the definitions say, and how it behaves as a module."""

import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fishr.nn.penalty
import oracles
from cases import LOSSES, TOLERANCE, LossCase, draw_batch, dtypes, indices_of, load_golden, log_cosh_loss
from fishr.errors import ConfigError, InputError
from fishr.functional import domain_gradient_variances, loss_residuals
from fishr.nn import FishrPenalty

VARIANTS = ("variance", "second_moment", "covariance")
variants = pytest.mark.parametrize("variant", VARIANTS)


def head_from(golden: dict[str, torch.Tensor]) -> nn.Linear:
    num_classes, num_features = golden["weight"].shape
    head = nn.Linear(num_features, num_classes)
    head.load_state_dict({"weight": golden["weight"], "bias": golden["bias"]})
    return head


def draw_step(seed=0, *, head=None, num_samples=14, dtype=torch.float32):
    """Features, logits and targets of one training step; logits and features are leaves."""
    generator = torch.Generator().manual_seed(seed)
    head = make_head() if head is None else head
    features = torch.randn(num_samples, head.in_features, generator=generator).to(dtype)
    logits = torch.randn(num_samples, head.out_features, generator=generator).to(dtype)
    targets = torch.randint(head.out_features, (num_samples,), generator=generator)
    return features.requires_grad_(), logits.requires_grad_(), targets


def make_head(num_features=5, num_classes=4, *, bias=True):
    return nn.Linear(num_features, num_classes, bias=bias)


SIZES = (4, 7, 3)


# What the published code computes


@pytest.mark.parametrize("name", ["ema", "ragged_noema", "binary"])
@pytest.mark.parametrize("by", ["sizes", "indices"])
def test_golden_domainbed(name, by):
    golden = load_golden(f"domainbed_fishr_{name}.npz")
    sizes = tuple(golden["domain_sizes"].tolist())
    domains = sizes if by == "sizes" else indices_of(sizes)
    head = head_from(golden)
    penalty = FishrPenalty(head, len(sizes), ema=golden["ema"].item())
    values, gradients = [], {"features": [], "weight": [], "bias": []}
    for features, labels in zip(golden["features"], golden["labels"], strict=True):
        features.requires_grad_()
        value = penalty(features, head(features), labels, domains)
        of = torch.autograd.grad(value, (features, head.weight, head.bias))
        values.append(value.detach())
        for leaf, gradient in zip(gradients, of, strict=True):
            gradients[leaf].append(gradient)
    assert oracles.relative_error(torch.stack(values), golden["penalty"]) <= 1e-5
    for leaf, of_steps in gradients.items():
        assert oracles.relative_error(torch.stack(of_steps), golden[f"grad_{leaf}"]) <= 1e-5


COLORED_MNIST = {"variance": "fishr", "second_moment": "fishr_notcentered", "covariance": "fishr_offdiagonal"}


@variants
def test_golden_colored_mnist(variant):
    golden, key = load_golden("colored_mnist_variants.npz"), COLORED_MNIST[variant]
    head, features = head_from(golden), golden["features"].requires_grad_()
    sizes = tuple(golden["domain_sizes"].tolist())
    penalty = FishrPenalty(head, 2, loss=nn.BCEWithLogitsLoss(), ema=0, reduction="sum", variant=variant)
    value = penalty(features, head(features), golden["targets"], sizes)
    (gradient,) = torch.autograd.grad(value, features)
    assert oracles.relative_error(value, golden[f"{key}/penalty"]) <= 1e-5
    assert oracles.relative_error(gradient, golden[f"{key}/grad_features"]) <= 1e-5


@pytest.mark.parametrize("variant", ["variance", "second_moment"])
def test_golden_colored_mnist_statistics(variant):
    golden, key = load_golden("colored_mnist_variants.npz"), COLORED_MNIST[variant]
    residuals = loss_residuals(nn.BCEWithLogitsLoss(), head_from(golden)(golden["features"]), golden["targets"])
    statistics = domain_gradient_variances(
        golden["features"], residuals, tuple(golden["domain_sizes"].tolist()), 2, centered=variant == "variance"
    )
    assert oracles.relative_error(statistics[:, 0, :-1], golden[f"{key}/weight_statistic"]) <= 1e-5
    assert oracles.relative_error(statistics[..., -1], golden[f"{key}/bias_statistic"]) <= 1e-5


def test_golden_colored_mnist_covariances_of_the_oracle():
    golden, key = load_golden("colored_mnist_variants.npz"), COLORED_MNIST["covariance"]
    per_sample = oracles.head_gradients(
        nn.BCEWithLogitsLoss(), golden["features"], golden["weight"], golden["bias"], golden["targets"]
    )
    domains = indices_of(tuple(golden["domain_sizes"].tolist()))
    for of_tensor, name in ((per_sample[..., :-1], "weight"), (per_sample[..., -1:], "bias")):
        covariances = oracles.covariances(of_tensor, domains, 2)
        assert oracles.relative_error(covariances, golden[f"{key}/{name}_statistic"]) <= 1e-5


# What the definitions say


def expected_penalty(batches, *, variant, ema, reduction):
    """The penalty of the last batch in float64, from one gradient for each sample of all batches."""
    statistics = []
    for batch in [batch.widened() for batch in batches]:
        per_sample = oracles.head_gradients(batch.loss, batch.features, batch.weight, batch.bias, batch.targets)
        where = {"domains": batch.domains, "num_domains": batch.num_domains, "mask": batch.mask}
        if variant != "covariance":
            statistics.append(oracles.variances(per_sample, centered=variant == "variance", **where))
    if variant == "covariance":
        return oracles.covariance_distance(per_sample, bias=batch.bias is not None, **where)
    return oracles.penalty(oracles.moving_average(statistics, ema), reduction)


def assert_penalty_matches(batches, *, variant, ema, reduction, tolerance):
    penalty = FishrPenalty(
        batches[0].head, batches[0].num_domains, loss=batches[0].loss, ema=ema, reduction=reduction, variant=variant
    )
    penalty.to(batches[0].weight.dtype)
    for batch in batches:
        actual = penalty(batch.features, batch.logits, batch.targets, batch.domains)
    expected = expected_penalty(batches, variant=variant, ema=ema, reduction=reduction)
    assert actual.dtype == batch.features.dtype
    assert oracles.relative_error(actual, expected) <= tolerance
    ours, theirs = (torch.autograd.grad(value, batch.leaves) for value in (actual, expected))
    assert oracles.relative_error(ours, theirs) <= tolerance


@variants
@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_penalty_of_each_loss(name, dtype, variant):
    batches = [draw_batch(name, dtype, seed=seed) for seed in range(3)]
    assert_penalty_matches(
        batches,
        variant=variant,
        ema=0 if variant == "covariance" else 0.9,
        reduction="sum" if variant == "covariance" else "mean",
        tolerance=TOLERANCE[dtype],
    )


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=5).map(tuple),
    num_classes=st.integers(2, 6),
    num_features=st.integers(1, 9),
    variant=st.sampled_from(VARIANTS),
    bias=st.booleans(),
    shuffled=st.booleans(),
    dtype=st.sampled_from(dtypes),
    seed=st.integers(0, 10**6),
)
def test_any_shape(sizes, num_classes, num_features, variant, bias, shuffled, dtype, seed):
    case = LossCase(
        loss=lambda dtype: nn.CrossEntropyLoss(label_smoothing=0.1),
        targets=lambda generator, n, dtype: torch.randint(num_classes, (n,), generator=generator),
        num_classes=num_classes,
    )
    batch = draw_batch(case, dtype, sizes=sizes, num_features=num_features, bias=bias, shuffled=shuffled, seed=seed)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4  # small differences of large moments occur
    assert_penalty_matches([batch], variant=variant, ema=0, reduction="sum", tolerance=tolerance)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_the_loss_by_default(num_outputs):
    name = "cross-entropy" if num_outputs > 1 else "binary, targets [sample]"
    batch = draw_batch(name)
    by_default = FishrPenalty(batch.head, 3, ema=0)(batch.features, batch.logits, batch.targets, batch.domains)
    named = FishrPenalty(batch.head, 3, ema=0, loss=batch.loss)
    assert torch.equal(by_default, named(batch.features, batch.logits, batch.targets, batch.domains))


def test_the_defaults_of_each_variant():
    head = make_head()
    assert FishrPenalty(head, 2).average.decay == 0.95
    assert FishrPenalty(head, 2).reduction == "mean"
    assert FishrPenalty(head, 2, variant="second_moment").average.decay == 0.95
    assert FishrPenalty(head, 2, variant="covariance").reduction == "sum"
    for without_average in (FishrPenalty(head, 2, ema=0), FishrPenalty(head, 2, variant="covariance")):
        assert without_average.state_dict() == {}


@variants
@pytest.mark.parametrize("name", ["cross-entropy", "all combined", "binary, many outputs, weighted", "callable"])
def test_gradcheck(name, variant):
    batch = draw_batch(name, sizes=(4, 5), num_features=3)
    penalty = FishrPenalty(batch.head, 2, loss=batch.loss, variant=variant).double()
    penalty(batch.features, batch.logits, batch.targets, batch.domains)  # gives the average a history
    penalty.eval()

    def compute(features, weight, bias):
        logits = nn.functional.linear(features, weight, bias)
        return penalty(features, logits, batch.targets, batch.domains)

    fresh = draw_batch(name, sizes=(4, 5), num_features=3, seed=1)
    assert torch.autograd.gradcheck(compute, fresh.leaves)


# Laws


def evaluate(variant, features, logits, targets, domains, *, loss=None, num_domains=3, reduction=None):
    head = make_head(features.shape[1], logits.shape[1])
    penalty = FishrPenalty(head, num_domains, loss=loss, ema=0, variant=variant, reduction=reduction)
    return penalty(features, logits, targets, domains)


@variants
def test_the_order_of_samples_and_the_names_of_domains_change_nothing(variant):
    features, logits, targets = draw_step(dtype=torch.float64)
    domains = indices_of(SIZES)
    expected = evaluate(variant, features, logits, targets, SIZES)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    shuffled = evaluate(variant, features[order], logits[order], targets[order], domains[order])
    assert oracles.relative_error(shuffled, expected) <= 1e-12
    relabelled = evaluate(variant, features, logits, targets, torch.tensor([1, 2, 0])[domains])
    assert oracles.relative_error(relabelled, expected) <= 1e-12


@variants
def test_equal_domains_have_no_penalty(variant):
    features, logits, targets = (part[:6] for part in draw_step(dtype=torch.float64))
    repeated = evaluate(variant, features.repeat(3, 1), logits.repeat(3, 1), targets.repeat(3), (6, 6, 6))
    assert abs(repeated.item()) < 1e-15
    half = evaluate(variant, features, logits, targets, (3, 3), num_domains=2)
    assert half.item() > 1e-6


@variants
def test_scaling_the_loss_scales_the_penalty_with_its_fourth_power(variant):
    features, logits, targets = draw_step(dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(reduction="none")
    values = [
        evaluate(variant, features, logits, targets, SIZES, loss=lambda z, y, c=c: c * criterion(z, y))
        for c in (1.0, 3.0)
    ]
    assert oracles.relative_error(values[1], 3**4 * values[0]) <= 1e-12


@pytest.mark.parametrize("variant", ["variance", "second_moment"])
@pytest.mark.parametrize("bias", [True, False])
def test_sum_is_mean_times_domains_times_parameters(variant, bias):
    head = make_head(bias=bias)
    features, logits, targets = draw_step(dtype=torch.float64)
    values = {"mean": 0, "sum": 0}
    for reduction in values:
        penalty = FishrPenalty(head, 3, variant=variant, reduction=reduction)
        for _ in range(2):
            values[reduction] = penalty(features, logits, targets, SIZES)
    num_parameters = sum(parameter.numel() for parameter in head.parameters())
    assert oracles.relative_error(values["sum"], values["mean"] * 3 * num_parameters) <= 1e-12


@variants
def test_ignored_samples_are_as_good_as_absent(variant):
    features, logits, targets = draw_step(dtype=torch.float64)
    domains, kept = indices_of(SIZES), torch.arange(14) % 3 != 1
    ignored = evaluate(variant, features, logits, targets.where(kept, -100), domains)
    absent = evaluate(variant, features[kept], logits[kept], targets[kept], domains[kept])
    assert oracles.relative_error(ignored, absent) <= 1e-12


# State


def run_steps(penalty, seeds):
    return [penalty(*draw_step(seed), SIZES) for seed in seeds]


def test_the_history_is_in_the_state_and_has_its_shape_from_the_start():
    for bias in (True, False):
        penalty = FishrPenalty(make_head(bias=bias), 3)
        assert {name: buffer.shape for name, buffer in penalty.state_dict().items()} == {
            "average.history": (3, 4, 5 + bias)
        }
        assert list(penalty.parameters()) == []


def test_state_goes_on_in_a_fresh_module_bit_for_bit():
    penalty = FishrPenalty(make_head(), 3)
    run_steps(penalty, range(4))
    fresh = FishrPenalty(make_head(), 3)
    fresh.load_state_dict(penalty.state_dict(), strict=True)
    for expected, actual in zip(run_steps(penalty, (4, 5)), run_steps(fresh, (4, 5)), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(fresh.average.history, penalty.average.history)
    without = run_steps(FishrPenalty(make_head(), 3), (4,))[0]
    assert not torch.equal(without, run_steps(fresh, (4,))[0])


def test_state_of_another_head_is_refused():
    penalty = FishrPenalty(make_head(), 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for average\.history"):
        penalty.load_state_dict(FishrPenalty(make_head(num_features=6), 3).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*average.history"):
        FishrPenalty(make_head(), 3, ema=0).load_state_dict(penalty.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*average.history"):
        penalty.load_state_dict({})


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_calls_outside_training_leave_the_history(how):
    penalty = FishrPenalty(make_head(), 3)
    run_steps(penalty, range(2))
    before = penalty.average.history.clone()
    if how == "eval":
        penalty.eval()
        observed = run_steps(penalty, (2,))[0]
        penalty.train()
    else:
        with torch.no_grad():
            observed = run_steps(penalty, (2,))[0]
    assert torch.equal(penalty.average.history, before)
    assert torch.equal(run_steps(penalty, (2,))[0], observed)
    assert not torch.equal(penalty.average.history, before)


def test_each_step_has_a_graph_of_its_own():
    penalty = FishrPenalty(make_head(), 3)
    first, second = draw_step(0), draw_step(1)
    penalty(*first, SIZES)
    penalty(*second, SIZES).backward()
    assert first[0].grad is None
    assert first[1].grad is None
    assert second[0].grad.abs().max() > 0
    assert second[1].grad.abs().max() > 0


def test_the_head_is_only_read():
    head = make_head()
    before = copy.deepcopy(head.state_dict())
    penalty = FishrPenalty(head, 3)
    features, _, targets = draw_step()
    penalty(features, head(features), targets, SIZES)
    assert list(penalty.state_dict()) == ["average.history"]
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_double():
    penalty = FishrPenalty(make_head(), 3).double()
    assert penalty.average.history.dtype == torch.float64
    batches = [draw_batch("cross-entropy", seed=seed) for seed in range(3)]
    for batch in batches:
        value = penalty(batch.features, batch.logits, batch.targets, batch.domains)
    expected = expected_penalty(batches, variant="variance", ema=0.95, reduction="mean")
    assert value.dtype == torch.float64
    assert oracles.relative_error(value, expected) <= 1e-12


# Precision


@variants
@pytest.mark.parametrize("name", ["cross-entropy", "binary, many outputs, weighted", "squared", "callable"])
def test_autocast_around_the_call_changes_nothing(name, variant):
    results = []
    for enabled in (False, True):
        batch = draw_batch(name, torch.float32)
        logits = batch.logits.detach().requires_grad_()
        penalty = FishrPenalty(batch.head, 3, loss=batch.loss, variant=variant)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = penalty(batch.features, logits, batch.targets, batch.domains)
        results.append([value, *torch.autograd.grad(value, (batch.features, logits))])
    for without, within in zip(*results, strict=True):
        assert within.dtype == torch.float32
        assert torch.equal(without, within)


def test_autocast_does_not_reach_into_a_loss():
    features, logits, targets = draw_step()
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))

    def loss(logits, targets):
        return nn.functional.cross_entropy(logits @ mixing, targets, reduction="none")

    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(evaluate("variance", features, logits, targets, SIZES, loss=loss))
    assert torch.equal(*values)


def test_a_backward_pass_within_autocast_changes_nothing():
    results = []
    for enabled in (False, True):
        features, logits, targets = draw_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = FishrPenalty(make_head(), 3)(features, logits, targets, SIZES)
            results.append(torch.autograd.grad(value, (features, logits)))
    for without, within in zip(*results, strict=True):
        assert torch.equal(without, within)


@variants
def test_bfloat16_features(variant):
    head = make_head()
    features, _, targets = draw_step(dtype=torch.bfloat16)
    wide = features.detach().float().requires_grad_()
    half = FishrPenalty(head, 3, variant=variant)(features, head(features.float()), targets, SIZES)
    full = FishrPenalty(head, 3, variant=variant)(wide, head(wide), targets, SIZES)
    assert half.dtype == torch.float32
    assert oracles.relative_error(half, full) <= 1e-6
    (gradient,), (truth,) = torch.autograd.grad(half, features), torch.autograd.grad(full, wide)
    assert gradient.dtype == torch.bfloat16
    assert oracles.relative_error(gradient, truth) <= 2**-7  # two roundings: through the logits and directly


@variants
def test_half_precision_logits_are_widened_before_the_residuals(variant):
    features, logits, targets = draw_step()
    narrow = logits.detach().bfloat16().requires_grad_()
    wide = narrow.detach().float()
    actual = evaluate(variant, features, narrow, targets, SIZES)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, evaluate(variant, features, wide, targets, SIZES))
    assert torch.autograd.grad(actual, narrow)[0].dtype == torch.bfloat16


# torch.compile

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler (g++ or c++)"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize(
    ("name", "variant", "by", "backend"),
    [
        ("all combined", "variance", "sizes", "aot_eager"),
        ("binary, weighted", "variance", "sizes", "aot_eager"),
        ("squared", "second_moment", "sizes", "aot_eager"),
        ("cross-entropy", "covariance", "sizes", "aot_eager"),
        ("cross-entropy", "variance", "indices", "aot_eager"),
        pytest.param("cross-entropy", "variance", "sizes", "inductor", marks=needs_compiler),
    ],
)
def test_a_compiled_step_equals_the_eager_one(name, variant, by, backend):
    torch.compiler.reset()
    batches = [draw_batch(name, torch.float32, shuffled=by == "indices", seed=seed) for seed in range(3)]
    eager = FishrPenalty(batches[0].head, 3, loss=batches[0].loss, variant=variant)
    compiled = copy.deepcopy(eager)

    def step_with(penalty):
        def step(features, weight, bias, targets, domains):
            logits = nn.functional.linear(features, weight, bias)
            return penalty(features, logits, targets, domains)

        return step

    compiled_step = torch.compile(step_with(compiled), backend=backend, fullgraph=by == "sizes")
    for batch in batches:
        results = []
        for step in (step_with(eager), compiled_step):
            value = step(*batch.leaves, batch.targets, SIZES if by == "sizes" else batch.domains)
            results.append([value, *torch.autograd.grad(value, batch.leaves)])
        for expected, actual in zip(*results, strict=True):
            assert oracles.relative_error(actual, expected) <= 1e-5
    for expected, actual in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


# Small batches


def count_calls_in_one(monkeypatch):
    calls = []
    original = fishr.nn.penalty.cross_entropy_penalty
    monkeypatch.setattr(
        "fishr.nn.penalty.cross_entropy_penalty", lambda *a, **k: calls.append(None) or original(*a, **k)
    )
    return calls


@pytest.mark.parametrize("settings", [{}, {"ema": 0.0, "reduction": "sum"}, {"loss": nn.CrossEntropyLoss()}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_small_batches_of_plain_cross_entropy_are_one_operation(settings, bias, monkeypatch):
    calls = count_calls_in_one(monkeypatch)
    head = make_head(bias=bias).double()
    in_one, in_parts = (FishrPenalty(head, 2, **settings).double() for _ in range(2))
    for step in range(3):
        features, _, targets = draw_step(step, head=head, dtype=torch.float64)
        if step == 2:
            in_one.eval(), in_parts.eval()
        logits = head(features)
        by_sizes = in_one(features, logits, targets, (7, 7))
        by_indices = in_parts(features, logits, targets, torch.arange(14) // 7)
        assert oracles.relative_error(by_sizes, by_indices) <= 1e-12
        leaves = [features, *head.parameters()]
        gradients = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (by_sizes, by_indices)]
        assert oracles.relative_error(*gradients) <= 1e-12
        for ours, theirs in zip(in_one.buffers(), in_parts.buffers(), strict=True):
            assert oracles.relative_error(ours, theirs) <= 1e-12
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((4, 10), {}),
        ((7, 7), {"variant": "second_moment"}),
        ((7, 7), {"variant": "covariance"}),
        ((7, 7), {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
        ((7, 7), {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 1.0]))}),
        ((7, 7), {"loss": nn.CrossEntropyLoss(ignore_index=0)}),
        ((7, 7), {"loss": lambda logits, targets: -logits.gather(1, targets.unsqueeze(1))[:, 0]}),
    ],
    ids=["unequal", "second moment", "covariance", "smoothing", "weights", "ignored", "callable"],
)
def test_other_batches_are_not(sizes, settings, monkeypatch):
    calls = count_calls_in_one(monkeypatch)
    head = make_head()
    features, logits, targets = draw_step(head=head)
    targets[0] = 0
    FishrPenalty(head, 2, **settings)(features, logits, targets, sizes)
    assert not calls


@pytest.mark.parametrize("ignored", [[], [0, 9, 10]], ids=["none ignored", "some ignored"])
def test_where_values_are_not_looked_at_small_batches_are_one_operation_too(ignored, monkeypatch):
    """As on an accelerator, where it cannot be known that the loss ignores no sample."""
    head = make_head()
    features, _, targets = draw_step(head=head)
    logits = head(features)
    targets[ignored] = -100
    expected = FishrPenalty(head, 2)(features, logits, targets, torch.arange(14) // 7)
    for module in ("nn.penalty", "functional.residuals", "functional.domains"):
        monkeypatch.setattr(f"fishr.{module}.values_may_be_checked", lambda tensor: False)
    calls = count_calls_in_one(monkeypatch)
    actual = FishrPenalty(head, 2)(features, logits, targets, (7, 7))
    assert len(calls) == 1
    assert oracles.relative_error(actual, expected) <= 1e-5
    leaves = [features, *head.parameters()]
    gradients = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (actual, expected)]
    assert oracles.relative_error(*gradients) <= 1e-5


def test_hooks_of_the_average_are_called():
    head, seen = make_head(), []
    features, logits, targets = draw_step(head=head)
    penalty = FishrPenalty(head, 2)
    penalty.average.register_forward_hook(lambda module, inputs, value: seen.append("forward"))
    penalty.average.register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    penalty(features, logits, targets, (7, 7)).backward()
    assert seen == ["forward", "backward"]


def test_an_average_of_ones_own_is_called():
    class Tripled(nn.Module):
        def forward(self, variances):
            return 3 * variances

    head = make_head()
    features, logits, targets = draw_step(head=head)
    plain, tripled = (FishrPenalty(head, 2, ema=0.0) for _ in range(2))
    tripled.average = Tripled()
    values = [penalty(features, logits, targets, (7, 7)) for penalty in (plain, tripled)]
    assert oracles.relative_error(values[1], 9 * values[0]) <= 1e-5


def test_autocast_around_a_small_batch_changes_nothing(monkeypatch):
    calls = count_calls_in_one(monkeypatch)
    head = make_head()
    features, logits, targets = draw_step(head=head)
    expected = FishrPenalty(head, 2)(features, logits, targets, (7, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = FishrPenalty(head, 2)(features, logits, targets, (7, 7))
    assert torch.equal(actual, expected)
    assert len(calls) == 2


def test_a_class_out_of_range_is_named_in_a_small_batch_too():
    head = make_head()
    features, logits, targets = draw_step(head=head)
    targets[3] = 4
    with pytest.raises(InputError, match="target 4 is out of range: the head has 4 outputs"):
        FishrPenalty(head, 2)(features, logits, targets, (7, 7))
    with pytest.raises(InputError, match="domain sizes must be num_domains=2 counts that add up to the 14 samples"):
        FishrPenalty(head, 2)(features, logits, targets % 4, (7, 7, 0))


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_domains": 1}, "num_domains must be at least 2, got 1"),
        ({"num_domains": 0}, "num_domains must be at least 2, got 0"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        (
            {"variant": "hessian"},
            "variant must be 'variance', 'second_moment' or 'covariance', got 'hessian'",
        ),
        ({"ema": 1.0}, r"decay of a moving average must lie in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"decay of a moving average must lie in \[0, 1\), got -0.1"),
        (
            {"variant": "covariance", "ema": 0.9},
            "'covariance' takes no moving average and only reduction='sum', got ema=0.9 and reduction='sum'",
        ),
        (
            {"variant": "covariance", "reduction": "mean"},
            "'covariance' takes no moving average and only reduction='sum', got ema=None and reduction='mean'",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_exist_or_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        FishrPenalty(make_head(), **{"num_domains": 2, **settings})


@pytest.mark.parametrize("head", [nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(5, 4)), torch.ones(4, 5)], ids=repr)
def test_a_head_that_is_not_linear(head):
    message = rf"head must be an nn.Linear \(the last layer of the network\), got {type(head).__name__}"
    with pytest.raises(ConfigError, match=message):
        FishrPenalty(head, 2)


@pytest.mark.parametrize(
    ("features", "logits"),
    [((14, 6), (14, 4)), ((14, 5), (14, 3)), ((14, 5), (13, 4)), ((14, 5, 1), (14, 4)), ((14,), (14, 4))],
)
def test_shapes_that_do_not_fit_the_head(features, logits):
    message = (
        r"the head takes features \[sample, 5\] and returns logits \[sample, 4\], "
        rf"got \[{', '.join(map(str, features))}\] and \[{', '.join(map(str, logits))}\]"
    )
    with pytest.raises(InputError, match=message):
        FishrPenalty(make_head(), 3)(torch.ones(features), torch.ones(logits), torch.zeros(14).long(), SIZES)


def test_a_head_that_tokens_share():
    features, logits = torch.ones(14, 6, 5), torch.ones(14, 6, 4)
    message = r"got \[14, 6, 5\] and \[14, 6, 4\]; pool tokens before the head, or take NetworkFishrPenalty"
    with pytest.raises(InputError, match=message):
        FishrPenalty(make_head(), 3)(features, logits, torch.zeros(14).long(), SIZES)


@variants
def test_a_domain_of_which_all_samples_are_ignored(variant):
    features, logits, targets = draw_step()
    targets[4:11] = -100
    penalty = FishrPenalty(make_head(), 3, variant=variant)
    message = r"domain 1 has no sample .*\(samples per domain: \[4, 0, 3\]\); every domain needs at least one"
    with pytest.raises(InputError, match=message):
        penalty(features, logits, targets, SIZES)


@variants
@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ((4, 10, 0), r"domain 2 has no sample .*\[4, 10, 0\]"),
        ((4, 10), r"domain sizes must be num_domains=3 counts that add up to the 14 samples, got \(4, 10\)"),
        (torch.full((14,), 3), "domain index 3 is out of range for num_domains=3: indices run from 0 to 2"),
        (torch.full((14,), -1), "domain index -1 is out of range for num_domains=3"),
        (torch.zeros(14), r"domains must be an int64 tensor \[sample\] = \[14\], got float32 \[14\]"),
    ],
    ids=["empty domain", "sizes", "index too large", "negative index", "type"],
)
def test_domains_that_do_not_fit_the_batch(domains, message, variant):
    with pytest.raises(InputError, match=message):
        FishrPenalty(make_head(), 3, variant=variant)(*draw_step(), domains)


def test_a_failed_call_leaves_the_history():
    penalty = FishrPenalty(make_head(), 3)
    run_steps(penalty, range(2))
    before = penalty.average.history.clone()
    with pytest.raises(InputError):
        penalty(*draw_step(2), (4, 10, 0))
    assert torch.equal(penalty.average.history, before)


def test_a_loss_that_returns_a_scalar():
    features, logits, _ = draw_step()
    penalty = FishrPenalty(make_head(), 3, loss=lambda z, y: log_cosh_loss(z, y).mean())
    message = r"one value for each sample, \[sample\] = \[14\], but returned a scalar; pass reduction='none'"
    with pytest.raises(InputError, match=message):
        penalty(features, logits, torch.ones(14, 4), SIZES)


def test_an_empty_domain_is_named_in_a_compiled_step_too():
    penalty = FishrPenalty(nn.Linear(3, 2), 2)
    step = torch.compile(penalty, backend="eager")
    with pytest.raises(InputError, match="domain 1 has no sample"):
        step(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4).long(), (4, 0))
