import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fishr.data import BatchSampler, DomainBatch, MultiDomainDataset, Samples, split_dataset, split_indices
from fishr.data.augmentation import NUM_DRAWS, augment
from fishr.data.image_format import ImageFormat
from fishr.data.images import Images
from fishr.data.sampling import split_groups
from fishr.errors import ConfigError, DataError
from fishr.functional.distributed import share


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


# Splits of a dataset


def split_of(
    sizes: Mapping[str, int],
    out_fraction: float = 0.2,
    trial: int = 0,
    *,
    fixed_out: Mapping[str, list[bool]] = {},
    groups: Mapping[str, list[int]] = {},
    held_out: tuple[str, ...] = (),
    evaluation_only: tuple[str, ...] = (),
) -> dict[str, tuple[list[int], list[int]]]:
    """In- and out-split of each domain of a dataset with so many samples in each."""
    made = MultiDomainDataset(
        "made",
        "vectors",
        {name: Samples(torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64)) for name, size in sizes.items()},
        ("a", "b"),
        evaluation_only=frozenset(evaluation_only),
        fixed_out={name: np.array(out) for name, out in fixed_out.items()},
        groups={name: np.array(codes) for name, codes in groups.items()},
    )
    splits = split_dataset(made, out_fraction, trial, held_out)
    assert list(splits) == list(sizes)
    for name, parts in splits.items():
        assert all(part.dtype == torch.int64 and part.tolist() == sorted(part.tolist()) for part in parts)
        assert sorted(torch.cat(parts).tolist()) == list(range(sizes[name]))
    return {name: (inside.tolist(), outside.tolist()) for name, (inside, outside) in splits.items()}


def test_without_fixed_splits_and_groups_each_domain_is_split_by_its_index() -> None:
    splits = split_of({"x": 30, "y": 50}, 0.3, trial=4)
    for index, (name, size) in enumerate((("x", 30), ("y", 50))):
        assert splits[name] == tuple(part.tolist() for part in split_indices(size, 0.3, 4, index))


def test_a_fixed_split_stays_as_it_is() -> None:
    out = [True, False, False, True, False]
    for trial, out_fraction in itertools.product((0, 1), (0.1, 0.9)):
        splits = split_of({"x": 5, "y": 50}, out_fraction, trial, fixed_out={"x": out})
        assert splits["x"] == ([1, 2, 4], [0, 3])
        assert splits["y"] == tuple(part.tolist() for part in split_indices(50, out_fraction, trial, 1))


def test_a_fixed_split_is_above_groups() -> None:
    splits = split_of({"x": 4}, fixed_out={"x": [True, False, True, False]}, groups={"x": [0, 1, 0, 1]})
    assert splits["x"] == ([1, 3], [0, 2])


@pytest.mark.parametrize("name", ["fixed_out", "groups", "neither"])
def test_without_an_out_split_all_is_trained_on(name: str) -> None:
    known = {"fixed_out": {"fixed_out": {"x": [True, False, True]}}, "groups": {"groups": {"x": [0, 1, 1]}}}
    assert split_of({"x": 3}, 0.0, **known.get(name, {})) == {"x": ([0, 1, 2], [])}


Grouped = dict[str, list[int]]


def grouped(draw: st.DrawFn) -> Grouped:
    """One to four domains with up to 40 samples each, whose groups they share or not."""
    shared = draw(st.booleans())
    domains = {}
    for domain in range(draw(st.integers(1, 4))):
        codes = draw(st.lists(st.integers(0, draw(st.integers(0, 15))), min_size=1, max_size=40))
        domains[f"d{domain}"] = [code if shared else 100 * domain + code for code in codes]
    return domains


