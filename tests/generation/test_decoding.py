"""Greedy decoding, sampling and streaming against the official record, transformers and itself."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from bench.oracles import relative_error
from glmkern.generation import KeyValueCache
from glmkern.generation.cache import BLOCK
from glmkern.generation.sampling import Sampling, replace_invalid_scores
from tests.generation.oracles import Recorder, cut_after_end, glm_twin, prompts
from tests.model.models import recorded_model, small_model

VARIANTS = {
    "groups": {},
    "one group": dict(multi_query_group_num=1),
    "interleaved": dict(multi_query_attention=False, multi_query_group_num=4),
    "layernorm": dict(rmsnorm=False, add_bias_linear=True),
    "post": dict(apply_residual_connection_post_layernorm=True, post_layer_norm=False),
}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "chatglm2_tiny"


@pytest.fixture(scope="module")
def cases(folder):
    return json.loads((folder / "cases.json").read_text())


# The official record


@pytest.mark.parametrize(
    "name",
    [
        "plain_b1",
        "plain_leftpad",
        "prefix_b1",
        "prefix_leftpad",
        "prefix_reppen",
        "prefix_eos_leftpad",
    ],
)
def test_recorded_greedy_texts_and_scores(folder, cases, name):
    case = load_file(folder / f"gen_{name}.safetensors")
    asked = cases[f"gen_{name}"]["kwargs"]
    weights = load_file(folder / "weights_eos_variant.safetensors") if "eos" in name else None
    model = recorded_model(folder, "noproj" if "prefix" in name else None, weights=weights)
    options = dict(
        max_length=asked["max_length"], repetition_penalty=asked.get("repetition_penalty", 1.0)
    )
    prompt = case["input_ids"], case["attention_mask"]
    assert torch.equal(model.generate(*prompt, **options), case["sequences"])

    # A processor sees rows that have ended, too, so that all recorded scores can be compared.
    recorder = Recorder()
    sequences = model.generate(*prompt, logits_processor=[recorder], **options)
    assert torch.equal(sequences, case["sequences"])
    assert relative_error(torch.stack(recorder.scores, 1), case["scores"]) < 1e-5


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.01, 50, 0.8), (0.8, 50, 0.8), (0.95, 50, 0.7), (1.0, 0, 0.5)],
)
def test_recorded_warpers(folder, temperature, top_k, top_p):
    case = load_file(folder / "sampling.safetensors")
    expected = case[f"warped_t{temperature}_k{top_k}_p{top_p}"]
    sampling = Sampling(True, top_p, top_k, temperature)
    torch.testing.assert_close(sampling.warp(case["scores"]), expected)


def test_recorded_invalid_scores(folder):
    case = load_file(folder / "sampling.safetensors")
    assert torch.equal(replace_invalid_scores(None, case["invalid_in"]), case["invalid_out"])
    assert torch.equal(replace_invalid_scores(None, case["scores"]), case["scores"])


def test_recorded_stream_over_two_rounds(folder, cases):
    case, model = cases["stream_prefix"], recorded_model(folder, "noproj")
    past = KeyValueCache(model)
    for turn, cached in (("turn1", case["past_tokens"]), ("turn2", None)):
        prompt, expected = torch.tensor(case[f"{turn}_input"]), case[turn]
        steps = list(
            model.stream_generate(prompt, max_length=len(expected[-1]), past_key_values=past)
        )
        assert [step.tolist() for step in steps] == [[ids] for ids in expected]
        if cached:
            assert past.lens.tolist() == [cached]


# transformers


@pytest.mark.parametrize("prefix", [None, 5])
def test_sampled_texts_are_those_of_transformers(prefix):
    """The same seed draws the same tokens, also after some rows have ended and left the batch."""
    model = small_model(pre_seq_len=prefix)
    ids, mask = prompts([7, 3, 1, 5, 4])
    ends = list(range(10, 30))
    options = dict(
        max_length=40, do_sample=True, top_p=0.9, top_k=20, temperature=1.3, eos_token_id=ends
    )
    torch.manual_seed(3)
    ours = model.generate(ids, mask, pad_token_id=0, **options)
    ended = torch.isin(ours[:, 7:], torch.tensor(ends)).any(1).sum()
    assert ended >= 3, "too few rows have ended for this to show anything"
    if prefix is None:
        twin = glm_twin(model)
        torch.manual_seed(3)
        theirs = twin.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        assert torch.equal(ours, theirs)
    # A processor keeps all rows in the batch; the draws are the same.
    torch.manual_seed(3)
    kept = model.generate(ids, mask, pad_token_id=0, logits_processor=[Recorder()], **options)
    assert torch.equal(ours, kept)


def test_repetition_penalty_is_that_of_transformers():
    model = small_model(pre_seq_len=None)
    ids, mask = prompts([6, 2, 4])
    options = dict(max_length=40, repetition_penalty=1.4, pad_token_id=0)
    theirs = glm_twin(model).generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(model.generate(ids, mask, **options), theirs)


# A batch, a step, a cache


def test_repetition_is_counted_row_by_row():
    model = small_model()
    lengths = [3, 8, 1]
    ids, mask = prompts(lengths)
    batch = model.generate(ids, mask, max_new_tokens=25, repetition_penalty=1.6)
    for row, length in enumerate(lengths):
        alone = model.generate(
            ids[row : row + 1, -length:], max_new_tokens=25, repetition_penalty=1.6
        )
        assert torch.equal(batch[row, 8 - length :], alone[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", [None, 5])
def test_a_batch_is_its_rows(variant, prefix):
    """Greedy texts of a padded batch, some rows ending early, are those of the rows alone, and what
    the model's logits say."""
    model = small_model(VARIANTS[variant], pre_seq_len=prefix)
    lengths = [4, 9, 1, 6]
    ids, mask = prompts(lengths)
    free = model.generate(ids, mask, max_new_tokens=30)
    ends = free[:2, 14].tolist()  # so that two rows end at their sixth new token at the latest
    batch = model.generate(ids, mask, max_new_tokens=30, eos_token_id=ends, pad_token_id=150)
    for row, length in enumerate(lengths):
        alone = model.generate(
            ids[row : row + 1, -length:], max_new_tokens=30, eos_token_id=ends, pad_token_id=150
        )[0]
        text = batch[row, 9 - length :]
        assert torch.equal(text[: len(alone)], alone)
        assert (text[len(alone) :] == 150).all()
        logits = model(alone.unsqueeze(0)).logits[0, length - 1 : -1]
        assert torch.equal(logits.argmax(-1), alone[length:])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_ended_rows_cost_nothing_and_the_prefix_is_made_once(monkeypatch, num_beams):
    model = small_model(projection=True)
    ids, mask = prompts([6, 2, 4, 5])
    ends = list(range(20, 35))
    options = dict(
        max_length=40, num_beams=num_beams, eos_token_id=ends, pad_token_id=0, length_penalty=0.0
    )
    rows, made = [], []
    read, encode = KeyValueCache.read, type(model.prefix_encoder).forward
    monkeypatch.setattr(
        KeyValueCache, "read", lambda self, new: rows.append(len(new)) or read(self, new)
    )
    monkeypatch.setattr(
        type(model.prefix_encoder), "forward", lambda self: made.append(self) or encode(self)
    )
    text = model.generate(ids, mask, **options)
    assert len(made) == 1
    assert rows == sorted(rows, reverse=True) and rows[0] > rows[-1]
    if num_beams == 1:
        # A step reads the rows that have not ended in the tokens so far.
        lengths = [len(row) for row in cut_after_end(text, 6, ends)]
        assert rows == [sum(n > step for n in lengths) for step in range(len(rows))]
    rows.clear()
    model.generate(ids, mask, logits_processor=[Recorder()], **options)
    assert set(rows) == {4 * num_beams}


