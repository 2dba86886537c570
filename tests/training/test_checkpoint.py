import hashlib
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fishr.data import MultiDomainDataset
from fishr.errors import RunError, RunInterruptedError
from fishr.training import AverageConfig, train
from fishr.training.averaging import make_average
from fishr.training.checkpoint import (
    Progress,
    load_checkpoint,
    newest_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from small_runs import AtStep, Outcome, outcome, run_config, signal_at

OLDER, NEWEST = "step-00000008", "step-00000009"


@pytest.fixture
def stopped(digits: MultiDomainDataset, tmp_path: Path) -> Path:
    """A run of Fishr that was stopped after step 9."""
    with pytest.raises(RunInterruptedError):
        train(run_config("fishr"), digits, tmp_path / "run", device="cpu", observer=signal_at(9))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [OLDER, NEWEST]
    return tmp_path / "run"


# Damage


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(checkpoint: Path) -> None:
    (checkpoint / "tensors.safetensors").write_bytes(b"")


def alter_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "tensors.safetensors").write_bytes(content)


def alter_the_state(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    file.write_text(file.read_text().replace('"step": 9', '"step": 7'))


def remove_the_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


def remove_the_checksums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()


def scramble_the_checksums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_bytes(b"\xff\xfe\x00")


def remove_everything(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        file.unlink()


DAMAGES = [
    truncate,
    empty,
    alter_a_byte,
    alter_the_state,
    remove_the_state,
    remove_the_checksums,
    scramble_the_checksums,
    remove_everything,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None],
    stopped: Path,
    digits: MultiDomainDataset,
    undisturbed: Callable[[str], Outcome],
    warnings_logged: Callable[[], list[str]],
) -> None:
    before = {file: file.read_bytes() for file in (stopped / "checkpoints" / NEWEST).iterdir()}
    damage(stopped / "checkpoints" / NEWEST)
    assert {file: file.read_bytes() for file in (stopped / "checkpoints" / NEWEST).iterdir()} != before
    train(run_config("fishr"), digits, stopped, device="cpu")
    assert warnings_logged() == [f"checkpoint {NEWEST} is damaged; continuing from {OLDER}"]
    assert outcome(stopped) == undisturbed("fishr")


def test_a_whole_checkpoint_is_used_without_a_word(
    stopped: Path,
    digits: MultiDomainDataset,
    undisturbed: Callable[[str], Outcome],
    warnings_logged: Callable[[], list[str]],
) -> None:
    train(run_config("fishr"), digits, stopped, device="cpu")
    assert warnings_logged() == []
    assert outcome(stopped) == undisturbed("fishr")


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(
    stopped: Path, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome]
) -> None:
    truncate(stopped / "checkpoints" / NEWEST)
    with pytest.raises(RunInterruptedError):
        train(run_config("fishr"), digits, stopped, device="cpu", observer=signal_at(9))
    shutil.rmtree(stopped / "checkpoints" / OLDER)
    train(run_config("fishr"), digits, stopped, device="cpu")
    assert outcome(stopped) == undisturbed("fishr")


def test_all_damaged_is_an_error_with_its_cure(stopped: Path, digits: MultiDomainDataset) -> None:
    truncate(stopped / "checkpoints" / OLDER)
    alter_a_byte(stopped / "checkpoints" / NEWEST)
    files = sorted(stopped.rglob("*"))
    with pytest.raises(
        RunError,
        match=rf"^every checkpoint in {stopped}/checkpoints is damaged \({NEWEST}, {OLDER}\): "
        "delete the run's folder to start anew$",
    ):
        train(run_config("fishr"), digits, stopped, device="cpu")
    assert sorted(stopped.rglob("*")) == files


