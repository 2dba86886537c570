"""Averages of the weights: hand-computed ones, float64 oracles, and the bookkeeping of SWAD's published code."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fishr.errors import ConfigError, InputError
from fishr.training.averaging import AVERAGES, AverageConfig, WeightAverage, make_average, valley

OPTIONS: dict[str, dict[str, float | int]] = {
    "sma": {"start": 4},
    "ema": {"decay": 0.9},
    "swad": {"n_converge": 2, "n_tolerance": 3, "tolerance": 1.1},
}


def averaging(name: str, **options: float) -> WeightAverage:
    return make_average(AverageConfig(name, options))


def one(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([float(value)])}


def value_of(weights: dict[str, Tensor] | None) -> float | None:
    return None if weights is None else weights["w"].item()


def trained_weights(steps: int) -> Iterator[dict[str, Tensor]]:
    """The live weights and buffers of a small network, changed in place at every step, as a run does."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(torch.randn(8, 3)), torch.randint(2, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield network.state_dict()


def plain_mean(history: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([weights[name].double() for weights in history]).mean(0) for name in history[0]}


def assert_average(found: dict[str, Tensor] | None, expected: dict[str, Tensor], newest: dict[str, Tensor]) -> None:
    """Floating tensors are near the float64 ``expected``, all others are those of ``newest``."""
    assert found is not None
    assert set(found) == set(newest)
    for name, value in newest.items():
        assert found[name].dtype == value.dtype
        if value.is_floating_point():
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], value)


def random_losses(seed: int) -> list[float]:
    """Losses of a run of up to 24 checkpoints that falls, or falls and rises, with more or less noise and ties."""
    generator = np.random.default_rng(seed)
    length = int(generator.integers(0, 25))
    times = np.linspace(0, 1, max(length, 1))[:length]
    trend = np.exp(-generator.uniform(0, 4) * times) + generator.choice([0, 1.5]) * times ** generator.integers(1, 5)
    noisy = trend * np.exp(generator.choice([0.02, 0.2, 0.8]) * generator.standard_normal(length))
    return np.round(noisy, int(generator.integers(1, 4))).tolist()


# Config


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sma", {"start": 100}),
        ("ema", {"decay": 0.999}),
        ("swad", {"tolerance": 1.3}),
        ("swad", {"tolerance": 1.3, "n_tolerance": 6, "n_converge": 3}),
    ],
)
def test_defaults_written_out_are_the_same_config(name: str, options: dict[str, float]) -> None:
    short, long = AverageConfig(name), AverageConfig(name, options)
    assert short == long
    assert json.dumps(dataclasses.asdict(short)) == json.dumps(dataclasses.asdict(long))
    assert AverageConfig(**json.loads(json.dumps(dataclasses.asdict(long)))) == long


def test_settings_that_differ_are_different_configs() -> None:
    assert AverageConfig("sma", {"start": 99}) != AverageConfig("sma")
    assert AverageConfig("sma") != AverageConfig("ema")
    assert dict(AverageConfig("swad", {"tolerance": 1.2}).options) == {
        "n_converge": 3,
        "n_tolerance": 6,
        "tolerance": 1.2,
    }


def test_a_whole_number_is_a_number() -> None:
    assert json.dumps(AverageConfig("swad", {"tolerance": 2}).options["tolerance"]) == "2.0"
    assert json.dumps(AverageConfig("ema", {"decay": 0}).options["decay"]) == "0.0"