def test_generation_grows_its_cache_by_blocks():
    """And what the cache holds then is what one pass over the whole text gives."""
    model = small_model(dict(seq_length=3 * BLOCK))
    ids, mask = prompts([3, 40])
    past, length = KeyValueCache(model), 2 * BLOCK + 9
    rooms, prompt = [], ids[1:]
    for step in model.stream_generate(prompt, max_length=length, past_key_values=past):
        rooms.append(past._room)
        text = step
    assert sorted(set(rooms)) == [BLOCK, 2 * BLOCK, 3 * BLOCK]
    assert past.lens.tolist() == [length - 1]
    whole = KeyValueCache(model)
    for _ in model.stream_generate(text[:, :-1], max_new_tokens=1, past_key_values=whole):
        pass
    for grown, fresh in zip(past._layers, whole._layers, strict=True):
        assert relative_error(grown[:, :, : length - 1], fresh[:, :, : length - 1]) < 1e-5


def test_a_text_continued_on_its_cache():
    """Rounds of several tokens after rounds of several tokens, in a batch of equal rows."""
    model = small_model()
    first, second = torch.randint(151, (3, 5)), torch.randint(151, (3, 4))
    past = KeyValueCache(model)
    *_, text = model.stream_generate(first, max_new_tokens=6, past_key_values=past)
    *_, more = model.stream_generate(second, max_new_tokens=7, past_key_values=past)
    # The last token that was generated is in no cache, as officially.
    whole = model.generate(torch.cat([text[:, :-1], second], 1), max_new_tokens=7)
    assert torch.equal(whole[:, 10:], more)