@given(st.composite(grouped)(), st.floats(0, 0.95), st.integers(0, 5))
def test_a_group_never_lies_on_both_sides(domains: Grouped, out_fraction: float, trial: int) -> None:
    groups = {name: np.array(codes) for name, codes in domains.items()}
    out = split_groups(groups, out_fraction, trial)
    assert {name: len(part) for name, part in out.items()} == {name: len(codes) for name, codes in domains.items()}
    sides: dict[int, set[bool]] = {}
    for name, codes in domains.items():
        for code, side in zip(codes, out[name].tolist(), strict=True):
            sides.setdefault(code, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    # A function of the trial, and not of the groups' numbers or the order of the samples.
    again = split_groups({name: 3 * codes[::-1] + 7 for name, codes in groups.items()}, out_fraction, trial)
    assert all(np.array_equal(again[name][::-1], part) for name, part in out.items())


@given(st.composite(grouped)(), st.floats(0, 0.95), st.integers(0, 5))
def test_the_share_is_as_near_as_groups_allow(domains: Grouped, out_fraction: float, trial: int) -> None:
    """To half the largest group where domains share none, or the smallest where none would fit."""
    out = split_groups({name: np.array(codes) for name, codes in domains.items()}, out_fraction, trial)
    for name, codes in domains.items():
        wanted, found = out_fraction * len(codes), int(out[name].sum())
        others = {code for other, them in domains.items() if other != name for code in them}
        sizes = [codes.count(code) for code in set(codes)]
        if not others & set(codes) and abs(found - wanted) > max(sizes) / 2 + 1e-9:
            assert found == min(sizes)
            assert len(sizes) > 1
            assert wanted < found / 2
        assert found > 0 or len(sizes) == 1 or out_fraction == 0


@pytest.mark.parametrize("shared", [False, True])
def test_many_small_groups_give_the_wanted_share_and_another_in_each_trial(shared: bool) -> None:
    codes = np.random.default_rng(0).integers(0, 200, (3, 1000))
    codes += 0 if shared else np.array([[0], [200], [400]])
    groups = dict(zip("xyz", codes.tolist(), strict=True))
    sizes = dict.fromkeys(groups, 1000)
    trials = [split_of(sizes, 0.2, trial, groups=groups) for trial in range(20)]
    for splits in trials:
        # Where a group has samples in all domains, it must fit into the out-split of each.
        off = 40 if shared else 5
        assert all(len(outside) == pytest.approx(200, abs=off) for _, outside in splits.values())
    assert len({tuple(splits["x"][1]) for splits in trials}) == 20
    assert split_of(sizes, 0.2, 3, groups=groups) == trials[3]
    # Every sample has its turn.
    assert len({sample for splits in trials for sample in splits["x"][1]}) > 900


def test_domains_with_and_without_groups() -> None:
    sizes = {"x": 20, "y": 20}
    splits = split_of(sizes, 0.2, 1, groups={"y": [index // 2 for index in range(20)]})
    assert splits["x"] == split_of(sizes, 0.2, 1)["x"]
    assert len(splits["y"][1]) == 4
    assert all(index ^ 1 in splits["y"][1] for index in splits["y"][1])


@pytest.mark.parametrize("size", [1, 4])
def test_too_few_samples_for_an_out_split(size: int) -> None:
    with pytest.raises(
        DataError,
        match=rf"^domain 'y' has {size} samples, too few for an out-split of 20%: use more of its samples, at least 5$",
    ):
        split_of({"x": 5, "y": size})


@pytest.mark.parametrize("out_fraction", [0.001, 1 / 49, 0.15, 0.3])
def test_the_least_samples_for_an_out_split_are_named(out_fraction: float) -> None:
    with pytest.raises(DataError, match="use more of its samples, at least") as raised:
        split_of({"x": 1}, out_fraction)
    least = int(str(raised.value).rsplit(" ", 1)[1])
    assert len(split_of({"x": least}, out_fraction)["x"][1]) == 1
    with pytest.raises(DataError, match="too few for an out-split"):
        split_of({"x": least - 1}, out_fraction)


@pytest.mark.parametrize(
    ("out_fraction", "empty", "advice", "known"),
    [
        (0.2, "out", "they are one group, which is not divided", {"groups": {"x": [7, 7, 7, 7, 7]}}),
        (0.8, "in", "they are one group, which is not divided", {"groups": {"x": [7, 7, 7, 7, 7]}}),
        (0.9, "in", "choose another out_fraction or trial", {"groups": {"x": [7, 7, 7, 8, 8]}}),
        (0.2, "out", "give some of them the split 'val'", {"fixed_out": {"x": [False] * 5}}),
        (0.2, "in", "give some of them the split 'train'", {"fixed_out": {"x": [True] * 5}}),
    ],
)
def test_an_empty_split_is_for_domains_that_are_not_trained_on(
    out_fraction: float, empty: str, advice: str, known: dict[str, dict[str, list[int]]]
) -> None:
    full = "out" if empty == "in" else "in"
    message = f"^domain 'x' of 'made', which is trained on, has nothing in its {empty}-split: all its 5 samples are in "
    with pytest.raises(DataError, match=f"{message}the {full}-split: {advice}"):
        split_of({"x": 5, "y": 9}, out_fraction, **known)
    for free in ({"held_out": ("x",)}, {"evaluation_only": ("x",)}):
        assert split_of({"x": 5, "y": 9}, out_fraction, **known, **free)["x"] == ([0, 1, 2, 3, 4], [])


def test_a_domain_that_is_not_trained_on_may_be_too_small_for_an_out_split() -> None:
    assert split_of({"x": 3, "y": 9}, held_out=("x",))["x"] == ([0, 1, 2], [])
    assert split_of({"x": 3, "y": 9}, evaluation_only=("x",))["x"] == ([0, 1, 2], [])
    with pytest.raises(DataError, match="domain 'x' has 3 samples, too few"):
        split_of({"x": 3, "y": 9}, held_out=("y",))


@pytest.mark.parametrize("known", [{}, {"groups": {"x": [0, 1, 2]}}])
@pytest.mark.parametrize("out_fraction", [1.0, -0.2, float("nan")])
def test_a_share_that_cannot_be_is_refused(out_fraction: float, known: dict[str, dict[str, list[int]]]) -> None:
    with pytest.raises(ConfigError, match=rf"share of the out-split must lie in \[0, 1\), got {out_fraction}"):
        split_of({"x": 3}, out_fraction, **known)


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


@given(size=st.integers(1, 10**6), few=st.integers(1, 20), seed=st.integers(0, 3), balanced=st.booleans())
@settings(max_examples=30)
def test_draws_do_not_depend_on_how_many_follow(size: int, few: int, seed: int, balanced: bool) -> None:
    size = size % 500 + 1 if balanced else size
    domain = Samples(torch.arange(size).float().unsqueeze(1), torch.arange(size) % 3)
    first, all_of_them = (
        BatchSampler([domain], batch_size, seed, class_balanced=balanced).batch(5).inputs for batch_size in (few, 20)
    )
    assert torch.equal(first, all_of_them[:few])


# Classes in balance


def of_classes(**counts: int) -> Samples:
    """Samples of the classes 0, 1, ..., as many as said; inputs tell which they are."""
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts.values())))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    return Samples(torch.arange(len(targets)).float().unsqueeze(1), targets)


def test_classes_are_drawn_as_often_and_missing_ones_never() -> None:
    domains = [of_classes(a=90, b=0, c=9, d=1), of_classes(a=0, b=5, c=0, d=50)]
    batch = BatchSampler(domains, 3000, seed=1, class_balanced=True).batch(0)
    shares = ([1000, 0, 1000, 1000], [0, 1500, 0, 1500])
    for part, expected in zip(batch.targets.split(batch.sizes), shares, strict=True):
        counts = torch.bincount(part, minlength=4)
        for count, mean in zip(counts.tolist(), expected, strict=True):
            assert count == pytest.approx(mean, abs=5 * (mean * (1 - mean / 3000)) ** 0.5)
    # Each is a sample of its class.
    for part, targets, domain in zip(
        batch.inputs.long().squeeze(1).split(batch.sizes), batch.targets.split(batch.sizes), domains, strict=True
    ):
        assert torch.equal(domain.targets[part], targets)


def test_samples_of_a_class_are_drawn_evenly() -> None:
    batch = BatchSampler([of_classes(a=40, b=5)], 4000, seed=1, class_balanced=True).batch(0)
    counts = torch.bincount(batch.inputs[batch.targets == 1].long().squeeze(1), minlength=45)
    drawn = counts[counts > 0].tolist()
    assert len(drawn) == 5
    assert all(count == pytest.approx(400, abs=5 * 400**0.5) for count in drawn)


def test_balanced_batches_are_functions_of_seed_domain_and_step() -> None:
    domains = [of_classes(a=40, b=5), of_classes(a=40, b=5)]
    third = BatchSampler(domains, 20, seed=3, class_balanced=True).batch(3)
    again = BatchSampler(domains, 20, seed=3, class_balanced=True)
    again.batch(7)
    assert torch.equal(again.batch(3).inputs, third.inputs)
    assert not torch.equal(third.inputs[:20], third.inputs[20:])
    assert not torch.equal(again.batch(4).inputs, third.inputs)
    assert not torch.equal(BatchSampler(domains, 20, seed=3).batch(3).inputs, third.inputs)


def test_balanced_batches_need_a_size() -> None:
    with pytest.raises(
        ConfigError, match=r"^batch_size must be a number for images and for class-balanced batches, got null$"
    ):
        BatchSampler([of_classes(a=2, b=2)], None, seed=0, class_balanced=True)


# Batches of images


class Files:
    """Noise in place of files, which tells what was read."""

    def __init__(self, count: int = 12) -> None:
        self.format = ImageFormat(8)
        generator = np.random.default_rng(0)
        self.images = [generator.integers(0, 256, (11, 13, 3), dtype=np.uint8) for _ in range(count)]
        self.read: list[int] = []
        self.on_read: Callable[[int], object] = lambda reads: None

    def open(self) -> "Files":
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        self.read.append(int(index))
        self.on_read(len(self.read))
        return self.images[index]


def image_domains(files: Files, augmentation: str = "domainbed") -> list[Samples]:
    """Two domains with half of the images each."""
    half = len(files) // 2
    return [
        Samples(Images(files, np.arange(start, start + half), augmentation), torch.arange(half) % 2)
        for start in (0, half)
    ]


def image_sampler(files: Files | None = None, seed: int = 3, batch_size: int = 4, **options: Any) -> BatchSampler:
    return BatchSampler(image_domains(files or Files()), batch_size, seed, **options)


def equal(one: DomainBatch, other: DomainBatch) -> bool:
    return (
        torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets) and one.sizes == other.sizes
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_of_images_is_a_function_of_seed_domain_and_step(balanced: bool) -> None:
    expected = [image_sampler(class_balanced=balanced).batch(step) for step in range(6)]
    assert len({batch.inputs.numpy().tobytes() for batch in expected}) == 6
    # Whatever was asked for, read ahead or not, and asked for again.
    for steps in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 3, 5, 3, 4, 0], [4, 5, 5, 0, 1, 1]):
        sampler = image_sampler(class_balanced=balanced)
        torch.manual_seed(steps[0])
        for step in steps:
            assert equal(sampler.batch(step), expected[step]), f"step {step} of {steps}"
    other_seed = image_sampler(seed=4, class_balanced=balanced)
    assert not torch.equal(other_seed.batch(3).inputs, expected[3].inputs)


