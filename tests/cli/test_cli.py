"""The command line as its users meet it."""

import json
import shlex

import pytest

from fishr.cli import main
from fishr.cli.app import spread_values
from fishr.cli.options import parse_settings
from fishr.errors import ConfigError

TRAIN = ["train", "--data", "colored-digits", "--subset", "40", "--steps", "10", "--quiet"]


def error_of(capsys, arguments: list[str]) -> str:
    """The message of a command that must fail with exit code 2 and one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing option '--data'"),
        (["train", "--data"], "Option '--data' requires an argument"),
        (["train", "--stepz", "3"], "No such option: --stepz"),
        ([*TRAIN, "--steps", "many"], "Invalid value for '--steps': "),
        ([*TRAIN, "--steps", "0"], "steps must be at least 1, got 0"),
        ([*TRAIN, "--data", "colored-digit"], "unknown dataset 'colored-digit'; did you mean 'colored-digits'?"),
        ([*TRAIN, "--algorithm", "fisher"], "unknown algorithm 'fisher'; did you mean 'fishr'?"),
        ([*TRAIN, "--test-domain", "+85%"], "unknown test domain of 'colored-digits' '+85%'"),
        ([*TRAIN, "--test-domain", "+80%", "+90%", "-90%"], "leaves no domain of 'colored-digits' to train on"),
        ([*TRAIN, "--set", "penalty_wieght=3"], "did you mean 'penalty_weight'?"),
        ([*TRAIN, "--set", "penalty_weight=high"], "penalty_weight must be a number, got 'high'"),
        ([*TRAIN, "--set", "lr"], "--set takes KEY=VALUE, got 'lr'"),
        ([*TRAIN, "--precision", "16"], "precision must be one of 32, bf16-mixed, got '16'"),
        ([*TRAIN, "--subset", "0"], "subset must be at least 1"),
        ([*TRAIN, "--device", "cdua"], "unknown device 'cdua'; did you mean 'cuda'?"),
        (["reproduce", "colored-mnist", "--methods", "erm", "fish"], "unknown method 'fish'; did you mean 'fishr'?"),
        (["reproduce", "colored-mnist", "--restarts", "0"], "Invalid value for '--restarts'"),
        (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["demo"], ["train"], ["reproduce"], ["reproduce", "colored-mnist"]], ids=" ".join
)
def test_help_shows_examples(arguments, capsys):
    assert main([*arguments, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    if arguments != ["reproduce"]:
        assert "Examples" in shown


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "Commands" in captured.out + captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fishr 0.")


def test_train_writes_a_run_and_says_so(capsys, tmp_path):
    folder = tmp_path / "run"
    assert main([*TRAIN, "--output", str(folder), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["trained"] is True
    assert first["step"] == 10
    assert first["held_out"] == ["-90%"]
    assert set(first["accuracy"]) == {"+80%", "+90%", "-90%", "gray"}
    assert all(0 <= value <= 1 for splits in first["accuracy"].values() for value in splits.values())
    of_run, of_report = (
        {"config.json", "metrics.jsonl", "model", "DONE"},
        {"mistakes.json", "made_by.json", "report.html"},
    )
    assert {path.name for path in folder.iterdir()} == of_run | of_report
    made_by = (folder / "made_by.json").read_bytes()
    assert json.loads(made_by)["command"] == shlex.join(["fishr", *TRAIN, "--output", str(folder), "--json"])

    assert main([*TRAIN, "--output", str(folder), "--json", "--quiet"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second == {**first, "trained": False}
    assert (folder / "made_by.json").read_bytes() == made_by

    assert "steps: 10 → 20" in error_of(capsys, [*TRAIN, "--output", str(folder), "--steps", "20"])


def test_train_names_its_folder_by_the_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--set", "lr=0.01", "batch_size=8"]) == 0
    shown = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"runs/{folder.name}/model" in shown.out
    assert shown.err == ""
    config = json.loads((folder / "config.json").read_text())
    assert config["hparams"]["lr"] == 0.01
    assert config["hparams"]["batch_size"] == 8


def test_train_holds_out_the_named_domain(capsys, tmp_path):
    arguments = [*TRAIN, "--algorithm", "erm", "--test-domain", "+80%", "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    held_out = [line for line in shown.splitlines() if "held out" in line]
    assert len(held_out) == 1
    assert "+80%" in held_out[0]


def test_a_switch_on_never_reached_is_warned_of(capsys, tmp_path):
    assert main([*TRAIN, "--set", "switch_on=11", "--output", str(tmp_path / "run")]) == 0
    assert "warning: the penalty never switches on" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(capsys, [*TRAIN, "--output", str(tmp_path / "file" / "run")])
    assert "Not a directory" in message


def test_a_signal_leaves_with_its_own_exit_code(capsys, tmp_path, monkeypatch):
    import os
    import signal

    from fishr.algorithms import ERM

    step = ERM.training_step

    def interrupted(self, batch, index, optimizers):
        if index == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index, optimizers)

    monkeypatch.setattr(ERM, "training_step", interrupted)
    arguments = [*TRAIN, "--algorithm", "erm", "--output", str(tmp_path / "run")]
    assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped after step 5 of 10" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0


def test_restarts_trained_together_leave_what_they_leave_one_by_one(capsys, tmp_path, monkeypatch):
    from fishr.workflows import reproduce
    from fishr.workflows.colored import Setting

    def small(label_flip, precision):
        options = {"label_flip": label_flip, "subset": 40}
        return Setting("colored-digits", 8, 1e-3, 1e-3, 9e4, steps=10, data_options=options, precision=precision)

    monkeypatch.setattr(reproduce, "setting", small)
    command = ["reproduce", "colored-mnist", "--methods", "erm", "vrex", "--restarts", "2", "--output", str(tmp_path)]
    assert main([*command, "--stack"]) == 0
    assert "| V-REx" in capsys.readouterr().out
    assert sorted(path.parent.name for path in tmp_path.glob("*/DONE")) == ["erm-0", "erm-1", "vrex-0", "vrex-1"]
    assert main(command) == 0
    assert "All runs were done before" in capsys.readouterr().out
    assert error_of(capsys, [*command, "--stack", "--track", "wandb"]).startswith(
        "fishr: error: wandb follows one run of a"
    )


def test_demo_writes_results(capsys, tmp_path):
    arguments = ["demo", "--seeds", "1", "--steps", "10", "--output", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "ERM" in shown.out
    assert "done before" not in shown.out
    assert "unseen" in shown.out
    content = json.loads((tmp_path / "results.json").read_text())
    assert [(run["algorithm"], run["seed"]) for run in content["runs"]] == [("erm", 0), ("fishr", 0)]
    for run in content["runs"]:
        assert all(0 <= run[f"{name}_accuracy"] <= 100 for name in ("train", "unseen", "gray"))

    assert main(arguments) == 0
    assert "All runs were done before" in capsys.readouterr().out

    assert main([*arguments, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["runs"] == content["runs"]
    assert shown.err == ""


def test_values_are_spread_over_repeated_options():
    spread = spread_values(["--methods", "a", "b", "-q", "--x", "c"])
    assert spread == ["--methods", "a", "--methods", "b", "-q", "--x", "c"]
    assert spread_values(["--test-domain", "+90%", "-90%"]) == ["--test-domain", "+90%", "--test-domain", "-90%"]
    assert spread_values(["--set", "x=1", "--set", "y=-1", "z=2"]) == [
        "--set",
        "x=1",
        "--set",
        "y=-1",
        "--set",
        "z=2",
    ]
    assert spread_values(["--steps", "3", "4"]) == ["--steps", "3", "4"]


def test_settings_are_parsed():
    parsed = parse_settings(["a=1", "b=0.5", "c=null", "d=true", "e=mean", "f=a=b"])
    assert parsed == {"a": 1, "b": 0.5, "c": None, "d": True, "e": "mean", "f": "a=b"}
    with pytest.raises(ConfigError, match="--set takes KEY=VALUE, got '=3'"):
        parse_settings(["=3"])


def test_an_interrupted_command_says_so(capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fishr.data.load_dataset", interrupted)
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == "fishr: interrupted\n"


def test_a_report_that_cannot_be_written_is_a_warning(capsys, tmp_path):
    folder = tmp_path / "run"
    assert main([*TRAIN, "--output", str(folder), "--quiet"]) == 0
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    (folder / "made_by.json").write_text("{")
    capsys.readouterr()
    assert main([*TRAIN, "--output", str(folder), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "Done before, nothing to do" in said.out
    assert "Report:" not in said.out
    assert "warning: the report in" in said.err
    assert "made_by.json cannot be read" in said.err
