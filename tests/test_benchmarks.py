"""The benchmarks run, their sides compute the same, what they write has the promised form. Nothing is timed here."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SETUP = {"date", "machine", "threads", "versions", "environment", "repeats", "quick", "method"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(script, name, output, *options):
    script(name).main(["--quick", "--repeats", "2", "--output", str(output), *options])
    assert (output / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    written = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
    assert written["setup"].keys() == SETUP
    assert written["setup"]["environment"].keys() == {"THP_MEM_ALLOC_ENABLE"}
    assert written["goals"] == []  # toy sizes are not judged
    return written["results"]


def test_penalty_writes_time_memory_and_agreement(script, tmp_path, capsys):
    results = run(script, "penalty", tmp_path, "--heads", "ColoredMNIST", "--sides", "backpack")
    sides = results["ColoredMNIST"]["sides"]
    assert list(sides) == ["fishr", "backpack"]
    for outcome in sides.values():
        assert outcome["status"] == "ok"
        assert outcome.keys() == {"status", "memory_bytes", "memory_ratio", "seconds", "time_ratio", "difference"}
        assert outcome["seconds"]["median"] > 0
        assert max(outcome["difference"].values()) <= 1e-4
    assert sides["fishr"]["time_ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert "| ColoredMNIST 2x8x1x16" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["PACS", "ColoredMNIST"])
def test_all_sides_compute_the_same(script, head):
    penalty = script("penalty")
    shape = penalty.HEADS[head].quick
    expected = penalty.value_and_gradients("fishr", shape)()
    assert len(expected) == 4  # value; features, weight, bias
    for side in penalty.SIDES:
        call = penalty.value_and_gradients(side, shape)
        for _ in range(2):  # a side leaves nothing behind that changes its next call
            assert max(penalty.differences(call(), expected).values()) <= 1e-5


def test_a_side_that_fails_or_is_too_slow_is_reported(script):
    penalty = script("penalty")
    too_slow = penalty.memory_in_fresh_process("fishr", "PACS", quick=True, limit=0.01)
    assert too_slow == {"status": "too slow: not done within 0.01 s"}
    results = {"PACS": {"shape": "3x32x7x2048", "sides": {"backpack": too_slow}}}
    assert too_slow["status"] in penalty.table(results)
    assert {goal.met for goal in penalty.goals(results)} == {None}


def test_goals_are_judged_in_their_direction(script):
    common = script("common")
    judged = {(common.Goal("", 2, at_least, value).met) for at_least, value in [(True, 2.1), (False, 1.9)]}
    missed = {(common.Goal("", 2, at_least, value).met) for at_least, value in [(True, 1.9), (False, 2.1)]}
    assert (judged, missed) == ({True}, {False})


def test_step_overhead_writes_ratios(script, tmp_path, capsys):
    results = run(script, "step_overhead", tmp_path)
    assert list(results) == ["colored-mnist-32", "colored-mnist-bf16", "resnet18"]
    for result in results.values():
        assert result.keys() == {"title", "seconds", "ratio", "losses_finite"}
        assert result["seconds"].keys() == {"erm", "fishr"}
        assert result["ratio"]["q1"] <= result["ratio"]["median"] <= result["ratio"]["q3"]
        assert result["losses_finite"]
    assert "resnet18" in capsys.readouterr().err


def test_step_overhead_measures_an_active_penalty_in_the_precision_asked_for(script):
    step_overhead = script("step_overhead")
    load = step_overhead.colored_mnist("bf16-mixed", quick=True)
    fishr = load.algorithms["fishr"]
    losses = fishr.losses(load.batch, 0)
    rescaled = (losses.terms["risk"] + fishr.l2_term()) / fishr.config.penalty_weight + losses.terms["penalty"]
    torch.testing.assert_close(losses.total, rescaled)
    assert fishr.features(load.batch.inputs).dtype == torch.bfloat16


def test_input_pipeline_writes_rates_of_all_sides(script, data_root, tmp_path):
    results = run(script, "input_pipeline", tmp_path, "--data-root", str(data_root))
    assert list(results["batches"]) == list(script("input_pipeline").SIDES)
    assert list(results["building"]) == ["decode", "build"]
    for rates in (results["batches"], results["building"]):
        assert all(side["images_per_second"]["median"] > 0 for side in rates.values())


def test_pacs_compares_chooses_and_draws(script, data_root, tmp_path, monkeypatch):
    pacs = script("pacs")
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pacs, "CANDIDATES", pacs.CANDIDATES[:1])
    weights = data_root / "weights" / "mobilenetv2_100_imagenet.safetensors"
    options = ["--quick", "--data-root", str(data_root), "--weights", str(weights), "--runs", str(tmp_path / "runs")]
    pacs.main([*options, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "pacs.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == ["art_painting", "cartoon", "photo", "sketch"]
    for of in results.values():
        assert {name: len(runs) for name, runs in of["runs"].items()} == {"erm": 2, "fishr": 2}
        assert all(len(run["curve"]) == 2 for runs in of["runs"].values() for run in runs)
    assert "| ERM, held-out accuracy" in (tmp_path / "pacs.md").read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "pacs.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1, 2), "Fishr beats ERM"),
        ((-1, -2), "Fishr does not beat ERM, it does"),
        ((1, -2), "Fishr does not beat ERM beyond"),
    ],
)
def test_pacs_judges_by_the_paired_difference(script, differences, verdict):
    results = {
        domain: {
            "runs": {
                "erm": [{"held_out": 0.5}, {"held_out": 0.6}],
                "fishr": [
                    {"held_out": value + difference / 100}
                    for value, difference in zip((0.5, 0.6), differences, strict=True)
                ],
            }
        }
        for domain in ("a", "b")
    }
    assert script("pacs").conclusion(results).startswith(verdict)


def test_manifest_writes_time_and_memory(script, tmp_path):
    results = run(script, "manifest", tmp_path)
    assert list(results) == [".csv", ".parquet"]
    for measured in results.values():
        assert measured["images"] == 1000
        assert measured["seconds"] > 0
        assert measured["bytes"] > 0
    assert [goal.bound for goal in script("manifest").goals(results)] == [60, 200, 60, 200]
