"""The official flow through the command line: from a data file to its files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import glmkern
from glmkern import cli
from glmkern.checkpoint import read_prefix
from glmkern.model.computation import Computation
from glmkern.training.flags.arguments import build
from glmkern.training.setup import prepare
from tests.official import PREFIX_LENGTH, REPOSITORY, command, prefix


def test_official_run(flags, tmp_path, capsys):
    assert cli.main(command(flags)) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "checkpoint-2",
        "checkpoint-4",
        "trainer_state.json",
        "trainer_log.jsonl",
        "train_results.json",
        "all_results.json",
        "samples.md",
    }
    last = out / "checkpoint-4"
    assert {path.name for path in last.iterdir()} == {
        "pytorch_model.bin",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "resume.json",
        "glmkern.json",
    }

    stored = torch.load(last / "pytorch_model.bin", weights_only=True)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "transformer.prefix_encoder.embedding.weight": (torch.float32, (PREFIX_LENGTH, 16))
    }
    config = json.loads((last / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (PREFIX_LENGTH, False)
    assert json.loads((last / "special_tokens_map.json").read_text()) == {}
    assert json.loads((last / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    kept = json.loads((last / "glmkern.json").read_text())
    assert kept["learning_rate"] == 0.02 and kept["version"] == glmkern.__version__

    results = json.loads((out / "train_results.json").read_text())
    assert results.keys() == {
        "epoch",
        "train_loss",
        "train_runtime",
        "train_samples",
        "train_samples_per_second",
        "train_steps_per_second",
    }
    assert results["train_samples"] == 10 and results["epoch"] == 1.6
    assert json.loads((out / "all_results.json").read_text()) == results
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["num_train_epochs"] == 2
    assert state["total_flos"] > 0
    assert [log["step"] for log in state["log_history"]] == [2, 4, 4]

    text = capsys.readouterr().out
    assert "--preprocessing_num_workers has no effect" in text
    assert "12 rows read, 2 of them left out" in text
    assert "of 10 prompts cut" in text and "of 10 responses cut" in text
    assert "padding avoided: " in text and "of the official 41 tokens a row" in text
    assert "  Num examples = 10\n" in text and "  Total optimization steps = 4\n" in text
    assert f"  Number of trainable parameters = {PREFIX_LENGTH * 16}\n" in text
    assert "***** train metrics *****\n  epoch                    =" in text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(flags, base, tmp_path, bits):
    """Quantised while it is read, or beforehand: the same prefix, bit for bit."""
    assert cli.main(["quantize", str(base), str(tmp_path / "base"), "--bits", str(bits)]) == 0
    prefixes = []
    for name, change in (
        ("once", {"quantization_bit": bits}),
        ("twice", {"quantization_bit": bits, "model_name_or_path": tmp_path / "base"}),
        ("before", {"model_name_or_path": tmp_path / "base"}),
    ):
        assert cli.main(command(flags | change | {"output_dir": tmp_path / name})) == 0
        last = tmp_path / name / "checkpoint-4"
        assert json.loads((last / "config.json").read_text())["quantization_bit"] == bits
        prefixes.append(prefix(last))
    assert torch.equal(prefixes[0], prefixes[1]) and torch.equal(prefixes[0], prefixes[2])
    assert cli.main(command(flags)) == 0
    assert not torch.equal(prefixes[0], prefix(tmp_path / "out/checkpoint-4"))


def test_example_dump(flags, capsys):
    assert cli.main(command({**flags, "max_steps": 1, "max_source_length": 64})) == 0
    lines = {
        line.split(" ", 1)[0]: line.split(" ", 1)[1]
        for line in capsys.readouterr().out.split("\n")
        if " " in line
    }
    ids, labels = json.loads(lines["input_ids"]), json.loads(lines["label_ids"])
    assert ids[:2] == [64790, 64792] and ids[-1] == 2 and len(ids) == len(labels)
    assert lines["inputs"].startswith("[Round 1]")
    learned = labels.index(next(label for label in labels if label != -100))
    assert labels[:learned] == [-100] * learned and labels[learned:] == ids[learned:]
    # The response of the first row, cut to 16 tokens.
    assert lines["labels"].strip().startswith("宽松的阔腿裤")


def test_flags_of_the_rows(flags, rows, capsys):
    """--history_column, --source_prefix and --no_ignore_pad_token_for_loss reach the rows."""
    records = [json.loads(line) for line in rows.read_text().split("\n")]
    rows.write_text(json.dumps([{**record, "past": [["甲", "乙"]]} for record in records]))
    argv = command(
        {
            **flags,
            "max_steps": 1,
            "max_source_length": 100,
            "history_column": "past",
            "source_prefix": "前缀",
        }
    )
    assert cli.main([*argv, "--no_ignore_pad_token_for_loss"]) == 0
    text = capsys.readouterr().out
    assert "inputs 前缀[Round 1]\n\n问：甲\n\n答：乙\n\n[Round 2]\n\n问：" in text
    labels = json.loads(text.split("label_ids ")[1].split("\n")[0])
    assert len(labels) == 100 + 16 + 1 and labels[0] == 0 == labels[-1]


def test_padding_avoided_is_exact(flags, capsys):
    assert (
        cli.main(
            command(
                {
                    **flags,
                    "max_steps": 1,
                    "max_source_length": 200,
                    "per_device_train_batch_size": 10,
                    "max_target_length": 39,
                    "gradient_accumulation_steps": 1,
                }
            )
        )
        == 0
    )
    text = capsys.readouterr().out
    tokens = int(text.split(" in all\n")[0].split("; ")[-1].replace(",", ""))
    assert f"padding avoided: {1 - tokens / (10 * 240):.0%} of the official 240" in text


def test_every_spelling_gives_the_same_run(flags, tmp_path):
    folders = [tmp_path / name for name in ("bare", "verb", "file", "dashes")]
    bare = command({**flags, "output_dir": folders[0]})
    assert cli.main(bare) == 0
    assert cli.main(["train", *command({**flags, "output_dir": folders[1]})[1:]]) == 0
    config = tmp_path / "flags.json"
    config.write_text(json.dumps({**flags, "output_dir": str(folders[2])}))
    assert cli.main([str(config)]) == 0
    dashes = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**flags, "output_dir": folders[3]}.items()
    ]
    assert cli.main(dashes) == 0
    ends = [prefix(folder / "checkpoint-4") for folder in folders]
    assert all(torch.equal(end, ends[0]) for end in ends[1:])


def test_warm_start_from_a_checkpoint(flags, tmp_path):
    assert cli.main(command(flags)) == 0
    first = prefix(tmp_path / "out" / "checkpoint-4")
    again = {
        **flags,
        "output_dir": tmp_path / "again",
        "learning_rate": 0,
        "max_steps": 1,
        "save_steps": 1,
        "ptuning_checkpoint": tmp_path / "out" / "checkpoint-4",
    }
    assert cli.main(command(again)) == 0
    assert torch.equal(prefix(tmp_path / "again" / "checkpoint-1"), first)


def test_projection_and_own_flags(flags, tmp_path):
    own = {
        "prefix_projection": True,
        "prefix_dropout": 0,
        "recompute": "layer",
        "tokens_per_pack": 0,
        "rope_precision": "model",
        "model_dtype": "bfloat16",
        "save_safetensors": True,
    }
    assert cli.main(command({**flags, **own})) == 0
    last = tmp_path / "out" / "checkpoint-4"
    official = torch.load(last / "pytorch_model.bin", weights_only=True)
    other = load_file(last / "model.safetensors")
    assert official.keys() == other.keys()
    assert all(torch.equal(official[name], other[name]) for name in official)
    state = read_prefix(tmp_path / "out" / "checkpoint-4")
    assert state.keys() == {
        "embedding.weight",
        "trans.0.weight",
        "trans.0.bias",
        "trans.2.weight",
        "trans.2.bias",
    }
    config = json.loads((tmp_path / "out" / "checkpoint-4" / "config.json").read_text())
    assert config["prefix_projection"] is True


def test_model_flags_reach_the_model(base):
    args = build(
        {
            "model_name_or_path": str(base),
            "model_dtype": "float16",
            "output_layer_bit": 8,
            "offload_embedding": True,
            "pre_seq_len": 3,
            "prefix_projection": True,
            "prefix_dropout": 0.25,
            "recompute": "mlp",
            "rope_precision": "model",
            "label_smoothing_factor": 0.125,
        }
    )
    model = prepare(args, torch.device("cpu")).load_model()
    assert model.computation == Computation(0.25, "mlp", 0.125)
    assert model.rope_precision == "model"
    assert model.transformer.output_layer.bits == 8 and model.offload_embedding
    assert model.dtype == torch.float16
    assert model.prefix_encoder.embedding.weight.shape == (3, 16)
    assert model.prefix_encoder.trans is not None


def test_validation_file_is_not_needed_to_train(flags, rows, capsys):
    """train.sh names one; without --do_eval it only gives the prompts of samples.md."""
    other = rows.parent / "other.json"
    other.write_text('{"question": "好"}')
    assert cli.main(command({**flags, "validation_file": other})) == 0
    text = capsys.readouterr().out
    assert f"samples.md answers rows of {rows}, because {other} has no column 'content'" in text


def test_label_smoothing_reaches_the_loss(flags, tmp_path):
    ends = []
    for factor in (0, 0.5):
        folder = tmp_path / str(factor)
        run = {**flags, "output_dir": folder, "label_smoothing_factor": factor}
        assert cli.main(command(run)) == 0
        ends.append(prefix(folder / "checkpoint-4"))
    assert not torch.equal(*ends)


def test_recompute_changes_no_bit(flags, tmp_path):
    ends = []
    for recompute in ("none", "mlp", "layer"):
        folder = tmp_path / recompute
        assert cli.main(command({**flags, "output_dir": folder, "recompute": recompute})) == 0
        ends.append(prefix(folder / "checkpoint-4"))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_deterministic_runs_have_the_same_bits(flags, tmp_path):
    ends = []
    try:
        for name in ("one", "two"):
            run = {**flags, "output_dir": tmp_path / name, "deterministic": True}
            assert cli.main(command(run)) == 0
            assert torch.are_deterministic_algorithms_enabled()
            ends.append(prefix(tmp_path / name / "checkpoint-4"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*ends)


def test_max_train_samples(flags, tmp_path, capsys):
    assert cli.main(command({**flags, "max_train_samples": 5})) == 0
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["train_samples"] == 4  # of five rows read, one is empty
    assert "5 rows read, 1 of them left out" in capsys.readouterr().out


def test_torchrun_with_one_process(flags, tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=1",
        "-m",
        "glmkern",
    ]
    done = subprocess.run(
        [*launcher, *command({**flags, "max_steps": 1, "save_steps": 1})],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoint-1" / "pytorch_model.bin").is_file()
