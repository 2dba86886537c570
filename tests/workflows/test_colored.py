"""The Colored MNIST protocol: what its runs are, and how their outcomes become tables."""

import json
import signal
from contextlib import contextmanager

import pytest

from fishr.errors import ConfigError, RunInterruptedError
from fishr.training import RunConfig
from fishr.training.loop import Silent
from fishr.workflows import colored, demo, reproduce
from fishr.workflows.colored import MethodRun, Setting, Spread

TINY = Setting("colored-digits", width=8, lr=1e-3, l2=1e-3, penalty_weight=9e4, steps=10, data_options={"subset": 40})


class Watching:
    def __init__(self, observer=None):
        self.started, self.finished, self.observer = [], [], observer or Silent()

    @contextmanager
    def run(self, method, seed):
        self.started.append((method, seed))
        yield self.observer

    def on_result(self, run):
        self.finished.append((run.algorithm, run.seed))


def configs(folder):
    contents = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")}
    for content in contents.values():
        assert content.pop("format") == 2
    return {name: RunConfig.from_dict(content) for name, content in contents.items()}


def test_every_method_is_the_published_protocol(tmp_path):
    watcher = Watching()
    colored.run_methods(TINY, list(colored.METHODS), [0, 3], tmp_path, watcher)
    expected = [(method, seed) for seed in (0, 3) for method in colored.METHODS]
    assert watcher.started == watcher.finished == expected
    for name, config in configs(tmp_path).items():
        assert config.hparams.batch_size is None
        assert config.hparams.l2 == 1e-3
        assert config.out_fraction == 0
        assert config.test_domains == ("-90%",)
        assert config.data_options["seed"] == config.seed
        if not name.startswith("erm"):
            assert config.hparams.switch_on == 4  # 190 of 500
            assert config.hparams.weight_before == 1
            assert config.hparams.penalty_weight == 9e4
            assert config.hparams.rescale
            assert not config.hparams.reset_optimizer


def test_the_published_switch_on_is_step_190_of_500():
    assert reproduce.setting(0.25, "32").switch_on == 190
    assert demo.setting(500).switch_on == 190
    assert demo.setting(250).switch_on == 95


def test_accuracies_are_those_of_the_last_record(tmp_path):
    (run,) = colored.run_methods(TINY, ["erm"], [0], tmp_path, Watching())
    last = json.loads((tmp_path / "erm-0" / "metrics.jsonl").read_text().splitlines()[-1])
    accuracy = {domain: splits["in"]["accuracy"] * 100 for domain, splits in last["domains"].items()}
    assert last["step"] == 10
    assert run.train_accuracy == pytest.approx((accuracy["+80%"] + accuracy["+90%"]) / 2)
    assert run.unseen_accuracy == accuracy["-90%"]
    assert run.gray_accuracy == accuracy["gray"]


def test_a_cut_job_continues_with_what_is_missing(tmp_path):
    undisturbed = colored.run_methods(TINY, ["erm", "fishr"], [0], tmp_path / "whole", Watching())

    class Cutting(Silent):
        def on_step(self, step, losses):
            if step == 7:
                raise RunInterruptedError("cut", 15)

    with pytest.raises(RunInterruptedError):
        colored.run_methods(TINY, ["erm", "fishr"], [0], tmp_path / "cut", Watching(Cutting()))
    continued = colored.run_methods(TINY, ["erm", "fishr"], [0], tmp_path / "cut", Watching())
    assert [run.accuracies for run in continued] == [run.accuracies for run in undisturbed]
    for name in ("erm-0", "fishr-0"):
        weights = [(tmp_path / job / name / "model" / "model.safetensors").read_bytes() for job in ("whole", "cut")]
        assert weights[0] == weights[1]


def test_layers_make_a_method_of_their_own(tmp_path):
    methods = colored.on_layers(["erm", "fishr", "fishr"], ["classifier", "featurizer", "all"])
    assert methods == ["erm", "fishr", "fishr-featurizer", "fishr-all"]
    assert colored.on_layers(["fishr-covariance", "fishr-second-moment"], ["classifier"]) == [
        "fishr-covariance",
        "fishr-second-moment",
    ]
    runs = colored.run_methods(TINY, methods, [0], tmp_path, Watching())
    assert [run.algorithm for run in runs] == methods
    found = {name: getattr(config.hparams, "layers", None) for name, config in configs(tmp_path).items()}
    assert found == {
        "erm-0": None,
        "fishr-0": "classifier",
        "fishr-featurizer-0": "featurizer",
        "fishr-all-0": "all",
    }
    penalties = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["losses"]["penalty"]
        for name in found
        if name != "erm-0"
    }
    assert penalties["fishr-featurizer-0"] > 0
    assert penalties["fishr-all-0"] > max(penalties["fishr-0"], penalties["fishr-featurizer-0"])
    assert [colored.TITLES[method] in reproduce.table(runs, {}) for method in methods] == [True] * 4