def test_streaming_yields_every_step_of_generate():
    model = small_model()
    ids, mask = prompts([2, 5])
    steps = list(model.stream_generate(ids, mask, max_length=16))
    assert [step.shape[1] for step in steps] == list(range(6, 17))
    whole = model.generate(ids, mask, max_length=16)
    assert all(torch.equal(step, whole[:, : step.shape[1]]) for step in steps)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_generate_what_their_logits_say(bits):
    model = small_model(dict(ffn_hidden_size=40)).quantize(bits)
    text = model.generate(torch.randint(151, (1, 3)), max_length=30)
    logits = model(text).logits
    assert torch.equal(logits[0, 2:-1].argmax(-1), text[0, 3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype):
    """The scores of every step are as near to the whole text's logits as the precision is."""
    model, recorder = small_model(dtype=dtype), Recorder()
    ids, mask = prompts([2, 5])
    text = model.generate(ids, mask, max_length=20, logits_processor=[recorder])
    text_mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.int64)], 1)
    positions = (text_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(text, text_mask, positions).logits[:, 4:-1].float()
    error = relative_error(torch.stack(recorder.scores, 1), logits)
    assert error < {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]


def test_a_generator_makes_draws_repeatable():
    model, prompt = small_model(), torch.randint(151, (3, 4))
    options = dict(max_length=30, do_sample=True, temperature=2.0)
    first, second, other = (
        model.generate(prompt, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_draws_follow_the_distribution():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, -1)
    sampling = Sampling(True, top_k=0, generator=torch.Generator().manual_seed(1))
    tokens = sampling.choose(scores, torch.arange(20_000), 20_000)
    counts = tokens.bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


def test_processors_act_in_their_order():
    model, prompt = small_model(), torch.randint(151, (2, 4))

    def only(token):
        def allow(input_ids, scores):
            assert input_ids.shape[0] == scores.shape[0] == 2
            return torch.full_like(scores, -1.0).index_fill(1, torch.tensor([token]), 0.0)

        return allow

    text = model.generate(prompt, max_new_tokens=3, logits_processor=[only(7), only(9)])
    assert (text[:, 4:] == 9).all()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_what_is_generated_can_be_learned(num_beams):
    """Inference's own tensors, which autograd refuses, stay inside."""
    model, table = small_model(), torch.nn.Embedding(151, 2)
    prompt = torch.randint(151, (2, 4))
    text = model.generate(prompt, max_length=9, num_beams=num_beams)
    *_, streamed = model.stream_generate(prompt, max_length=9)
    for ids in (text, streamed):
        table(ids).sum().backward()
        ids += 1


def test_processors_may_write_into_their_scores():
    def forbid(input_ids, scores):
        scores[:, 7:] = -float("inf")
        return scores

    prompt = torch.randint(151, (2, 4))
    for num_beams in (1, 2):
        text = small_model().generate(
            prompt, max_length=9, num_beams=num_beams, logits_processor=[forbid], eos_token_id=[]
        )
        assert (text[:, 4:] < 7).all()


def test_dropout_never_acts():
    model, prompt = small_model(dict(hidden_dropout=0.5)), torch.randint(151, (2, 4))
    assert torch.equal(
        model.generate(prompt, max_length=20), model.train().generate(prompt, max_length=20)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(max_length=4), "max_length 4 counts the prompt, which has 4 tokens"),
        (dict(max_length=65), "max_length 65 .* the model has 64 positions"),
        (
            dict(max_length=9, attention_mask=torch.tensor([[1, 1, 1, 0]])),
            "pad prompts on the left",
        ),
        (dict(max_length=9, attention_mask=torch.ones(4)), r"must be \[B, S\] and not empty"),
        (dict(max_length=9, do_sample=True, temperature=0.0), "temperature must be above 0"),
        (dict(max_length=9, do_sample=True, top_p=0.0), "top_p in"),
        (dict(max_length=9, num_beams=0), "num_beams must be at least 1, not 0"),
        (dict(max_length=9, repetition_penalty=0.0), "repetition_penalty must be above 0, not 0.0"),
    ],
)
def test_options_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_model().generate(torch.ones(1, 4, dtype=torch.int64), **options)


def test_a_cache_that_does_not_fit():
    model, prompt = small_model(), torch.randint(151, (1, 4))
    past = KeyValueCache(model)
    list(model.stream_generate(prompt, max_new_tokens=2, past_key_values=past))

    def more(ids=prompt, model=model, **options):
        next(model.stream_generate(ids, past_key_values=past, **options))

    with pytest.raises(ValueError, match="past_key_values has 1 rows"):
        more(prompt.repeat(2, 1), max_new_tokens=2)
    with pytest.raises(ValueError, match="without padding, not .* with 2 masked"):
        more(max_new_tokens=2, attention_mask=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="the model has 59 positions"):
        more(max_length=60)
    with pytest.raises(ValueError, match="of another model or prefix"):
        more(model=copy.deepcopy(model), max_new_tokens=2)
    model.use_prefix(None)
    with pytest.raises(ValueError, match="of another model or prefix"):
        more(max_new_tokens=2)


def test_a_callers_cache_keeps_its_rows():
    """Also those that have ended, or it could not be given back."""
    model, prompt = small_model(), torch.randint(151, (2, 3))
    end = int(model.generate(prompt, max_new_tokens=3, eos_token_id=[])[0, 4])
    past = KeyValueCache(model)
    *_, text = model.stream_generate(
        prompt, max_new_tokens=6, past_key_values=past, eos_token_id=[end]
    )
    assert len(past.lens) == 2
    next(model.stream_generate(text[:, -1:], max_new_tokens=2, past_key_values=past))
