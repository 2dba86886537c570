"""Runs tracked by TensorBoard, by MLflow in an SQLite database, and by W&B offline."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fishr.data import MultiDomainDataset
from fishr.errors import ConfigError, RunError, RunInterruptedError, TrackingError
from fishr.models import ModelConfig
from fishr.records import RunRecord
from fishr.training import loop, train
from fishr.training.trackers import MLflow, TensorBoard, TrackedRun, WandB, _make_experiment, check_tracker
from fishr.training.tracking import Tracking
from small_runs import STEPS, AtStep, Outcome, outcome, run_config, signal_at
from tracked_runs import (
    NOLOAD,
    Points,
    keep_trackers_local,
    mlflow_points,
    mlflow_run,
    tensorboard_points,
    wandb_points,
    wandb_records,
)

POINTS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": tensorboard_points,
    "mlflow": mlflow_points,
    "wandb": wandb_points,
}
TRACKERS = list(POINTS)
CLASSES = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


pytestmark = pytest.mark.filterwarnings(NOLOAD)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs; to make MLflow's database takes seconds, so they all share it."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        keep_trackers_local(patch, folder)
        yield folder / "runs"


def expected(records: list[RunRecord], kept: RunRecord, tracker: str) -> Points:
    """What a tracker should know of a run."""
    points: Points = {}

    def add(record: RunRecord, metrics: dict[str, float], prefix: str = "") -> None:
        for name, value in metrics.items():
            points.setdefault(f"{prefix}{name}", []).append((record.step, value))

    def evaluations(record: RunRecord) -> dict[str, float]:
        found = {}
        for domain, splits in record.domains.items():
            named = domain.replace("+", "_").replace("%", "_") if tracker == "mlflow" else domain
            for split, metrics in splits.items():
                found[f"accuracy/{named}/{split}"] = metrics.accuracy
                found[f"loss/{named}/{split}"] = metrics.loss
        return found

    for record in records:
        add(record, {f"train/{name}": value for name, value in record.losses.items()})
        add(record, evaluations(record))
        add(record, {"seconds_per_step": record.seconds_per_step})
    add(kept, evaluations(kept), "kept/")
    return points


def check(found: Points, wanted: Points) -> None:
    """TensorBoard keeps float32."""
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def check_tracked(run: Path, digits: MultiDomainDataset, tracker: str, name: str = "fishr") -> None:
    """That the tracker knows all of a run that is done, and nothing twice."""
    done = train(run_config(name), digits, run, device="cpu")
    assert not done.trained
    check(POINTS[tracker](run), expected(done.records, done.kept, tracker))


def stop_at(step: int, digits: MultiDomainDataset, run: Path, **settings: Any) -> None:
    with pytest.raises(RunInterruptedError, match=f"stopped after step {step} "):
        train(run_config("fishr"), digits, run, device="cpu", observer=signal_at(step), **settings)


# What is told


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_is_tracked_and_ends_with_the_same_bits(
    tracker: str, runs: Path, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome]
) -> None:
    run = runs / f"whole-{tracker}"
    assert train(run_config("fishr"), digits, run, device="cpu", track=tracker).trained
    check_tracked(run, digits, tracker)
    assert outcome(run) == undisturbed("fishr")


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_runs_trained_together_are_tracked_each(tracker: str, runs: Path, digits: MultiDomainDataset) -> None:
    planned = [
        loop.PlannedRun(
            run_config(seed=seed, model=ModelConfig("mlp"), hparams={"batch_size": None}),
            digits,
            runs / f"together-{tracker}-{seed}",
        )
        for seed in (0, 1)
    ]
    for result in loop.train_together(planned, device="cpu", track=tracker):
        check(POINTS[tracker](result.folder), expected(result.records, result.kept, tracker))


def test_tensorboard_shows_hyperparameters_beside_the_outcome(runs: Path, digits: MultiDomainDataset) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    train(run_config("fishr", select=True), digits, runs / "hparams", device="cpu", track="tensorboard")
    events = EventAccumulator(str(runs / "hparams" / "tensorboard"))
    events.Reload()
    plugin = events.PluginTagToContent("hparams")
    settings = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info.hparams
    assert settings["algorithm"].string_value == "fishr"
    assert settings["hparams.lr"].number_value == 1e-2
    metrics = HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment.metric_infos
    assert "kept/accuracy/-90%/in" in {metric.name.tag for metric in metrics}


def test_mlflow_has_config_state_and_model(runs: Path, digits: MultiDomainDataset) -> None:
    from mlflow import MlflowClient

    config = run_config("fishr")
    train(config, digits, runs / config.hash, device="cpu", track="mlflow")
    tracked = mlflow_run(runs / config.hash)
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == f"fishr on colored-digits, held out -90% ({config.hash})"
    assert tracked.data.params["hparams.lr"] == "0.01"
    assert tracked.data.params["test_domains"] == "['-90%']"
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_experiment(tracked.info.experiment_id).name == "fishr"
    assert tracked.info.artifact_uri == (runs / "mlartifacts" / tracked.info.run_id / "artifacts").as_uri()
    copy = Path(client.download_artifacts(tracked.info.run_id, "model"))
    model = runs / config.hash / "model"
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in model.iterdir()
    }


def test_wandb_has_config_state_and_model(runs: Path, digits: MultiDomainDataset) -> None:
    train(run_config("fishr"), digits, runs / "offline", device="cpu", track="wandb")
    records = list(wandb_records(runs / "offline"))
    (tracked,) = (record.run for record in records if record.HasField("run"))
    assert (tracked.project, tracked.display_name) == ("fishr", "offline")
    config = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert config["hparams.lr"] == 0.01
    (artifact,) = (record.artifact for record in records if record.HasField("artifact"))
    assert (artifact.type, artifact.name) == ("model", f"model-{tracked.run_id}")
    model = runs / "offline" / "model"
    assert {entry.path for entry in artifact.manifest.contents} == {file.name for file in model.iterdir()}
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_names_that_mlflow_does_not_allow_stay_different() -> None:
    spelled = MLflow.spelled(None, ["sketch", "a+", "a%", "医院 1", "x/y"])  # type: ignore[arg-type]
    assert spelled == {"sketch": "sketch", "a+": "a_", "a%": "a__", "医院 1": "医院 1", "x/y": "x_y"}


def test_an_experiment_may_have_been_made_by_another_machine(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: None)
    for _ in range(2):
        _make_experiment(client, "raced for", None)
    with pytest.raises(MlflowException, match="Invalid experiment name"):
        _make_experiment(client, "", None)


def test_without_a_model_none_is_told(runs: Path, digits: MultiDomainDataset) -> None:
    from mlflow import MlflowClient

    train(run_config("fishr"), digits, runs / "no-model", device="cpu", track="mlflow", keep_model=False)
    assert not (runs / "no-model" / "model").exists()
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.list_artifacts(mlflow_run(runs / "no-model").info.run_id) == []


# Stopped, killed, continued


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_stopped_run_continues_as_the_same_one(tracker: str, runs: Path, digits: MultiDomainDataset) -> None:
    """Its first four steps are not tracked, and told later."""
    run = runs / f"stopped-{tracker}"
    stop_at(5, digits, run)
    stop_at(6, digits, run, track=tracker)
    name = json.loads((run / "tracking.json").read_text())[tracker]["name"]
    if tracker == "mlflow":
        assert mlflow_run(run).info.status == "KILLED"
    stop_at(8, digits, run, track=tracker)
    train(run_config("fishr"), digits, run, device="cpu", track=tracker)
    check_tracked(run, digits, tracker)
    assert json.loads((run / "tracking.json").read_text()) == {tracker: {"name": name, "step": STEPS}}
    if tracker == "mlflow":
        assert mlflow_run(run).info.status == "FINISHED"
    if tracker == "wandb":
        assert {record.run.run_id for record in wandb_records(run) if record.HasField("run")} == {name}


def test_a_continued_run_is_running_again(runs: Path, digits: MultiDomainDataset) -> None:
    run, states = runs / "running", []
    stop_at(5, digits, run, track="mlflow")
    look = AtStep(10, lambda: states.append(mlflow_run(run).info.status))
    train(run_config("fishr"), digits, run, device="cpu", observer=look, track="mlflow")
    assert states == ["RUNNING"]


def test_a_run_that_has_lost_its_checkpoints_tells_only_what_is_new(runs: Path, digits: MultiDomainDataset) -> None:
    run = runs / "from-the-start"
    stop_at(9, digits, run, track="mlflow")
    shutil.rmtree(run / "checkpoints")
    train(run_config("fishr"), digits, run, device="cpu", track="mlflow")
    assert [step for step, _ in mlflow_points(run)["train/loss"]] == [4, 8, STEPS]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_record_that_is_made_again_is_told_once(
    tracker: str, runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the checkpoint of the second record is to be saved."""
    run, save = runs / f"again-{tracker}", loop.save_checkpoint

    def full(folder: Path, parts: Any, optimizers: Any, progress: Any) -> None:
        if progress.step == 8:
            raise OSError(28, "No space left on device")
        save(folder, parts, optimizers, progress)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full)
        with pytest.raises(RunError, match="No space left on device"):
            train(run_config("fishr"), digits, run, device="cpu", track=tracker)
    assert [step for step, _ in POINTS[tracker](run)["train/loss"]] == [4]
    if tracker == "mlflow":
        assert mlflow_run(run).info.status == "FAILED"
    train(run_config("fishr"), digits, run, device="cpu", track=tracker)
    check_tracked(run, digits, tracker)


