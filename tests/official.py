"""The official command line on a very small base."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmkern import cli
from glmkern.checkpoint import expected_shapes, read_prefix
from glmkern.model.config import ChatGLMConfig

REPOSITORY = Path(__file__).resolve().parents[1]
PREFIX_LENGTH = 4  # of the small training runs


def write_base(folder: Path, tokenizer: Path) -> Path:
    """Fills a folder in the official layout: the real tokenizer over a very small random base."""
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=64896,
        hidden_size=8,
        ffn_hidden_size=16,
        kv_channels=4,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        eos_token_id=2,
        pad_token_id=0,
        extra={"original_rope": True},
    )
    config.save(folder)
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: torch.ones(shape)
            if "norm" in name
            else 0.3 * torch.randn(shape, generator=generator)
            for name, shape in expected_shapes(config).items()
        },
        folder / "model.safetensors",
    )
    shutil.copy(tokenizer / "tokenizer.model", folder)
    return folder


def command(flags: dict[str, object]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def refused(argv: list[str], capsys, status: int = 2) -> str:
    """The one line on stderr of a command that ends with `status`."""
    assert cli.main(argv) == status
    captured = capsys.readouterr()
    line, end = captured.err.split("\n")
    assert end == "" and line.startswith("glmkern: ")
    return line.removeprefix("glmkern: ")


def prefix(folder: Path) -> torch.Tensor:
    """The prefix of a checkpoint, without projection."""
    return read_prefix(folder)["embedding.weight"]
