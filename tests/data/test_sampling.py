import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fishr.data import BatchSampler, DomainBatch, MultiDomainDataset, Samples, split_indices
from fishr.errors import ConfigError, DataError


def samples(start: int, size: int) -> Samples:
    """Samples whose inputs tell which they are."""
    numbers = torch.arange(start, start + size)
    return Samples(numbers.float().unsqueeze(1), numbers)


# Splits


@given(
    size=st.integers(1, 200),
    out_fraction=st.floats(0, 0.999),
    trial=st.integers(0, 2**32),
    domain=st.integers(0, 10),
)
def test_splits_are_disjoint_and_complete(size: int, out_fraction: float, trial: int, domain: int) -> None:
    inside, outside = split_indices(size, out_fraction, trial, domain)
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(size))
    assert len(outside) == int(size * out_fraction)
    assert inside.tolist() == sorted(inside.tolist())
    assert outside.tolist() == sorted(outside.tolist())


def test_splits_depend_on_trial_and_domain_only() -> None:
    reference = split_indices(100, 0.2, trial=1, domain=2)
    torch.manual_seed(5)
    again = split_indices(100, 0.2, trial=1, domain=2)
    assert torch.equal(reference[0], again[0])
    assert torch.equal(reference[1], again[1])
    for trial, domain in ((0, 2), (1, 1), (2, 1)):
        assert not torch.equal(reference[1], split_indices(100, 0.2, trial, domain)[1])


