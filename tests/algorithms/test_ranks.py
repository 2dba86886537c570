"""Algorithms on several ranks train as in one process."""

import socket

import pytest
import torch
import torch.multiprocessing

import shared_batches
from fishr.training.ranks import Ranks
from oracles import relative_error


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """What each of several ranks has after training each algorithm; in most steps one of them lacks a domain."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(shared_batches.rank, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"found-{index}.pt") for index in range(request.param)]


@pytest.mark.parametrize("name", shared_batches.NAMES)
def test_ranks_train_as_one_process(name, found):
    expected = shared_batches.trained(name, Ranks("cpu", "32"))
    first = found[0][name]
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(first[key], value) < 1e-8, key
    for other in found[1:]:
        assert all(torch.equal(value, other[name][key]) for key, value in first.items())


def test_what_looks_at_inputs_is_for_one_device():
    assert {"arm", "mixup", "mtl"} == shared_batches.FOR_ONE_DEVICE