KILLED = """
import os, signal, sys
from pathlib import Path
import lightning.pytorch.loggers, mlflow, wandb
from fishr.training import train
from small_runs import noisy_registered, run_config, signal_at, small_digits

digits = small_digits()
with noisy_registered():
    for tracker in ("tensorboard", "mlflow", "wandb"):
        if (child := os.fork()) == 0:
            folder = Path(sys.argv[1]) / f"killed-{tracker}"
            killed = signal_at(10, signal.SIGKILL)
            train(run_config("fishr"), digits, folder, device="cpu", observer=killed, track=tracker)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(runs: Path) -> Path:
    """Runs whose processes were killed after ten steps."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("WANDB_SERVICE", None)  # the background process of this one's runs
    subprocess.run([sys.executable, "-c", KILLED, str(runs)], env=environment, check=True)
    return runs


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_killed_run_is_tracked_and_continues(tracker: str, killed: Path, digits: MultiDomainDataset) -> None:
    """W&B had written nothing yet."""
    run = killed / f"killed-{tracker}"
    known = POINTS[tracker](run).get("train/loss", [])
    assert [step for step, _ in known] == ([] if tracker == "wandb" else [4, 8])
    train(run_config("fishr"), digits, run, device="cpu", track=tracker)
    check_tracked(run, digits, tracker)


