"""The workloads of bench_train: model, rows, and every implementation's training step.

The model has ChatGLM2's shape at a size every machine holds: hidden 1024, 8 layers, 8 heads of 128
in 2 groups, ffn 3424, vocabulary 8192; prefix 128, no dropout, float32 activations.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.oracles import relative_error, twin_forward
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.checkpoint import expected_shapes
from glmkern.model.computation import Computation
from glmkern.model.packing import IGNORE_INDEX, pack_rows
from glmkern.training.data.rows import Row

PREFIX = 128
TOLERANCE = 1e-5
# (tokens of the prompt, tokens learned) of each row.
FULL_ROWS = ((0, 128),) * 4
# Four neighbours among AdvertiseGen's training rows, tokenised by the official script with
# max_source_length 64 and max_target_length 128. Of all such batches this one is nearest to the
# means of tokens, longest row and prompts: 517, 154 and 205.
ADVERTISEGEN_ROWS = ((58, 64), (43, 71), (50, 79), (58, 97))
OFFICIAL_WIDTH = 64 + 128 + 1  # to which the official script pads every row


def make_model() -> ChatGLM:
    """The model with random dense weights, in training mode."""
    config = ChatGLMConfig(
        num_layers=8,
        padded_vocab_size=8192,
        hidden_size=1024,
        ffn_hidden_size=3424,
        kv_channels=128,
        num_attention_heads=8,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        seq_length=512,
        torch_dtype="float32",
    )
    model = ChatGLM(config, pre_seq_len=PREFIX, computation=Computation(prefix_dropout=0.0))
    torch.manual_seed(0)
    model.load_base(
        (
            (name, torch.ones(shape) if "layernorm" in name else torch.randn(shape) / 32)
            for name, shape in expected_shapes(config).items()
        ),
        torch.float32,
        "cpu",
    )
    return model.train()


def make_rows(lengths: Sequence[tuple[int, int]], vocabulary: int) -> list[Row]:
    """Random rows of (tokens of the prompt, tokens learned)."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, learned in lengths:
        ids = torch.randint(vocabulary, (prompt + learned,), generator=generator).tolist()
        rows.append(Row(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return rows


def padded(rows: Sequence[Row], width: int | None) -> tuple[Tensor, Tensor]:
    """ids and labels [B, width], padded on the right as officially; None: to the longest row."""
    width = width or max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for b, row in enumerate(rows):
        ids[b, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[b, : len(row.labels)] = torch.tensor(row.labels)
    return ids, labels


@dataclass(frozen=True)
class Step:
    """One implementation: `run` makes a step and returns its loss, `gradient` then gives the
    prefix's gradient [P, L * 2 * G * C] in ChatGLM2's layout."""

    run: Callable[[], Tensor]
    gradient: Callable[[], Tensor]


def _step(
    prefix: Tensor,
    loss_of: Callable[[], Tensor],
    as_ours: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Step:
    def run() -> Tensor:
        prefix.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return Step(run, lambda: as_ours(prefix.grad))


def _packed_step(model: ChatGLM, rows: Sequence[Row]) -> Step:
    batch = pack_rows(rows)
    return _step(model.prefix_encoder.embedding.weight, lambda: model.loss(batch))


def _int4_step(model: ChatGLM, rows: Sequence[Row]) -> Step:
    return _packed_step(copy.deepcopy(model).quantize(4), rows)


# transformers, PEFT and diffusers must not weigh on our own peak memory: `peers` is imported late.


def _peft_step(
    model: ChatGLM, rows: Sequence[Row], attention: str, width: int | None = None
) -> Step:
    from bench import peers

    ids, labels = padded(rows, width)
    peer = peers.glm_with_peft(model, attention).train()
    prefix = peers.prefix_of(peer)
    turn_back = functools.partial(
        peers.rotate_keys, positions=-len(prefix), cos_sin=model.cos_sin, config=model.config
    )
    return _step(prefix, lambda: peer(input_ids=ids, labels=labels).loss, turn_back)


def _official_step(model: ChatGLM, rows: Sequence[Row], checkpointing: bool) -> Step:
    from bench import peers

    ids, labels = padded(rows, None)
    twin = peers.official(model, checkpointing)
    return _step(
        twin.prefix_encoder.embedding.weight, lambda: twin_forward(twin, ids, labels=labels)[0]
    )


def _lean_step(model: ChatGLM, rows: Sequence[Row]) -> Step:
    from bench import peers

    return _packed_step(peers.lean(copy.deepcopy(model).quantize(4)), rows)


OURS = "glmkern"
PEFT = "GlmForCausalLM + PEFT"
OFFICIAL = "official scheme"
OFFICIAL_WITHOUT_CHECKPOINTING = f"{OFFICIAL}, no checkpointing"


@dataclass(frozen=True)
class Workload:
    """Rows, and the step of each implementation, ours first, from the dense model and the rows."""

    lengths: Sequence[tuple[int, int]]
    steps: dict[str, Callable[[ChatGLM, Sequence[Row]], Step]]

    def make_step(self, implementation: str, model: ChatGLM) -> Step:
        return self.steps[implementation](
            model, make_rows(self.lengths, model.config.padded_vocab_size)
        )


def _peft(attention: str, width: int | None = None) -> Callable:
    return functools.partial(_peft_step, attention=attention, width=width)


WORKLOADS = {
    "float32": Workload(
        FULL_ROWS,
        {OURS: _packed_step, f"{PEFT}, eager": _peft("eager"), f"{PEFT}, sdpa": _peft("sdpa")},
    ),
    "int4": Workload(
        FULL_ROWS,
        {
            OURS: _int4_step,
            "lean dequantise + sgemm": _lean_step,
            OFFICIAL: functools.partial(_official_step, checkpointing=True),
            OFFICIAL_WITHOUT_CHECKPOINTING: functools.partial(_official_step, checkpointing=False),
        },
    ),
    "AdvertiseGen": Workload(
        ADVERTISEGEN_ROWS,
        {
            OURS: _packed_step,
            f"{PEFT}, sdpa, padded to {OFFICIAL_WIDTH}": _peft("sdpa", OFFICIAL_WIDTH),
            f"{PEFT}, sdpa, padded to the longest": _peft("sdpa"),
        },
    ),
}


def check_equal_work(steps: dict[str, Step], tolerance: float = TOLERANCE) -> None:
    """Loss and prefix gradient of all are the same as ours, to `tolerance` of the largest."""
    loss, gradient = steps[OURS].run(), steps[OURS].gradient()
    for name, step in steps.items():
        errors = [relative_error(step.run(), loss), relative_error(step.gradient(), gradient)]
        if not max(errors) <= tolerance:  # nor if it is not a number
            raise RuntimeError(
                f"{name} does other work than {OURS}: relative difference of the "
                f"loss {errors[0]:.1e}, of the prefix gradient {errors[1]:.1e}"
            )