def test_options_are_copied() -> None:
    options = {"start": 5}
    config = AverageConfig("sma", options)
    options["start"] = 6
    assert config.options["start"] == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smaa", {}, "unknown average 'smaa'; did you mean 'sma'? (known: ema, sma, swad)"),
        ("sma", {"stort": 1}, "unknown option of 'sma' 'stort'; did you mean 'start'? (known: start)"),
        ("ema", {"start": 1}, "unknown option of 'ema' 'start' (known: decay)"),
        ("sma", {"start": 1.0}, "start must be a whole number, got 1.0"),
        ("sma", {"start": True}, "start must be a whole number, got True"),
        ("sma", {"start": None}, "start must be a whole number, got None"),
        ("sma", {"start": 0}, "start must be at least 1, got 0"),
        ("ema", {"decay": "0.9"}, "decay must be a number, got '0.9'"),
        ("ema", {"decay": False}, "decay must be a number, got False"),
        ("ema", {"decay": float("nan")}, "decay must be a number, got nan"),
        ("ema", {"decay": 1}, "decay must lie in [0, 1), got 1"),
        ("ema", {"decay": -0.1}, "decay must lie in [0, 1), got -0.1"),
        ("swad", {"tolerance": float("inf")}, "tolerance must be a number, got inf"),
        ("swad", {"tolerance": 0.99}, "tolerance must be at least 1, got 0.99"),
        ("swad", {"n_converge": 7}, "n_tolerance must be at least 1 and at least n_converge (7), got 6"),
        (
            "swad",
            {"n_converge": 0, "n_tolerance": 0, "tolerance": 0},
            "n_converge must be at least 1, got 0; n_tolerance must be at least 1 and at least n_converge (0), got 0; "
            "tolerance must be at least 1, got 0",
        ),
        (
            "swad",
            {"n_converge": 2.5, "tol": 1, "tolerance": "high"},
            "n_converge must be a whole number, got 2.5; unknown option of 'swad' 'tol'; did you mean "
            "'tolerance'? (known: n_converge, n_tolerance, tolerance); tolerance must be a number, got 'high'",
        ),
        (None, {}, "an average is a name and a mapping of options, got None and {} (names: sma, ema, swad)"),
        ("sma", 100, "an average is a name and a mapping of options, got 'sma' and 100 (names: sma, ema, swad)"),
    ],
)
def test_a_setting_that_cannot_be(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AverageConfig(name, options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sma", {"start": 1}),
        ("ema", {"decay": 0.0}),
        ("swad", {"n_converge": 1, "n_tolerance": 1, "tolerance": 1.0}),
        ("swad", {"n_converge": 6}),
    ],
)
def test_a_setting_at_the_edge(name: str, options: dict[str, float]) -> None:
    assert AverageConfig(name, options).options.items() >= options.items()


# SMA and EMA


def test_sma_by_hand() -> None:
    average = averaging("sma", start=2)
    found = []
    for steps, value in enumerate([7.0, 2.0, 6.0, 4.0], start=1):
        average.update(one(value), steps)
        average.at_checkpoint(None)
        found.append(value_of(average.current()))
    # None, 2, (2 + 6) / 2, (2 + 6 + 4) / 3
    assert found == [None, 2, 4, 4]
    assert value_of(average.final()) == 4


def test_sma_starts_at_100() -> None:
    average = averaging("sma")
    for steps in range(1, 103):
        average.update(one(steps), steps)
        if steps < 100:
            assert average.current() is None
    assert value_of(average.final()) == pytest.approx(101)  # 100, 101 and 102


def test_ema_by_hand() -> None:
    average = averaging("ema", decay=0.5)
    assert average.current() is None
    found = []
    for steps, value in enumerate([4.0, 0.0, 8.0], start=1):
        average.update(one(value), steps)
        average.at_checkpoint(None)
        found.append(value_of(average.current()))
    # 4, 4/2 + 0/2, 2/2 + 8/2
    assert found == [4, 2, 5]
    assert value_of(average.final()) == 5


def test_ema_without_decay_is_the_newest_weights() -> None:
    average = averaging("ema", decay=0)
    for steps in range(1, 4):
        average.update(one(0.1 * steps), steps)
    assert value_of(average.final()) == one(0.1 * 3)["w"].item()


def test_sma_and_ema_against_float64() -> None:
    sma, ema = averaging("sma", start=4), averaging("ema", decay=0.9)
    history: list[dict[str, Tensor]] = []
    decayed: dict[str, Tensor] = {}
    for steps, weights in enumerate(trained_weights(40), start=1):
        history.append({name: value.clone() for name, value in weights.items()})
        sma.update(weights, steps)
        ema.update(weights, steps)
        for name, value in history[-1].items():
            decayed[name] = 0.9 * decayed[name] + 0.1 * value.double() if steps > 1 else value.double()
        assert_average(ema.current(), decayed, newest=history[-1])
        if steps >= 4:
            assert_average(sma.current(), plain_mean(history[3:]), newest=history[-1])


# What is averaged, and how


