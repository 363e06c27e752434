"""A decoding step as a CUDA graph: what it asks of a GPU, which steps suit one, its capture and
replay, and the looks at its flags."""

import contextlib
import gc
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

import glmkern
from bench.bench_full_size import chatglm2_6b
from bench.fake_gpu import DEVICE, fake_gpu, host_copies, host_reads, launches
from bench.launches import count_token, decoding_without_data, fake_model
from glmkern import dispatch
from glmkern.generation import decoding
from glmkern.generation.decoding import make_decoder
from glmkern.generation.in_place import Look, Replay
from glmkern.generation.sampling import replace_invalid_scores
from tests.model.models import EVEN, SMALL, ChatGLMConfig

CONFIG = ChatGLMConfig.from_dict(SMALL | EVEN)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(do_sample=True, top_p=0.8, temperature=0.9, repetition_penalty=1.1),
        dict(logits_processor=[replace_invalid_scores]),
    ],
    ids=["greedy", "draws, penalty", "official processor"],
)
def test_a_step_asks_the_gpu_for_nothing(options):
    """No value is read back, no shape depends on one, nothing comes from the host."""
    with fake_gpu() as gpu, torch.inference_mode():
        running = decoding_without_data(fake_model(CONFIG).eval(), rows=3, **options)
        with gpu.recording() as events:
            running.step()
        assert launches(events)["prefix_attention_decode"] == CONFIG.num_layers
        assert host_reads(events) == []
        assert host_copies(events) == []
        with gpu.recording() as events:
            running._flags()
        assert host_reads(events) == []


@pytest.mark.parametrize(("rows", "a_layer"), [(1, 9), (2, 12), (16, 12)])
def test_launches_of_a_token(rows, a_layer):
    """Where they are not one graph; of few rows three products have their splits added."""
    count = count_token(replace(chatglm2_6b(), num_layers=5), rows)
    assert count.launches <= a_layer * 5 + 15  # those outside of the layers