def test_without_any_checkpoint_the_run_starts_anew(
    stopped: Path, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    train(run_config("fishr"), digits, stopped, device="cpu")
    assert outcome(stopped) == undisturbed("fishr")


def test_a_half_written_folder_of_a_killed_process_does_no_harm(
    stopped: Path, digits: MultiDomainDataset, undisturbed: Callable[[str], Outcome]
) -> None:
    shutil.copytree(stopped / "checkpoints" / NEWEST, stopped / "checkpoints/.step-00000012.999999")
    truncate(stopped / "checkpoints/.step-00000012.999999")
    assert newest_checkpoint(stopped / "checkpoints") == stopped / "checkpoints" / NEWEST
    train(run_config("fishr"), digits, stopped, device="cpu")
    assert outcome(stopped) == undisturbed("fishr")
    assert list(stopped.rglob("*999999*")) == []


def test_a_half_written_folder_is_gone_before_the_next_checkpoint(stopped: Path, digits: MultiDomainDataset) -> None:
    """A run that is killed often must not fill the disk."""
    shutil.copytree(stopped / "checkpoints" / NEWEST, stopped / "checkpoints/.step-00000012.999999")
    with pytest.raises(RunInterruptedError):
        train(run_config("fishr"), digits, stopped, device="cpu", observer=signal_at(10))
    assert list(stopped.rglob("*999999*")) == []


# What is kept


def test_only_the_last_two_are_kept(digits: MultiDomainDataset, tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*")))

    for step in (4, 5, 9, 11):
        observer = AtStep(step, lambda: (look(), signal.raise_signal(signal.SIGTERM)))
        with pytest.raises(RunInterruptedError):
            train(run_config(), digits, tmp_path / "run", device="cpu", observer=observer)
    look()
    steps = [[int(name.removeprefix("step-")) for name in names] for names in seen]
    assert steps == [[], [4], [5, 8], [8, 9], [9, 11]]


def test_all_state_is_in_it(stopped: Path) -> None:
    tensors = load_file(stopped / "checkpoints" / NEWEST / "tensors.safetensors")
    state = json.loads((stopped / "checkpoints" / NEWEST / "state.json").read_text())
    names = [name for name in tensors if name.startswith("algorithm/")]
    of_featurizer = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    expected = {f"featurizer.{name}" for name in {*of_featurizer, "1.num_batches_tracked"}}
    expected |= {"classifier.weight", "classifier.bias", "penalty.average.history"}
    assert {name.removeprefix("algorithm/") for name in names} == expected
    assert tensors["algorithm/penalty.average.history"].abs().sum() > 0
    parameters = 6
    optimizer = {f"optimizer/main/{index}/{key}" for index in range(parameters) for key in ("exp_avg", "exp_avg_sq")}
    assert optimizer < set(tensors)
    # The optimizer was reset at step index 6, so it has made the updates 7, 8 and 9 since.
    assert tensors["optimizer/main/0/step"] == 3
    assert (state["step"], state["steps_in_sums"], set(state["loss_sums"])) == (
        9,
        1,
        {"loss", "risk", "penalty", "penalty_weight"},
    )
    assert state["optimizers"]["main"]["param_groups"][0]["lr"] == 1e-2


def test_checksums_are_as_sha256sum_writes_them(stopped: Path) -> None:
    checkpoint = stopped / "checkpoints" / NEWEST
    expected = "".join(
        f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("tensors.safetensors", "state.json")
    )
    assert (checkpoint / "SHA256SUMS").read_text() == expected
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=checkpoint, check=True)


# Several optimizers


class Fading(SGD):
    """Gradient descent whose state is a plain number: the factor of the next update."""

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                factor = self.state[parameter].setdefault("factor", 1.0)
                parameter.data -= group["lr"] * factor * parameter.grad
                self.state[parameter]["factor"] = factor * 0.7


class ThreeParts(nn.Module):
    """Three layers with an optimizer each, and a buffer that is a number of updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(1, 1)
        self.register_buffer("updates", torch.tensor(0))
        # The same parameter under two names.
        self.one_again = self.one
        self.optimizers = {
            "main": Adam(self.one.parameters(), lr=0.1, amsgrad=True),
            "inner": SGD(self.two.parameters(), lr=0.1, momentum=0.9),
            "plain": Fading(self.three.parameters(), lr=0.1),
            "untouched": Adam([nn.Parameter(torch.zeros(2))], lr=0.5),
        }

    def update(self) -> None:
        for name in ("main", "inner", "plain"):
            self.optimizers[name].zero_grad()
        inputs = torch.arange(12.0).reshape(4, 3) / 12 + self.updates
        self.three(self.two(self.one(inputs))).square().mean().backward()
        for name in ("main", "inner", "plain"):
            self.optimizers[name].step()
        self.updates += 1

    def everything(self) -> list[Tensor]:
        return list(self.state_dict().values())


def test_every_optimizer_continues_with_the_same_bits(tmp_path: Path) -> None:
    whole = ThreeParts()
    for _ in range(3):
        whole.update()
    whole.optimizers["inner"].param_groups[0]["lr"] = 0.05
    save_checkpoint(tmp_path, {"model": whole}, whole.optimizers, Progress(3, {"loss": 0.1 + 0.2}, 2))
    for _ in range(3):
        whole.update()

    continued = ThreeParts()
    continued.update()
    restored = load_checkpoint(newest_whole_checkpoint(tmp_path), {"model": continued}, continued.optimizers)
    assert restored == Progress(3, {"loss": 0.1 + 0.2}, 2)
    assert continued.optimizers["inner"].param_groups[0]["lr"] == 0.05
    assert continued.optimizers["untouched"].state == {}
    for _ in range(3):
        continued.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.everything(), continued.everything(), strict=True))


def test_parts_with_the_same_names_stay_apart(tmp_path: Path) -> None:
    parts = {"one": nn.Linear(2, 1), "other": nn.Linear(2, 1)}
    save_checkpoint(tmp_path, parts, {}, Progress(3, {}, 0))
    restored = {"one": nn.Linear(2, 1), "other": nn.Linear(2, 1)}
    assert load_checkpoint(newest_whole_checkpoint(tmp_path), restored, {}) == Progress(3, {}, 0)
    for name, part in parts.items():
        assert torch.equal(restored[name].weight, part.weight)
        assert torch.equal(restored[name].bias, part.bias)
    assert not torch.equal(parts["one"].weight, parts["other"].weight)


def test_a_part_may_have_no_state_yet(tmp_path: Path) -> None:
    """Such as an average that has not begun."""
    parts = {"model": nn.Linear(2, 1), "average": make_average(AverageConfig("sma"))}
    save_checkpoint(tmp_path, parts, {}, Progress(3, {}, 0))
    assert load_checkpoint(newest_whole_checkpoint(tmp_path), parts, {}) == Progress(3, {}, 0)
    assert parts["average"].current() is None


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "checkpoints") is None
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    model = ThreeParts()
    for step in (9, 10, 100_000):
        save_checkpoint(tmp_path, {"model": model}, model.optimizers, Progress(step, {}, 0))
    assert load_checkpoint(newest_whole_checkpoint(tmp_path), {"model": model}, model.optimizers).step == 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00100000"]