@pytest.mark.parametrize("name", ["sma", "ema", "swad"])
def test_tensors_keep_their_kind(name: str) -> None:
    average = averaging(name, **{"sma": {"start": 1}, "ema": {"decay": 0.5}, "swad": {"n_converge": 1}}[name])
    for steps in (1, 2):
        weights = {
            "float32": torch.full((2, 3), float(steps)),
            "float64": torch.full((), 1e-12 * steps, dtype=torch.float64).add(1),
            "bfloat16": torch.full((2,), steps, dtype=torch.bfloat16),
            "int64": torch.tensor(steps),
            "bool": torch.tensor([steps == 2]),
            "empty": torch.zeros(0, 3),
        }
        average.update(weights, steps)
    average.at_checkpoint(0.0)
    found = average.final()
    assert found is not None
    assert torch.equal(found["float32"], torch.full((2, 3), 1.5))
    assert found["float64"].item() - 1 == pytest.approx(1.5e-12, rel=1e-3)
    assert torch.equal(found["bfloat16"], torch.full((2,), 1.5, dtype=torch.bfloat16))
    assert torch.equal(found["int64"], torch.tensor(2))
    assert torch.equal(found["bool"], torch.tensor([True]))
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in weights.items()}
    assert found["empty"].shape == (0, 3)


@pytest.mark.parametrize("name", ["sma", "swad"])
def test_half_precision_is_averaged_in_float32(name: str) -> None:
    """Steps of 1/500 vanish in bfloat16, which has 8 bits: a mean kept in it would stay near 1.5."""
    average = averaging(name, **{"sma": {"start": 1}, "swad": {"n_converge": 1}}[name])
    for steps in range(1, 501):
        average.update({"w": torch.tensor([1.0 if steps <= 250 else 2.0], dtype=torch.bfloat16)}, steps)
        if steps % 100 == 0:
            average.at_checkpoint(0.5)
    assert value_of(average.final()) == 1.5
    for steps in range(501, 1001):
        average.update({"w": torch.tensor([2.0], dtype=torch.bfloat16)}, steps)
    average.at_checkpoint(0.5)
    assert value_of(average.final()) == 1.75


@pytest.mark.parametrize("name", list(AVERAGES))
def test_nothing_shares_memory_with_the_weights(name: str) -> None:
    average = averaging(name, **{"sma": {"start": 1}, "ema": {}, "swad": {"n_converge": 1}}[name])
    weights = {"w": torch.ones(2, requires_grad=True), "count": torch.tensor(1)}
    average.update(weights, 1)
    with torch.no_grad():
        weights["w"].zero_()
        weights["count"].zero_()
    average.at_checkpoint(0.5)
    first = average.current()
    assert first is not None
    assert not first["w"].requires_grad
    first["w"].fill_(9)
    first["count"].fill_(9)
    again = average.current()
    assert again is not None
    assert torch.equal(again["w"], torch.ones(2))
    assert torch.equal(again["count"], torch.tensor(1))
    average.update({"w": torch.full((2,), 5.0), "count": torch.tensor(2)}, 2)
    average.at_checkpoint(0.5)
    assert torch.equal(again["w"], torch.ones(2)), "what was kept at a checkpoint changed"
    assert torch.equal(again["count"], torch.tensor(1))


def test_an_average_loads_into_its_network() -> None:
    average = averaging("sma", start=1)
    *_, last = (average.update(weights, steps) or weights for steps, weights in enumerate(trained_weights(5), 1))
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    network.load_state_dict(average.final())
    assert network[1].num_batches_tracked == last["1.num_batches_tracked"] == 5
    assert not torch.equal(network[1].running_mean, last["1.running_mean"])


