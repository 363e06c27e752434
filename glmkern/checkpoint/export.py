"""`glmkern export`: a prefix in another format, or the base as a native GlmForCausalLM."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from glmkern.checkpoint.adapter import write_adapter
from glmkern.checkpoint.base import read_base
from glmkern.checkpoint.base_writer import write_glm
from glmkern.checkpoint.native_glm import native_config
from glmkern.checkpoint.prefix import (
    check_family,
    check_prefix,
    describe_prefix,
    fold_prefix,
    prefix_family,
    read_prefix,
    write_prefix,
)
from glmkern.checkpoint.quantized import dequantize_stream
from glmkern.checkpoint.tensor_files import require_new
from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder
from glmkern.model.config import ChatGLMConfig

# Not the modelling code of an official folder, which a native one does not need.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "MODEL_LICENSE",
    "LICENSE",
)


class ExportedPrefix(NamedTuple):
    """What export_prefix wrote; `folded` where a projection became a flat prefix."""

    folder: Path
    tokens: int
    folded: bool


def export_prefix(
    source: str | Path,
    target: str | Path,
    layout: str,
    fold: bool = False,
    base: str | Path | None = None,
) -> ExportedPrefix:
    """Write the prefix at `source` to the new folder `target` in another format.

    Args:
        source: a checkpoint-N folder, a weight file, or a PEFT adapter's folder.
        target: a folder that holds no prefix yet. It gets config.json too where that is known.
        layout: "bin" (official), "safetensors", or "peft" for a flat adapter of the native base.
        fold: write the flat prefix that a projection amounts to; "peft" does so anyway.
        base: the base the prefix was trained on; None: the config.json beside the prefix tells.

    Raises:
        InputError: the prefix is damaged, is not that of `base`, or cannot be divided into layers
            because nothing says how; the target holds a model or cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target)
    config = _config_of(source, base)
    state = read_prefix(source, config)
    tokens, _, projection = describe_prefix(state)
    if config is not None:
        check_prefix(state, config, tokens, projection, source)
        check_family(source, config)
    elif layout == "peft" or (fold and projection):
        raise InputError(
            f"{source} has no config.json beside it, and nothing else says how its columns are "
            "divided; name its base with --base"
        )
    require_new(target)
    folded = projection and (fold or layout == "peft")
    if folded:
        state = fold_prefix(state, config)
    if layout == "peft":
        _check_expressible(source, replace(config, quantization_bit=0))
        native = base is not None and native_config(resolve_folder(base)) is not None
        write_adapter(target, state["embedding.weight"], config, str(base) if native else None)
    else:
        family = prefix_family(source) if config is None else config.family
        write_prefix(target, state, layout, family)
        if config is not None:
            projection = projection and not folded
            replace(config, pre_seq_len=tokens, prefix_projection=projection).save(target)
    return ExportedPrefix(target, tokens, folded)


def export_glm(source: str | Path, target: str | Path, dequantize: bool = False) -> Path:
    """Write the base in `source` as a native GlmForCausalLM to the new folder `target`.

    Tensors keep their bits and dtype; they are read one at a time, and one shard of the result is
    in memory. Tokenizer files and licences are copied.

    Args:
        source: a folder, or the cached name, of a base.
        target: a folder that holds no model yet.
        dequantize: write codes of 4 or 8 bits as the dense weights they stand for, in the dtype of
            their scales.

    Raises:
        InputError: the source is broken, quantised without `dequantize`, or of an architecture that
            GlmForCausalLM has not; the target holds a model or cannot be written.
    """
    folder, target = resolve_folder(source), Path(target)
    config = ChatGLMConfig.from_pretrained(folder)
    bits = config.quantization_bit
    if bits and not dequantize:
        raise InputError(
            f"{folder} is quantised to {bits} bits, which GlmForCausalLM cannot hold; export the "
            "fp16 base, or pass --dequantize to write dense weights"
        )
    require_new(target)
    dense = replace(config, quantization_bit=0)
    _check_expressible(folder, dense)
    tensors = read_base(folder, config)
    return write_glm(
        target,
        dense,
        dequantize_stream(tensors, bits) if bits else tensors,
        companions=[folder / name for name in COMPANIONS if (folder / name).is_file()],
    )


def _config_of(source: Path, base: str | Path | None) -> ChatGLMConfig | None:
    """The configuration of the prefix's base, or None where nothing tells."""
    if base is not None:
        return ChatGLMConfig.from_pretrained(base)
    folder = source if source.is_dir() else source.parent
    has_config = (folder / "config.json").is_file()
    return ChatGLMConfig.from_pretrained(folder) if has_config else None


def _check_expressible(source: Path, config: ChatGLMConfig) -> None:
    try:
        config.to_glm_dict()
    except ValueError as error:
        raise InputError(f"{source} has no native form: {error}") from error
