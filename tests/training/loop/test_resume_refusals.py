"""What a run does not go on from: other flags, rows or models, and damaged files."""

import json
from pathlib import Path

import pytest
import torch

from glmkern.errors import InputError
from glmkern.training.loop.checkpoint import fingerprint
from glmkern.training.loop.resume import check_same_run, find_checkpoint
from glmkern.training.loop.trainer import Trainer
from tests.training import children
from tests.training.checkpoints import every_flag, make_checkpoint, rewrite
from tests.training.children import random_rows
from tests.training.stand_in import StandIn, arguments, simple_rows


@pytest.mark.parametrize(
    "earlier, now, words",
    [
        (
            {},
            {"seed": 7},
            "--seed is 7, but .* comes from a run with 42; pass --seed 42, or start a",
        ),
        ({"data_seed": None}, {"data_seed": 7}, "--data_seed is 7, .* with None; leave it out, or"),
        ({"pre_seq_len": 128}, {"pre_seq_len": 64}, "--pre_seq_len is 64"),
        ({}, {"per_device_train_batch_size": 3}, "--per_device_train_batch_size is 3"),
        ({}, {"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps is 3"),
        ({}, {"prefix_projection": True}, "--prefix_projection is True"),
        ({}, {"optim": "adamw_torch"}, "--optim is adamw_torch, .* pass --optim adamw_hf"),
        ({}, {"group_by_length": True}, "--group_by_length is True"),
        ({}, {"tf32": True}, "--tf32 is True, .* leave it out"),
        ({"max_steps": 10}, {"max_steps": 20}, "--max_steps is 20"),
        ({}, {"num_train_epochs": 5.0}, "--num_train_epochs is 5.0"),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1, "max_steps": 9},
            "--max_steps is 9",
        ),
        (
            {},
            {"ptuning_checkpoint": "old"},
            "goes on with a stopped run, prefix, optimiser and "
            "schedule included, .* starts a new run from a saved",
        ),
    ],
)
def test_another_run_is_refused(tmp_path, earlier, now, words):
    checkpoint = make_checkpoint(tmp_path, 2, **earlier)
    check_same_run(checkpoint, every_flag(**earlier))
    with pytest.raises(InputError, match=words) as error:
        check_same_run(checkpoint, every_flag(**now))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "earlier, now",
    [
        (
            {},
            {
                "output_dir": "elsewhere",
                "logging_steps": 7,
                "save_total_limit": 1,
                "save_steps": 9,
                "overwrite_output_dir": True,
                "tokens_per_pack": "0",
                "recompute": "layer",
            },
        ),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "max_steps": 9}),
        ({"ptuning_checkpoint": "old"}, {"ptuning_checkpoint": "old"}),
        ({"ptuning_checkpoint": "old"}, {}),
        ({"model_dtype": "auto"}, {"model_dtype": "float32"}),  # what auto was, resume.json knows
    ],
)
def test_what_may_change(tmp_path, earlier, now):
    check_same_run(make_checkpoint(tmp_path, 2, **earlier), every_flag(**now))