# Where SWAD's valley lies


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        # Too few checkpoints, or falling to the end.
        ([], (3, 6, 1.3), None),
        ([1.0, 2.0], (3, 6, 1.3), None),
        ([5.0, 4.0, 3.0, 2.0, 1.0], (3, 6, 1.3), None),
        ([5.0, 4.0, 3.0, 2.0, 2.5], (3, 6, 1.3), None),
        # l_1 = 1 is the lowest of three; the threshold is 1.3 · (1 + 1.2 + 1.1) / 3 = 1.43.
        ([2.0, 1.0, 1.2, 1.1], (3, 6, 1.3), range(1, 4)),
        ([2.0, 1.0, 1.2, 1.1, 1.43, 1.44], (3, 6, 1.3), range(1, 5)),
        # Five above the threshold do not end it, six do; a later dip then comes too late.
        ([2.0, 1.0, 1.2, 1.1, 2.0, 2.0, 2.0, 2.0, 2.0, 1.4], (3, 6, 1.3), range(1, 10)),
        ([2.0, 1.0, 1.2, 1.1, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.4], (3, 6, 1.3), range(1, 4)),
        # Five above the threshold at the end of the run are left out.
        ([2.0, 1.0, 1.2, 1.1, 2.0, 2.0, 2.0, 2.0, 2.0], (3, 6, 1.3), range(1, 4)),
        # A later lower loss starts no second valley.
        ([1.0, 1.0, 1.0, 0.2, 0.3, 0.3], (3, 6, 1.3), range(6)),
        # A tie is no fall; the window's own checkpoints may be above the threshold.
        ([1.0, 1.0, 1.0], (3, 6, 1.3), range(3)),
        ([1.0, 9.0, 2.0], (3, 6, 1.3), range(3)),
        ([1.0, 2.0, 9.0], (3, 6, 1.3), range(2)),
        # Ends within the checkpoints that started it.
        ([1.0, 4.0, 4.0], (3, 3, 1.0), range(1)),
        ([1.0, 4.0, 4.0, 4.0], (3, 3, 1.0), range(1)),
        ([1.0, 4.0, 4.0, 1.0], (3, 3, 1.0), range(4)),
        ([1.0, 4.0, 4.0, 4.0, 1.0], (3, 3, 1.0), range(1)),
        # One checkpoint of each.
        ([3.0, 3.0, 3.1, 2.0], (1, 1, 1.0), range(2)),
        # A loss of zero.
        ([0.0, 0.0, 0.0, 0.1, 0.0], (3, 6, 1.3), range(5)),
    ],
)
def test_valleys_by_hand(losses: list[float], options: tuple[int, int, float], expected: range | None) -> None:
    assert valley(losses, *options) == expected


def algorithm_1(losses: list[float], n_converge: int, n_tolerance: int, tolerance: float) -> tuple[int, int] | None:
    """The paper's pseudo-code over checkpoints; None where it finds no start or no end."""
    start = threshold = None
    for now in range(n_converge - 1, len(losses)):
        if threshold is None:
            window = losses[now - n_converge + 1 : now + 1]
            if window[0] == min(window):
                start, threshold = now - n_converge + 1, tolerance * (sum(window) / n_converge)
        elif now >= n_tolerance - 1 and threshold < min(losses[now - n_tolerance + 1 : now + 1]):
            assert start is not None
            return start, now - n_tolerance
    return None


def published_segments(losses: list[float], n_converge: int, n_tolerance: int, tolerance: float) -> list[int] | None:
    """The segments that enter the published average, as often as they do; None where it finds no start.

    The published average starts as a copy of segment s that counts nothing: the first that enters replaces it.
    """
    start, dead, entered = None, False, []
    remembered: list[int] = []
    for now in range(len(losses)):
        remembered = [*remembered, now][-n_tolerance:]
        if start is None:
            window = losses[max(0, now + 1 - n_converge) : now + 1]
            if len(window) < n_converge or min(window) < window[0]:
                continue
            start = now + 1 - n_converge
            threshold = tolerance * np.mean(losses[start : now + 1])
            if n_tolerance > n_converge:
                oldest = remembered[: n_tolerance - n_converge + 1]
                above = [position for position, index in enumerate(oldest) if losses[index] > threshold]
                entered += oldest[(above[-1] + 2 if above else 1) :]
        elif remembered[0] >= start:
            if all(losses[index] > threshold for index in remembered):
                dead = True
                break
            entered.append(remembered[0])
    if start is None:
        return None
    waiting = [] if dead else remembered[1:]
    while any(losses[index] <= threshold for index in waiting):
        entered.append(waiting.pop(0))
    return entered or [start]


SETTINGS = [(3, 6, 1.3), (3, 6, 1.2), (3, 4, 1.3), (2, 3, 1.05), (1, 2, 1.1), (3, 3, 1.3), (1, 1, 1.0), (2, 7, 1.1)]


@pytest.mark.parametrize("options", SETTINGS)
def test_valleys_are_those_of_the_papers_algorithm(options: tuple[int, int, float]) -> None:
    ended = 0
    for seed in range(400):
        losses = random_losses(seed)
        found, expected = valley(losses, *options), algorithm_1(losses, *options)
        if expected is not None:
            assert found == range(expected[0], expected[1] + 1), losses
            ended += 1
        elif found is not None:
            assert len(losses) - found.stop < options[1], losses
    assert ended > 20


