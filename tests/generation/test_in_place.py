"""Decoding in place: the texts of decoding step by step, with a step that a CUDA graph can hold."""

import contextlib
import gc
import weakref
from functools import partial
from unittest import mock

import pytest
import torch

import glmkern
from bench.fake_gpu import DEVICE, fake_gpu, host_copies, host_reads, launches
from bench.launches import count_token, decoding_without_data, fake_model
from glmkern import dispatch
from glmkern.generation import KeyValueCache, cache, decoding, in_place
from glmkern.generation.decoding import generate, make_decoder, stream_generate
from glmkern.generation.in_place import InPlaceDecoding, Look, Replay
from glmkern.generation.sampling import InvalidScores, replace_invalid_scores
from tests.model.models import SMALL, ChatGLMConfig, small_model

VOCABULARY = SMALL["padded_vocab_size"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return small_model()


def prompts(rows, longest):
    """Padded on the left; the first row has no padding."""
    ids = torch.randint(5, VOCABULARY, (rows, longest))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : int(torch.randint(longest, ()))] = 0
    return ids, mask


def frequent_tokens(model, ids, mask, count):
    """Tokens that greedy texts have, so that rows end early and at different steps."""
    texts = generate(model, ids, mask, max_new_tokens=12, eos_token_id=[])[:, ids.shape[1] + 2 :]
    return texts.flatten().unique()[:count].tolist()


@contextlib.contextmanager
def looking_every(steps):
    with mock.patch.object(InPlaceDecoding.__init__, "__defaults__", (steps,)):
        yield


@pytest.mark.parametrize("look_every", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_the_same_greedy_text(model, rows, look_every):
    """Rows end early; the first prompt's text crosses the bounds of the cache's room."""
    ids, mask = prompts(rows, longest=37)
    for ends in ([], frequent_tokens(model, ids, mask, 3)):
        options = dict(max_new_tokens=26, eos_token_id=ends)
        expected = generate(model, ids, mask, cuda_graphs=False, **options)
        with looking_every(look_every), mock.patch.object(in_place, "LEAST_GROWTH", 2):
            found = generate(model, ids, mask, cuda_graphs=True, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("room", [1, 4, 64])
def test_lengths_across_the_bounds_of_the_room(model, room):
    ids, mask = prompts(4, longest=9)
    expected = generate(model, ids, mask, cuda_graphs=False, max_new_tokens=40, eos_token_id=[])
    with mock.patch.object(cache, "BLOCK", room), mock.patch.object(in_place, "LEAST_GROWTH", room):
        found = generate(model, ids, mask, cuda_graphs=True, max_new_tokens=40, eos_token_id=[])
    assert torch.equal(found, expected)


def test_rows_leave_where_half_have_ended(model):
    ids, mask = prompts(16, longest=9)
    ends = frequent_tokens(model, ids, mask, 4)
    sizes = []
    select = KeyValueCache.select

    def keep(self, rows):
        sizes.append(len(rows))
        select(self, rows)

    options = dict(max_new_tokens=40, eos_token_id=ends)
    expected = generate(model, ids, mask, cuda_graphs=False, **options)
    with looking_every(2), mock.patch.object(KeyValueCache, "select", keep):
        found = generate(model, ids, mask, cuda_graphs=True, **options)
    assert torch.equal(found, expected)
    assert sizes
    assert all(2 * later <= earlier for earlier, later in zip([16, *sizes], sizes, strict=False))


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.3),
        dict(do_sample=True, top_p=0.8, temperature=0.9),
        dict(do_sample=True, top_k=0, repetition_penalty=0.7),
        dict(logits_processor=[replace_invalid_scores]),
    ],
    ids=["penalty", "draws", "draws, penalty", "official processor"],
)
def test_penalties_draws_and_the_official_processor(model, options):
    ids, mask = prompts(5, longest=11)
    ends = frequent_tokens(model, ids, mask, 3)
    texts = []
    for cuda_graphs in (False, True):
        generator = torch.Generator().manual_seed(3)
        asked = dict(max_new_tokens=20, eos_token_id=ends, generator=generator, **options)
        texts.append(generate(model, ids, mask, cuda_graphs=cuda_graphs, **asked))
    assert torch.equal(*texts)


def test_a_stream_and_the_cache_that_it_leaves(model):
    """Every step's ids; a conversation goes on from the cache either way."""
    first, second = (torch.randint(5, VOCABULARY, (1, n)) for n in (8, 3))
    found = []
    for cuda_graphs in (False, True):
        past = KeyValueCache(model)
        steps = []
        for prompt in (first, second):
            steps += stream_generate(
                model,
                prompt,
                past_key_values=past,
                max_new_tokens=5,
                eos_token_id=[],
                cuda_graphs=cuda_graphs,
            )
        found.append((steps, past.lens.tolist(), past.longest))
    (expected, *counts), (steps, *in_place_counts) = found
    assert all(map(torch.equal, expected, steps))
    assert len(steps) == len(expected) == 10
    assert counts == in_place_counts