def test_a_server_of_wandb_says_what_it_knows(
    runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows a record of a run whose process was killed before it could note that."""
    from wandb.sdk.wandb_run import Run

    run = runs / "resumed"
    stop_at(10, digits, run)
    (run / "tracking.json").write_text(json.dumps({"wandb": {"name": "1a2b3c4d", "step": 0}}))

    def resumed(self: Run) -> bool:
        self.summary.update({"trainer/global_step": 4})
        return True

    monkeypatch.setattr(Run, "resumed", property(resumed))
    train(run_config("fishr"), digits, run, device="cpu", track="wandb")
    assert [step for step, _ in wandb_points(run)["train/loss"]] == [8, STEPS]


def test_tensorboard_hides_what_was_told_but_not_noted(
    runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def note(self: Tracking, run: TrackedRun) -> None:
        if run.step == 8:
            raise KilledError
        noted(self, run)

    run, noted = runs / "not-noted", Tracking._note
    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "_note", note)
        with pytest.raises(KilledError):
            train(run_config("fishr"), digits, run, device="cpu", track="tensorboard")
    assert [step for step, _ in tensorboard_points(run)["train/loss"]] == [4, 8]
    train(run_config("fishr"), digits, run, device="cpu", track="tensorboard")
    check_tracked(run, digits, "tensorboard")


def test_who_interrupts_twice_waits_for_no_tracker(runs: Path, digits: MultiDomainDataset) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run_config(), digits, runs / "twice", device="cpu", observer=AtStep(6, interrupt), track="mlflow")
    assert mlflow_run(runs / "twice").info.status == "RUNNING"


def test_a_run_that_is_done_tells_nothing(runs: Path, digits: MultiDomainDataset) -> None:
    run = runs / "done"
    train(run_config(), digits, run, device="cpu")
    assert not train(run_config(), digits, run, device="cpu", track="tensorboard").trained
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "model", "DONE"}


def test_without_its_note_a_run_is_tracked_as_a_new_one(runs: Path, digits: MultiDomainDataset) -> None:
    run = runs / "anew"
    stop_at(5, digits, run, track="mlflow")
    first = mlflow_run(run).info.run_id
    (run / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json cannot be read: delete it to track the run as a new one"):
        train(run_config("fishr"), digits, run, device="cpu", track="mlflow")
    (run / "tracking.json").unlink()
    train(run_config("fishr"), digits, run, device="cpu", track="mlflow")
    assert mlflow_run(run).info.run_id != first
    check_tracked(run, digits, "mlflow")


# Trackers that fail


def test_a_tracker_that_cannot_be_reached_is_an_error_before_the_training(
    runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "away"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(TrackingError, match=r"^mlflow does not track the run in .*away \(.*\): mend the cause, or"):
            train(run_config("fishr"), digits, run, device="cpu", track="mlflow")
    assert (run / "metrics.jsonl").read_text() == ""
    train(run_config("fishr"), digits, run, device="cpu", track="mlflow")
    check_tracked(run, digits, "mlflow")


def test_a_tracker_that_has_lost_the_run_is_an_error(runs: Path, digits: MultiDomainDataset) -> None:
    run = runs / "lost"
    stop_at(5, digits, run, track="mlflow")
    (run / "tracking.json").write_text(json.dumps({"mlflow": {"name": "f" * 32, "step": 4}}))
    with pytest.raises(TrackingError, match=r"delete .*tracking\.json to track the run as a new one, or train without"):
        train(run_config("fishr"), digits, run, device="cpu", track="mlflow")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_could_not_be_told_is_told_later(
    tracker: str,
    runs: Path,
    digits: MultiDomainDataset,
    undisturbed: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    """The tracker is away for two of the three records."""
    run, add = runs / f"later-{tracker}", CLASSES[tracker].add

    def away(self: Any, metrics: dict[str, float], step: int) -> None:
        if not tried or tried[-1] < 2:
            tried.append(len(tried) + 1)
            raise ConnectionError("nobody\nanswers")
        add(self, metrics, step)

    tried: list[int] = []
    monkeypatch.setattr(CLASSES[tracker], "add", away)
    train(run_config("fishr"), digits, run, device="cpu", track=tracker)
    assert warnings_logged() == [
        f"{tracker} cannot be told of the run in {run} (ConnectionError: nobody\nanswers): training goes on, and it is "
        "told again with the next record"
    ]
    assert len(tried) == 2
    check_tracked(run, digits, tracker)
    assert outcome(run) == undisturbed("fishr")


@pytest.mark.parametrize("method", ["add", "add_outcome", "leave"])
def test_a_tracker_that_stays_away_harms_no_run(
    method: str,
    runs: Path,
    digits: MultiDomainDataset,
    undisturbed: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[], list[str]],
) -> None:
    run = runs / f"away-{method}"

    def away(*arguments: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(TensorBoard, method, away)
    assert train(run_config("fishr"), digits, run, device="cpu", track="tensorboard").trained
    assert outcome(run) == undisturbed("fishr")
    assert warnings_logged()[-1] == (
        f"tensorboard cannot be told of the run in {run} (ConnectionError: nobody answers): what it misses is in "
        f"{run / 'metrics.jsonl'}"
    )
    assert len(warnings_logged()) == (2 if method == "add" else 1)


def test_an_open_run_of_somebody_else_is_left_alone(runs: Path, digits: MultiDomainDataset, tmp_path: Path) -> None:
    import wandb

    with wandb.init(dir=tmp_path, name="theirs") as theirs:
        with pytest.raises(TrackingError, match=r"the run 'theirs' is open in this process: end it by wandb\.finish"):
            train(run_config("fishr"), digits, runs / "theirs", device="cpu", track="wandb")
        theirs.log({"still": 1})


# What is around


def test_the_environment_is_heeded_and_left_as_it_was(
    runs: Path, digits: MultiDomainDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train(run_config(), digits, runs / "mine", device="cpu", track="mlflow")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not mlflow.is_tracking_uri_set()
    experiment = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}").get_experiment_by_name("mine")
    assert experiment.experiment_id == mlflow_run(runs / "mine").info.experiment_id

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs / 'mlflow.db'}")
    train(run_config(), digits, tmp_path / "elsewhere", device="cpu", track="mlflow")
    assert not (tmp_path / "mlflow.db").exists()

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    train(run_config(), digits, runs / "mine-too", device="cpu", track="wandb")
    assert not (runs / "mine-too" / "wandb").exists()
    assert {record.run.project for record in wandb_records(tmp_path) if record.HasField("run")} == {"theirs"}


def test_stdout_is_left_to_results(
    runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client of an MLflow server prints where a run that ends can be seen."""
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setattr(MLFlowLogger, "finalize", lambda self, status: print("View run at"))  # noqa: T201
    train(run_config(), digits, runs / "printed", device="cpu", track="mlflow")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "View run at\n")


def test_every_process_of_a_job_tracks_its_run(
    runs: Path, digits: MultiDomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second one, SLURM_PROCID=1, in which Lightning's loggers say nothing by themselves."""
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    train(run_config("fishr"), digits, runs / "second-process", device="cpu", track="tensorboard")
    assert rank_zero_only.rank == 1
    check_tracked(runs / "second-process", digits, "tensorboard")


@pytest.mark.parametrize("package", ["lightning", "mlflow"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"^--track mlflow needs the package {package}: pip install 'fishr\[tracking\]'$"
    ):
        check_tracker("mlflow")


def test_a_folder_with_a_packages_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_tracker("wandb")


def test_an_unknown_tracker_is_an_error_before_anything_is_written(digits: MultiDomainDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'mlfow'; did you mean 'mlflow'\?"):
        train(run_config(), digits, tmp_path / "run", device="cpu", track="mlfow")
    assert not (tmp_path / "run").exists()
