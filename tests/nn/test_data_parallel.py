"""Several ranks give what one process gives: penalty, averaged gradients, moving average, errors."""

import pytest
import torch
import torch.multiprocessing

import data_parallel


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size, tmp_path):
    torch.multiprocessing.spawn(data_parallel.rank, (world_size, tmp_path), nprocs=world_size)
    found = torch.load(tmp_path / "found.pt")
    expected = data_parallel.gradients_and_history([torch.arange(21)] * data_parallel.STEPS)
    (error,) = found.pop("errors")
    assert "not available over several ranks" in error
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        assert (found[name] - value).abs().max() <= 1e-10 * value.abs().max(), name

    for index in range(world_size):
        assert "domain 2 has no sample" in (tmp_path / f"empty-{index}").read_text()
