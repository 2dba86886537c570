import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fishr.cli import main
from fishr.cli.console import stdout
from fishr.records import read_records
from fishr.sweeps.folder import SweepFolder
from fishr.training import RunConfig
from small_sweeps import wait_for

ARGUMENTS = [
    *("--datasets", "colored-digits", "--algorithms", "erm", "fishr", "--test-domain", "-90%"),
    *("--subset", "60", "--draws", "1", "--trials", "1", "--steps", "8", "--checkpoint-every", "4", "--slots", "1"),
]


def sweep(folder: Path, *arguments: str) -> int:
    return main(["sweep", "run", *ARGUMENTS, "--output", str(folder), *arguments])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    assert sweep(folder, "--quiet") == 0
    return folder


def test_a_dry_run_says_what_it_would_take_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "sweep", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "2 runs: 1 dataset x 2 algorithms x held-out domains x 1 draw x 1 trial; 0 of them done" in said
    assert re.search(r"about \d+ s for the others, 1 run at a time, \d+ threads? each; disk: 8\.0 kB, and up to", said)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_and_its_table(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(done), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1:4] for line in lines[1:]] == [
        ["colored-digits", "-90%", "erm"],
        ["colored-digits", "", "erm"],
        ["colored-digits", "-90%", "fishr"],
        ["colored-digits", "", "fishr"],
        ["", "", "erm"],
        ["", "", "fishr"],
    ]
    assert sorted(path.name for run in (done / "runs").iterdir() for path in run.iterdir()) == sorted(
        2 * ["DONE", "config.json", "metrics.jsonl"]
    )