def test_transforms_are_those_of_the_sample() -> None:
    """Each with numbers of its own, also where one image is drawn several times."""
    files = Files(2)
    files.images[1] = files.images[0]
    sampler = image_sampler(files, batch_size=40)
    batch = sampler.batch(0)
    assert (batch.inputs.dtype, batch.inputs.shape, batch.sizes) == (torch.uint8, (80, 3, 8, 8), (40, 40))
    # In each domain and step too.
    assert len({image.numpy().tobytes() for image in torch.cat([batch.inputs, sampler.batch(1).inputs])}) == 160


def test_a_batch_of_images_does_not_depend_on_how_many_follow() -> None:
    few, many = (image_sampler(batch_size=size).batch(2) for size in (3, 5))
    for domain in (0, 1):
        assert torch.equal(few.inputs[3 * domain :][:3], many.inputs[5 * domain :][:3])
        assert torch.equal(few.targets[3 * domain :][:3], many.targets[5 * domain :][:3])


def test_draws_and_transforms_share_no_random_numbers() -> None:
    """The same numbers would choose the image and change it: dark images would always be flipped."""
    files = Files(2)
    image = files.images[0]
    batch = BatchSampler(image_domains(files)[:1], 8, seed=3).batch(5)
    for words in ((3, 0xBA7C, 0, 5), (3, 0, 5), (3, 5)):
        rows = np.random.default_rng(words).random((8, NUM_DRAWS))
        transformed = np.stack([augment(image, files.format, "domainbed", row) for row in rows])
        assert not np.array_equal(transformed, batch.inputs.permute(0, 2, 3, 1).numpy())


