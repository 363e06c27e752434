"""Independent implementations that the model is compared with, and small random models."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


def diffusers_twin(model: ChatGLM) -> torch.nn.Module:
    """The official architecture as diffusers carries it, with the model's own weights."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as TheirConfig
    from diffusers.pipelines.kolors.text_encoder import ChatGLMModel

    values = model.config.to_dict() | {"use_cache": False}
    for theirs_differ in ("model_type", "torch_dtype", "max_length"):
        del values[theirs_differ]
    if model.prefix_encoder is not None:
        values |= {
            "pre_seq_len": len(model.prefix_encoder.embedding.weight),
            "prefix_projection": model.prefix_encoder.trans is not None,
        }
    twin = ChatGLMModel(TheirConfig(**values), empty_init=False)
    state = {k.removeprefix("transformer."): v.float() for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing)
    return twin.eval()


def twin_forward(
    twin: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(the official loss, logits [B, S, V])."""
    hidden = twin(
        input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=False,
        return_dict=False,
    )[0]
    logits = twin.output_layer(hidden).transpose(0, 1)
    if labels is None:
        return None, logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), logits


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


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
