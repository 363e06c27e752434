"""ChatGLM2-6B over 4-bit weights on this GPU: how fast are a step and a token?

    python -m bench.gpu.model step|decode|peer --rows rows.jsonl [--tables profiles.txt]

    step      times of the steps of bench_step, useful flops a second, peak memory, and where the
              time of one step goes
    decode    seconds and launches a token for 1 and for 16 rows, and where the time goes
    peer      both by GlmForCausalLM of transformers and PEFT's prefix, over a dense float16 base

One JSON object a line, as it comes; the profiler's tables go to a file of their own.
"""

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.bench_full_size import chatglm2_6b
from bench.bench_generate import PEER, make_prompts, one_at_a_time
from bench.bench_step import DEQUANTISED, ROW_BY_ROW, make_dense_model, make_model, make_steps
from bench.bench_train import flops
from bench.clock import seconds_per_round
from bench.gpu.profiler import Profile, profile, seconds_of
from bench.gpu.rows import failure, write_rows
from bench.train_models import ADVERTISEGEN_ROWS, OFFICIAL, OFFICIAL_WIDTH, OURS, make_rows, padded
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.generation.in_place import Replay

ROUNDS, OFFICIAL_ROUNDS = 5, 2
SETS = 4  # of four rows in a step, as officially
PROMPT = 64
DECODED = (8, 40)  # tokens; the difference of two texts leaves the prompt out
COUNTED = (4, 12)  # likewise, where launches are counted; the first steps are warm-up and capture
SMALL = replace(
    chatglm2_6b(),
    num_layers=2,
    padded_vocab_size=150,
    hidden_size=48,
    ffn_hidden_size=40,
    kv_channels=16,
    num_attention_heads=4,
    seq_length=256,
)
SMALL_ROWS = ((3, 4), (2, 5))

Row = dict[str, object]


def config_for(device: str) -> ChatGLMConfig:
    """The real model on a GPU, a small one in a rehearsal on a CPU."""
    return chatglm2_6b() if device == "cuda" else SMALL


def rows_of(model: ChatGLM) -> Sequence[tuple[int, int]]:
    """(tokens of the prompt, tokens learned) of four rows that go with the model's size."""
    return SMALL_ROWS if model.config.num_layers == SMALL.num_layers else ADVERTISEGEN_ROWS


@dataclass(frozen=True)
class Bench:
    """What the parts share: the model, where it is, and the file of the profiler's tables."""

    device: str
    tables: Path | None
    model: ChatGLM

    def step(self) -> Iterator[Callable[[], Row]]:
        self.model.train()
        yield self.memory_of_step
        yield lambda: self.profile_step(OURS)
        for name in (OURS, DEQUANTISED, ROW_BY_ROW):
            yield lambda name=name: self.time_step(SETS, name)
        for sets in (2 * SETS, 1):
            yield lambda sets=sets: self.time_step(sets, OURS)
        yield lambda: self.time_step(SETS, OFFICIAL)
        yield lambda: self.profile_step(ROW_BY_ROW)

    def decode(self) -> Iterator[Callable[[], Row]]:
        self.model.eval()
        for rows, graphs in itertools.product((1, 16), (True, False)):
            yield lambda rows=rows, graphs=graphs: self.time_decode(rows, graphs)
        for rows, graphs in ((1, True), (1, False), (16, False)):
            yield lambda rows=rows, graphs=graphs: self.profile_decode(rows, graphs)

    def time_step(self, sets: int, name: str) -> Row:
        lengths = rows_of(self.model) * sets
        (step,) = make_steps(self.model, lengths, [name]).values()
        rounds = OFFICIAL_ROUNDS if name == OFFICIAL else ROUNDS
        (seconds,) = seconds_per_round([step.run], self.device, rounds)
        start = time.perf_counter()
        step.run()
        host = time.perf_counter() - start
        return {
            "what": f"step of {len(lengths)} rows: {name}",
            "host_ms": round(host * 1e3, 2),
            **step_speed(self.model, lengths, seconds),
        }

    def memory_of_step(self) -> Row:
        (step,) = make_steps(self.model, rows_of(self.model) * SETS, [OURS]).values()
        if self.device == "cpu":
            return {"what": "memory of a step: not on a CPU"}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        return {
            "what": "memory of a step of 16 rows",
            "resident_mib": round(before / 2**20),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        }

    def profile_step(self, name: str) -> Row:
        (step,) = make_steps(self.model, rows_of(self.model) * SETS, [name]).values()
        step.run()
        found = profile(step.run, self.device)
        self.keep(found, f"a step: {name}")
        return {"what": f"profile of a step: {name}"} | found.as_row()

    def keep(self, found: Profile, title: str) -> None:
        if self.tables is not None:
            found.append_to(self.tables, title)

    def time_decode(self, rows: int, graphs: bool) -> Row:
        prompts = self.prompts(rows)
        return {"what": decoding(rows, graphs)} | decode_speed(
            lambda tokens: generate(self.model, prompts, tokens, graphs), rows, self.device
        )

    def profile_decode(self, rows: int, graphs: bool) -> Row:
        prompts = self.prompts(rows)
        few, many = (
            profile(
                lambda tokens=tokens: generate(self.model, prompts, tokens, graphs), self.device
            )
            for tokens in COUNTED
        )
        self.keep(many, decoding(rows, graphs))
        tokens = COUNTED[1] - COUNTED[0]
        return {
            "what": f"profile of {decoding(rows, graphs)}",
            "launches_per_token": (many.launches - few.launches) / tokens,
            "copies_per_token": (many.copies - few.copies) / tokens,
            "busy_ms_per_token": round((many.busy_ms - few.busy_ms) / tokens, 3),
        }

    def prompts(self, rows: int) -> Tensor:
        vocabulary = self.model.config.padded_vocab_size
        return make_prompts([PROMPT] * rows, 0, vocabulary).input_ids.to(self.device)

    def peer(self) -> Iterator[Callable[[], Row]]:
        """`model` is dense here. The peer pads rows to one length, as the official script does."""
        from bench import peers

        peer = peers.glm_with_peft(self.model, "sdpa")
        yield lambda: self.time_peer_step(peer.train())
        yield lambda: self.time_peer_decode(peer.eval())

    def time_peer_step(self, peer: torch.nn.Module) -> Row:
        lengths = rows_of(self.model) * SETS
        rows = make_rows(lengths, self.model.config.padded_vocab_size)
        ids, labels = (x.to(self.device) for x in padded(rows, OFFICIAL_WIDTH))

        def step() -> None:
            for row in range(len(ids)):
                peer(input_ids=ids[row : row + 1], labels=labels[row : row + 1]).loss.backward()

        (seconds,) = seconds_per_round([step], self.device, OFFICIAL_ROUNDS)
        return {"what": f"step of {len(lengths)} rows: {PEER}"} | step_speed(
            self.model, lengths, seconds
        )

    def time_peer_decode(self, peer: torch.nn.Module) -> Row:
        def generate_one(tokens: int) -> None:
            prompts = make_prompts([PROMPT], tokens, self.model.config.padded_vocab_size)
            ids, mask = (x.to(self.device) for x in (prompts.input_ids, prompts.attention_mask))
            one_at_a_time(peer, type(prompts)(ids, mask, tokens))

        return {"what": f"decoding of 1 row: {PEER}"} | decode_speed(generate_one, 1, self.device)