def test_the_out_split_is_a_random_draw() -> None:
    """Every sample is in the out-split of about a fifth of the trials."""
    trials = 500
    counts = torch.zeros(50)
    for trial in range(trials):
        counts[split_indices(50, 0.2, trial, 0)[1]] += 1
    standard_error = (0.2 * 0.8 / trials) ** 0.5
    assert ((counts / trials - 0.2).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("out_fraction", [1.0, 1.5, -0.2])
def test_a_split_that_is_not_possible_is_refused(out_fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"share of the out-split must lie in \[0, 1\), got {out_fraction}"):
        split_indices(10, out_fraction, trial=0, domain=0)


# Batches


def test_a_batch_has_batch_size_samples_of_each_domain_in_order() -> None:
    batch = BatchSampler([samples(0, 10), samples(100, 20)], batch_size=4, seed=0).batch(7)
    assert batch.sizes == (4, 4)
    assert batch.domains.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(batch.inputs.squeeze(1).long(), batch.targets)
    assert set(batch.targets[:4].tolist()) <= set(range(10))
    assert set(batch.targets[4:].tolist()) <= set(range(100, 120))


def test_a_batch_is_a_function_of_seed_domain_and_step_only() -> None:
    domains = [samples(0, 50), samples(0, 50)]
    sampler = BatchSampler(domains, batch_size=20, seed=3)
    third = sampler.batch(3).targets
    torch.manual_seed(5)
    for step in (9, 0, 4):
        sampler.batch(step)
    assert torch.equal(sampler.batch(3).targets, third)
    assert torch.equal(BatchSampler(domains, batch_size=20, seed=3).batch(3).targets, third)
    # Another domain beside it, or another in front of it, changes nothing for domain 0.
    assert torch.equal(BatchSampler(domains[:1], batch_size=20, seed=3).batch(3).targets, third[:20])
    assert not torch.equal(third[:20], third[20:])
    assert not torch.equal(sampler.batch(4).targets[:20], third[:20])
    other_seed = BatchSampler(domains, batch_size=20, seed=4)
    assert not torch.equal(other_seed.batch(3).targets[:20], third[:20])
    # Nor does a sum of the three tell a batch.
    assert not torch.equal(other_seed.batch(2).targets[:20], third[:20])
    assert not torch.equal(sampler.batch(2).targets[20:], third[:20])


def test_draws_are_with_replacement_and_even() -> None:
    sampler = BatchSampler([samples(0, 5)], batch_size=1000, seed=0)
    counts = torch.bincount(sampler.batch(0).targets, minlength=5)
    assert counts.sum() == 1000
    standard_error = (1000 * 0.2 * 0.8) ** 0.5
    assert ((counts - 200).abs() < 5 * standard_error).all()


def test_a_full_batch_is_all_of_every_domain() -> None:
    sampler = BatchSampler([samples(0, 3), samples(10, 2)], batch_size=None, seed=0)
    for step in (0, 5):
        batch = sampler.batch(step)
        assert batch.targets.tolist() == [0, 1, 2, 10, 11]
        assert batch.sizes == (3, 2)
        assert batch.domains.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_refused(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size must be at least 1, got {batch_size}"):
        BatchSampler([samples(0, 3)], batch_size, seed=0)


def test_a_batch_moves_with_its_sizes() -> None:
    batch = DomainBatch.of([samples(0, 3), samples(10, 2)]).to(torch.device("meta"))
    assert batch.inputs.device.type == batch.targets.device.type == "meta"
    assert batch.sizes == (3, 2)


# Datasets


def dataset(
    domains: dict[str, Samples], *, binary: bool = False, evaluation_only: str = "", test_domain: str = "x"
) -> MultiDomainDataset:
    return MultiDomainDataset(
        "made", "vectors", domains, tuple("abcdef"), test_domain, binary, frozenset({evaluation_only} - {""})
    )


def test_the_customary_test_domain_is_one_to_hold_out() -> None:
    three = {"x": samples(0, 3), "y": samples(3, 2), "z": samples(5, 1)}
    with pytest.raises(DataError, match="the test domain of 'made' must be one of x, y, got 'z'"):
        dataset(three, evaluation_only="z", test_domain="z")


def test_a_dataset_knows_its_shape_outputs_and_domains() -> None:
    three = {"x": samples(0, 3), "y": samples(3, 2), "z": samples(5, 1)}
    made = dataset(three, evaluation_only="z")
    assert made.input_shape == (1,)
    assert made.trainable_domains == ("x", "y")
    assert made.num_outputs == 6
    assert dataset(three, binary=True).num_outputs == 1


def test_a_single_domain_is_refused() -> None:
    with pytest.raises(DataError, match=r"dataset 'made' has 1 domain to train on or hold out \(x\); at least 2"):
        dataset({"x": samples(0, 3), "y": samples(3, 2)}, evaluation_only="y")


def test_an_empty_domain_is_refused() -> None:
    with pytest.raises(DataError, match="domain 'y' of 'made' has 0 inputs and 0 targets"):
        dataset({"x": samples(0, 3), "y": samples(3, 0)})


def test_inputs_and_targets_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="domain 'y' of 'made' has 2 inputs and 3 targets"):
        dataset({"x": samples(0, 3), "y": Samples(torch.zeros(2, 1), torch.zeros(3))})


def test_inputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"inputs of domain 'y' of 'made' have shape \[4\], expected \[1\]"):
        dataset({"x": samples(0, 3), "y": Samples(torch.zeros(2, 4), torch.zeros(2))})


def test_test_domains_are_checked() -> None:
    domains = {"xa": samples(0, 3), "yb": samples(3, 2), "gray": samples(5, 1)}
    made = dataset(domains, evaluation_only="gray", test_domain="xa")
    made.check_test_domains(("xa",))
    made.check_test_domains(())
    with pytest.raises(ConfigError, match=r"unknown test domain of 'made' 'gray' \(known: xa, yb\)"):
        made.check_test_domains(("gray",))
    with pytest.raises(DataError, match="holding out xa, yb leaves no domain of 'made' to train on"):
        made.check_test_domains(("xa", "yb"))


def test_targets_must_be_classes() -> None:
    domains = {"x": samples(0, 3), "y": Samples(torch.zeros(2, 1), torch.tensor([0, -100]))}
    with pytest.raises(DataError, match="targets of domain 'y' of 'made' run from -100 to 0; its 6 classes are 0 to 5"):
        dataset(domains)