def test_a_processor_of_the_caller(model):
    ids, mask = prompts(1, longest=3)
    seen = []

    def processor(ids, scores):
        seen.append(ids.shape[1])
        return scores

    generate(model, ids, mask, max_new_tokens=2, logits_processor=[processor], eos_token_id=[])
    assert seen == [3, 4]
    with pytest.raises(ValueError, match="cuda_graphs cannot be True beside a logits_processor"):
        generate(model, ids, mask, logits_processor=[processor], cuda_graphs=True)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_scores_that_are_no_numbers(model, cuda_graphs):
    broken = small_model()
    with torch.no_grad():
        broken.transformer.output_layer.weight[3] = torch.nan
    ids, mask = prompts(2, longest=4)
    options = dict(max_new_tokens=30, do_sample=True, eos_token_id=[], cuda_graphs=cuda_graphs)
    with pytest.raises(InvalidScores, match="no token can be drawn"):
        generate(broken, ids, mask, **options)
    with pytest.raises(InvalidScores):
        list(stream_generate(broken, ids, mask, **options))


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
    config = ChatGLMConfig.from_dict(SMALL | dict(ffn_hidden_size=38))
    with fake_gpu() as gpu, torch.inference_mode():
        running = decoding_without_data(fake_model(config).eval(), rows=3, **options)
        with gpu.recording() as events:
            running.step()
        assert launches(events)["prefix_attention_decode"] == config.num_layers
        assert host_reads(events) == []
        assert host_copies(events) == []
        with gpu.recording() as events:
            running._flags()
        assert host_reads(events) == []


def test_launches_of_a_token():
    """At most 12 a layer, where they are not one graph."""
    count = count_token(ChatGLMConfig.from_dict(SMALL | dict(ffn_hidden_size=38, num_layers=5)), 2)
    assert count.launches_a_layer <= 12
    assert count.launches <= 12 * 5 + 25


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


def test_a_decoding_ends_with_its_last_reference(model):
    """It holds a cache and the memory of a graph, for which Python's collector may come late."""
    ids, mask = prompts(2, longest=4)
    seen = []

    class Watched(InPlaceDecoding):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(weakref.ref(self))

    gc.disable()
    try:
        with mock.patch.object(decoding, "InPlaceDecoding", Watched):
            generate(model, ids, mask, max_new_tokens=4, eos_token_id=[], cuda_graphs=True)
        assert seen
        assert seen[0]() is None
    finally:
        gc.enable()


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
def test_where_a_step_suits_a_graph(model, monkeypatch, change, in_place):
    """An offloaded embedding has tokens come to the host; float64 has no kernels."""
    monkeypatch.setattr(decoding, "waits_for_values", lambda name, device: False)
    usual = dict(device=GPU, dtype=torch.float16, offload_embedding=False, config=model.config)
    assert make_decoder(mock.Mock(**usual | change), None).in_place is in_place


def test_ops_that_read_values_suit_no_graph(model, monkeypatch):
    """The reference of attention reads lengths, and GLMKERN_CHECK=1 has all values read."""
    away = mock.Mock(device=GPU, dtype=torch.float16, offload_embedding=False, config=model.config)
    monkeypatch.setattr(dispatch, "why_unavailable", lambda name, device: None)
    assert make_decoder(away, None).in_place
    with glmkern.backend("reference"):
        assert not make_decoder(away, None).in_place
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    assert not make_decoder(away, None).in_place


def test_draws_leave_the_generator_where_single_steps_do(model):
    """The next text, of another batch, is the same then."""
    ids, mask = prompts(5, longest=7)
    ends = frequent_tokens(model, ids, mask, 12)
    texts = []
    for cuda_graphs in (False, True):
        generator = torch.Generator().manual_seed(11)
        options = dict(max_new_tokens=30, do_sample=True, top_k=0, eos_token_id=ends)
        for _ in range(3):
            texts.append(
                generate(model, ids, mask, generator=generator, cuda_graphs=cuda_graphs, **options)
            )
    assert all(text.shape[1] < 37 for text in texts)
    assert all(map(torch.equal, texts[:3], texts[3:]))


def test_room_is_made_once_where_it_is_known(model):
    """No more than the text can need, before the first step."""
    ids, mask = prompts(2, longest=62)
    rooms = []
    grow = KeyValueCache._grow

    def keep(self, rows, entries):
        grow(self, rows, entries)
        rooms.append(self._room)

    with mock.patch.object(KeyValueCache, "_grow", keep):
        generate(model, ids[:1, :2], max_new_tokens=60, eos_token_id=[], cuda_graphs=True)
        assert rooms == [64]
        rooms.clear()
        broad = small_model(dict(seq_length=200))
        generate(broad, ids, mask, max_new_tokens=30, eos_token_id=[], cuda_graphs=True)
    assert rooms == [64, 128]


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
