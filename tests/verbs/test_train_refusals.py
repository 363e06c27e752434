"""What stops the official flow through the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmkern import cli
from tests.official import command, refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_file": "missing.json"}, "missing.json cannot be read"),
        ({"prompt_column": "question"}, "has no column 'question'"),
        ({"model_name_or_path": "missing/base"}, "missing/base"),
        ({"ptuning_checkpoint": "missing"}, "there is no prefix checkpoint missing"),
        (
            {"max_target_length": 128, "max_source_length": 1024, "source_prefix": "长" * 300},
            "but the base has 256 positions; lower --max_source_length",
        ),
        ({"pre_seq_len": 0}, "--pre_seq_len is 0"),
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"quantization_bit": 3}, "--quantization_bit is 3; it must be 4 or 8"),
        ({"output_dir": ""}, "--output_dir is missing; name the folder to write to"),
        ({"resume_from_checkpoint": "", "max_source_length": 2}, "--max_source_length is 2"),
        (
            {"metric_for_best_model": "rouge-1"},
            "--metric_for_best_model is rouge-1, but nothing is",
        ),
        ({"output_layer_bit": 4}, "--output_layer_bit is 4; it must be 8"),
        ({"label_smoothing_factor": 2}, "--label_smoothing_factor is 2.0; it must be in [0, 1"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 11}, "do not fill a micro"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, tmp_path, capsys, changes, words):
    if torch.cuda.is_available() and "fp16" in changes:
        changes = {**changes, "no_cuda": True}
    assert words in refused(command({**flags, **changes}), capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_prefix_length(flags, tmp_path, capsys):
    assert cli.main(command(flags)) == 0
    capsys.readouterr()
    wrong = {
        **flags,
        "ptuning_checkpoint": tmp_path / "out" / "checkpoint-4",
        "pre_seq_len": 5,
        "output_dir": tmp_path / "again",
    }
    assert "holds 4 virtual tokens, but pre_seq_len is 5" in refused(command(wrong), capsys)
    assert not (tmp_path / "again").exists()


def test_broken_line(flags, rows, capsys):
    with rows.open("a") as file:
        file.write('\n{"content": ')
    assert "line 13" in refused(command(flags), capsys)


def test_lfs_pointers(flags, base, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (copy / "tokenizer.model").write_text(pointer)
    broken = command({**flags, "model_name_or_path": copy})
    assert "tokenizer.model is a Git LFS pointer" in refused(broken, capsys)
    shutil.copy(base / "tokenizer.model", copy)
    (copy / "model.safetensors").write_text(pointer)
    assert "LFS pointer" in refused(broken, capsys)


def test_unsupported_configuration(flags, base, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config["multi_query_attention"] = False
    (copy / "config.json").write_text(json.dumps(config))
    unfit = command({**flags, "model_name_or_path": copy})
    assert "with multi_query_attention False" in refused(unfit, capsys)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_made(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inside = command({**flags, "output_dir": tmp_path / "file" / "out"})
    assert "cannot make --output_dir" in refused(inside, capsys)


def test_output_folder_in_use(flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    del flags["overwrite_output_dir"]
    assert "pass --overwrite_output_dir" in refused(command(flags), capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_without_a_prefix(flags, capsys):
    del flags["pre_seq_len"]
    assert "only prefixes are trained here" in refused(command(flags), capsys)


def test_failed_run(flags, base, tmp_path, capsys):
    """A base whose logits overflow fails at the first step, and no checkpoint is left."""

    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    weights = load_file(copy / "model.safetensors")
    weights["transformer.encoder.final_layernorm.weight"][0] = 3e38
    save_file(weights, copy / "model.safetensors")
    whole_step = {**flags, "model_name_or_path": copy, "gradient_accumulation_steps": 10}
    line = refused(command(whole_step), capsys, status=1)
    assert line.startswith("step 1: the loss is nan (rows ")
    # Counted in the file, where the fourth and the eighth are empty.
    named = line.split("(rows ")[1].split(")")[0].split(", ")
    assert sorted(map(int, named)) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert not any((tmp_path / "out").iterdir())
