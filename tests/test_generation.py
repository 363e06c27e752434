"""Greedy generation and the sampling warpers against the official record."""

import pytest
import torch
from safetensors.torch import load_file

from glmkern.generation import choose, warp
from tests.model.oracles import recorded_model, small_model


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "chatglm2_tiny"


@pytest.mark.parametrize("name", ["plain_b1", "plain_leftpad", "prefix_b1", "prefix_leftpad",
                                  "prefix_eos_leftpad"])
def test_greedy_sequences(folder, name):
    case = load_file(folder / f"gen_{name}.safetensors")
    weights = load_file(folder / "weights_eos_variant.safetensors") if "eos" in name else None
    model = recorded_model(folder, "noproj" if "prefix" in name else None, weights=weights)
    sequences = model.generate(case["input_ids"], case["attention_mask"],
                               max_length=case["sequences"].shape[1])
    assert torch.equal(sequences, case["sequences"])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"),
                         [(0.01, 50, 0.8), (0.8, 50, 0.8), (0.95, 50, 0.7), (1.0, 0, 0.5)])
def test_warpers(folder, temperature, top_k, top_p):
    case = load_file(folder / "sampling.safetensors")
    expected = case[f"warped_t{temperature}_k{top_k}_p{top_p}"]
    torch.testing.assert_close(warp(case["scores"], top_p, top_k, temperature), expected)


def test_draws_follow_the_distribution():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, -1)
    generator = torch.Generator().manual_seed(1)
    counts = choose(scores, True, 1.0, 0, 1.0, generator).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


def test_a_row_stops_at_any_end_token():
    model = small_model()
    prompt = torch.randint(1, 150, (2, 4))
    free = model.generate(prompt, max_length=12)
    end = int(free[0, 6])
    stopped = model.generate(prompt, max_length=12, eos_token_id=[end], pad_token_id=149)
    row = stopped[0].tolist()
    first = row.index(end, 4)
    assert torch.equal(stopped[0, :first + 1], free[0, :first + 1])
    assert all(token == 149 for token in row[first + 1:])


def test_configurations_generate_what_their_logits_say():
    for variant in ({}, dict(multi_query_attention=False, multi_query_group_num=4),
                    dict(rmsnorm=False, add_bias_linear=True),
                    dict(apply_residual_connection_post_layernorm=True, post_layer_norm=False)):
        model = small_model(variant)
        sequence = model.generate(torch.randint(1, 150, (1, 3)), max_length=10, eos_token_id=[])
        logits = model(sequence).logits
        assert torch.equal(logits[0, 2:-1].argmax(-1), sequence[0, 3:])


@pytest.mark.parametrize(("options", "sentence"), [
    (dict(max_length=4), "max_length 4 counts the prompt, which has 4 tokens"),
    (dict(max_length=65), "max_length 65 .* the model has 64 positions"),
    (dict(max_length=9, attention_mask=torch.tensor([[1, 1, 1, 0]])), "pad prompts on the left"),
    (dict(max_length=9, attention_mask=torch.ones(4)), r"must be \[B, S\] and not empty"),
    (dict(max_length=9, do_sample=True, temperature=0.0), "temperature must be above 0"),
    (dict(max_length=9, do_sample=True, top_p=0.0), "top_p in"),
])
def test_options_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_model().generate(torch.ones(1, 4, dtype=torch.int64), **options)
