"""The files of a checkpoint beside the training state: configuration, tokenizer and flags."""

import json
from pathlib import Path

from glmkern import __version__
from glmkern.checkpoint import read_prefix, write_prefix
from glmkern.files.atomic import write_text
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.flags.arguments import Arguments

FLAGS_FILE = "glmkern.json"


def write_companions(
    folder: Path, config: ChatGLMConfig, tokenizer: ChatGLMTokenizer, arguments: Arguments
) -> None:
    """Write what a checkpoint folder, with its prefix there already, needs to be loaded."""
    config.save(folder)
    tokenizer.save(folder)
    generation = {
        "_from_model_config": True,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    write_text(folder / "generation_config.json", _json(generation))
    write_text(folder / FLAGS_FILE, _json({"version": __version__, **arguments.to_dict()}))
    if arguments.training.save_safetensors:
        # The bits of the pytorch_model.bin that is in the folder already.
        write_prefix(folder, read_prefix(folder), "safetensors", config.family)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
