"""The real size: a random ChatGLM2-6B in 4 bits on this machine, and what that takes.

    python -m bench.bench_full_size [--folder F]     prints a table and writes bench/results/

Makes an fp16 base of 28 layers, hidden 4096, vocabulary 65,024 in F (default build/full_size), 12.5
GB, shard by shard, unless it is there. Then it runs every stage in a process of its own:

    quantise   `glmkern quantize --bits 4`, streamed from the fp16 shards
    load       ChatGLM.from_pretrained of the 4-bit folder
    step       one training step of the official shape: 64 + 128 tokens, prefix 128, batch 1
    generate   ten tokens after a prompt of 64
    step-8, generate-8: the same with --output_layer_bit 8

A stage's memory is the largest its process ever had resident (ru_maxrss), Python and torch
included. Beside the times of step and generate stand their useful flops and the machine's float32
matrix product rate, measured right after. What the formats cost in accuracy is measured on the
small base of `glmkern demo`, which was trained: the loss of its held-out rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.clock import seconds_per_round
from bench.harness import RESULTS
from bench.roofline import gemm_probe, machine
from glmkern import ChatGLM, ChatGLMConfig, ChatGLMTokenizer, demo
from glmkern.checkpoint import expected_shapes, quantize_folder, write_base
from glmkern.model.packing import pack_rows
from glmkern.training.data.examples import read_examples
from glmkern.training.data.rows import build_training_rows

FOLDER = Path(__file__).resolve().parents[1] / "build/full_size"
# Asked of each stage: GiB resident, seconds.
ASKED = {"quantise": (6.0, None), "load": (4.5, 60), "step": (5.5, None), "generate": (5.5, None)}
FORMATS = {
    "as trained, float16": {},
    "4 bits": {"quantization_bit": 4},
    "8 bits": {"quantization_bit": 8},
    "output layer in 8 bits": {"output_layer_bit": 8},
    "4 bits, output layer in 8 bits": {"quantization_bit": 4, "output_layer_bit": 8},
}
SHARD_BYTES = 2_000_000_000
PROMPT, RESPONSE, PREFIX, NEW_TOKENS = 64, 128, 128, 10


class Row(NamedTuple):
    input_ids: list[int]
    labels: list[int]


def chatglm2_6b() -> ChatGLMConfig:
    """As published, but for the words around the architecture."""
    return ChatGLMConfig(
        num_layers=28,
        padded_vocab_size=65024,
        hidden_size=4096,
        ffn_hidden_size=13696,
        kv_channels=128,
        num_attention_heads=32,
        seq_length=32768,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        torch_dtype="float16",
        eos_token_id=2,
        pad_token_id=0,
    )


def make_base(folder: Path) -> None:
    """A random fp16 base; the gain of every linear is 1, so nothing overflows."""
    config, generator = chatglm2_6b(), torch.Generator().manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if "layernorm" in name:
            return torch.ones(shape, dtype=torch.float16)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        # From a pool of numbers: drawing six billion would take longer than everything else.
        pool = torch.randn(2**22, generator=generator) * scale
        rows = -(-torch.Size(shape).numel() // len(pool))
        shifts = torch.randint(len(pool), (rows,), generator=generator).tolist()
        numbers = torch.cat([pool.half().roll(shift) for shift in shifts])
        return numbers[: torch.Size(shape).numel()].view(shape)

    write_base(
        folder,
        config,
        ((name, weight(name, shape)) for name, shape in expected_shapes(config).items()),
        SHARD_BYTES,
    )


def stage_quantise(folder: Path) -> dict:
    return _timed(lambda: quantize_folder(folder / "fp16", folder / "int4", 4))


def stage_load(folder: Path) -> dict:
    return _timed(lambda: ChatGLM.from_pretrained(folder / "int4", "cpu"))


def stage_step(folder: Path, output_layer_bit: int | None = None) -> dict:
    """Forward, backward and the optimiser's step of the prefix."""
    model = ChatGLM.from_pretrained(
        folder / "int4", "cpu", pre_seq_len=PREFIX, output_layer_bit=output_layer_bit
    ).train()
    optimiser = torch.optim.AdamW(model.prefix_encoder.parameters(), lr=2e-2)
    ids = torch.randint(1000, 60000, (PROMPT + RESPONSE,)).tolist()
    batch = pack_rows([Row(ids, [-100] * PROMPT + ids[PROMPT:])])

    def step() -> float:
        loss = model.loss(batch)
        loss.backward()
        optimiser.step()
        return loss.item()

    result = _timed(step)
    if not result["value"] > 0:
        raise RuntimeError(f"the loss is {result['value']}")
    return result | _gemm_rate()


