"""The verb plan: its table, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmkern import cli
from glmkern.checkpoint import write_prefix
from tests.model.models import SMALL, small_model
from tests.official import REPOSITORY, command, refused


@pytest.fixture
def chatglm2_6b(shared, tmp_path) -> Path:
    """The published configuration and tokenizer, and no weights."""
    folder = tmp_path / "chatglm2-6b"
    folder.mkdir()
    shutil.copy(shared / "data" / "configs" / "chatglm2-6b" / "config.json", folder)
    shutil.copy(shared / "data" / "tokenizer" / "tokenizer.model", folder)
    return folder


@pytest.fixture
def config_only(tmp_path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, "model_type": "chatglm"}))
    return folder


def planned(argv: list[object], capsys) -> str:
    assert cli.main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def figure(text: str, name: str) -> float:
    """The GiB of one line of the table."""
    return float(re.search(rf"^  {re.escape(name)} +([\d.]+)", text, re.MULTILINE)[1])


def test_the_published_command_for_a_gpu(chatglm2_6b, shared, capsys):
    text = planned(
        [
            "--do_train",
            "--train_file",
            shared / "data" / "advertisegen" / "train.json",
            "--validation_file",
            "dev.json",
            "--preprocessing_num_workers",
            "10",
            "--prompt_column",
            "content",
            "--response_column",
            "summary",
            "--overwrite_cache",
            "--model_name_or_path",
            chatglm2_6b,
            "--output_dir",
            "output/adgen",
            "--max_source_length",
            "64",
            "--max_target_length",
            "128",
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            "16",
            "--max_steps",
            "3000",
            "--learning_rate",
            "2e-2",
            "--pre_seq_len",
            "128",
            "--quantization_bit",
            "4",
            "--gpu",
            "L4",
        ],
        capsys,
    )
    assert text.startswith("2,000 rows read, 0 of them left out")
    assert "408 of 2,000 prompts cut, which loses the end of the question" in text
    assert "tokens a row: mean 129.2, median 129, longest 193; 258,495 in all\n" in text
    assert "the end token is learned in all 2,000 rows, after a cut response too\n" in text
    assert "padding avoided: 33% of the official 193 tokens a row" in text
    assert "linears 4-bit codes with float16 scales" in text and "loss scale 65536" in text
    assert "on L4 (data sheet: 22.5 GiB, 121 TFLOP/s in float16, 300 GB/s)" in text
    assert "assuming 50% of the data sheet's rate" in text and "for 3,000 steps\n" in text
    # 28 * 203,948,032 / 2 bytes of codes, 2 * 2 * 65,024 * 4,096 of embedding and output layer.
    assert figure(text, "base weights") == pytest.approx(3.66, abs=0.01)
    parts = re.findall(r"^  [a-zA-Z ,]+? +([\d.]+)$", text, re.MULTILINE)
    assert len(parts) == 5
    assert figure(text, "peak") == pytest.approx(sum(map(float, parts)), abs=0.03)


def test_a_config_alone_and_this_machine(config_only, capsys):
    text = planned(
        [
            "--model_name_or_path",
            config_only,
            "--pre_seq_len",
            "8",
            "--no_cuda",
            "--max_source_length",
            "20",
            "--max_target_length",
            "9",
            "--per_device_train_batch_size",
            "3",
            "--gradient_accumulation_steps",
            "2",
        ],
        capsys,
    )
    assert text.startswith("no --train_file: every row is taken to have 30 tokens\n")
    assert "on this CPU (measured: " in text
    assert "while 180 tokens are computed at once, 60 of them labelled" in text
    assert " s a step\n" in text and "for 0 steps" not in text
    assert not any(config_only.parent.joinpath(name).exists() for name in ("out", "output"))


def test_recompute_trades_memory_for_time(chatglm2_6b, capsys):
    lines = planned(
        ["--model_name_or_path", chatglm2_6b, "--pre_seq_len", "128", "--gpu", "H100"], capsys
    ).splitlines()
    start = lines.index("predicted for every --recompute:")
    numbers = [
        re.match(
            rf"  {name} +([\d.]+) GiB, ([\d.]+) s a step; (at least )?([\d,]+) tokens "
            "fit at once",
            line,
        )
        for name, line in zip(("none", "mlp", "layer"), lines[start + 1 :], strict=False)
    ]
    memory, seconds, tokens = zip(
        *((float(m[1]), float(m[2]), int(m[4].replace(",", ""))) for m in numbers), strict=True
    )
    assert memory[0] > memory[1] > memory[2] and seconds[0] < seconds[1] < seconds[2]
    assert tokens[0] < tokens[1] < tokens[2]


def test_flags_from_a_file(config_only, tmp_path, capsys):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps({"model_name_or_path": str(config_only), "pre_seq_len": 8}))
    assert "on T4 (" in planned([path, "--gpu", "T4"], capsys)


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--gpu", "RTX 4091"],
            "--gpu RTX 4091 is not in the table (nearest: RTX 4090); known are V1",
        ),
        (["--pre_seq_len", "0"], "--pre_seq_len is 0"),
        (["--max_step", "3"], "there is no flag --max_step; the nearest is --max_steps"),
        (["--fp16", "--no_cuda"], "--fp16 needs a GPU"),
        (["--train_file", "rows.json"], "--prompt_column is missing"),
        (
            ["--train_file", "rows.json", "--prompt_column", "a", "--response_column", "b"],
            "tokenizer.model is missing",
        ),
        (["--model_name_or_path", "missing/base"], "missing/base"),
    ],
)
def test_mistakes(config_only, capsys, argv, words):
    start = ["plan", "--model_name_or_path", str(config_only), "--pre_seq_len", "8"]
    assert words in refused([*start, *argv], capsys)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_file": "missing.json"}, "missing.json cannot be read"),
        (
            {"max_target_length": 128, "max_source_length": 1024, "source_prefix": "长" * 300},
            "but the base has 256 positions; lower --max_source_length",
        ),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 11},
            "10 rows do not fill a micro-batch of 11, and --dataloader_drop_last",
        ),
    ],
)
def test_rows_that_a_run_refuses(flags, tmp_path, capsys, changes, words):
    argv = command({**flags, **changes})
    said = refused(["plan", *argv], capsys)
    assert words in said and said == refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_base(flags, config_only, base, capsys):
    shutil.copy(base / "tokenizer.model", config_only)
    argv = command({**flags, "model_name_or_path": config_only})
    said = refused(["plan", *argv], capsys)
    assert "but the base has only 151" in said and said == refused(argv, capsys)


@pytest.mark.parametrize("projection", [False, True])
def test_the_length_of_a_prefix_to_go_on_from(config_only, tmp_path, capsys, projection):
    model = small_model(pre_seq_len=7, projection=projection)
    write_prefix(tmp_path, model.prefix_encoder.state_dict())
    start = [
        "--model_name_or_path",
        config_only,
        "--gpu",
        "L4",
        "--max_source_length",
        "20",
        "--max_target_length",
        "9",
    ]
    given = ["--pre_seq_len", "7", *(["--prefix_projection"] if projection else [])]
    assert planned([*start, "--ptuning_checkpoint", tmp_path], capsys) == planned(
        [*start, *given], capsys
    )
    assert "there is no prefix checkpoint missing" in refused(
        ["plan", *map(str, start), "--ptuning_checkpoint", "missing"], capsys
    )


def test_more_steps_than_a_date_can_hold(config_only, capsys):
    text = planned(
        [
            "--model_name_or_path",
            config_only,
            "--pre_seq_len",
            "8",
            "--gpu",
            "L4",
            "--max_steps",
            10**18,
        ],
        capsys,
    )
    assert "more than 100 years for 1,000,000,000,000,000,000 steps\n" in text


def test_what_does_not_fit_a_prefix_is_one_sentence(config_only, capsys):
    values = json.loads((config_only / "config.json").read_text())
    (config_only / "config.json").write_text(json.dumps({**values, "multi_query_attention": False}))
    argv = ["plan", "--model_name_or_path", str(config_only), "--pre_seq_len", "8"]
    assert "with multi_query_attention False" in refused(argv, capsys)


def test_a_gpu_without_a_name(capsys):
    assert cli.main(["plan", "--gpu"]) == 2
    assert "--gpu: expected one argument" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from glmkern.cli import main; assert main(['plan', '--help']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--gpu NAME" in done.stdout
