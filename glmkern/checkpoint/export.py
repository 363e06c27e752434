"""Writing a base model: safetensors under the official names, and config.json."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from glmkern.checkpoint.atomic import replaced
from glmkern.checkpoint.shapes import expected_shapes
from glmkern.model.config import ChatGLMConfig

# An older model's shards must not stay beside a single file, nor a single file beside shards.
STALE = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


def write_base(
    folder: str | Path,
    config: ChatGLMConfig,
    state: dict[str, torch.Tensor],
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `state` (official keys, in the dtype it has) and config.json; returns the folder.

    One model.safetensors, or shards of at most `max_shard_bytes` with their index; a tensor larger
    than that has a shard of its own. Files of the same layout already in the folder are replaced.
    All files are written before the first is renamed, and config.json goes first and comes last:
    a kill leaves the old model, the new one, or a folder without config.json, which is refused.
    Raises ValueError where `state` is not exactly the weights that `config` describes.
    """
    folder = Path(folder)
    _check_state(config, state)
    shards = _shards(config, state, max_shard_bytes)
    with ExitStack() as renames:
        # The stack unwinds from the last file to the first, so config.json is renamed last.
        temporary = renames.enter_context(replaced(folder / "config.json"))
        temporary.write_text(config.to_json(), encoding="utf-8")
        for name, tensors in shards.items():
            temporary = renames.enter_context(replaced(folder / name))
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
        if len(shards) > 1:
            temporary = renames.enter_context(replaced(folder / "model.safetensors.index.json"))
            temporary.write_text(_index(shards), encoding="utf-8")
        for name in STALE:
            for old in folder.glob(name):
                old.unlink()
    return folder


def _shards(
    config: ChatGLMConfig, state: dict[str, torch.Tensor], max_bytes: int
) -> dict[str, dict[str, torch.Tensor]]:
    groups: list[dict[str, torch.Tensor]] = []
    room = 0
    for name in expected_shapes(config):
        tensor = state[name].detach().cpu().contiguous()
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _index(shards: dict[str, dict[str, torch.Tensor]]) -> str:
    total = sum(tensor.nbytes for group in shards.values() for tensor in group.values())
    weight_map = {name: file for file, group in shards.items() for name in group}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _check_state(config: ChatGLMConfig, state: dict[str, torch.Tensor]) -> None:
    expected = expected_shapes(config)
    for name in expected.keys() ^ state.keys():
        raise ValueError(
            f"{name} is in {'the configuration' if name in expected else 'the state'} "
            "only; the state must hold exactly the weights of the configuration"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}; the configuration asks for "
                f"{list(shape)}"
            )