def step_speed(model: ChatGLM, lengths: Sequence[tuple[int, int]], seconds: Sequence[float]) -> Row:
    best, tokens = median(seconds), sum(map(sum, lengths))
    return {
        "tokens": tokens,
        "ms": round(best * 1e3, 2),
        "ms_range": [round(x * 1e3, 2) for x in (min(seconds), max(seconds))],
        "tokens_per_s": round(tokens / best),
        "useful_tflops": round(flops(model.config, lengths) / best / 1e12, 1),
    }


def decode_speed(generate_tokens: Callable[[int], object], rows: int, device: str) -> Row:
    """Of each further token, from two texts whose lengths differ."""
    times = []
    for tokens in DECODED:
        text = partial(generate_tokens, tokens)
        text()
        times.append(median(seconds_of(text, device) for _ in range(3)))
    seconds = (times[1] - times[0]) / (DECODED[1] - DECODED[0])
    return {
        "ms_per_token": round(seconds * 1e3, 3),
        "tokens_per_s": round(rows / seconds, 1),
        f"ms_of_prompt_and_{DECODED[0]}": round(times[0] * 1e3, 1),
    }


def decoding(rows: int, graphs: bool) -> str:
    return f"decoding {rows} rows" + (", CUDA graphs" if graphs else "")


def generate(model: ChatGLM, prompts: Tensor, tokens: int, graphs: bool | None = None) -> Tensor:
    """Greedy, to the last token asked for. RuntimeError where a graph is wanted and there is none,
    because a capture of this process has failed."""
    options = dict(max_new_tokens=tokens, eos_token_id=[], cuda_graphs=graphs)
    ids = model.eval().generate(prompts, **options)
    if graphs and Replay.captures_fail:
        raise RuntimeError("decoding goes on without CUDA graphs since a capture has failed")
    return ids


def rows_as_they_come(bench: Bench, part: str) -> Iterator[Row]:
    for work in getattr(bench, part)():
        try:
            yield {"part": part} | work()
        except (KeyboardInterrupt, Exception) as error:
            yield {"part": part, "what": part} | failure(error)
            if isinstance(error, KeyboardInterrupt):
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "decode", "peer"))
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    parser.add_argument("--tables", type=Path, help="file that the profiler's tables go to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # of a capture that fails: what is called a graph here shall be one
    warnings.simplefilter("error", RuntimeWarning)
    make = make_dense_model if args.part == "peer" else make_model
    model = make(config_for(args.device), torch.float16, args.device)
    bench = Bench(args.device, args.tables, model)
    return int(write_rows(args.rows, rows_as_they_come(bench, args.part)) > 0)


if __name__ == "__main__":
    sys.exit(main())