def test_the_next_batch_is_read_while_the_current_one_is_used() -> None:
    files = Files()
    everything_read = threading.Event()
    files.on_read = lambda reads: everything_read.set() if reads == 16 else None
    sampler = image_sampler(files)
    first = sampler.batch(0)
    assert everything_read.wait(timeout=30)
    assert first.sizes == (4, 4)
    files.on_read = lambda reads: None
    sampler.batch(1)
    # What was read ahead is not read again.
    assert len(files.read) in range(16, 25)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_image_that_cannot_be_read_is_said_when_its_batch_is_due(ahead: bool) -> None:
    expected = image_sampler().batch(1)
    files = Files()
    files.on_read = lambda reads: fail() if reads > 8 else None

    def fail() -> None:
        raise DataError("sketch/dog/3.png cannot be read (truncated PNG): repair or remove it")

    sampler = image_sampler(files)
    sampler.batch(0)
    if not ahead:
        files.read = [0] * 8
        sampler._ahead = None
    with pytest.raises(DataError, match=r"^sketch/dog/3.png cannot be read \(truncated PNG\)"):
        sampler.batch(1)
    files.on_read = lambda reads: None
    assert equal(sampler.batch(1), expected)


# For an accelerator

CPU = torch.device("cpu")
ACCELERATOR = torch.device("meta")  # it stands for one: nothing is computed there


