"""Are a training step and a text of ChatGLM2-6B over 4-bit weights right on this GPU?

    python -m tests.gpu.judge_model graphs|step|text --rows rows.jsonl

Loss and prefix gradient of four rows, and ten greedy tokens: our kernels and plain PyTorch over
dequantised weights, each in float16 and float32, against float64; and texts by CUDA graphs beside
those step by step. One JSON object a line.
"""

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import glmkern
from bench.bench_step import make_model, make_steps
from bench.gpu.model import config_for, generate, rows_of
from bench.gpu.rows import RIGHT, WRONG, failure, plain, write_rows
from bench.oracles import relative_error
from bench.train_models import OURS
from glmkern import ChatGLM
from tests.backends import Backend, available
from tests.ops.numerics import GRADIENT

PRECISIONS = (torch.float16, torch.float32)
BACKENDS = ("triton", "reference")
PROMPTS, PROMPT, GREEDY = 2, 64, 10
DRAWN_UNTIL = 64  # tokens, of a random model's draws in the mean


def verdicts(part: str, device: str) -> Iterator[dict]:
    model = make_model(config_for(device), torch.float16, device)
    # of a capture that fails: what is called a graph here shall be one
    warnings.simplefilter("error", RuntimeWarning)
    try:
        yield from PARTS[part](model)
    except (KeyboardInterrupt, Exception) as error:
        yield {"what": part} | failure(error)


def judge_step(model: ChatGLM) -> Iterator[dict]:
    """By the rule of a kernel's gradient: three times the error of PyTorch's in the same precision,
    for the loss too, whose own may be small by luck."""
    exact = loss_and_gradient(model, torch.float64, "reference")
    found, ratios = {}, []
    for dtype in PRECISIONS:
        errors = {}
        for backend in BACKENDS:
            ours = loss_and_gradient(model, dtype, backend)
            errors[backend] = [relative_error(a, b) for a, b in zip(ours, exact, strict=True)]
            found[f"{plain(dtype)} {backend}"] = [f"{e:.2e}" for e in errors[backend]]
        ratios += [error / (GRADIENT * errors["reference"][1]) for error in errors["triton"]]
    verdict = RIGHT if all(0 <= ratio <= 1 for ratio in ratios) else WRONG  # NaN is neither
    yield {"what": "step", "verdict": verdict, "ratio": round(max(ratios), 3), **found}


def loss_and_gradient(model: ChatGLM, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """In float64, from a step of four rows in `dtype`."""
    twin = in_precision(model, dtype).train()
    (step,) = make_steps(twin, rows_of(model), [OURS]).values()
    with glmkern.backend(backend):
        return step.run().double(), step.gradient().double()


def prompts_for(model: ChatGLM, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.padded_vocab_size, (rows, PROMPT), generator=generator)
    return ids.to(model.device)


def judge_text(model: ChatGLM) -> Iterator[dict]:
    """Equal in float32, where no two tokens are as likely as each other; counted in float16."""
    ids = prompts_for(model, PROMPTS)
    same = {}
    for dtype in PRECISIONS:
        twin, texts = in_precision(model, dtype), []
        for backend in BACKENDS:
            with glmkern.backend(backend):
                texts.append(generate(twin, ids, GREEDY, graphs=False)[:, -GREEDY:])
        same[plain(dtype)] = int((texts[0] == texts[1]).sum())
    most = PROMPTS * GREEDY
    found = {f"same tokens of {most}, {name}": count for name, count in same.items()}
    verdict = RIGHT if same["float32"] == most else WRONG
    yield {"what": "greedy text", "verdict": verdict, **found}


def judge_graphs(model: ChatGLM) -> Iterator[dict]:
    """A CUDA graph's text is that of its steps one by one: greedy and drawn, across bounds of the
    cache's room, where rows end one after the other. In float32: alone, a row has another kernel
    than beside others, and step by step the last one is alone."""
    model = in_precision(model, torch.float32).eval()
    new = 300 if model.device.type == "cuda" else 40
    for rows, sampled in itertools.product((1, 5), (False, True)):
        ids, texts = prompts_for(model, rows), []
        if sampled:
            ends = torch.arange(0, model.config.padded_vocab_size, DRAWN_UNTIL)
        else:
            row, last = torch.arange(rows), ids.shape[1] + 2 * new // 5
            ends = generate(model, ids, 2 * new // 5 + 1, graphs=False)[row, last - new // 15 * row]
        options = dict(max_new_tokens=new, eos_token_id=ends.tolist(), do_sample=sampled)
        for graphs in (True, False):
            generator = torch.Generator(model.device).manual_seed(4)
            texts.append(model.generate(ids, generator=generator, cuda_graphs=graphs, **options))
        what = f"graphs beside single steps: {rows} rows, {'drawn' if sampled else 'greedy'}"
        verdict = RIGHT if torch.equal(*texts) else WRONG
        yield {"what": what, "verdict": verdict, "tokens": texts[1].shape[1] - ids.shape[1]}


def in_precision(model: ChatGLM, dtype: torch.dtype) -> ChatGLM:
    """The model, or a copy whose floating numbers are in `dtype`; the codes stay."""
    return model if dtype == model.dtype else copy.deepcopy(model).to(dtype)


PARTS = {"graphs": judge_graphs, "step": judge_step, "text": judge_text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    with available(Backend("triton", args.device)):
        rows = ({"part": "right"} | row for row in verdicts(args.part, args.device))
        return int(write_rows(args.rows, rows) > 0)


if __name__ == "__main__":
    sys.exit(main())