@pytest.mark.parametrize("options", SETTINGS)
def test_valleys_beside_the_published_bookkeeping(options: tuple[int, int, float]) -> None:
    """The same start and end; what differs in between is what the docstring says, and nothing else."""
    n_converge, n_tolerance, _ = options
    valleys = 0
    for seed in range(400):
        losses = random_losses(seed)
        found, published = valley(losses, *options), published_segments(losses, *options)
        assert (found is None) == (published is None), losses
        if found is None or published is None:
            continue
        valleys += 1
        assert found[-1] == max(published), losses
        lost, earlier = set(found) - set(published), set(published) - set(found)
        may_lose = n_tolerance == n_converge or len(losses) == n_converge
        assert lost <= ({found.start} if may_lose else set()), losses
        assert earlier <= set(range(found.start - (n_tolerance - n_converge - 1), found.start)), losses
    assert valleys > 250


@pytest.mark.parametrize(
    ("losses", "options", "published", "ours"),
    [
        # s = 4, threshold 1.365. The window of six is then 1 ... 6; of 1 ... 4, 2 is skipped after 1, which is above.
        # Three checkpoints later 4 is the oldest in the window and enters again; the end takes the rest.
        ([3.0, 2.0, 1.2, 1.1, 1.0, 1.05, 1.1, 1.1, 1.1, 1.1], (3, 6, 1.3), [3, 4, 4, 5, 6, 7, 8, 9], range(4, 10)),
        # The run ends as soon as s is found: all of the window but its oldest enters.
        ([3.0, 2.0, 1.2, 1.1, 1.0, 1.05, 1.1], (3, 6, 1.3), [3, 4, 2, 3, 4, 5, 6], range(4, 7)),
        # s = 0 in a run of three checkpoints is the oldest of the window, and lost.
        ([1.0, 1.1, 1.2], (3, 6, 1.3), [1, 2, 1, 2], range(3)),
        # s is replaced by the first that enters.
        ([1.0, 1.1, 1.2, 1.1], (3, 3, 1.3), [1, 2, 3], range(4)),
    ],
)
def test_the_published_bookkeeping_by_hand(
    losses: list[float], options: tuple[int, int, float], published: list[int], ours: range
) -> None:
    """That each difference exists is part of what the docstring says."""
    assert published_segments(losses, *options) == published
    assert valley(losses, *options) == ours


# SWAD, step by step


def follow(average: WeightAverage, segments: Sequence[Sequence[float]], losses: Sequence[float]) -> list[float]:
    """The average after each checkpoint, NaN where there is none: pytest.approx compares no None."""
    found, steps = [], 0
    for segment, loss in zip(segments, losses, strict=True):
        for value in segment:
            steps += 1
            average.update(one(value), steps)
        average.at_checkpoint(loss)
        value = value_of(average.current())
        found.append(np.nan if value is None else value)
    return found


def test_swad_by_hand() -> None:
    average = averaging("swad", n_converge=2, n_tolerance=2, tolerance=1.5)
    segments = [[100.0], [1.0, 3.0], [5.0], [40.0, 40.0], [11.0, 0.0], [50.0], [60.0], [70.0]]
    losses = [2.0, 1.0, 1.0, 1.6, 1.5, 1.6, 1.6, 0.1]
    # Segment 1 starts it, found at checkpoint 2; the threshold is 1.5. Segment 3 is above and waits for segment 4:
    # (1 + 3 + 5) / 3, then (1 + 3 + 5 + 40 + 40 + 11 + 0) / 7 = 100 / 7. Segments 5 and 6 end it.
    expected = [np.nan, np.nan, 3, 3, 100 / 7, 100 / 7, 100 / 7, 100 / 7]
    assert follow(average, segments, losses) == pytest.approx(expected, nan_ok=True)
    assert value_of(average.final()) == pytest.approx(100 / 7)


def test_each_step_counts_the_same_in_segments_of_unequal_length() -> None:
    average = averaging("swad", n_converge=1)
    assert follow(average, [[1.0], [4.0, 4.0, 4.0]], [0.5, 0.5]) == [1, 3.25]  # (1 + 3 · 4) / 4, not (1 + 4) / 2


def test_steps_after_the_last_checkpoint_do_not_count() -> None:
    average = averaging("swad", n_converge=1)
    follow(average, [[1.0]], [0.5])
    average.update(one(9.0), 2)
    assert value_of(average.final()) == 1