def test_for_an_accelerator_colors_are_left_to_it() -> None:
    host, device = image_sampler(batch_size=30), image_sampler(batch_size=30, device=ACCELERATOR)
    for step in (0, 3):
        expected, batch = host.batch(step), device.batch(step)
        assert (batch.inputs.dtype, batch.inputs.device.type) == (torch.uint8, "cpu")
        assert batch.colors is not None
        assert expected.colors is None
        finished = batch.to(CPU)
        assert finished.colors is None
        assert torch.equal(finished.targets, expected.targets)
        assert finished.sizes == expected.sizes
        assert not torch.equal(batch.inputs, expected.inputs)
        difference = 255 * finished.inputs - expected.inputs.float()
        assert difference.abs().mean() < 3  # 1.1 was seen, of noise, by hue in bytes
        assert difference.abs().max() < 40
    assert equal(image_sampler(batch_size=30, device=ACCELERATOR).batch(3), batch)


@pytest.mark.parametrize("num_ranks", [2, 7])
def test_a_rank_leaves_the_colors_of_its_own_share(num_ranks: int) -> None:
    whole = image_sampler(batch_size=5, device=ACCELERATOR).batch(2).to(CPU)
    for rank in range(num_ranks):
        sampler = image_sampler(batch_size=5, device=ACCELERATOR, rank=rank, num_ranks=num_ranks)
        own = sampler.batch(2).to(CPU)
        parts = [part[share(5, rank, num_ranks)] for part in whole.split(whole.inputs)]
        torch.testing.assert_close(own.inputs, torch.cat(parts))


