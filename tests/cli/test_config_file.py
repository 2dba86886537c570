import json
from pathlib import Path

import pytest

from fishr.cli import main


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "train.yaml"


def train(config_file: Path, *arguments: str) -> int:
    return main(["train", "--config", str(config_file), "--quiet", *arguments])


WHOLE = """\
# a comment
data: colored-digits
algorithm: irm
steps: 4
subset: 60
select: true
class-balanced: false
average: null
test_domain: [-90%]
set:
  lr: 1e-3
  penalty_weight: 3
mean: []
"""


def test_a_file_gives_options_and_the_command_line_wins(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(WHOLE)
    assert train(config_file, "--algorithm", "vrex", "--output", str(tmp_path / "run")) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["algorithm"] == "vrex"
    assert config["steps"] == 4
    assert config["select"] is True
    assert config["class_balanced"] is False
    assert config["average"] is None
    assert config["test_domains"] == ["-90%"]
    assert config["hparams"]["lr"] == 0.001
    assert config["hparams"]["penalty_weight"] == 3


def test_the_command_line_takes_the_place_of_lists_too(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(WHOLE)
    run = tmp_path / "run"
    assert main(["train", "--set", "lr=0.01", f"--config={config_file}", "--quiet", "--output", str(run)]) == 0
    hparams = json.loads((run / "config.json").read_text())["hparams"]
    assert hparams["lr"] == 0.01
    assert hparams["penalty_weight"] != 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "line 1: unknown key 'stepz'; did you mean 'steps'? (known: algorithm, augment"),
        ("config: other.yaml", "line 1: unknown key 'config'"),
        ("# first\nsteps: many", "line 2: Invalid value for '--steps': "),
        ("steps: 1.5", "line 1: Invalid value for '--steps': "),
        ("steps: [1, 2]", "line 1: steps must be one value, got [1, 2]"),
        ("steps: true", "line 1: steps must be one value, got true"),
        ("steps: 3\nsteps: 4", "line 2: steps is given twice"),
        ("select: maybe", 'line 1: select must be true or false, got "maybe"'),
        ("set: 3", "line 1: set must be lines of the form name: value, got 3"),
        ("test-domain: [b, [c]]", 'line 1: test-domain must be one value, or a list of them, got ["b", ["c"]]'),
        ("steps: 0", "line 1: steps must be at least 1, got 0"),
        (
            "steps: 3\nset:\n  lr: 0.1\n  batchsize: 8",
            "line 4: unknown hyperparameter 'batchsize'; did you mean",
        ),
        ("precision: 64", "line 1: precision must be one of 32, bf16-mixed, got '64'"),
        ("test-domain: ['-90%', '-80%']", "line 1: unknown test domain of 'colored-digits' '-80%'"),
        ("- a", "line 1: expected lines such as steps: 1000"),
        ("steps: 3\na: [", "line 3: expected the node content, but found '<stream end>'"),
        ("a: !!python/name:os.system", "line 1: could not determine a constructor for the tag"),
        ("a: \x07", "is no YAML: unacceptable character"),
    ],
)
def test_mistakes_name_key_and_line(
    text: str, message: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(f"{text}\n")
    assert train(config_file, "--data", "colored-digits") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fishr: error: {config_file}")
    assert message in line


def test_files_that_cannot_be_read(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config_file) == 2
    assert f"there is no file {config_file}" in capsys.readouterr().err
    config_file.write_bytes(b"\xff\xfe\x00")
    assert train(config_file) == 2
    assert f"{config_file} is no YAML" in capsys.readouterr().err


def test_an_empty_file_gives_nothing(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file.write_text("# nothing yet\n")
    assert train(config_file) == 2
    assert "Missing option '--data'" in capsys.readouterr().err