def test_a_report_says_how_many_planned_runs_have_no_record(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = SweepFolder(tmp_path)
    half.plan({}, SweepFolder(done).jobs())
    first = half.jobs()[0].run
    shutil.copytree(done / "runs" / first, half.runs / first)
    assert main(["report", str(tmp_path)]) == 0
    assert f"1 of 2 runs planned in {tmp_path} have no record yet" in capsys.readouterr().err


def test_called_again_it_makes_only_what_is_missing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(done) == 0
    said = capsys.readouterr()
    assert said.err == (
        "fishr: 2 runs: 1 dataset x 2 algorithms x held-out domains x 1 draw x 1 trial; 2 of them done\n"
    )
    assert "2 runs done" in said.out
    assert f"Report: {done / 'report.html'}" in said.out
    assert sweep(done, "--draws", "2", "--dry-run") == 0
    assert "4 runs: 1 dataset x 2 algorithms x held-out domains x 2 draws x 1 trial; 2 of them done" in (
        capsys.readouterr().err
    )


def test_status(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "status", str(done)]) == 0
    assert "2 of 2 runs are done." in capsys.readouterr().out
    assert main(["sweep", "status", str(done), "--json"]) == 0
    states = [run["state"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert states == ["done", "done"]


def test_a_sweep_from_a_file(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"""
        datasets: [colored-digits]
        algorithms: [erm, fishr]
        test-domain: ["-90%"]
        subset: 60
        draws: 1
        trials: 1
        steps: 8
        checkpoint-every: 4
        output: {done}
        """
    )
    assert main(["sweep", "run", "--config", str(tmp_path / "sweep.yaml")]) == 0
    assert "2 of them done" in capsys.readouterr().err


def test_status_of_a_sweep_that_is_done_is_not_watched_for_long(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "status", str(done), "--live"]) == 0
    assert "2 of 2 runs are done." in capsys.readouterr().out


def test_status_names_damaged_files(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SweepFolder(tmp_path)
    folder.plan({}, SweepFolder(done).jobs()[:1])
    run = folder.runs / folder.jobs()[0].run
    run.mkdir(parents=True)
    (run / "config.json").write_text("{")
    assert main(["sweep", "status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said
    assert "JSONDecodeError" in said


def test_status_names_failures_and_runs_at_work(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdout, "width", 200)
    folder = SweepFolder(tmp_path / "sweep")
    folder.plan({}, SweepFolder(done).jobs())
    at_work, failed = (folder.runs / job.run for job in folder.jobs())
    for run in (at_work, failed):
        run.mkdir(parents=True)
        original = done / "runs" / run.name
        (run / "config.json").write_bytes((original / "config.json").read_bytes())
        (run / "metrics.jsonl").write_bytes((original / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0])
    (at_work / ".lease").touch()
    (failed / "FAILED").write_text("Traceback\nloss is nan\n")
    assert main(["sweep", "status", str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"erm on colored-digits, held out -90%, draw 0, trial 0 .* 4 .* 8 .* 0 s", said)
    assert "loss is nan" in said
    assert "0 of 2 runs are done." in said

    assert main(["sweep", "retry", str(folder.path)]) == 0
    assert "Failures forgotten: 1;" in capsys.readouterr().out
    assert main(["sweep", "retry", str(folder.path)]) == 0
    assert "No run has failed." in capsys.readouterr().out


def test_a_failed_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "sweep", "--set", "lr=1e30") == 1
    said = capsys.readouterr()
    assert "failed: at step" in said.err
    assert "0 runs done" in said.out
    assert "2 runs failed: fishr sweep status" in said.err


def test_a_stop_from_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "fishr.cli", "sweep", "run", *ARGUMENTS, "--output", str(folder)]
    process = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_a_checkpoint(folder))
    assert main(["sweep", "stop", str(folder)]) == 0
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"stopped; the runs are saved in {folder}: the same command continues" in said
    assert not list(folder.glob("runs/*/.lease"))


def test_an_interrupt_saves_the_runs(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "fishr.cli", "sweep", "run", *ARGUMENTS, "--output", str(folder)]
    process = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_a_checkpoint(folder))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "fisr"], "unknown algorithm 'fisr'; did you mean 'fishr'?"),
        (["--datasets", "colored-digitz"], "unknown dataset 'colored-digitz'; did you mean 'colored-digits'?"),
        (["--test-domain", "-80%"], "unknown test domain of 'colored-digits' '-80%'"),
        (["--executor", "slurm"], "unknown executor 'slurm'"),
        (["--slots", "0"], "slots must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "checkpoint-every must be at least 1, got 0"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run is of --executor ray, not local"),
        (["--precision", "64"], "precision must be one of 32, bf16-mixed"),
    ],
)
def test_mistakes_are_found_before_any_run(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "sweep", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_another_sweep_in_the_folder_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(done, "--steps", "9") == 2
    assert "holds a sweep with other settings (steps: 8 → 9): choose another --output" in capsys.readouterr().err


def test_the_best_draws_are_configs_that_train_takes(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that they make is the one of the sweep, to the same records."""
    assert main(["report", str(done), "--best-configs", str(tmp_path / "best")]) == 0
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "colored-digits-erm--90%.yaml",
        "colored-digits-fishr--90%.yaml",
    ]
    assert "data-root" not in (tmp_path / "best" / "colored-digits-erm--90%.yaml").read_text()
    capsys.readouterr()
    for config in (tmp_path / "best").iterdir():
        assert main(["train", "--config", str(config), "--output", str(tmp_path / config.stem)]) == 0
        name = RunConfig.from_dict(config_of(tmp_path / config.stem)).hash
        ours, theirs = (read_records(run / "metrics.jsonl") for run in (tmp_path / config.stem, done / "runs" / name))
        assert [record.domains for record in ours] == [record.domains for record in theirs]


def config_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "config.json").read_text())
    del content["format"]
    return content


def test_best_configs_are_of_sweeps_and_one_rule(
    done: Path, domainbed_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(domainbed_sweep), "--best-configs", str(tmp_path)]) == 2
    assert "there is no sweep in" in capsys.readouterr().err
    assert main(["report", str(done), "--best-configs", str(tmp_path), "--selection", "all"]) == 2
    assert "--best-configs needs one --selection" in capsys.readouterr().err


def test_best_configs_of_a_rule_that_selects_nothing(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(done), "--best-configs", str(tmp_path), "--selection", "leave-one-out"]) == 0
    assert f"0 configs written to {tmp_path}" in capsys.readouterr().err


def has_a_checkpoint(folder: Path) -> bool:
    return bool(list(folder.glob("runs/*/checkpoints/step-*")))