@pytest.mark.parametrize("recipe", ["none", "light"])
def test_without_changes_of_color_nothing_is_left(recipe: str) -> None:
    samplers = [BatchSampler(image_domains(Files(), recipe), 4, 3, device=device) for device in (CPU, ACCELERATOR)]
    on_host, batch = (sampler.batch(1) for sampler in samplers)
    assert batch.colors is None
    assert equal(on_host, batch)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_copies_from_pinned_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda value: pinned.append(value) or value)
    batch = image_sampler(device=torch.device(device)).batch(0)
    if device == "cpu":
        assert not pinned
    else:
        wanted = (batch.inputs, batch.targets, batch.colors.weights, batch.colors.turns, batch.colors.by_turn)
        assert all(any(value is one for one in pinned) for value in wanted)


def test_memory_is_pinned_for_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own begins on the first GPU."""
    seen: list[tuple[str, torch.device]] = []
    of_this = threading.current_thread().name
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    monkeypatch.setattr(Tensor, "pin_memory", lambda value: value)
    for device in ("cpu", "cuda:1"):
        image_sampler(device=torch.device(device)).batch(0)
    ((name, device),) = seen
    assert name != of_this
    assert device == torch.device("cuda:1")


def test_all_of_every_domain_goes_to_the_device_once() -> None:
    sampler = BatchSampler([samples(0, 3), samples(10, 2)], batch_size=None, seed=0, device=ACCELERATOR)
    assert sampler.batch(0).inputs.device == ACCELERATOR
    assert sampler.batch(0) is sampler.batch(1)


def test_images_need_a_batch_size() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size must be a number for images and for class-balanced"):
        BatchSampler(image_domains(Files()), None, seed=0)


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
    inputs, targets = zip(samples(0, 3), samples(10, 2), strict=True)
    batch = DomainBatch.of(list(inputs), list(targets)).to(torch.device("meta"))
    assert batch.inputs.device.type == batch.targets.device.type == "meta"
    assert batch.sizes == (3, 2)


# Datasets


def dataset(
    domains: dict[str, Samples], *, binary: bool = False, evaluation_only: str = "", test_domain: str | None = "x"
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


@pytest.mark.parametrize("held_out", [(), ("x",)])
def test_a_single_domain_can_be_evaluated_but_not_trained_on(held_out: tuple[str, ...]) -> None:
    made = dataset({"x": samples(0, 3), "y": samples(3, 2)}, evaluation_only="y")
    with pytest.raises(DataError, match=r"dataset 'made' has 1 domain to train on or hold out \(x\); at least 2"):
        made.check_test_domains(held_out)


@pytest.mark.parametrize("held_out", [(), ("x",)])
def test_a_single_class_can_be_evaluated_but_not_trained_on(held_out: tuple[str, ...]) -> None:
    one = Samples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    made = MultiDomainDataset("made", "images", {"x": one, "y": one}, ("cat",))
    message = r"^dataset 'made' has images of one class, 'cat': at least 2 are needed to tell apart$"
    with pytest.raises(DataError, match=message):
        made.check_test_domains(held_out)


def test_a_dataset_without_a_domain_is_refused() -> None:
    with pytest.raises(DataError, match=r"^dataset 'made' has no domain$"):
        dataset({}, test_domain=None)


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


def with_groups(*, evaluation_only: frozenset[str] = frozenset(), **groups: list[int]) -> MultiDomainDataset:
    return MultiDomainDataset(
        "made",
        "vectors",
        {name: samples(0, 3) for name in "xyz"},
        tuple("abcdef"),
        evaluation_only=evaluation_only,
        groups={name: np.array(codes) for name, codes in groups.items()},
    )


@pytest.mark.parametrize(
    ("held_out", "shared"),
    [(("x",), 1), (("z",), 2), (("y",), 1), (("x", "z"), 1), (("y", "z"), 1), ((), 0)],
)
def test_groups_in_held_out_and_training_domains_are_warned_of(
    held_out: tuple[str, ...], shared: int, warnings_logged: Callable[[], list[str]]
) -> None:
    with_groups(x=[0, 0, 1], y=[2, 2, 3], z=[1, 3, 4]).check_test_domains(held_out)
    expected = (
        f"{shared} groups of 'made' have samples both in the held-out domain and in training domains: "
        "accuracy there is not that on unseen groups"
    )
    assert warnings_logged() == ([expected] if shared else [])


@pytest.mark.parametrize("groups", [{}, {"x": [0, 0, 1]}, {"x": [0, 0, 1], "y": [2, 2, 3], "z": [4, 5, 5]}])
def test_groups_of_one_domain_are_not(groups: dict[str, list[int]], warnings_logged: Callable[[], list[str]]) -> None:
    with_groups(**groups).check_test_domains(("x",))
    assert warnings_logged() == []


def test_groups_of_a_domain_never_trained_on_are_not(warnings_logged: Callable[[], list[str]]) -> None:
    with_groups(x=[0, 0, 1], z=[0, 1, 1], evaluation_only=frozenset("z")).check_test_domains(("x",))
    assert warnings_logged() == []


def test_targets_must_be_classes() -> None:
    domains = {"x": samples(0, 3), "y": Samples(torch.zeros(2, 1), torch.tensor([0, -100]))}
    with pytest.raises(DataError, match="targets of domain 'y' of 'made' run from -100 to 0; its 6 classes are 0 to 5"):
        dataset(domains)


def with_columns(fixed_out: dict[str, list[bool]], groups: dict[str, list[int]]) -> MultiDomainDataset:
    return MultiDomainDataset(
        "made",
        "vectors",
        {name: samples(0, 4) for name in ("x", "y")},
        tuple("abcd"),
        fixed_out={name: np.array(out) for name, out in fixed_out.items()},
        groups={name: np.array(codes) for name, codes in groups.items()},
    )


def test_a_fixed_split_that_tears_groups_apart_is_refused() -> None:
    torn = with_columns({"x": [True, False, False, True]}, {"x": [1, 1, 2, 3]})
    with pytest.raises(DataError, match="the split of 'made' puts 1 of 3 groups on both sides"):
        split_dataset(torn, 0.25, trial=0)
    split_dataset(torn, 0.0, trial=0)
    split_dataset(torn, 0.25, trial=0, held_out=("x",))


def test_groups_of_half_a_domain_each_are_split() -> None:
    inside, outside = split_dataset(with_columns({}, {"x": [7, 7, 9, 9]}), 0.25, trial=0)["x"]
    assert (len(inside), len(outside)) == (2, 2)


@pytest.mark.parametrize("kind", ["fixed_out", "groups"])
def test_columns_of_another_length_are_refused(kind: str) -> None:
    columns: dict[str, dict[str, list[int]]] = {"fixed_out": {}, "groups": {}, kind: {"x": [0, 1, 1]}}
    with pytest.raises(DataError, match=f"{kind} of 'made' has 3 entries for domain 'x', expected one for each"):
        with_columns(**columns)


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
@pytest.mark.parametrize("kind", ["images", "vectors", "everything"])
def test_ranks_share_a_batch_out(kind: str, num_ranks: int) -> None:
    """Each reads its part of each domain, and knows the targets of all."""

    def sampler(**ranks: int) -> BatchSampler:
        if kind == "images":
            return image_sampler(**ranks)
        return BatchSampler([samples(0, 9), samples(100, 4)], 5 if kind == "vectors" else None, 3, **ranks)

    whole = sampler().batch(2)
    shares = [sampler(rank=rank, num_ranks=num_ranks).batch(2) for rank in range(num_ranks)]
    assert all(torch.equal(share.targets, whole.targets) and share.sizes == whole.sizes for share in shares)
    for domain, inputs in enumerate(whole.split(whole.inputs)):
        of_domain = [share.parts[domain] for share in shares]
        assert torch.equal(torch.cat([part.inputs for part in of_domain]), inputs)
        assert max(len(part.inputs) for part in of_domain) - min(len(part.inputs) for part in of_domain) <= 1
        assert all(torch.equal(part.targets, whole.split(whole.targets)[domain]) for part in of_domain)
