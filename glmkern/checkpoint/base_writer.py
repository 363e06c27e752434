"""Writing a base model, under the official or the native names, with its config.json."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from glmkern.checkpoint.native_glm import glm_shapes, to_glm_stream
from glmkern.checkpoint.shapes import expected_shapes
from glmkern.checkpoint.tensor_files import save_safetensors, save_torch
from glmkern.errors import InputError
from glmkern.files.atomic import NewFiles
from glmkern.model.config import ChatGLMConfig

SHARD_BYTES = 5_000_000_000

# layout: the name of a file and of a shard. transformers and read_base look for safetensors first.
NAMES = {
    "safetensors": ("model.safetensors", "model-{:05d}-of-{:05d}.safetensors"),
    "bin": ("pytorch_model.bin", "pytorch_model-{:05d}-of-{:05d}.bin"),
}


def write_base(
    folder: str | Path,
    config: ChatGLMConfig,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = SHARD_BYTES,
    layout: str = "safetensors",
    companions: Iterable[Path] = (),
) -> Path:
    """Write `tensors` (official keys, in the dtype they have) and config.json; returns the folder.

    One model.safetensors ("bin": pytorch_model.bin), or shards of at most `max_shard_bytes` with
    their index; a tensor larger than that has a shard of its own. A stream of (key, tensor) pairs
    is written as it comes, with one shard in memory. Files of the same layout already in the folder
    are replaced, and `companions` (the tokenizer's, say) are copied into it.

    All files are written before the first is renamed. The old config.json is removed first, and the
    new one is named last. A kill leaves the old model, the new one, or a folder without
    config.json, which is refused.

    Raises ValueError where `tensors` is not exactly the weights that `config` describes,
    quantization_bit included. Raises InputError where they cannot be written. So too for "bin"
    beside safetensors, which would be read in its place.
    """
    expected = expected_shapes(config, config.quantization_bit)
    return _write(folder, config.to_json(), expected, tensors, max_shard_bytes, layout, companions)


def write_glm(
    folder: str | Path,
    config: ChatGLMConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = SHARD_BYTES,
    companions: Iterable[Path] = (),
) -> Path:
    """Write a stream of official (key, tensor) pairs as a native GlmForCausalLM in safetensors.

    Like write_base in all else. Raises ValueError, naming the field, also for a configuration
    that GlmForCausalLM cannot express.
    """
    values = json.dumps(config.to_glm_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    stream = to_glm_stream(tensors, config)
    return _write(
        folder, values, glm_shapes(config), stream, max_shard_bytes, "safetensors", companions
    )


def _write(
    folder: str | Path,
    configuration: str,
    expected: dict[str, tuple[int, ...]],
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
    layout: str,
    companions: Iterable[Path],
) -> Path:
    folder = Path(folder)
    if isinstance(tensors, Mapping):
        _check_names(expected, tensors)
        stream = ((name, tensors[name].detach().cpu().contiguous()) for name in expected)
    else:
        # Copies: a tensor mapped from a file would keep all that was read of it in memory.
        stream = ((name, tensor.clone()) for name, tensor in tensors)
    if layout == "bin" and list(folder.glob("model*.safetensors*")):
        raise InputError(
            f"{folder} holds safetensors, which would be read in place of the new "
            "pytorch_model.bin; choose another folder"
        )
    single, shard = NAMES[layout]
    with NewFiles(folder) as new:
        config = new.temporary()  # first, so that a folder that cannot be written costs no shard
        shards: list[tuple[Path, dict[str, int]]] = []  # file, bytes by key
        for group in _grouped(_checked(expected, stream), max_shard_bytes):
            temporary = new.temporary()
            _save(group, temporary, layout)
            shards.append((temporary, {name: tensor.nbytes for name, tensor in group.items()}))
        names = {temporary: single for temporary, _ in shards}
        if len(shards) > 1:
            names = {
                temporary: shard.format(number, len(shards))
                for number, (temporary, _) in enumerate(shards, 1)
            }
            index = new.temporary()
            index.write_text(_index(shards, names), encoding="utf-8")
            names[index] = f"{single}.index.json"
        for companion in companions:
            copy = new.temporary()
            shutil.copyfile(companion, copy)
            names[copy] = companion.name
        config.write_text(configuration, encoding="utf-8")
        names[config] = "config.json"
        # An older model's shards must not stay beside a single file; the reverse holds too.
        new.rename(
            names, ("config.json", single, f"{single}.index.json", shard.replace("{:05d}", "*"))
        )
    return folder


def _checked(
    expected: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream; ValueError where a tensor does not belong, and at the end where one lacks."""
    seen = set()
    for name, tensor in tensors:
        if name in expected and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; the configuration asks for "
                f"{list(expected[name])}"
            )
        seen.add(name)
        yield name, tensor
    _check_names(expected, seen)


def _check_names(expected: dict[str, tuple[int, ...]], names: Iterable[str]) -> None:
    for name in expected.keys() ^ set(names):
        raise ValueError(
            f"{name} is in {'the configuration' if name in expected else 'the state'} "
            "only; the state must hold exactly the weights of the configuration"
        )


def _grouped(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one shard after the other."""
    group: dict[str, torch.Tensor] = {}
    room = max_bytes
    for name, tensor in tensors:
        if group and tensor.nbytes > room:
            yield group
            group, room = {}, max_bytes
        group[name] = tensor
        room -= tensor.nbytes
    yield group


def _save(group: dict[str, torch.Tensor], path: Path, layout: str) -> None:
    if layout == "bin":
        # torch.save writes the whole storage of which a tensor may be a part.
        whole = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in group.items()
        }
        save_torch(whole, path)
    else:
        save_safetensors(group, path)


def _index(shards: list[tuple[Path, dict[str, int]]], names: dict[Path, str]) -> str:
    total = sum(nbytes for _, sizes in shards for nbytes in sizes.values())
    weight_map = {name: names[path] for path, sizes in shards for name in sizes}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
