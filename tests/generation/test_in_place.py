"""Decoding in place: the texts of decoding step by step, with a step that a CUDA graph can hold."""

import contextlib
import gc
import weakref
from unittest import mock

import pytest
import torch

from glmkern.generation import KeyValueCache, cache, decoding, in_place
from glmkern.generation.decoding import generate, stream_generate
from glmkern.generation.in_place import InPlaceDecoding
from glmkern.generation.sampling import InvalidScores, replace_invalid_scores
from tests.model.models import SMALL, small_model

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
