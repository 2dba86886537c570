"""The benchmarks run, their sides compute the same, what they write has the promised form. Nothing is timed here."""

import gc
import importlib
import json
import mmap
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.fishr import FishrConfig
from fishr.data import DomainBatch

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
    assert fishr.features(load.batch).dtype == torch.bfloat16


def test_gpu_writes_rates_memory_and_the_head(script, data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    results = run(script, "gpu", tmp_path, "--data-root", str(data_root), "--sides", "real")
    assert list(results["steps"]) == ["erm", "fishr", "real"]
    for side in results["steps"].values():
        assert side["images_per_second"]["median"] > 0
        assert side["loss_finite"]
    assert results["memory"].keys() == {"erm", "fishr"}
    assert list(results["head"]["sides"]) == ["fishr", "backpack"]
    assert max(results["head"]["sides"]["backpack"]["difference"].values()) <= 1e-4
    if not torch.cuda.is_available():
        assert "There is no GPU here: measured on the CPU." in capsys.readouterr().out


def test_gpu_compares_the_same_algorithm_with_backpack(script):
    gpu = script("gpu")
    generator = torch.Generator().manual_seed(0)
    trained = []
    for algorithm_class in (gpu.Fishr, gpu.BackPACKFishr):
        torch.manual_seed(0)
        network = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)
        algorithm = algorithm_class(*network, 3, FishrConfig(switch_on=0, penalty_weight=10.0, reset_optimizer=False))
        trained.append((algorithm, algorithm.configure_optimizers()))
    for step in range(4):
        data = DomainBatch(torch.randn(18, 5, generator=generator), torch.arange(18) % 3, (6, 6, 6))
        ours, theirs = (algorithm.training_step(data, step, optimizers) for algorithm, optimizers in trained)
        assert ours.terms["penalty"] > 0
        for name, value in ours.terms.items():
            torch.testing.assert_close(theirs.terms[name], value)
    for ours, theirs in zip(*(algorithm.state_dict().values() for algorithm, _ in trained), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fishr", "memory", "real", "met"),
    [(1.004, 1.001, 1.1, [True] * 3), (1.006, 1.003, 1.2, [False] * 3)],
    ids=["met", "missed"],
)
def test_gpu_judges_a_gpu_alone(script, fishr, memory, real, met):
    gpu = script("gpu")
    steps = {name: {"time_ratio": {"median": ratio}} for name, ratio in {"fishr": fishr, "real": real}.items()}
    results = {"steps": steps, "memory": {"erm": 1000, "fishr": 1000 * memory}}
    assert [goal.met for goal in gpu.goals(results, on_gpu=True)] == met
    assert [goal.met for goal in gpu.goals(results, on_gpu=False)] == [None] * 3


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


def test_report_scale_writes_time_and_memory(script, tmp_path):
    results = run(script, "report_scale", tmp_path)
    assert list(results) == ["without index", "with index", "with index, all rules", "one run changed"]
    for measured in results.values():
        assert measured["rows"] > 500
        assert measured["seconds"] > 0
        assert measured["bytes"] > 0
    assert [goal.bound for goal in script("report_scale").goals(results)] == [60, 5, 2]


def test_report_page_is_small_and_opens(script, browser, tmp_path):
    results = run(script, "report_page", tmp_path)
    assert results["runs"] == 1000
    assert 0 < results["megabytes"] < 20
    assert 0 < results["seconds to open"] < results["seconds to the first chart"]