@pytest.mark.parametrize(
    ("methods", "layers", "message"),
    [
        (["fishr"], ["head"], "unknown layers 'head'"),
        (["fishr-covariance"], ["all"], "fishr-covariance does not compare the gradients of layers 'all': fishr and"),
    ],
)
def test_layers_that_cannot_be(methods, layers, message):
    with pytest.raises(ConfigError, match=message):
        colored.on_layers(methods, layers)


def test_seeds_trained_together_are_what_they_are_one_by_one(tmp_path):
    one_by_one = colored.run_methods(TINY, ["erm", "fishr"], [0, 3], tmp_path / "one by one", Watching())
    watcher = Watching()
    together = colored.run_methods(TINY, ["erm", "fishr"], [0, 3], tmp_path / "together", watcher, stack=True)
    method_after_method = [("erm", 0), ("erm", 3), ("fishr", 0), ("fishr", 3)]
    assert watcher.started == watcher.finished == method_after_method
    assert [(run.algorithm, run.seed) for run in together] == method_after_method
    assert configs(tmp_path / "together") == configs(tmp_path / "one by one")
    accuracies = {(run.algorithm, run.seed): run.accuracies for run in one_by_one}
    for run in together:
        assert run.accuracies == pytest.approx(accuracies[run.algorithm, run.seed], abs=2.5)  # one of 40 samples
    assert all((tmp_path / f"together/{method}-{seed}/mistakes.json").exists() for method, seed in method_after_method)
    assert colored.run_methods(TINY, ["fishr"], [0, 3], tmp_path / "together", Watching()) == together[2:]


def test_an_unknown_method_is_refused_before_any_run(tmp_path):
    with pytest.raises(ConfigError, match="unknown method 'fish'; did you mean 'fishr'"):
        colored.run_methods(TINY, ["erm", "fish"], [0], tmp_path / "job", Watching())
    assert not (tmp_path / "job").exists()


RUNS = [
    MethodRun("erm", 0, 86.0, 14.0, 70.0, 0.1),
    MethodRun("erm", 1, 88.0, 16.0, 72.0, 0.1),
    MethodRun("fishr", 0, 71.0, 69.0, 70.0, 0.1),
]


def test_spread_is_the_population_standard_deviation():
    spreads = colored.summaries(RUNS)
    assert spreads["erm"] == Spread((87.0, 15.0, 71.0), (1.0, 1.0, 1.0))
    assert spreads["fishr"] == Spread((71.0, 69.0, 70.0), (0.0, 0.0, 0.0))


def test_the_table_shows_published_beside_measured_where_it_is_known():
    header, _, erm, fishr = reproduce.table(RUNS, reproduce.PUBLISHED).splitlines()
    assert header.count("published") == 3
    assert [cell.strip() for cell in erm.strip("|").split("|")] == [
        "ERM",
        "2",
        "87.0 ± 1.0",
        "15.0 ± 1.0",
        "71.0 ± 1.0",
        "86.4 ± 0.2",
        "14.0 ± 0.7",
        "71.0 ± 0.7",
    ]
    assert "Fishr" in fishr
    other = [MethodRun("fishr-covariance", 0, 71.0, 69.0, 70.0, 0.1)]
    assert "published" not in reproduce.table(other, reproduce.PUBLISHED)
    assert "not known" in reproduce.table([*RUNS, *other], reproduce.PUBLISHED)


@pytest.mark.parametrize(("label_flip", "known"), [(0.25, True), (0.0, False)])
def test_published_figures_go_with_their_label_flip_only(label_flip, known, tmp_path):
    table = reproduce.write_table(tmp_path, RUNS, reproduce.setting(label_flip, "32"))
    assert ("published" in table) is known
    assert table in (tmp_path / "results.md").read_text()


def test_the_conclusion_follows_the_numbers():
    erm, fishr = Spread((88.0, 17.0, 67.0), (0, 0, 0)), Spread((69.0, 71.0, 67.0), (0, 0, 0))
    assert demo.conclusion(erm, fishr).startswith("Fishr holds up where ERM does not")
    assert "88 % to 17 %" in demo.conclusion(erm, fishr)
    assert demo.conclusion(fishr, erm).startswith("Fishr does not hold up better")


def test_a_method_named_twice_is_one_method(tmp_path):
    assert len(colored.run_methods(TINY, ["erm", "erm"], [0], tmp_path, Watching())) == 1


def test_a_signal_in_the_last_step_of_a_run_stops_the_job(tmp_path):
    class LastMoment(Silent):
        def on_step(self, step, losses):
            if step == TINY.steps:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunInterruptedError, match="is done"):
        colored.run_methods(TINY, ["erm", "fishr"], [0], tmp_path, Watching(LastMoment()))
    assert (tmp_path / "erm-0" / "DONE").exists()
    assert not (tmp_path / "fishr-0").exists()