def test_a_checkpoint_without_steps_is_none() -> None:
    average = averaging("swad", n_converge=2)
    follow(average, [[1.0], []], [0.5, 0.5])
    assert average.current() is None
    assert follow(average, [[3.0]], [0.6]) == [2]


@pytest.mark.parametrize("options", SETTINGS)
def test_swad_is_the_plain_mean_over_the_valley_at_every_checkpoint(options: tuple[int, int, float]) -> None:
    n_converge, n_tolerance, tolerance = options
    for seed in range(60):
        losses = random_losses(seed)
        generator = np.random.default_rng((seed, 1))
        segments = [generator.standard_normal(generator.integers(1, 5)).tolist() for _ in losses]
        average = averaging("swad", n_converge=n_converge, n_tolerance=n_tolerance, tolerance=tolerance)
        expected: list[float] = []
        for end in range(1, len(losses) + 1):
            found = valley(losses[:end], *options)
            steps = [] if found is None else [value for index in found for value in segments[index]]
            expected.append(float(np.mean(steps)) if steps else np.nan)
        assert follow(average, segments, losses) == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), losses
        if expected and not np.isnan(expected[-1]):
            assert value_of(average.final()) == pytest.approx(expected[-1], rel=1e-5, abs=1e-6)


def test_swad_on_a_network_against_float64() -> None:
    average = averaging("swad", n_converge=2, n_tolerance=3, tolerance=1.1)
    losses = [0.9, 0.5, 0.52, 0.6, 0.53, 0.51]  # threshold 0.561: all from segment 1 on
    history: list[dict[str, Tensor]] = []
    for steps, weights in enumerate(trained_weights(24), start=1):
        history.append({name: value.clone() for name, value in weights.items()})
        average.update(weights, steps)
        if steps % 4 == 0:
            average.at_checkpoint(losses[steps // 4 - 1])
    assert_average(average.final(), plain_mean(history[4:]), newest=history[-1])


def test_other_tensors_are_those_of_the_newest_step_in_the_valley() -> None:
    average = averaging("swad", n_converge=1, n_tolerance=2, tolerance=1.0)
    for steps, loss in enumerate([1.0, 1.0, 2.0], start=1):
        average.update({"w": torch.ones(1), "count": torch.tensor(steps)}, steps)
        average.at_checkpoint(loss)
    found = average.final()
    assert found is not None
    assert found["count"] == 2


def test_swad_holds_no_more_segments_than_it_may_need() -> None:
    """The mean and the open segment, and below n_tolerance pending ones."""
    average = averaging("swad")
    most = 0
    for steps, loss in enumerate([2 - steps / 20 for steps in range(20)] + [5.0, 5.0, 5.0, 5.0, 5.0, 1.0] * 4, 1):
        average.update(one(1.0), steps)
        most = max(most, sum(name.endswith("/w") for name in average.state_dict()))
        average.at_checkpoint(loss)
    assert most == 1 + 1 + 5
    for steps in range(6):
        average.update(one(1.0), steps)
        average.at_checkpoint(9.0)
    average.update(one(1.0), 100)
    assert [name for name in average.state_dict() if name.endswith("/w")] == ["mean/values/w"]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), -0.5])
def test_swad_needs_a_loss_at_every_checkpoint(loss: float | None) -> None:
    average = averaging("swad")
    assert average.needs_validation
    average.update(one(1.0), 1)
    with pytest.raises(
        InputError,
        match=rf"^swad needs a finite validation loss of at least 0 at every checkpoint, .*, got {loss}; without an "
        "out-split take sma or ema$",
    ):
        average.at_checkpoint(loss)


def test_sma_and_ema_need_no_loss() -> None:
    assert not averaging("sma").needs_validation
    assert not averaging("ema").needs_validation


# State


def continued(name: str, average: WeightAverage) -> WeightAverage:
    """A fresh one from the other's state, by way of a file's bytes."""
    fresh = averaging(name, **OPTIONS[name])
    fresh.load_state_dict(load(save({key: value.clone() for key, value in average.state_dict().items()})))
    return fresh


