import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishr.records import Metrics, RunRecord, read_records

RECORD = RunRecord(
    step=300,
    losses={"loss": 0.1 + 0.2, "penalty": 1e-30},
    domains={
        "+80%": {"in": Metrics(accuracy=0.75, loss=1 / 3), "out": Metrics(accuracy=1.0, loss=0.0)},
        'Ω \u2028 \x85 \\ " \n': {"in": Metrics(accuracy=0.0, loss=math.inf)},
    },
    seconds_per_step=0.0125,
)

floats = st.floats(allow_nan=False)
metrics = st.builds(Metrics, accuracy=st.floats(0, 1), loss=floats)
records = st.builds(
    RunRecord,
    step=st.integers(0, 10**9),
    losses=st.dictionaries(st.text(), floats, max_size=3),
    domains=st.dictionaries(
        st.text(), st.dictionaries(st.sampled_from(["in", "out"]), metrics, max_size=2), max_size=3
    ),
    seconds_per_step=floats,
)


@settings(derandomize=True, deadline=None)
@given(record=records)
def test_reads_back_from_one_line_of_json(record: RunRecord) -> None:
    line = record.to_json()
    assert len(line.splitlines()) == 1
    assert RunRecord.from_json(line) == record


def test_the_line_is_plain_json() -> None:
    assert json.loads(RECORD.to_json())["domains"]["+80%"] == {
        "in": {"accuracy": 0.75, "loss": 1 / 3},
        "out": {"accuracy": 1.0, "loss": 0.0},
    }


def test_a_loss_that_is_not_a_number_reads_back() -> None:
    record = RunRecord(1, {"loss": math.nan}, {}, 0.0)
    assert math.isnan(RunRecord.from_json(record.to_json()).losses["loss"])


def test_all_records_of_a_file_in_order(tmp_path: Path) -> None:
    others = [RECORD, RunRecord(600, {}, {}, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(record.to_json() + "\n" for record in others))
    assert read_records(tmp_path / "metrics.jsonl") == others


@pytest.mark.parametrize("kept", [0, 1, 20, -2, -1])
def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path, kept: int) -> None:
    """Even when only the end of the line is missing: the record will be written again."""
    line = RECORD.to_json() + "\n"
    (tmp_path / "metrics.jsonl").write_text(line + line[:kept])
    assert read_records(tmp_path / "metrics.jsonl") == [RECORD]


def test_no_file_and_an_empty_file_hold_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_records(tmp_path / "metrics.jsonl") == []
