"""Beam search against the official record, transformers, and exhaustive search."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmkern.generation.beams import BeamSearch, Search
from glmkern.generation.cache import KeyValueCache
from glmkern.generation.decoding import make_decoder, read_prompts
from tests.generation.oracles import Recorder, cut_after_end, glm_twin, prompts
from tests.model.models import recorded_model, small_model


def search(model, ids, mask, num_beams, max_length, **options):
    """Sequences and the scores they won by."""
    decoder = make_decoder(model, KeyValueCache(model), **options)
    prompt = read_prompts(decoder.cache, ids, mask, max_length)
    return BeamSearch(decoder, num_beams).run(prompt, max_length)


def test_recorded_beam_search(golden):
    folder = golden / "chatglm2_tiny"
    case = load_file(folder / "gen_prefix_beam3.safetensors")
    model = recorded_model(folder, "noproj")
    ids, mask = case["input_ids"], case["attention_mask"]
    output = search(model, ids, mask, 3, 32)
    assert torch.equal(output.sequences, case["sequences"])
    torch.testing.assert_close(output.scores, case["sequences_scores"])
    assert torch.equal(model.generate(ids, mask, num_beams=3, max_length=32), case["sequences"])


@pytest.mark.parametrize("ends", range(6))
def test_texts_are_those_of_transformers(ends):
    """Its present release measures a text's length in another way than 4.30.2 did, so texts of all
    lengths are compared by their probability alone. Texts then end early, and prompts too."""
    model = small_model(pre_seq_len=None)
    twin = glm_twin(model)
    ids, mask = prompts([7, 3, 5])
    options = dict(num_beams=2 + ends % 4, max_length=20, pad_token_id=0, length_penalty=0.0)
    ends = list(range(10, 10 + ends))
    theirs = twin.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=ends or None, **options
    )
    ours = model.generate(ids, mask, eos_token_id=ends, **options)
    assert cut_after_end(ours, 7, ends) == cut_after_end(theirs, 7, ends)


@pytest.mark.parametrize("prefix", [None, 3])
def test_as_many_beams_as_texts_find_the_best_one(prefix):
    """Every text of up to three tokens over a vocabulary of five, of which one is the end, scored
    by the whole text's logits: sum / length, the end token not counted in the length."""
    vocabulary, end, new = 5, 2, 3
    model = small_model(dict(padded_vocab_size=vocabulary), pre_seq_len=prefix)
    prompt = torch.randint(vocabulary, (1, 2))
    scored = {}
    for tokens in itertools.product(range(vocabulary), repeat=new):
        stop = tokens.index(end) + 1 if end in tokens else new
        text = torch.cat([prompt, torch.tensor([tokens])], 1)
        logits = model(text).logits[0, 1:-1].log_softmax(-1).detach()
        total = sum(float(logits[i, tokens[i]]) for i in range(stop))
        scored[tokens[:stop]] = total / (2 + stop - (end in tokens))
    best = max(scored, key=scored.get)
    output = search(
        model,
        prompt,
        torch.ones_like(prompt),
        vocabulary**new,
        2 + new,
        eos_token_id=end,
        pad_token_id=0,
    )
    # Where all texts end early, the longest one's end token is the last column.
    assert tuple(output.sequences[0, 2 : 2 + len(best)].tolist()) == best
    assert output.scores.item() == pytest.approx(scored[best], rel=1e-5)


