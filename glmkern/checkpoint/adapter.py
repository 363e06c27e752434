"""A prefix as a PEFT adapter of the native GlmForCausalLM.

The adapter holds the prefix's numbers in their order; its keys are rotated. ChatGLM2 leaves the
keys of a prefix unrotated and counts the real tokens from 0. Under PEFT the real tokens start at
T = num_virtual_tokens. As (R(p + T) q) . (R(T) k) = (R(p) q) . k, the adapter's keys are R(T) k.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glmkern.checkpoint.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FAMILY,
    read_metadata,
    read_tensors,
    save_safetensors,
    trained_tensor,
)
from glmkern.errors import InputError
from glmkern.files.atomic import NewFiles
from glmkern.model.config import ChatGLMConfig
from glmkern.model.rotary import BASE

KEY = "prompt_embeddings"
ROPE_RATIO = "rope_ratio"


class Geometry(NamedTuple):
    """How the columns of a prefix are divided: [layers, key and value, groups, channels]."""

    layers: int
    groups: int
    channels: int

    @classmethod
    def of(cls, config: ChatGLMConfig) -> "Geometry":
        return cls(config.num_layers, config.multi_query_group_num, config.kv_channels)


def rotate_keys(
    rows: torch.Tensor, geometry: Geometry, positions: int, rope_ratio: float = 1
) -> torch.Tensor:
    """A prefix with the first half of every key rotated by RoPE to `positions`, which may be < 0.

    rows: float32 [T, L * 2 * G * C]. Angles and products are float64, rounded once to float32;
    values and the second halves of keys keep their bits. There and back the rotated numbers differ
    by at most 2^-23 times the length of their pair.
    """
    layers, groups, channels = geometry
    rotary = channels // 2
    rotated = rows.clone(memory_format=torch.contiguous_format)
    keys = rotated.view(-1, layers, 2, groups, channels)[:, :, 0, :, :rotary]  # [T, L, G, C / 2]
    frequencies = BASE ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = positions / rope_ratio * frequencies  # [C / 4]
    pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    keys.copy_(torch.view_as_real(turned).flatten(-2))
    return rotated


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter's folder, or the weights in one."""
    folder = path if path.is_dir() else path.parent
    return (folder / ADAPTER_CONFIG).is_file() and (path.is_dir() or path.name in ADAPTER_WEIGHTS)


def write_adapter(
    folder: str | Path, rows: torch.Tensor, config: ChatGLMConfig, base: str | None = None
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; returns the folder.

    Args:
        rows: the flat prefix, float32 [T, kv_size].
        config: of the base the prefix was trained on.
        base: base_model_name_or_path, a native folder; None: PEFT is told when it loads.
    """
    geometry, tokens = Geometry.of(config), len(rows)
    width = geometry.groups * geometry.channels
    values = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "encoder_hidden_size": width,
        "inference_mode": True,
        "num_attention_heads": geometry.groups,
        "num_layers": geometry.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    keys = rotate_keys(rows, geometry, tokens, config.rope_ratio)
    metadata = {FAMILY: config.family, ROPE_RATIO: str(config.rope_ratio)}
    with NewFiles(folder) as new:
        weights, settings = new.temporary(), new.temporary()
        save_safetensors({KEY: keys}, weights, metadata)
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        new.rename({weights: ADAPTER_WEIGHTS[0], settings: ADAPTER_CONFIG}, (ADAPTER_CONFIG,))
    return Path(folder)


def read_adapter(path: Path, config: ChatGLMConfig | None = None) -> torch.Tensor:
    """The flat prefix in an adapter's folder or its weights, float32 [T, kv_size], un-rotated.

    Adapters that PEFT trained on a native GlmForCausalLM are read as well; one trained with
    prefix_projection is stored flat. An adapter that does not say the rope_ratio of its base, as
    those of PEFT do not, has that of `config`.
    Raises InputError, naming the file, for another kind of adapter and for one that is damaged.
    So too where its columns are divided otherwise than those of `config`.
    """
    folder = path if path.is_dir() else path.parent
    settings = folder / ADAPTER_CONFIG
    tokens, geometry = _read_settings(settings)
    if config is not None and geometry != Geometry.of(config):
        raise InputError(
            f"{settings} describes {_described(geometry)}, but this base has "
            f"{_described(Geometry.of(config))}; it was trained on another base model"
        )
    candidates = [path] if path.is_file() else [folder / name for name in ADAPTER_WEIGHTS]
    file = next((each for each in candidates if each.is_file()), None)
    if file is None:
        raise InputError(f"{folder} has {ADAPTER_CONFIG}, but lacks {ADAPTER_WEIGHTS[0]}")
    tensors = read_tensors(file)
    if tensors.keys() != {KEY}:
        raise InputError(
            f"{file} holds {', '.join(sorted(tensors)) or 'nothing'}; the adapter of a prefix "
            f"holds {KEY} alone"
        )
    expected = [tokens, 2 * geometry.layers * geometry.groups * geometry.channels]
    if list(tensors[KEY].shape) != expected:
        raise InputError(
            f"{KEY} in {file} has shape {list(tensors[KEY].shape)}, but {ADAPTER_CONFIG} asks for "
            f"{expected}; the two do not belong together"
        )
    rows = trained_tensor(file, KEY, tensors[KEY])
    return rotate_keys(rows, geometry, -tokens, _rope_ratio(file, config))


def _rope_ratio(file: Path, config: ChatGLMConfig | None) -> float:
    """Of the base that the adapter was rotated for."""
    said = read_metadata(file).get(ROPE_RATIO)
    if said is None:
        return config.rope_ratio if config else 1
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?", said):
        raise InputError(f"{file} says rope_ratio {said!r}, which is no number; export it again")
    return float(said)


def _read_settings(path: Path) -> tuple[int, Geometry]:
    """(virtual tokens, geometry) from adapter_config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not the configuration of a PEFT adapter ({error!r}); export it again"
        ) from error
    if kind != "PREFIX_TUNING":
        raise InputError(f"{path} says peft_type {kind!r}; only 'PREFIX_TUNING' is a prefix")
    tokens, layers, width, groups = (
        _positive(path, values, name)
        for name in ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
    )
    if values.get("num_transformer_submodules") not in (None, 1):
        raise InputError(
            f"{path} says num_transformer_submodules {values['num_transformer_submodules']!r}; "
            "GlmForCausalLM has 1"
        )
    if width % (4 * groups):
        raise InputError(
            f"{path} says token_dim {width} in num_attention_heads {groups}; a head has a multiple "
            "of 4 channels"
        )
    return tokens, Geometry(layers, groups, width // groups)


def _positive(path: Path, values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path} says {name} {value!r}; it must be a positive integer")
    return value


def _described(geometry: Geometry) -> str:
    return "{} layers of {} groups of {} channels".format(*geometry)