def test_strength_compares_forms_with_erm(script, data_root, tmp_path, monkeypatch):
    strength = script("strength")
    monkeypatch.setenv("FISHR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(strength, "DIGITS_SETTINGS", {"follow": (0.5,), "once": (0.5,), "relative": (1.0,)})
    monkeypatch.setattr(strength, "PACS_SETTINGS", {"once": (0.5,)})
    monkeypatch.setattr(strength.pacs, "QUICK", replace(strength.pacs.QUICK, steps=2))
    weights = data_root / "weights" / "mobilenetv2_100_imagenet.safetensors"
    options = ["--quick", "--data-root", str(data_root), "--weights", str(weights), "--runs", str(tmp_path / "runs")]
    strength.main([*options, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "strength.json").read_text(encoding="utf-8"))["results"]
    assert {name: list(of) for name, of in results.items()} == {
        "Colored Digits, 4 steps": ["ERM", "follow 0.5", "once 0.5", "relative 1"],
        "PACS, last step": ["ERM", "once 0.5"],
        "PACS, best by validation": ["ERM", "once 0.5"],
    }
    assert all(len(values) == 2 for of in results.values() for form in of.values() for values in form.values())


def test_a_weight_measured_once_stays(script):
    """While the library's follows the gradients, which are a hundredth from step 20 on."""
    script("strength")
    data = DomainBatch(torch.randn(12, 3, generator=torch.manual_seed(0)), torch.arange(12) % 2, (6, 6))
    weights = {}
    for name in ("fishr", "fishr-once"):
        config = FishrConfig(strength=0.5, switch_on=10, lr=1e-9)
        head = torch.nn.Linear(3, 2)
        algorithm = ALGORITHMS[name](torch.nn.Identity(), head, 2, config, steps=100)
        optimizers = algorithm.configure_optimizers()
        for step in range(40):
            if step == 20:
                head.weight.data.mul_(10)
            losses = algorithm.training_step(data, step, optimizers)
            weights[name, step] = losses.terms["penalty_weight"].item()
    assert weights["fishr-once", 9] == 0
    assert weights["fishr-once", 19] == weights["fishr-once", 39] > 0
    assert weights["fishr", 39] != pytest.approx(weights["fishr", 19], rel=0.1)


def test_a_relative_penalty_has_no_scale(script):
    strength = script("strength")
    targets = torch.arange(12) % 2
    features = torch.randn(12, 3, generator=torch.manual_seed(0))
    penalties = []
    for scale in (1.0, 10.0):
        head = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.zeros_(head.weight)  # residuals do not depend on the features then
        data = DomainBatch(scale * features, targets, (6, 6))
        algorithm = strength.FishrRelative(torch.nn.Identity(), head, 2, FishrConfig(ema=0.5), steps=10)
        penalties.append(algorithm.risk_and_penalty(data.inputs, data)[1].item())
    assert penalties[0] > 0
    assert penalties[1] == pytest.approx(penalties[0])


def test_algorithms_are_tuned_compared_and_timed(script, tmp_path):
    options = ["--algorithms", "fishr", "dann", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--quick"]
    script("algorithms").main(options)
    results = json.loads((tmp_path / "algorithms.json").read_text(encoding="utf-8"))["results"]
    assert list(results["accuracy"]) == ["erm", "fishr", "dann"]
    for of_domains in results["accuracy"].values():
        assert list(of_domains) == ["+80%", "+90%", "-90%"]
        for outcome in of_domains.values():
            assert outcome["chosen"] == outcome["validation"].index(max(outcome["validation"]))
            assert len(outcome["held_out"]) == 2
    assert results["accuracy"]["fishr"]["+80%"]["hparams"]["strength"] == 0.5
    assert all(cost["MLP"] > 0 for cost in results["step_costs"].values())


def test_alignment_follows_both_methods(script, tmp_path, data_root, browser):
    options = ["--data-root", str(data_root), "--runs", str(tmp_path / "runs")]
    results = run(script, "alignment", tmp_path, *options)
    assert results["switch_on"] == 8
    assert list(results["seeds"]) == ["0", "1"]
    for seed in results["seeds"].values():
        assert list(seed) == ["erm", "fishr"]
        for series in seed.values():
            assert series["step"] == [10, 20]
            assert all(len(values) == 2 and all(np.isfinite(values)) for values in series.values())
    verdict = (tmp_path / "alignment.md").read_text()
    assert verdict.count("of the training domains: **") == 3
    assert "<svg" in (tmp_path / "alignment.svg").read_text()[:100]


def test_estimator_compares_fits_with_those_of_scikit_learn(script, tmp_path):
    results = run(script, "estimator", tmp_path)
    assert list(results) == ["scikit-learn", "erm", "fishr"]
    for side in results.values():
        assert side.keys() == {"seconds", "ratio", "training_accuracy"}
        assert side["seconds"]["median"] > 0
    assert results["scikit-learn"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}


def test_estimator_gives_all_sides_the_same_work(script):
    estimator = script("estimator")
    size = replace(estimator.QUICK, epochs=60)
    arrays = estimator.draw(size)
    fits = estimator.fits(arrays, size)
    peer, erm, fishr = (fits[name]() for name in ("scikit-learn", "erm", "fishr"))
    assert peer.n_iter_ == erm.n_epochs_ == fishr.n_epochs_ == 60
    assert [weights.shape[::-1] for weights in list(erm.network_.parameters())[::2]] == [w.shape for w in peer.coefs_]
    assert fishr.domains_.tolist() == [0, 1, 2, 3]
    assert min(side.score(arrays.X, arrays.y) for side in (peer, erm, fishr)) > 0.8


def test_scaling_writes_times_memory_and_fits(script, tmp_path, browser, monkeypatch):
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "torch_device", lambda name: torch.device("cpu"))
    results = run(script, "scaling", tmp_path)
    assert results["device"] == "the CPU"
    assert list(results["dimensions"]) == list(results["base"]) == ["domains", "classes", "samples", "features"]
    for of in results["dimensions"].values():
        assert [point["size"] for point in of["points"]] == [2, 4, 8, 16]
        assert all(point["seconds"]["median"] > 0 for point in of["points"])
        assert of["fit"]["sizes"] == [8, 16]
    assert [goal.bound for goal in scaling.goals(results["dimensions"])] == [1.1, 1.1, 1.1, 1.1, 0.01]
    assert "<svg" in (tmp_path / "scaling.svg").read_text()[:100]


@pytest.mark.parametrize(
    "shape",
    [(4, 65, 32, 256), (2, 3, 256, 512), (3, 90, 20, 5000), (2, 4, 400, 2048)],
    ids=["at once, forward", "at once, backward", "in turn, forward", "in turn, backward"],
)
def test_memory_is_what_the_formula_says(script, shape):
    scaling, cpu = script("scaling"), torch.device("cpu")
    shape = scaling.Shape(*shape)
    assert scaling.peak_bytes(scaling.one_call(shape, cpu), cpu) == pytest.approx(
        scaling.predicted_bytes(shape, cpu), rel=1e-3
    )


def test_scaling_fits_the_growth_of_large_sizes_round_by_round(script):
    scaling = script("scaling")
    fixed, slopes = 1.0, (1.0, 2.0, 3.0)
    seconds = {size: [max(fixed, slope * (size / 16) ** 1.5) for slope in slopes] for size in (2, 4, 8, 16, 32, 64)}
    fit = scaling.fit(seconds)
    assert fit["sizes"] == [16, 32, 64]
    assert fit["exponent"] == pytest.approx({"median": 1.5, "q1": 1.5, "q3": 1.5})
    assert fit["r_squared"] == pytest.approx(1)


def test_soak_watches_both_kinds_of_runs(script, tmp_path, browser):
    soak = script("soak")
    soak.main(["--quick", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert written["goals"] == []
    assert list(written["results"]) == ["vectors", "images"]
    for result in written["results"].values():
        assert result["step"] == list(range(2, 17, 2))
        assert result["series"].keys() == result["growth"].keys() == soak.NAMES.keys()
        assert all(len(values) == 8 and min(values) > 0 for values in result["series"].values())
    assert "<svg" in (tmp_path / "soak.svg").read_text()[:100]


def test_soak_finds_what_is_left_behind(script):
    soak = script("soak")
    watch, tensors, memory = soak.Watch(every=5), [], []
    gc.collect()
    with ExitStack() as files:
        for step in range(1, 41):
            files.enter_context(Path("/dev/null").open())
            tensors.append(torch.zeros(1))
            memory.append(mmap.mmap(-1, 2**20))  # what was freed before is not used again for it
            memory[-1].write(b"1" * 2**20)
            watch.on_step(step, {})
    assert watch.steps == [5, 10, 15, 20, 25, 30, 35, 40]
    growth = {name: soak.growth([getattr(state, name) for state in watch.states]) for name in soak.NAMES}
    assert growth["open_files"] == growth["tensors"] == 20
    assert growth["memory_mib"] == pytest.approx(20, abs=4)
    assert growth["threads"] == 0
    goals = soak.goals({"vectors": {"growth": growth}})
    assert [goal.met for goal in goals] == [False, False, True, False]


@pytest.mark.parametrize(
    ("absolute", "relative", "said"),
    [
        ([0.5, 0.5], [0.9, 0.9], "Fishr aligns them, in size and relative to it"),
        ([0.5, 0.5], [0.9, 1.1], "Fishr brings them closer in size, but not, in every seed, relative to it"),
        ([2.0, 2.0], [1.1, 1.1], "Fishr does not align them"),
        ([0.5, 2.0], [1.1, 1.1], "undecided"),
    ],
)
def test_alignment_says_in_words_whether_the_claim_holds(script, absolute, relative, said):
    alignment = script("alignment")
    found = {}
    for seed, (one, other) in enumerate(zip(absolute, relative, strict=True)):
        ratios = {name: [one] for name in alignment.CLAIMS} | {f"{name}_relative": [other] for name in alignment.CLAIMS}
        found[str(seed)] = {"fishr": ratios, "erm": {name: [1.0] for name in ratios}}
    assert alignment.verdict(found).count(f"**{said}**") == 3
