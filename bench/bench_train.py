"""One training step, forward and backward of the prefix, beside GlmForCausalLM + PEFT.

    python -m bench.bench_train                 prints the table and writes bench/results/
    python -m bench.bench_train --profile       where our step's time goes

The model has ChatGLM2's shape at a size every machine holds: hidden 1024, 8 layers, 8 heads of 128
in 2 groups, ffn 3424, vocabulary 8192; 4 rows of 128 tokens, a label at every token, prefix 128, no
dropout, float32. Before anything is timed, loss and prefix gradient of all must be equal. Time is
taken in interleaved rounds of one process, peak memory in one process each.

The fraction is of the float32 matrix product rate, counting useful flops: 2 a weight and token for
every linear forward and again backward (no weight gradient is due, and no token gradient below the
first layer's attention), and 4 C a score of attention, 2.5 times that backward.
"""

import argparse
import functools
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import Work, add_arguments, run_and_report
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.checkpoint import expected_shapes
from glmkern.model.packing import unpad

ROWS, LENGTH, PREFIX = 4, 128, 128
TOLERANCE = 1e-5
PEERS = {f"GlmForCausalLM + PEFT, {attention}": attention for attention in ("eager", "sdpa")}
OURS = "glmkern"


def make_model() -> ChatGLM:
    """The model with random weights, in training mode."""
    config = ChatGLMConfig(
        num_layers=8, padded_vocab_size=8192, hidden_size=1024, ffn_hidden_size=3424,
        kv_channels=128, num_attention_heads=8, multi_query_attention=True, multi_query_group_num=2,
        add_qkv_bias=True, seq_length=512, torch_dtype="float32")
    model = ChatGLM(config, pre_seq_len=PREFIX)
    torch.manual_seed(0)
    model.load_base(((name, torch.ones(shape) if "layernorm" in name else torch.randn(shape) / 32)
                     for name, shape in expected_shapes(config).items()), torch.float32, "cpu")
    model.prefix_dropout = 0.0
    return model.train()


@dataclass(frozen=True)
class Step:
    """One implementation: `run` makes a step and returns its loss, `gradient` then gives the
    prefix's gradient [P, L * 2 * G * C] in ChatGLM2's layout."""

    run: Callable[[], Tensor]
    gradient: Callable[[], Tensor]


def make_step(name: str, model: ChatGLM, ids: Tensor) -> Step:
    return _our_step(model, ids) if name == OURS else _peer_step(model, ids, PEERS[name])


def _our_step(model: ChatGLM, ids: Tensor) -> Step:
    batch, _ = unpad(ids, labels=ids)
    prefix = model.prefix_encoder.embedding.weight

    def run() -> Tensor:
        prefix.grad = None
        loss = model.loss(batch)
        loss.backward()
        return loss.detach()

    return Step(run, lambda: prefix.grad)


def _peer_step(model: ChatGLM, ids: Tensor, attention: str) -> Step:
    from bench import peers  # transformers and PEFT must not weigh on our own peak memory

    peer = peers.glm_with_peft(model, attention).train()
    prefix = peers.prefix_of(peer)
    turn_back = functools.partial(peers.rotate_keys, positions=-len(prefix), cos_sin=model.cos_sin,
                                  config=model.config)

    def run() -> Tensor:
        prefix.grad = None
        loss = peer(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return Step(run, lambda: turn_back(prefix.grad))


def check_equal_work(steps: dict[str, Step]) -> None:
    """Loss and prefix gradient of every implementation are the same, to TOLERANCE max-norm."""
    loss, gradient = steps[OURS].run(), steps[OURS].gradient()
    for name in PEERS:
        errors = [relative_error(steps[name].run(), loss),
                  relative_error(steps[name].gradient(), gradient)]
        if max(errors) > TOLERANCE:
            raise RuntimeError(f"{name} does other work than {OURS}: relative difference of the "
                               f"loss {errors[0]:.1e}, of the prefix gradient {errors[1]:.1e}")


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def flops(config: ChatGLMConfig) -> int:
    """Useful flops of one step."""
    output = 2 * config.hidden_size * config.padded_vocab_size * ROWS * (LENGTH - 1)
    scores = ROWS * config.num_attention_heads * (LENGTH * (LENGTH + 1) // 2 + LENGTH * PREFIX)
    attention = int(3.5 * 4 * config.kv_channels * scores) * config.num_layers
    return linear_flops(config, ROWS * LENGTH) + 2 * output + attention


def linear_flops(config: ChatGLMConfig, tokens: int) -> int:
    """Of the four linears of every layer, forward and backward."""
    in_qkv = config.hidden_size * config.qkv_size
    weights = in_qkv + config.hidden_size * (config.query_size + 3 * config.ffn_hidden_size)
    return 2 * tokens * (2 * config.num_layers * weights - in_qkv)


def peak_memory(name: str) -> dict[str, float]:
    """MiB resident in this process once the model is there, and at the peak of two steps."""
    model = make_model()
    step = make_step(name, model, token_ids(model.config))
    del model
    gc.collect()
    # Linux: from here on the high-water mark starts again.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib()
    step.run()
    step.run()
    return {"resident_mib": before, "peak_mib": _resident_mib()}


def _resident_mib() -> float:
    """The process's largest resident set since it began, or since clear_refs."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(name: str) -> dict:
    """peak_memory in a process of its own."""
    command = [sys.executable, "-m", "bench.bench_train", "--memory", name]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"implementation": name, **json.loads(printed.splitlines()[-1])}


def profile(model: ChatGLM) -> str:
    step = make_step(OURS, model, token_ids(model.config))
    step.run()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step.run()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30,
                                         max_name_column_width=40)


def token_ids(config: ChatGLMConfig) -> Tensor:
    return torch.randint(config.padded_vocab_size, (ROWS, LENGTH),
                         generator=torch.Generator().manual_seed(1))


def works(device: str) -> list[Work]:
    model = make_model()
    ids = token_ids(model.config)
    steps = {name: make_step(name, model, ids) for name in (OURS, *PEERS)}
    check_equal_work(steps)
    return [Work("training step", name, (ROWS, LENGTH), torch.float32, 0, flops(model.config),
                 step.run, peer=name in PEERS) for name, step in steps.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cpu")
    add_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="only profile our step")
    parser.add_argument("--memory", choices=(OURS, *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profile:
        print(profile(make_model()))
    elif args.memory:
        print(json.dumps(peak_memory(args.memory)))
    else:
        memory = [measure_memory(name) for name in (OURS, *PEERS)]
        run_and_report("train", works, args, memory=memory)


if __name__ == "__main__":
    main()