def test_the_recorder_sees_what_a_graph_cannot_hold():
    """The test of the test above: each way to wait for the GPU, and each copy to it, is seen."""
    with fake_gpu(found=2) as gpu:
        x = torch.empty(4, 3, device=DEVICE)
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x.isfinite().all()),
            lambda: x[0].tolist(),
            lambda: (x > 0).nonzero(),
            lambda: x[x[:, 0] > 0],
            lambda: x.cpu(),
            lambda: torch.empty(4, 3).copy_(x),
            lambda: torch.multinomial(x, 1),
            lambda: torch.equal(x, x),
        ):
            with gpu.recording() as events:
                wait()
            assert len(host_reads(events)) >= 1
        for copy in (
            lambda: torch.ones(3).to(DEVICE),
            lambda: torch.tensor([1, 2], device=DEVICE),
            lambda: x.copy_(torch.ones(4, 3)),
            lambda: x[torch.tensor([0, 1])],
        ):
            with gpu.recording() as events:
                copy()
            assert len(host_copies(events)) == 1
        with gpu.recording() as events:
            y = (x * 2)[:, 1:].contiguous()
            y.add_(1)
        assert launches(events) == {"mul": 1, "clone": 1, "add": 1}


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: a replay does what was captured."""

    log: list = []

    def register_generator_state(self, generator):
        self.log.append("generator")

    def replay(self):
        self.log.append("replay")


@contextlib.contextmanager
def fake_capture(fails=False):
    """torch.cuda without a GPU. A real capture runs nothing on the device."""
    log = []

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        log.append(f"capture, {stream}, {capture_error_mode}, gc {gc.isenabled()}")
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (FakeGraph, "log", log),
            (Replay, "captures_fail", False),
            (torch.cuda, "CUDAGraph", FakeGraph),
            (torch.cuda, "graph", capture),
            (torch.cuda, "Stream", lambda device: f"stream of {device}"),
            (torch.cuda, "current_stream", lambda device: f"current of {device}"),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield log


CAPTURE = "capture, stream of cuda:1, thread_local, gc False"
GPU = torch.device("cuda", 1)


def test_the_second_step_is_captured_and_then_replayed():
    """Also after a change of its tensors: no kernel is compiled within a capture."""
    with fake_capture() as log:
        replay = Replay(GPU, torch.Generator())
        cycle = ["run", "generator", CAPTURE, "run", "replay", "replay"]
        for _ in range(2):
            log.clear()
            for _ in range(3):
                replay(lambda: log.append("run"))
            assert log == cycle
            replay.forget()


def test_where_a_capture_fails_every_step_runs():
    """From then on in the whole process; an empty capture ends what the failed one has begun."""
    with fake_capture(fails=True) as log:
        run = partial(log.append, "run")
        replay = Replay(GPU, None)
        replay(run)
        with pytest.warns(RuntimeWarning, match="without CUDA graphs, as a capture failed: operat"):
            replay(run)
        replay(run)
        assert log == ["run", CAPTURE, "run", CAPTURE, "run", "run"]
        log.clear()
        another = Replay(GPU, torch.Generator())
        another(run)
        another(run)
        assert log == ["run", "run"]


def test_a_capture_without_memory_is_out_of_memory():
    def full():
        if len(log) > 1:
            raise torch.OutOfMemoryError("2 GiB")
        log.append("run")

    with fake_capture() as log:
        replay = Replay(GPU, None)
        replay(full)
        with pytest.raises(torch.OutOfMemoryError):
            replay(full)


def test_on_a_cpu_every_step_runs():
    log = []
    replay = Replay(torch.device("cpu"), None)
    for _ in range(3):
        replay(partial(log.append, "run"))
    assert log == ["run"] * 3


@pytest.mark.parametrize(
    ("change", "in_place"),
    [
        ({}, True),
        (dict(offload_embedding=True), False),
        (dict(dtype=torch.float64), False),
        (dict(device=torch.device("cpu")), False),
    ],
    ids=str,
)
def test_where_a_step_suits_a_graph(monkeypatch, change, in_place):
    """An offloaded embedding has tokens come to the host; float64 has no kernels."""
    monkeypatch.setattr(decoding, "waits_for_values", lambda name, device: False)
    usual = dict(device=GPU, dtype=torch.float16, offload_embedding=False, config=CONFIG)
    assert make_decoder(mock.Mock(**usual | change), None).in_place is in_place


def test_ops_that_read_values_suit_no_graph(monkeypatch):
    """The reference of attention reads lengths, and GLMKERN_CHECK=1 has all values read."""
    away = mock.Mock(device=GPU, dtype=torch.float16, offload_embedding=False, config=CONFIG)
    monkeypatch.setattr(dispatch, "why_unavailable", lambda name, device: None)
    assert make_decoder(away, None).in_place
    with glmkern.backend("reference"):
        assert not make_decoder(away, None).in_place
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    assert not make_decoder(away, None).in_place


def test_a_look_at_a_cpu_is_not_late():
    flags = torch.zeros(3, dtype=torch.bool)
    look = Look(flags, every=4, late=True)
    flags[1] = True
    assert look.at(flags) == [False, True, False]
    assert [look.is_due(step) for step in range(5)] == [True, False, False, False, True]


def test_a_look_at_a_gpu_is_a_look_late(monkeypatch):
    """It waits for the copy of the look before, which a stream of the flags' device makes."""
    asked = []

    class Event:
        def synchronize(self):
            asked.append("wait")

        def record(self, stream):
            asked.append(stream)

    class Flags:
        """What a GPU's tensor of two flags would be asked."""

        is_cuda, device = True, GPU

        def __init__(self, *values):
            self.values = torch.tensor(values)

        def __len__(self):
            return len(self.values)

    zeros, copy = torch.zeros, torch.Tensor.copy_
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **kw: zeros(*size, **kw))
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, flags, non_blocking: copy(self, flags.values)
    )
    look = Look(Flags(False, False), every=8, late=True)
    found = [look.at(Flags(*x)) for x in ((False, True), (True, True), (True, True))]
    assert found == [[False, False], [False, True], [True, True]]
    assert asked == ["wait", "stream of cuda:1"] * 3
