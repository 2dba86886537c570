import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domainbed_folders import record
from fishr.data.listing import BENCHMARKS
from fishr.errors import RunError
from fishr.records import Metrics, RunHistory, RunRecord
from fishr.reports import run_folders
from fishr.reports.domainbed import DATASETS
from fishr.reports.run_folders import INDEX, read_histories

CONFIG: dict[str, Any] = {
    "format": 2,
    "data": "pacs",
    "algorithm": "fishr",
    "hparams": {"lr": 1e-3},
    "test_domains": ["sketch"],
    "seed": 5,
    "trial": 1,
    "draw": 2,
    "steps": 600,
    "data_options": {"subset": None},
}


def write_run(folder: Path, steps: tuple[int, ...] = (300, 600), **changes: Any) -> Path:
    """A run of ours on two domains; it is not trained, but its files are those of one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            domains = {
                "photo": {"out": Metrics(0.5, 1.0)},
                "sketch": {"in": Metrics(step / 1000, 1.0)} | ({"out": Metrics(0.25, 1.0)} if step == 600 else {}),
            }
            file.write(RunRecord(step, {}, domains, 1.5).to_json() + "\n")
    (folder / "DONE").touch()
    return folder


def write_theirs(folder: Path, algorithm: str = "IB_ERM", steps: tuple[int, ...] = (0, 300), **args: Any) -> Path:
    """A run as DomainBed leaves it, without ``done``."""
    folder.mkdir(parents=True)
    records = [record("PACS", algorithm, (3,), 2, 1, step) for step in steps]
    for each in records:
        each["args"] |= args
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def only(path: Path) -> RunHistory:
    (history,) = read_histories([path]).histories
    return history


@pytest.fixture
def folders_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders whose files were read since."""
    read: list[str] = []
    original = run_folders._read_run

    def noted(folder: Path) -> RunHistory:
        read.append(folder.name)
        return original(folder)

    monkeypatch.setattr(run_folders, "_read_run", noted)
    return read


def test_a_run_of_ours(tmp_path: Path) -> None:
    history = only(write_run(tmp_path / "run"))
    assert history.dataset == "pacs"
    assert history.algorithm == "fishr"
    assert history.test_domains == ("sketch",)
    assert (history.draw, history.trial) == (2, 1)
    assert history.hparams == {"lr": 1e-3}
    assert history.protocol == {"made by": "fishr", "steps": 600, "data_options": {"subset": None}}
    assert history.domains == ("photo", "sketch")
    assert history.steps.tolist() == [300, 600]
    assert history.accuracy("sketch", "in").tolist() == [0.3, 0.6]
    np.testing.assert_equal(history.accuracy("sketch", "out"), [np.nan, 0.25])
    np.testing.assert_equal(history.accuracy("photo", "in"), [np.nan, np.nan])
    assert history.validated_domains == ["photo", "sketch"]
    assert history.hours == pytest.approx(600 * 1.5 / 3600)
    assert history.done


def test_a_run_of_domainbeds(tmp_path: Path) -> None:
    history = only(write_theirs(tmp_path / "run"))
    assert history.dataset == "pacs"
    assert history.algorithm == "ib-erm"
    assert history.test_domains == ("sketch",)
    assert (history.draw, history.trial) == (2, 1)
    assert history.domains == ("art_painting", "cartoon", "photo", "sketch")
    assert history.accuracy("photo", "out").tolist() == [
        record("PACS", "IB_ERM", (3,), 2, 1, step)["env2_out_acc"] for step in (0, 300)
    ]
    assert history.hours == pytest.approx(301 * 0.36 / 3600)
    assert not history.done


def test_domainbeds_datasets_that_we_do_not_know_keep_their_name_and_numbers(tmp_path: Path) -> None:
    history = only(write_theirs(tmp_path / "run", dataset="Debug28"))
    assert history.dataset == "Debug28"
    assert history.test_domains == ("env3",)


def test_the_names_of_domainbeds_datasets_lead_to_ours() -> None:
    ours = dict(DATASETS.values())
    assert {name: layout.domains for name, layout in BENCHMARKS.items()}.items() <= ours.items()


def test_runs_of_both_kinds_at_any_depth(tmp_path: Path) -> None:
    write_run(tmp_path / "ours/runs/0a")
    write_theirs(tmp_path / "theirs/0b")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / ".config.1234")  # half a folder, not yet renamed
    found = read_histories([tmp_path])
    assert [history.folder for history in found.histories] == [
        str(tmp_path / "ours/runs/0a"),
        str(tmp_path / "theirs/0b"),
    ]
    assert not found.problems


def test_a_run_that_two_paths_lead_to_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0a")
    assert len(read_histories([tmp_path, tmp_path / "runs"]).histories) == 1


def test_links_are_not_followed(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0a")
    (tmp_path / "runs/back").symlink_to(tmp_path)
    (tmp_path / "best").symlink_to(tmp_path / "runs/0a")
    for _ in range(2):  # the second time there is an index
        assert len(read_histories([tmp_path]).histories) == 1


def test_a_path_through_a_link_leads_to_the_same_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "sweep/runs/0a")
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    assert len(read_histories([Path("sweep"), tmp_path / "sweep", tmp_path / "link"]).histories) == 1


