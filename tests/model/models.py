"""Small random models and batches."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import expected_shapes
from glmkern.model.config import ChatGLMConfig

# Odd on purpose: hidden != heads * kv_channels, nothing a multiple of a tile.
SMALL: dict[str, Any] = dict(
    num_layers=3,
    padded_vocab_size=151,
    hidden_size=50,
    ffn_hidden_size=39,
    kv_channels=12,
    num_attention_heads=4,
    multi_query_attention=True,
    multi_query_group_num=2,
    seq_length=64,
    add_qkv_bias=True,
    torch_dtype="float32",
)
EVEN = dict(ffn_hidden_size=38)  # 4 bits pack two columns in a byte


def random_weights(config: ChatGLMConfig) -> dict[str, Tensor]:
    """Official names to values; norms around 1, the rest with the gain of a trained model."""
    weights = {}
    for name, shape in expected_shapes(config).items():
        if "layernorm" in name:
            weights[name] = torch.rand(shape) + 0.5 * name.endswith("weight")
        else:
            weights[name] = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
    return weights


def small_model(
    overrides: dict | None = None,
    *,
    pre_seq_len: int | None = 5,
    projection: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ChatGLM:
    """A random model in evaluation mode."""
    config = ChatGLMConfig.from_dict(SMALL | (overrides or {}))
    model = ChatGLM(config, pre_seq_len=pre_seq_len, prefix_projection=projection)
    model.load_base(random_weights(config).items(), dtype, "cpu")
    return model.eval()


def recorded_model(
    folder: Path,
    prefix: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: dict[str, Tensor] | None = None,
    **options,
) -> ChatGLM:
    """The tiny model of the official record; `prefix` is None, "noproj" or "proj", `weights`
    replace some of the recorded ones."""
    model = ChatGLM(
        ChatGLMConfig.from_pretrained(folder),
        pre_seq_len=prefix and 8,
        prefix_projection=prefix == "proj",
        **options,
    )
    state = load_file(folder / "weights.safetensors") | (weights or {})
    model.load_base(state.items(), dtype, "cpu")
    if prefix:
        state = load_file(folder / f"prefix_{prefix}.safetensors")
        model.prefix_encoder.load_state_dict(
            {k.removeprefix("transformer.prefix_encoder."): v for k, v in state.items()}
        )
    return model.eval()


def random_rows(lengths: Sequence[int]) -> list[SimpleNamespace]:
    """Random rows of these lengths; the second half of each carries labels."""
    rows = []
    for n in lengths:
        ids = torch.randint(SMALL["padded_vocab_size"], (n,)).tolist()
        labels = [-100] * (n // 2) + ids[n // 2 :]
        rows.append(SimpleNamespace(input_ids=ids, labels=labels))
    return rows


def padded_batch(lengths: list[int], vocabulary: int, side: str) -> dict[str, Tensor]:
    """input_ids, attention_mask, position_ids and labels of rows padded on one side; labels on
    roughly two thirds of the tokens that have a real predecessor."""
    widest = max(lengths)
    batch = {
        name: torch.zeros(len(lengths), widest, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "position_ids")
    }
    batch["labels"] = torch.full((len(lengths), widest), -100)
    for b, length in enumerate(lengths):
        place = slice(widest - length, widest) if side == "left" else slice(0, length)
        ids = torch.randint(vocabulary, (length,))
        batch["input_ids"][b, place] = ids
        batch["attention_mask"][b, place] = 1
        batch["position_ids"][b, place] = torch.arange(length)
        chosen = torch.rand(length) < 0.67
        chosen[0], chosen[-1] = False, length > 1
        batch["labels"][b, place] = torch.where(chosen, ids, -100)
    return batch
