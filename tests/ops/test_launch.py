"""Where Triton kernels are started: on the GPU of their tensors, whichever is current."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from glmkern.generation.in_place import Replay
from glmkern.triton_kernels import launch as launching


class FakeKernel:
    """Writes down its grid, its options and the device that is current when it starts."""

    def __init__(self, current):
        self.current, self.starts = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.starts.append((grid, list(self.current), options))


@pytest.fixture
def current_device(monkeypatch):
    """The devices that are entered now, the innermost last."""
    entered = []

    @contextlib.contextmanager
    def device(device):
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_first_tensor_is_current(current_device, index):
    kernel, gpu = FakeKernel(current_device), torch.device("cuda", index)
    tensor = SimpleNamespace(is_cuda=True, device=gpu)
    launching.launch(kernel, (3, 2), tensor, 7, num_warps=4, N=5)
    ((grid, entered, options),) = kernel.starts
    assert grid == (3, 2)
    assert entered == [gpu]
    assert options["N"] == 5
    assert current_device == []


def test_no_programs_are_no_launch(current_device):
    kernel = FakeKernel(current_device)
    launching.launch(kernel, (0, 2), SimpleNamespace(is_cuda=True), num_warps=4)
    assert kernel.starts == []


def test_a_graph_is_captured_on_the_model_s_device(current_device):
    """Not on the one that is current, or its kernels would run on another stream."""
    seen, gpu = [], torch.device("cuda", 1)
    graph = SimpleNamespace(replay=lambda: seen.append(list(current_device)))
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", lambda: graph),
        mock.patch.object(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "Stream", str),
        mock.patch.object(torch.cuda, "current_stream", str),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    ):
        replay = Replay(gpu, None)
        for _ in range(2):
            replay(lambda: seen.append(list(current_device)))
    # the first, eager step; the captured one; its replay
    assert seen == [[], [gpu], [gpu]]