def same(left: dict[str, Tensor] | None, right: dict[str, Tensor] | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.keys() == right.keys() and all(
        value.dtype == right[key].dtype and torch.equal(value, right[key]) for key, value in left.items()
    )


@pytest.mark.parametrize("name", list(AVERAGES))
def test_state_goes_on_bit_for_bit_from_every_step(name: str) -> None:
    """One that is saved and loaded after every step, and one never, against each other."""
    losses = [0.9, 0.5, 0.52, 0.6, 0.53, 0.7, 0.8, 0.9, 0.1]  # SWAD: starts at 1, a wait at 3, ends at 5
    average, replaced = averaging(name, **OPTIONS[name]), averaging(name, **OPTIONS[name])
    found = 0
    for steps, weights in enumerate(trained_weights(3 * len(losses)), start=1):
        mixed = {**weights, "half": weights["0.weight"].half()}
        for each in (average, replaced):
            each.update(mixed, steps)
        replaced = continued(name, replaced)
        assert same(average.state_dict(), replaced.state_dict())
        if steps % 3 == 0:
            for each in (average, replaced):
                each.at_checkpoint(losses[steps // 3 - 1])
            replaced = continued(name, replaced)
            assert same(average.state_dict(), replaced.state_dict())
        assert same(average.current(), replaced.current())
        assert same(average.current(), continued(name, replaced).final())
        found += average.current() is not None
    assert found > 10


@pytest.mark.parametrize("name", list(AVERAGES))
def test_a_loaded_state_is_a_copy(name: str) -> None:
    average, fresh = averaging(name, **OPTIONS[name]), averaging(name, **OPTIONS[name])
    for steps in range(1, 6):
        average.update(one(steps), steps)
        average.at_checkpoint(0.5)
    average.update(one(6), 6)
    state = {key: value.clone() for key, value in average.state_dict().items()}
    fresh.load_state_dict(average.state_dict())
    fresh.update(one(50), 7)
    fresh.at_checkpoint(0.5)
    assert same(average.state_dict(), state)
    assert not same(fresh.current(), average.current())


def test_losses_are_kept_in_double() -> None:
    """0.7 in float32 is below 0.7: the threshold would fall, and all later checkpoints lie above it."""
    average = averaging("swad", n_converge=1, n_tolerance=1, tolerance=1.0)
    assert follow(average, [[1.0]], [0.7]) == [1]
    fresh = averaging("swad", n_converge=1, n_tolerance=1, tolerance=1.0)
    fresh.load_state_dict(average.state_dict())
    assert follow(fresh, [[3.0]], [0.7]) == [2]


def test_loading_replaces_what_was_there() -> None:
    for name in AVERAGES:
        used = averaging(name, **OPTIONS[name])
        for steps, loss in enumerate([0.5, 0.5, 0.5, 0.5, 0.9], start=1):
            used.update(one(steps), steps)
            used.at_checkpoint(loss)
        used.update(one(6), 6)
        used.load_state_dict(averaging(name, **OPTIONS[name]).state_dict())
        assert used.current() is None
        assert same(used.state_dict(), averaging(name, **OPTIONS[name]).state_dict())


# A run too short


def warnings_of(average: WeightAverage, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="fishr.training.averaging"):
        assert average.final() is None
    return [record.getMessage() for record in caplog.records]


def test_a_run_that_ends_before_smas_start(caplog: pytest.LogCaptureFixture) -> None:
    average = averaging("sma")
    for steps in range(1, 100):
        average.update(one(1.0), steps)
    assert warnings_of(average, caplog) == [
        "no weights were averaged, the run's last weights are kept: sma starts at update 100, which the run did not "
        "reach; lower its start"
    ]


def test_a_run_with_too_few_checkpoints_for_swad(caplog: pytest.LogCaptureFixture) -> None:
    average = averaging("swad")
    follow(average, [[1.0], [2.0]], [0.5, 0.6])
    assert warnings_of(average, caplog) == [
        "no weights were averaged, the run's last weights are kept: swad needs 3 checkpoints (n_converge), the run "
        "had 2; lower checkpoint_every"
    ]


def test_a_run_whose_loss_falls_to_the_end(caplog: pytest.LogCaptureFixture) -> None:
    average = averaging("swad")
    follow(average, [[1.0]] * 5, [0.5, 0.4, 0.3, 0.2, 0.1])
    assert warnings_of(average, caplog) == [
        "no weights were averaged, the run's last weights are kept: swad found no checkpoint whose validation loss is "
        "the lowest of 3 from there (n_converge), it fell to the end; train longer or lower checkpoint_every"
    ]


def test_an_average_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for name in AVERAGES:
            average = averaging(name, **OPTIONS[name])
            for steps in range(1, 6):
                average.update(one(steps), steps)
                average.at_checkpoint(0.5)
            assert average.current() is not None
            average.final()
    assert not caplog.records