def stage_generate(folder: Path, output_layer_bit: int | None = None) -> dict:
    model = ChatGLM.from_pretrained(
        folder / "int4", "cpu", pre_seq_len=PREFIX, output_layer_bit=output_layer_bit
    ).eval()
    ids = torch.randint(1000, 60000, (1, PROMPT))
    result = _timed(
        lambda: model.generate(
            ids, max_new_tokens=NEW_TOKENS, eos_token_id=[], do_sample=False
        ).shape[1]
    )
    return result | _gemm_rate()


def _timed(call: Callable) -> dict:
    start = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - start
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": round(seconds, 2),
        "gib": round(gib, 2),
        "value": value if isinstance(value, (int, float)) else None,
    }


def stage_flops(stage: str) -> int | None:
    # Not at the top: the benchmark's peers would count in the memory of the stages.
    from bench.bench_train import flops, linear_weights

    config = chatglm2_6b()
    if stage.startswith("step"):
        return flops(config, [(PROMPT, RESPONSE)])
    if stage.startswith("generate"):
        output = config.hidden_size * config.padded_vocab_size * NEW_TOKENS
        return 2 * (linear_weights(config) * (PROMPT + NEW_TOKENS - 1) + output)
    return None


def _gemm_rate() -> dict:
    probe = gemm_probe("cpu")
    (seconds,) = seconds_per_round([probe.call], "cpu", 3)
    return {"gemm_flops_per_s": probe.flops / sorted(seconds)[1]}


STAGES = {
    "quantise": stage_quantise,
    "load": stage_load,
    "step": stage_step,
    "generate": stage_generate,
    "step-8": partial(stage_step, output_layer_bit=8),
    "generate-8": partial(stage_generate, output_layer_bit=8),
}


def losses() -> dict[str, float]:
    """The held-out loss of the demo's base in every format."""
    tokenizer = ChatGLMTokenizer.from_pretrained(demo.BASE)
    examples = read_examples(demo.HELD_OUT_FILE, demo.PROMPT_COLUMN, demo.RESPONSE_COLUMN)
    batch = pack_rows(
        build_training_rows(examples, tokenizer, max_source_length=96, max_target_length=128).rows
    )
    with torch.inference_mode():
        return {
            name: ChatGLM.from_pretrained(demo.BASE, "cpu", **options).eval().loss(batch).item()
            for name, options in FORMATS.items()
        }


def as_markdown(run: dict) -> str:
    described = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    text = (
        "# full_size\n\nChatGLM2-6B in 4 bits. Made by `python -m bench.bench_full_size`, "
        f"which says what the stages are.\n\n{described}\n\n"
        "| stage | seconds | GiB resident at most | asked | TFLOP | of the product rate |\n"
        "|---|---|---|---|---|---|\n"
    )
    for name, row in run["stages"].items():
        gib, seconds = ASKED.get(name, (None, None))
        asked = f"{gib} GiB" if gib else "-"
        asked += f", {seconds} s" if seconds else ""
        tera = share = "-"
        if row["flops"]:
            tera = f"{row['flops'] / 1e12:.2f}"
            share = (
                f"{row['flops'] / row['seconds'] / row['gemm_flops_per_s']:.2f} of "
                f"{row['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"
            )
        text += f"| {name} | {row['seconds']} | {row['gib']} | {asked} | {tera} | {share} |\n"
    text += "\n| the demo's trained base | loss of its held-out rows |\n|---|---|\n"
    for name, loss in run["losses"].items():
        text += f"| {name} | {loss:.4f} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="30 GB are needed there")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.folder)))
        return
    if not (args.folder / "fp16/config.json").is_file():
        make_base(args.folder / "fp16")
    run = {"machine": machine("cpu"), "stages": {}}
    for name in STAGES:
        if name == "quantise" and (args.folder / "int4").is_dir():
            for old in (args.folder / "int4").iterdir():
                old.unlink()
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "bench.bench_full_size",
                "--stage",
                name,
                "--folder",
                args.folder,
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        run["stages"][name] = json.loads(child.stdout) | {"flops": stage_flops(name)}
        print(name, run["stages"][name], flush=True)
    run["losses"] = losses()
    path = RESULTS / "full_size.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(run))
    print(as_markdown(run))


if __name__ == "__main__":
    main()
