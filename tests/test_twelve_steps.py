"""Twelve steps through the command line equal the official recipe over diffusers' ChatGLMModel.

The oracle shares no code with the run: rows are tokenised by sentencepiece and padded as the
official script pads, their order is torch's RandomSampler under the official seeding, the model is
diffusers' (with the same weights), and the optimiser's rule is written out.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from bench.oracles import diffusers_twin, relative_error, twin_forward
from glmkern import ChatGLM, cli
from glmkern.checkpoint import expected_shapes
from glmkern.model.config import ChatGLMConfig

ROWS, BATCH, ACCUMULATION, STEPS = 43, 2, 4, 12
SOURCE, TARGET, PREFIX = 28, 14, 16
LEARNING_RATE, SEED = 2e-2, 42
GMASK, SOP, EOS, PAD, IGNORED = 64790, 64792, 2, 0, -100


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=64896,
        hidden_size=32,
        ffn_hidden_size=44,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=128,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.save(folder)
    generator = torch.Generator().manual_seed(5)
    save_file(
        {
            name: 1 + 0.1 * torch.randn(shape, generator=generator)
            if "norm" in name
            else 0.3 * torch.randn(shape, generator=generator)
            for name, shape in expected_shapes(config).items()
        },
        folder / "model.safetensors",
    )
    shutil.copy(shared / "data" / "tokenizer" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def examples(shared) -> list[dict[str, str]]:
    lines = (shared / "data" / "advertisegen" / "train.json").read_text().split("\n")[:ROWS]
    return [json.loads(line) for line in lines]


def padded_rows(examples: list[dict[str, str]], base: Path) -> list[tuple[Tensor, Tensor]]:
    """ids and labels [SOURCE + TARGET + 1] of every row, as the official script makes them."""
    tokenizer = SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    rows = []
    for example in examples:
        prompt = f"[Round 1]\n\n问：{example['content']}\n\n答："
        source = [GMASK, SOP, *tokenizer.encode(prompt)][:SOURCE]
        target = [*tokenizer.encode(example["summary"])[:TARGET], EOS]
        padding = SOURCE + TARGET + 1 - len(source) - len(target)
        rows.append(
            (
                torch.tensor(source + target + [PAD] * padding),
                torch.tensor([IGNORED] * len(source) + target + [IGNORED] * padding),
            )
        )
    return rows


def first_prefix(shape: torch.Size) -> Tensor:
    """torch's default for an embedding, the first numbers drawn after seeding."""
    torch.manual_seed(SEED)
    return torch.nn.Embedding(*shape).weight.detach()


def official_run(rows: list[tuple[Tensor, Tensor]], base: Path) -> tuple[list[float], Tensor]:
    """The loss of every step, and the prefix at the end."""
    twin = diffusers_twin(ChatGLM.from_pretrained(base, device="cpu", pre_seq_len=PREFIX))
    prefix = twin.prefix_encoder.embedding.weight
    with torch.no_grad():
        prefix.copy_(first_prefix(prefix.shape))
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter is prefix)

    torch.manual_seed(SEED)
    generator = torch.Generator()
    generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    loader = DataLoader(rows, BATCH, sampler=RandomSampler(rows, generator=generator))
    epochs = math.ceil(STEPS / (len(loader) // ACCUMULATION))
    micro_batches = [batch for _ in range(epochs) for batch in loader]

    losses = []
    moment, square = torch.zeros_like(prefix), torch.zeros_like(prefix)
    for step in range(STEPS):
        losses.append(0.0)
        prefix.grad = None
        for ids, labels in micro_batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            loss, _ = twin_forward(twin, ids, torch.ones_like(ids), labels=labels)
            (loss / ACCUMULATION).backward()
            losses[-1] += loss.item() / ACCUMULATION
        with torch.no_grad():
            gradient = prefix.grad * min(1.0, 1.0 / (prefix.grad.norm() + 1e-6))
            moment = 0.9 * moment + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            rate = LEARNING_RATE * (STEPS - step) / STEPS
            rate *= math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            prefix -= rate * moment / (square.sqrt() + 1e-8)
    return losses, prefix.detach()


def test_twelve_steps(base, examples, tmp_path):
    rows_file = tmp_path / "train.json"
    rows_file.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in examples))
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "--do_train",
                "--train_file",
                str(rows_file),
                "--prompt_column",
                "content",
                "--response_column",
                "summary",
                "--model_name_or_path",
                str(base),
                "--output_dir",
                str(out),
                "--max_source_length",
                str(SOURCE),
                "--max_target_length",
                str(TARGET),
                "--per_device_train_batch_size",
                str(BATCH),
                "--gradient_accumulation_steps",
                str(ACCUMULATION),
                "--max_steps",
                str(STEPS),
                "--logging_steps",
                "1",
                "--save_steps",
                str(STEPS),
                "--learning_rate",
                str(LEARNING_RATE),
                "--pre_seq_len",
                str(PREFIX),
                "--prefix_dropout",
                "0",
                "--model_dtype",
                "float32",
                "--no_cuda",
                "--disable_tqdm",
            ]
        )
        == 0
    )
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    stored = torch.load(out / f"checkpoint-{STEPS}" / "pytorch_model.bin", weights_only=True)
    prefix = stored["transformer.prefix_encoder.embedding.weight"]

    expected_losses, expected_prefix = official_run(padded_rows(examples, base), base)
    assert len(losses) == STEPS
    # Logged losses are rounded to four digits.
    assert losses == pytest.approx(expected_losses, rel=0, abs=1e-4)
    assert relative_error(prefix, expected_prefix) <= 1e-4
    assert relative_error(first_prefix(expected_prefix.shape), expected_prefix) > 1e-2
