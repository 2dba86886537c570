"""Comparisons of algorithms on held-out domains: what is run, chosen, kept and continued."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from fishr.algorithms import ALGORITHMS, ERM, Losses
from fishr.data import MultiDomainDataset, Samples
from fishr.errors import ConfigError, NonFiniteLossError, RunError, RunInterruptedError
from fishr.models import ModelConfig, load_model
from fishr.reports.comparison import expectation, verdict
from fishr.training.loop import RunCost, Silent
from fishr.workflows import compare as workflow
from fishr.workflows.compare import Setting, compare
from fishr.workflows.plan import Extent
from small_runs import numbered, registered, signal_at

SETTING = Setting(
    ("fishr",),
    Extent(draws=2, seeds=2, steps=6),
    model=ModelConfig("mlp", {"width": 4, "depth": 1}),
    hparams={"batch_size": 4},
)


def four_domains(size: int = 15) -> MultiDomainDataset:
    """Vectors of two classes, which differ less from domain to domain; one domain more for evaluation only."""
    generator = torch.Generator().manual_seed(0)
    domains = {}
    for distance, name in enumerate(("a", "b", "c", "d", "extra")):
        targets = torch.arange(size) % 2
        inputs = torch.randn(size, 3, generator=generator) + (4 - distance) * targets[:, None]
        domains[name] = Samples(inputs, targets)
    return MultiDomainDataset("four", "vectors", domains, ("no", "yes"), evaluation_only=frozenset({"extra"}))


class Watching:
    """Remembers what it is told; ``observe`` makes the observer of a run from its number."""

    def __init__(self, observe=lambda number: Silent()):
        self.observe, self.plan, self.names, self.configs, self.trained = observe, None, [], [], 0

    def on_images(self, done, total): ...

    def on_measure(self, algorithm): ...

    def on_plan(self, plan, asked):
        self.plan = plan

    @contextmanager
    def run(self, name):
        self.names.append(name)
        yield self.observe(len(self.names))

    def on_result(self, name, config, result):
        self.configs.append(config)
        self.trained += result.trained


@pytest.fixture
def costs(monkeypatch):
    """A step takes a second, whatever the machine."""
    measured = []

    def measure(config, dataset, **options):
        measured.append(config.algorithm)
        return RunCost(start=0.0, step=1.0, checkpoint=0.0)

    monkeypatch.setattr(workflow, "measure_cost", measure)
    return measured


def files(folder):
    return [(folder / name).read_bytes() for name in ("results.json", "results.md", "model/model.safetensors")]


def test_what_is_run(tmp_path, costs):
    watcher = Watching()
    compare(numbered(), SETTING, tmp_path, watcher)
    runs = [(c.algorithm, c.test_domains, c.seed, c.trial) for c in watcher.configs]
    draws_then_seeds = [
        (algorithm, (domain,), seed, seed)
        for seeds in ((0, 0), (1,))
        for domain in ("a", "b", "c")
        for algorithm in ("erm", "fishr")
        for seed in seeds
    ]
    assert runs[:-1] == draws_then_seeds
    assert runs[-1][1:] == ((), 0, 0)
    assert watcher.plan.runs == len(runs) == len(set(watcher.names)) == 19
    assert watcher.plan.seconds == 18 * 6 + 6 * 3 / 2
    assert costs == ["erm", "fishr"]
    assert {c.steps for c in watcher.configs} == {6}
    assert all(c.model == SETTING.model for c in watcher.configs)


def test_the_first_draw_is_recommended_and_others_share_what_algorithms_have_in_common(tmp_path, costs):
    watcher = Watching()
    compare(numbered(), SETTING, tmp_path, watcher)
    first, second = (watcher.configs[i].hparams for i in (0, 1))
    fishr_first, fishr_second = (watcher.configs[i].hparams for i in (2, 3))
    assert (first.lr, fishr_first.lr, fishr_first.strength) == (1e-3, 1e-3, 0.5)
    assert second.lr == fishr_second.lr != 1e-3
    assert (fishr_second.strength, fishr_second.switch_on) == (0.5, 0.3)
    assert {c.hparams.batch_size for c in watcher.configs} == {4}


def test_hyperparameters_are_chosen_by_the_training_domains_alone(tmp_path, costs):
    watcher = Watching()
    outcome = compare(four_domains(), replace(SETTING, asked=Extent(3, 1, 8)), tmp_path, watcher)
    for algorithm, of_domains in outcome.choices.items():
        for domain, choice in of_domains.items():
            runs = [c for c in watcher.configs if (c.algorithm, c.test_domains) == (algorithm, (domain,))]
            scores, held_out = [], []
            for config in runs:
                record = json.loads((tmp_path / "runs" / config.hash / "DONE").read_text())["domains"]
                scores.append(fmean(record[name]["out"]["accuracy"] for name in "abcd" if name != domain))
                held_out.append(record[domain]["in"]["accuracy"])
            assert choice.scores == scores
            assert choice.held_out == held_out
            assert choice.draw == scores.index(max(scores))
            assert outcome.accuracies[algorithm][domain] == [held_out[choice.draw]]


def test_hyperparameters_are_chosen_by_domains_left_out(tmp_path, costs):
    watcher = Watching()
    setting = replace(SETTING, algorithms=("vrex",), select_by="leave-one-out")
    outcome = compare(four_domains(), setting, tmp_path, watcher)
    # Each of 6 pairs once, for both domains of it.
    assert watcher.plan.runs == len(watcher.names) == 2 * (4 * 3 + 6 * 2) + 1
    accuracy = {
        (c.algorithm, c.hparams, c.test_domains): json.loads((tmp_path / "runs" / c.hash / "DONE").read_text())[
            "domains"
        ]
        for c in watcher.configs
        if c.seed == 0
    }
    for algorithm, of_domains in outcome.choices.items():
        draws = list(dict.fromkeys(c.hparams for c in watcher.configs if c.algorithm == algorithm))
        for domain, choice in of_domains.items():
            expected = [
                fmean(
                    accuracy[algorithm, hparams, tuple(sorted((domain, other)))][other]["in"]["accuracy"]
                    for other in "abcd"
                    if other != domain
                )
                for hparams in draws
            ]
            assert choice.scores == pytest.approx(expected)
    strengths = {c.hparams.strength for c in watcher.configs if c.algorithm == "vrex"}
    assert len(strengths) == 2


def test_one_draw_leaves_nothing_to_choose(tmp_path, costs):
    watcher = Watching()
    setting = replace(SETTING, select_by="leave-one-out", asked=Extent(1, 1, 6))
    compare(four_domains(), setting, tmp_path, watcher)
    assert watcher.plan.runs == len(watcher.names) == 2 * 4 + 1


def test_the_outcome_is_that_of_its_accuracies(tmp_path, costs):
    outcome = compare(four_domains(), SETTING, tmp_path, Watching())
    titles = {"erm": "ERM", "fishr": "Fishr"}
    assert {name: list(of) for name, of in outcome.accuracies.items()} == {name: list("abcd") for name in titles}
    assert outcome.verdict == verdict(outcome.accuracies, titles)
    assert outcome.expectation == expectation(outcome.accuracies[outcome.verdict.chosen])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["accuracies"] == outcome.accuracies
    assert written["verdict"]["sentence"] == outcome.verdict.sentence
    text = (tmp_path / "results.md").read_text()
    assert outcome.verdict.sentence in text
    assert "| Fishr    |" in text


def test_the_model_is_trained_on_all_domains_and_its_card_says_what_to_expect(tmp_path, costs):
    outcome = compare(four_domains(), SETTING, tmp_path, Watching())
    card = load_model(outcome.model).card
    assert card.provenance["train_domains"] == list("abcd")
    assert card.provenance["config"]["algorithm"] == outcome.verdict.chosen
    assert card.provenance["unseen_domain"]["mean"] == outcome.expectation.mean
    text = (outcome.model / "README.md").read_text()
    assert f"| expected on an unseen domain | {outcome.expectation.mean:.0%}" in text


@pytest.mark.parametrize("number", [1, 3, 16, 19])
def test_a_stopped_comparison_continues_to_the_same_results(number, tmp_path, costs):
    compare(numbered(), SETTING, tmp_path / "whole", Watching())

    def observe(run):
        return signal_at(3, signal.SIGINT) if run == number else Silent()

    with pytest.raises(RunInterruptedError, match=r"stopped after step 3 of 6"):
        compare(numbered(), SETTING, tmp_path / "cut", Watching(observe))
    watcher = Watching()
    compare(numbered(), SETTING, tmp_path / "cut", watcher)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert watcher.trained == 19 - number + 1
    assert costs == ["erm", "fishr"] * 2  # not measured again


def test_a_finished_comparison_is_only_read(tmp_path, costs):
    first = compare(numbered(), SETTING, tmp_path, Watching())
    watcher = Watching()
    assert compare(numbered(), SETTING, tmp_path, watcher) == first
    assert watcher.trained == 0


def test_more_of_the_same_makes_only_what_is_missing(tmp_path, costs):
    compare(numbered(), SETTING, tmp_path, Watching())
    watcher = Watching()
    compare(numbered(), replace(SETTING, asked=Extent(2, 3, 6)), tmp_path, watcher)
    assert watcher.trained == 6
    assert [c.seed for c in watcher.configs if c.seed == 2] == [2] * 6


def test_another_comparison_in_the_folder_is_refused(tmp_path, costs):
    compare(numbered(), SETTING, tmp_path, Watching())
    with pytest.raises(
        RunError,
        match=r"another comparison \(select: False → True; given.batch_size: 4 → 8\): choose another --output",
    ):
        compare(numbered(), replace(SETTING, hparams={"batch_size": 8}, select=True), tmp_path, Watching())


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "compared": 3}'])
def test_a_damaged_plan_is_refused(content, tmp_path, costs):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(
        RunError, match=r"plan.json cannot be read: choose another --output, or delete the file to plan"
    ):
        compare(numbered(), SETTING, tmp_path, Watching())


def test_a_budget_takes_draws_then_seeds_then_steps(tmp_path, costs):
    """18 runs of 6 steps, a second each, and one on all domains do not fit; 12 and that one do."""
    watcher = Watching()
    setting = replace(SETTING, budget=12 * 6 + 9.5)
    compare(numbered(), setting, tmp_path, watcher)
    assert watcher.plan.extent == Extent(1, 2, 6)
    assert watcher.plan.seconds <= setting.budget
    assert len(watcher.names) == 13


def test_a_budget_that_is_too_short_is_refused(tmp_path, costs):
    with pytest.raises(
        ConfigError, match=r"^the budget of 10 s is too short: the minimum \(1 draw, 2 seeds, 6 steps\)"
    ):
        compare(numbered(), replace(SETTING, budget=10), tmp_path, Watching())
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_costs_are_measured(tmp_path):
    watcher = Watching()
    compare(numbered(), replace(SETTING, asked=Extent(1, 1, 2)), tmp_path, watcher)
    for cost in watcher.plan.costs.values():
        assert 0 < cost.step < 10
        assert 0 < cost.checkpoint < 10
        assert 0 < cost.start < 10


def test_too_few_domains_are_refused(tmp_path):
    data = numbered()
    two = replace(data, domains={name: data.domains[name] for name in ("a", "c")}, evaluation_only=frozenset())
    with pytest.raises(
        ConfigError, match=r"^erm, fishr can be compared on 3 domains or more, dataset 'numbered' has 2: a, c$"
    ):
        compare(two, SETTING, tmp_path, Watching())
    with pytest.raises(ConfigError, match=r"on 4 domains or more, as --select-by leave-one-out leaves out 2 at once, "):
        compare(numbered(), replace(SETTING, select_by="leave-one-out"), tmp_path, Watching())


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match=r"unknown algorithm 'fisher'"):
        Setting(("fisher",), Extent(1, 1, 1))
    with pytest.raises(ConfigError, match=r"^select_by must be one of training, leave-one-out, got 'test'$"):
        Setting(("fishr",), Extent(1, 1, 1), select_by="test")
    with pytest.raises(ConfigError, match=r"^draws must be at least 1, got 0; steps must be at least 1, got -1$"):
        Setting(("fishr",), Extent(0, 1, -1))


def test_erm_is_always_compared_with_and_comes_first():
    assert Setting(("fishr", "vrex", "fishr"), Extent(1, 1, 1)).algorithms == ("erm", "fishr", "vrex")
    assert Setting(("fishr", "erm"), Extent(1, 1, 1)).algorithms == ("erm", "fishr")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, costs):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r" exists and is not a comparison \(it has no plan.json\): choose another"):
        compare(numbered(), SETTING, tmp_path, Watching())
    assert list((tmp_path / "model").iterdir()) == []


def test_without_its_plan_a_comparison_is_planned_anew(tmp_path, costs):
    compare(numbered(), SETTING, tmp_path, Watching())
    (tmp_path / "plan.json").unlink()
    watcher = Watching()
    compare(numbered(), SETTING, tmp_path, watcher)
    assert watcher.trained == 0
    assert costs == ["erm", "fishr"] * 2


def test_an_algorithm_more_is_measured_and_the_others_are_not_again(tmp_path, costs):
    compare(numbered(), SETTING, tmp_path, Watching())
    compare(numbered(), replace(SETTING, algorithms=("vrex", "fishr")), tmp_path, Watching())
    assert costs == ["erm", "fishr", "vrex"]


class Diverging(ERM):
    """Its loss is not finite with any learning rate but the recommended one."""

    def losses(self, batch, step):
        losses = super().losses(batch, step)
        return losses if self.config.lr == 1e-3 else Losses(losses.total * float("nan"), losses.terms)


def test_a_draw_that_diverges_is_out(tmp_path, costs, warnings_logged):
    with registered(ALGORITHMS, "diverging", Diverging):
        outcome = compare(numbered(), replace(SETTING, algorithms=("diverging",)), tmp_path, Watching())
        for domain, choice in outcome.choices["diverging"].items():
            assert choice.draw == 0
            assert choice.scores[1] is choice.held_out[1] is None
            assert outcome.accuracies["diverging"][domain][0] == choice.held_out[0]
        assert warnings_logged()[0].startswith("draw 1 of ERM is out, held out a: at step 1 loss is nan")
        assert json.loads((tmp_path / "results.json").read_text())["choices"]["diverging"]["a"]["scores"][1] is None
        bad = replace(SETTING, algorithms=("diverging",), hparams={"lr": 1.0})
        with pytest.raises(NonFiniteLossError):
            compare(numbered(), bad, tmp_path / "bad", Watching())


def test_given_hyperparameters_are_those_of_all_draws_of_algorithms_that_have_them(tmp_path, costs):
    watcher = Watching()
    setting = replace(SETTING, hparams={"batch_size": 4, "lr": 0.5, "penalty_weight": 2.0})
    compare(numbered(), setting, tmp_path, watcher)
    assert {c.hparams.lr for c in watcher.configs} == {0.5}
    fishr = [c.hparams for c in watcher.configs if c.algorithm == "fishr"]
    assert {(h.penalty_weight, h.strength) for h in fishr} == {(2.0, None)}
    with pytest.raises(ConfigError, match=r"unknown hyperparameter of erm, fishr 'strenght'"):
        compare(numbered(), replace(SETTING, hparams={"strenght": 2.0}), tmp_path / "other", Watching())


def test_results_say_what_was_reduced_and_what_chose(tmp_path, costs):
    compare(numbered(), replace(SETTING, budget=12 * 6 + 9.5), tmp_path / "reduced", Watching())
    text = (tmp_path / "reduced/results.md").read_text()
    assert "1 draw, 2 seeds, 6 steps instead of 2 draws, 2 seeds, 6 steps, for the budget." in text
    assert "Hyperparameters are the recommended ones." in text
    compare(numbered(), SETTING, tmp_path / "whole", Watching())
    text = (tmp_path / "whole/results.md").read_text()
    assert "2 draws, 2 seeds, 6 steps. Hyperparameters were chosen by accuracy on the out-splits of the" in text


def test_hints_are_those_of_all_runs_of_an_algorithm(tmp_path, costs):
    setting = replace(SETTING, hparams={"batch_size": 4, "penalty_weight": 1e9})
    outcome = compare(numbered(), setting, tmp_path, Watching())
    assert outcome.hints["erm"] == []
    assert len(outcome.hints["fishr"]) >= 9
    assert "λ = 1e+09" in outcome.hints["fishr"][0]
