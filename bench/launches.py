"""What a training step and a decoded token ask of a GPU, counted without one.

    python -m bench.launches          prints the table and writes it to bench/results/

Launches, reads that make the host wait, and copies from the host, of ChatGLM2-6B in float16 over
4-bit weights with a prefix of 128, on a GPU without data (fake_gpu.py). A pack is 16 rows of
AdvertiseGen or one of them, forward and backward, from the batch on the host to the gradient; its
prefix drops. A token is greedy, after 64 in the cache. Where decoding in place is replayed as a
CUDA graph, the host launches one graph a token, whatever it holds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.bench_full_size import chatglm2_6b
from bench.fake_gpu import DEVICE, Event, fake_gpu, host_copies, host_reads, launches
from bench.train_models import ADVERTISEGEN_ROWS, PREFIX, make_rows
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.checkpoint import expected_shapes
from glmkern.generation.cache import KeyValueCache
from glmkern.generation.decoder import Prompts
from glmkern.generation.decoding import make_decoder
from glmkern.generation.in_place import InPlaceDecoding
from glmkern.model.packing import pack_rows

RESULTS = Path(__file__).with_name("results")
CACHED, ROOM = 64, 128
LOSS_SCALE = 2.0**10


@dataclass(frozen=True)
class Count:
    """What a piece of work asks of the GPU; `kernels` by name, the most frequent first."""

    name: str
    launches: int
    launches_a_layer: float
    host_reads: list[str]
    host_copies: list[str]
    kernels: dict[str, int]


def fake_model(config: ChatGLMConfig, dtype: torch.dtype = torch.float16) -> ChatGLM:
    """On the GPU without data, in training mode, with weights of 4 bits."""
    with torch.device(DEVICE):
        model = ChatGLM(config, pre_seq_len=PREFIX)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        codes = len(shape) == 2 and ".layers." in name
        return torch.empty(shape, dtype=torch.int8 if codes else dtype, device=DEVICE)

    shapes = expected_shapes(config, bits=4)
    model.load_base(((name, tensor(name, shape)) for name, shape in shapes.items()), dtype, DEVICE)
    return model.train()


def decoding_without_data(model: ChatGLM, rows: int, **options: object) -> InPlaceDecoding:
    """After prompts of 64 tokens, with room for more."""
    state = KeyValueCache(model)
    state.lens, state.longest = torch.full((rows,), CACHED, device=DEVICE), CACHED
    state._grow(rows, ROOM)
    hidden = torch.empty(rows, model.config.hidden_size, dtype=model.dtype, device=DEVICE)
    ids = torch.zeros(rows, CACHED, dtype=torch.int64, device=DEVICE)
    decoder = make_decoder(model, state, cuda_graphs=True, **options)
    return InPlaceDecoding(decoder, Prompts(ids, ids[:, 0], hidden), CACHED + ROOM)


def events_of_pack(
    config: ChatGLMConfig, lengths: Sequence[tuple[int, int]], **chip: int
) -> list[Event]:
    """From the batch on the host to the gradient of the prefix; `chip` as fake_gpu takes it."""
    batch = pack_rows(make_rows(lengths, config.padded_vocab_size))
    with fake_gpu(**chip) as gpu:
        model = fake_model(config)
        with gpu.recording() as events:
            (model.loss(batch) * LOSS_SCALE).backward()
    return events


def events_of_token(config: ChatGLMConfig, rows: int, **chip: int) -> list[Event]:
    """Of a step of decoding in place."""
    with fake_gpu(**chip) as gpu, torch.inference_mode():
        decoding = decoding_without_data(fake_model(config).eval(), rows)
        with gpu.recording() as events:
            decoding.step()
    return events


def count_pack(config: ChatGLMConfig, lengths: Sequence[tuple[int, int]]) -> Count:
    name = f"a pack of {len(lengths)} rows, {sum(map(sum, lengths))} tokens"
    return counted(name, config, events_of_pack(config, lengths))


def count_token(config: ChatGLMConfig, rows: int) -> Count:
    name = f"a token of {rows} row{'s' * (rows > 1)}"
    return counted(name, config, events_of_token(config, rows))


def counted(name: str, config: ChatGLMConfig, events: Sequence[Event]) -> Count:
    kernels = launches(events)
    # the first layer has no gradient of its tokens; what occurs less often is no layer's
    inside = sum(n for n in kernels.values() if n >= config.num_layers - 1)
    return Count(
        name,
        kernels.total(),
        round(inside / config.num_layers, 1),
        host_reads(events),
        host_copies(events),
        dict(kernels.most_common()),
    )


def count_all(config: ChatGLMConfig) -> list[Count]:
    return [
        count_pack(config, ADVERTISEGEN_ROWS * 4),
        count_pack(config, ADVERTISEGEN_ROWS[:1]),
        count_token(config, 1),
        count_token(config, 16),
    ]


def as_markdown(counts: Sequence[Count]) -> str:
    head = ("", "launches", "a layer", "host reads", "copies from the host", "kernels")
    lines = [head, ["---"] * len(head)]
    for count in counts:
        kernels = ", ".join(f"{name} {n}" for name, n in count.kernels.items() if n > 2)
        lines.append(
            (
                count.name,
                str(count.launches),
                str(count.launches_a_layer),
                str(len(count.host_reads)),
                str(len(count.host_copies)),
                kernels,
            )
        )
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        f"# Launches\n\nMade by `python -m bench.launches`, which says what is counted.\n\n{table}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    counts = count_all(chatglm2_6b())
    path = RESULTS / "launches.json"
    path.write_text(json.dumps([vars(count) for count in counts], indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(counts))
    print(as_markdown(counts))


if __name__ == "__main__":
    main()