def test_hypotheses_follow_the_rules():
    """Two beams, whose ids have three tokens: 9 is the end."""
    one = Search(row=0, num_beams=2, length_penalty=1.0)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    # An end token counts among the first two candidates, not after them.
    assert one.step([-3.0, -4.0, -5.0, -6.0], [1, 0, 0, 1], [9, 7, 9, 8], ids, [9]) == [
        (0, 7, -4.0),
        (1, 8, -6.0),
    ]
    assert [(text.score, text.ids.tolist()) for text in one.best] == [(-1.0, [4, 5, 6])]
    assert not one.done
    # The best candidate is worth -2.7 / 3, better than the worst finished text, -1.
    one.step([-2.7, -2.8, -2.9, -3.0], [0, 1, 0, 1], [9, 7, 6, 5], ids, [9])
    assert [text.score for text in one.best] == pytest.approx([-1.0, -0.9]) and not one.done
    # The worst one leaves for a better; the best candidate is now no better than any.
    one.step([-2.8, -2.9, -3.0, -3.1], [1, 0, 1, 1], [9, 7, 6, 5], ids, [9])
    assert [text.score for text in one.best] == pytest.approx([-2.8 / 3, -0.9])
    assert one.done


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompts_that_are_done_leave_the_batch_without_effect(do_sample):
    model = small_model()
    ids, mask = prompts([6, 2, 4, 5])
    options = dict(
        num_beams=3,
        max_length=30,
        eos_token_id=list(range(20, 35)),
        pad_token_id=0,
        do_sample=do_sample,
    )
    dropped, kept = (
        model.generate(
            ids,
            mask,
            logits_processor=processors,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        for processors in ([], [Recorder()])
    )
    assert torch.equal(dropped, kept)
    lengths = (dropped != 0).sum(1)
    assert lengths.min() < lengths.max()


def test_a_batch_is_its_rows():
    """Where padding does not count as length."""
    model = small_model()
    lengths = [6, 2, 9]
    ids, mask = prompts(lengths)
    options = dict(
        num_beams=4,
        length_penalty=0.0,
        repetition_penalty=1.2,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=list(range(20, 28)),
    )
    batch = cut_after_end(model.generate(ids, mask, **options), 9, options["eos_token_id"])
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        assert cut_after_end(alone, length, options["eos_token_id"]) == [batch[row]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 50, 1.0), (0.95, 50, 0.7), (1.7, 1, 1.0), (0.6, 0, 0.01)],
)
def test_beam_sampling(temperature, top_k, top_p):
    """Against the rules written down plainly: whole texts through the model, every beam's sum
    warped by transformers' own warpers, which keep two tokens."""
    model, beams, max_length, end = small_model(), 3, 16, [11, 12, 13, 14]
    prompt = torch.randint(151, (1, 4))
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k, min_tokens_to_keep=1 + len(end)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p, min_tokens_to_keep=1 + len(end)))
    generator = torch.Generator().manual_seed(9)
    ids, sums, finished = prompt.repeat(beams, 1), torch.zeros(beams), []
    done = False
    while not done and ids.shape[1] < max_length:
        with torch.no_grad():
            scores = model(ids).logits[:, -1].log_softmax(-1) + sums.unsqueeze(1)
        for warper in warpers:
            scores = warper(ids, scores)
        flat = scores.flatten()
        drawn = torch.multinomial(flat.softmax(-1), (1 + len(end)) * beams, generator=generator)
        drawn = sorted(drawn.tolist(), key=lambda place: -flat[place])
        ended = [place for place in drawn[:beams] if place % 151 in end]
        for place in ended:
            finished.append((float(flat[place]) / ids.shape[1], ids[place // 151].tolist()))
        finished = sorted(finished)[-beams:]
        done = len(finished) == beams and finished[0][0] >= float(flat[drawn[0]]) / ids.shape[1]
        continued = [place for place in drawn if place % 151 not in end][:beams]
        ids = torch.stack([torch.cat([ids[p // 151], torch.tensor([p % 151])]) for p in continued])
        sums = flat[continued]
    if not done:
        finished += [
            (float(total) / max_length, text.tolist())
            for total, text in zip(sums, ids, strict=True)
        ]
    expected = max(finished)[1]
    text = model.generate(
        prompt,
        num_beams=beams,
        max_length=max_length,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=end,
        generator=torch.Generator().manual_seed(9),
    )[0].tolist()
    assert text == (expected + end[:1])[:max_length]


def test_sums_that_leave_the_range_are_told():
    with pytest.raises(ValueError, match="temperature 0.01 divides the sums .* use temperature 1"):
        small_model().generate(
            torch.randint(151, (1, 3)),
            num_beams=2,
            do_sample=True,
            temperature=0.01,
            max_length=40,
            eos_token_id=[],
        )
