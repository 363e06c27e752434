"""Known GPUs and this machine."""

from pathlib import Path

import pytest
import torch

from bench.bench_full_size import chatglm2_6b
from glmkern.errors import InputError
from glmkern.plan import machines
from glmkern.plan import run as plan_run
from glmkern.plan.machines import GIB, GPUS, PROCESS, named_gpu, this_machine
from glmkern.plan.run import forecast_run
from glmkern.training.flags.arguments import (
    Arguments,
    DataTrainingArguments,
    ModelArguments,
    TrainingArguments,
)
from glmkern.training.setup import Setup
from tests.plan.jobs import machine, random_rows


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_gpu_has_many_spellings(name):
    assert named_gpu(name, "float16").name.startswith("RTX 4090 (data sheet: 24 GiB, 165.2 TFLOP")


@pytest.mark.parametrize(
    "name, dtype, rate",
    [
        ("A100 80GB", "float16", 312),
        ("A100 80GB", "bfloat16", 312),
        ("A100 80GB", "float32", 19.5),
        ("T4", "float16", 65),
        ("T4", "bfloat16", 8.1),
    ],
)
def test_the_rate_is_that_of_the_precision(name, dtype, rate):
    gpu = named_gpu(name, dtype)
    assert gpu.flops == pytest.approx(rate * 1e12 * machines.GPU_SHARE_OF_DATA_SHEET)


@pytest.mark.parametrize(
    "name, dtype, note",
    [
        ("RTX 3090", "bfloat16", ""),
        ("T4", "float16", "sm_75: the CUDA C++ kernels run; Triton's need sm_80"),
        ("T4", "bfloat16", "sm_75: no products of bfloat16; --fp16 is eight times as fast"),
        ("V100 16GB", "float16", "sm_70: the kernels need sm_75, so PyTorch's own ops run"),
    ],
)
def test_old_chips_have_a_note(name, dtype, note):
    assert named_gpu(name, dtype).note.startswith(note)
    assert note or not named_gpu(name, dtype).note


def test_an_unknown_gpu():
    with pytest.raises(InputError) as error:
        named_gpu("RTX 4091", "float16")
    assert "(nearest: RTX 4090)" in str(error.value)
    assert all(name in str(error.value) for name in GPUS)


def test_this_machine_is_measured_without_random_numbers():
    this_machine.cache_clear()
    before = torch.get_rng_state()
    here = this_machine("cpu", "float32")
    assert torch.equal(before, torch.get_rng_state())
    assert 1e8 < here.flops < 1e15 and 1e8 < here.bandwidth < 1e13
    assert here.overhead > PROCESS and "measured" in here.name
    assert this_machine("cpu", "float32") is here


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(machines, "available_bytes", lambda: 12 * GIB)
    monkeypatch.setattr(machines, "resident_bytes", lambda: GIB)
    monkeypatch.setattr(machines, "_product_rate", lambda *_: 1e12)
    monkeypatch.setattr(machines, "_read_rate", lambda *_: 1e10)
    alone, shared = (this_machine.__wrapped__("cpu", "float32", *each) for each in ((), (3,)))
    assert (alone.memory, shared.memory) == (13 * GIB, 5 * GIB)
    assert "5.0 GiB free for each of 3 processes" in shared.name and "each" not in alone.name


@pytest.mark.parametrize(
    "device, environment, sharing",
    [
        ("cpu", {}, 1),
        ("cpu", {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 3),
        ("cuda:1", {"LOCAL_WORLD_SIZE": "3"}, 1),
    ],
)
def test_a_run_knows_its_share(monkeypatch, device, environment, sharing):
    asked = []
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plan_run, "this_machine", lambda *values: asked.append(values) or machine())
    arguments = Arguments(
        ModelArguments(model_name_or_path="base", pre_seq_len=5),
        DataTrainingArguments(),
        TrainingArguments(output_dir="out"),
        (),
    )
    setup = Setup(torch.device(device), torch.float32, Path("base"), chatglm2_6b(), arguments)
    forecast_run(setup, random_rows(3, 9, 100))
    assert asked == [(device, "float32", sharing)]