def test_folders_that_cannot_be_looked_into_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "0a")
    (tmp_path / "locked").mkdir()
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    original = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("locked"):
            raise PermissionError(13, os.strerror(13), path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = read_histories([tmp_path])
    assert len(found.histories) == 1
    assert found.problems == {
        str(tmp_path / "locked"): "cannot be read (PermissionError)",
        str(tmp_path / "?"): "cannot be read (UnicodeEncodeError)",
    }


@pytest.mark.parametrize("write", [write_run, write_theirs])
def test_a_last_line_that_was_cut_off_loses_that_line_only(write: Any, tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    records = next(run.glob("*.jsonl"))
    complete = only(run)
    records.write_text(records.read_text() + '{"step": 900, "dom')
    cut = only(run)
    assert cut.steps.tolist() == complete.steps.tolist()
    np.testing.assert_equal(cut.accuracies, complete.accuracies)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), "no records yet"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no records yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "line 1 of metrics.jsonl is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "cannot be read (KeyError: 'domains')"),
        (lambda run: (run / "config.json").write_text("[]"), "cannot be read (TypeError"),
        (
            lambda run: (run / "config.json").write_text(json.dumps(CONFIG | {"format": 1})),
            "written by another version of fishr (format 1, not 2)",
        ),
    ],
)
def test_what_counts_for_nothing_is_named(spoil: Any, reason: str, tmp_path: Path) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    spoil(bad)
    for _ in range(2):  # the second time there is an index
        found = read_histories([tmp_path])
        assert [history.folder for history in found.histories] == [str(good)]
        assert list(found.problems) == [str(bad)]
        assert reason in found.problems[str(bad)]


def test_a_run_of_no_sweep_has_no_draw_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert only(run).swept
    (run / "config.json").write_text(json.dumps(CONFIG | {"draw": None}))
    assert (only(run).swept, only(run).draw) == (False, 0)


def test_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing is no folder"):
        read_histories([tmp_path / "missing"])
    with pytest.raises(RunError, match=r"there is no run in .*: no folder with config\.json or results\.jsonl"):
        read_histories([tmp_path])


# The index


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests write counts as written long ago."""
    monkeypatch.setattr(run_folders, "JUST_NOW_NS", 0)


def comparable(histories: list[RunHistory]) -> list[Any]:
    return [
        [value.tolist() if isinstance(value, np.ndarray) else value for value in vars(history).values()]
        for history in histories
    ]


@pytest.mark.usefixtures("old")
def test_the_index_says_what_the_files_say(tmp_path: Path, folders_read: list[str]) -> None:
    write_run(tmp_path / "0a")
    write_run(tmp_path / "0b", steps=(300,), test_domains=["photo", "sketch"])
    write_theirs(tmp_path / "0c")
    first = comparable(list(read_histories([tmp_path]).histories))
    assert sorted(folders_read) == ["0a", "0b", "0c"]
    folders_read.clear()
    np.testing.assert_equal(comparable(list(read_histories([tmp_path]).histories)), first)
    assert not folders_read


def test_what_was_written_just_now_is_read_again(tmp_path: Path, folders_read: list[str]) -> None:
    write_run(tmp_path / "0a")
    read_histories([tmp_path])
    read_histories([tmp_path])
    assert folders_read == ["0a", "0a"]


@pytest.mark.usefixtures("old")
def test_only_runs_that_changed_are_read_again(tmp_path: Path, folders_read: list[str]) -> None:
    for name in ("changed", "finished", "removed", "same"):
        write_run(tmp_path / name, steps=(300,))
    (tmp_path / "finished/DONE").unlink()
    read_histories([tmp_path])
    folders_read.clear()

    write_run(tmp_path / "new")
    (tmp_path / "finished/DONE").touch()
    with (tmp_path / "changed/metrics.jsonl").open("a") as file:
        file.write(RunRecord(600, {}, {"photo": {}, "sketch": {}}, 1.5).to_json() + "\n")
    for file in (tmp_path / "removed").iterdir():
        file.unlink()
    (tmp_path / "removed").rmdir()
    histories = {Path(history.folder).name: history for history in read_histories([tmp_path]).histories}
    assert sorted(folders_read) == ["changed", "finished", "new"]
    assert sorted(histories) == ["changed", "finished", "new", "same"]
    assert histories["changed"].steps.tolist() == [300, 600]
    assert histories["finished"].done
    folders_read.clear()
    assert len(read_histories([tmp_path]).histories) == 4
    assert not folders_read


@pytest.mark.parametrize("content", [b"", b"not an index", b"ARROW1"])
def test_a_damaged_index_is_made_anew(content: bytes, tmp_path: Path) -> None:
    write_run(tmp_path / "0a")
    (tmp_path / INDEX).write_bytes(content)
    assert len(read_histories([tmp_path]).histories) == 1
    assert len((tmp_path / INDEX).read_bytes()) > 100


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "0a")

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(run_folders, "write_bytes", refuse)
    assert len(read_histories([tmp_path]).histories) == 1


def test_a_run_itself_gets_no_index(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0a")
    read_histories([run])
    assert not (run / INDEX).exists()
