"""Greedy generation beside GlmForCausalLM.generate, which takes one prompt at a time.

    python -m bench.bench_generate                  prints the table and writes bench/results/
    python -m bench.bench_generate --rounds 3 --json x.json
    python -m bench.bench_generate --profile        where the time of our decoding goes

The model is bench_train's (hidden 1024, 8 layers, prefix 128), in float32:

    predict   16 prompts as long as AdvertiseGen's, 32 new tokens each; ours in one batch, the peer
              one after the other, as the official prediction runs
    decode    33 tokens after a prompt of one, so that all but the first pass are decoding; ours
              also over weights kept in float16 and in 4 bits

The peer is transformers with sdpa and its own cache, and the prefix as PEFT has it. Before anything
is timed all must say the same text. Lean weights are compared with a peer that has their values in
float32. Bytes are those of the weights, once a pass; flops 2 a weight and token. Time is taken in
interleaved rounds of one process.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.harness import Work, add_arguments, run_and_report
from bench.train_models import OURS, make_model
from glmkern import ChatGLM, ops
from glmkern.model.modules import FrozenLinear

PEER = "GlmForCausalLM + PEFT, one at a time"
# Tokens of neighbouring prompts of AdvertiseGen, template included; cut at 64 as officially.
PREDICT = (58, 43, 50, 58, 64, 47, 39, 52, 61, 44, 57, 49, 64, 41, 55, 46)
DECODE = (1,)
NEW_TOKENS = {"predict": 32, "decode": 33}
# Rounds are long: one of the peer's takes as long as all of the others.
ROUNDS = 7


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, both int64 [B, S], and how many tokens each shall get."""

    input_ids: Tensor
    attention_mask: Tensor
    new_tokens: int


def make_prompts(lengths: Sequence[int], new_tokens: int, vocabulary: int) -> Prompts:
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(vocabulary, (length,), generator=generator)
        mask[row, -length:] = 1
    return Prompts(ids, mask, new_tokens)


def ours(model: ChatGLM, prompts: Prompts) -> Tensor:
    """int64 [B, new tokens], of all prompts in one batch."""
    ids = model.generate(
        prompts.input_ids,
        prompts.attention_mask,
        max_new_tokens=prompts.new_tokens,
        eos_token_id=[],
    )
    return ids[:, prompts.input_ids.shape[1] :]


def one_at_a_time(peer: torch.nn.Module, prompts: Prompts) -> Tensor:
    """The same from glm_with_peft, a prompt after the other and without padding."""
    from transformers import GenerationConfig

    asked = GenerationConfig(
        max_new_tokens=prompts.new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    rows = []
    for row, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
        row = row[mask.bool()].unsqueeze(0)
        ids = peer.generate(
            input_ids=row, attention_mask=torch.ones_like(row), generation_config=asked
        )
        rows.append(ids[0, row.shape[1] :])
    return torch.stack(rows)


def make_peer(model: ChatGLM) -> torch.nn.Module:
    from bench import peers

    return peers.glm_with_peft(model, "sdpa").eval()


def with_float16_weights(model: ChatGLM) -> ChatGLM:
    """A copy whose embedding, linears and output layer are kept in float16."""
    found = copy.deepcopy(model)
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and "prefix_encoder" not in name:
            found.load_base([(name, weight.half())], torch.float32, "cpu")
    return found


def as_float32(model: ChatGLM) -> ChatGLM:
    """A copy with dense float32 weights of the same values."""
    found = copy.deepcopy(model)
    for linear in found.modules():
        if isinstance(linear, FrozenLinear) and linear.weight is None:
            weight = ops.dequantize(linear.matrix, torch.float32)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            linear.packed, linear.scale, linear.bits = None, None, 0
    found.config = replace(found.config, quantization_bit=0)
    return found.float()


def check_equal_texts(model: ChatGLM, peer: torch.nn.Module, prompts: Prompts) -> None:
    """Raises RuntimeError unless both say the same."""
    texts = ours(model, prompts), one_at_a_time(peer, prompts)
    if not torch.equal(*texts):
        row = int((texts[0] != texts[1]).any(1).nonzero()[0])
        raise RuntimeError(
            f"{PEER} says another text than {OURS}: prompt {row} got "
            f"{texts[1][row].tolist()} and {texts[0][row].tolist()}"
        )


def weight_bytes(model: ChatGLM) -> int:
    """Of what every decoded token reads: all weights but the embedding and the prefix."""
    return sum(
        x.nbytes
        for name, x in model.state_dict().items()
        if "prefix_encoder" not in name and "word_embeddings" not in name
    )


def works(model: ChatGLM) -> list[Work]:
    vocabulary = model.config.padded_vocab_size
    tasks = {
        name: make_prompts(lengths, NEW_TOKENS[name], vocabulary)
        for name, lengths in (("predict", PREDICT), ("decode", DECODE))
    }
    dense = sum(x.numel() for x in model.state_dict().values() if x.dim() == 2)
    dense -= model.prefix_encoder.embedding.weight.numel() + vocabulary * model.config.hidden_size

    def work(name: str, implementation: str, model: ChatGLM, call: Callable, peer: bool) -> Work:
        prompts = tasks[name]
        rows = len(prompts.input_ids)
        tokens = int(prompts.attention_mask.sum()) + rows * (prompts.new_tokens - 1)
        passes = prompts.new_tokens * (rows if peer else 1)
        shape = (*prompts.input_ids.shape, prompts.new_tokens)
        return Work(
            name,
            implementation,
            shape,
            torch.float32,
            passes * weight_bytes(model),
            2 * dense * tokens,
            lambda: call(prompts),
            peer,
        )

    found, peer = [], make_peer(model)
    for name, prompts in tasks.items():
        check_equal_texts(model, peer, prompts)
        found.append(work(name, OURS, model, lambda prompts: ours(model, prompts), False))
        found.append(work(name, PEER, model, lambda prompts: one_at_a_time(peer, prompts), True))
    for implementation, lean in (
        (f"{OURS}, float16 weights", with_float16_weights(model)),
        (f"{OURS}, 4 bits", copy.deepcopy(model).quantize(4)),
    ):
        check_equal_texts(lean, make_peer(as_float32(lean)), tasks["decode"])
        found.append(
            work(
                "decode",
                implementation,
                lean,
                lambda prompts, lean=lean: ours(lean, prompts),
                False,
            )
        )
    return found


def profile(model: ChatGLM) -> str:
    """The ops of both tasks by their own time."""
    text = ""
    for name, lengths in (("predict", PREDICT), ("decode", DECODE)):
        prompts = make_prompts(lengths, NEW_TOKENS[name], model.config.padded_vocab_size)
        ours(model, prompts)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            ours(model, prompts)
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16)
        text += f"\n{name}\n{table}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(device="cpu", rounds=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="only profile our generation")
    args = parser.parse_args()
    if args.profile:
        print(profile(make_model().eval()))
    else:
        run_and_report("generate", lambda device: works(make_model().eval()), args)


if __name__ == "__main__":
    main()
