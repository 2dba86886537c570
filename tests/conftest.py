"""Fixtures that more than one folder of tests needs."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A data root with the real MNIST: ``$FISHR_DATA``, else ``shared/data`` beside the checkout."""
    if named := os.environ.get("FISHR_DATA"):
        return Path(named)
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    if (beside / "MNIST" / "raw").is_dir():
        return beside
    reason = f"no real MNIST: FISHR_DATA is not set and there is no {beside / 'MNIST' / 'raw'}"
    if os.environ.get("FISHR_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