def test_a_position_of_another_version(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    position = json.loads((checkpoint / "resume.json").read_text())
    (checkpoint / "resume.json").write_text(json.dumps({**position, "moon": 1}))
    with pytest.raises(InputError, match="resume.json is of another version"):
        resume_stand_in(checkpoint)


def resume_stand_in(checkpoint: Path, rows=None, model=None, **flags) -> None:
    Trainer(
        model or StandIn(), rows or simple_rows(6), arguments(**{"max_steps": 3, **flags})
    ).train(checkpoint)


def test_other_rows_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    resume_stand_in(checkpoint)
    for rows in (simple_rows(7), simple_rows(6)[::-1], simple_rows(6, length=5)):
        with pytest.raises(InputError, match="comes from a run over other rows"):
            resume_stand_in(checkpoint, rows)
    labels, ids = random_rows(2, 9), random_rows(2, 9)
    assert fingerprint(labels) == fingerprint(ids)
    ids[1].input_ids[2] += 1
    labels[1].labels[2] += 1
    assert len({fingerprint(rows) for rows in (labels, ids, random_rows(2, 9))}) == 3


def test_other_models_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(
            InputError,
            match=f"comes from a run in float32 and this one is in "
            f"{str(dtype)[6:]}; pass --model_dtype float32",
        ):
            resume_stand_in(checkpoint, model=StandIn(dtype))
    with pytest.raises(
        InputError,
        match=r"embedding.weight of the prefix in .* is \[1, 8\] and "
        r"in this run \[5, 144\]",
    ):
        resume_stand_in(checkpoint, model=children.model())
    with pytest.raises(InputError, match="has 2 steps, more than the 1 of this run"):
        resume_stand_in(checkpoint, max_steps=1)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "resume.json",
        "trainer_state.json",
        "pytorch_model.bin",
    ],
)
def test_damaged_checkpoints(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 2)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        resume_stand_in(checkpoint)


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer.pt", []),
        ("optimizer.pt", {}),
        ("optimizer.pt", {"state": 1, "param_groups": [1]}),
        ("scheduler.pt", []),
        ("scheduler.pt", {}),
        ("scheduler.pt", torch.ones(2)),
        ("rng_state.pth", []),
        ("rng_state.pth", {"python": 1}),
        ("rng_state.pth", {"python": (3, ())}),
        ("rng_state.pth", {"python": (3, (1,) * 625, None), "cpu": torch.ones(2)}),
        ("resume.json", []),
        ("resume.json", 3),
        ("trainer_state.json", []),
        ("trainer_state.json", {}),
        ("trainer_state.json", {"global_step": "2"}),
        ("trainer_state.json", {"global_step": 2, "log_history": {}}),
        ("trainer_state.json", {"global_step": 2, "best_model_checkpoint": 2}),
    ],
)
def test_files_of_another_shape(tmp_path, name, value):
    checkpoint = make_checkpoint(tmp_path, 2)
    rewrite(checkpoint / name, value)
    with pytest.raises(InputError, match=name) as error:
        resume_stand_in(checkpoint)
    assert str(tmp_path) in str(error.value) and "another checkpoint" in str(error.value)


def test_a_place_and_moments_of_another_shape(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    position = json.loads((checkpoint / "resume.json").read_text())
    rewrite(checkpoint / "resume.json", {**position, "micro_batches": [2]})
    with pytest.raises(InputError, match="resume.json is damaged"):
        resume_stand_in(checkpoint)
    rewrite(checkpoint / "resume.json", position)
    moments["state"][0]["exp_avg"] = torch.zeros(3)
    rewrite(checkpoint / "optimizer.pt", moments)
    with pytest.raises(InputError, match="optimizer.pt is damaged"):
        resume_stand_in(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"tokens_per_pack": 3}', None])
def test_flags_that_are_none(tmp_path, content):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / "glmkern.json").unlink()
    if content is not None:
        (checkpoint / "glmkern.json").write_text(content)
    with pytest.raises(InputError, match="glmkern.json"):
        check_same_run(find_checkpoint(str(checkpoint), tmp_path), every_flag())
    with pytest.raises(InputError, match="glmkern.json .*; resume from another checkpoint"):
        check_same_run(find_checkpoint("auto", tmp_path), every_flag())


def test_a_checkpoint_that_does_not_name_its_dtype(tmp_path):
    """As of older releases: only the loss scale tells float16 from the others."""
    checkpoint = make_checkpoint(tmp_path, 2)
    position = json.loads((checkpoint / "resume.json").read_text())
    assert position.pop("dtype") == "float32"
    rewrite(checkpoint / "resume.json", position)
    resume_stand_in(checkpoint)
    with pytest.raises(
        InputError,
        match="has no scaler.pt, which only a run in float16 saves, "
        "and this one is in float16; pass the --model_dtype",
    ):
        resume_stand_in(checkpoint, model=StandIn(torch.float16))
