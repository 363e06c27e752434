"""ChatGLM2 on the CUDA kernels alone, on the CPU: the official record, training, and a command line
without Triton. tests/model/test_model_on_kernels.py has more, on a GPU where there is one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import glmkern
from bench.oracles import relative_error
from tests.backends import CUDA, available
from tests.cuda_on_host.machine import Machine
from tests.cuda_on_host.sanitized import library
from tests.model.models import recorded_model
from tests.official import REPOSITORY, command, write_base
from tests.training.conftest import tiny, tiny_rows  # noqa: F401 (fixtures)
from tests.training.loop.test_trajectory import follow

pytestmark = pytest.mark.skipif(
    CUDA.device != "cpu", reason="the CUDA backend serves this machine's GPU"
)
TOLERANCE = 1e-5


@pytest.fixture
def cuda():
    with available(CUDA), glmkern.backend("cuda"):
        yield


def run(model, case):
    inputs = [case.get(name) for name in ("input_ids", "attention_mask", "position_ids", "labels")]
    loss, logits = model(*inputs)
    loss.backward()
    return loss.detach(), logits.detach()


@pytest.mark.parametrize("prefix", ["noproj", "proj"])
@pytest.mark.parametrize("layout", ["eval", "trainlayout"])
def test_official_record(cuda, golden, prefix, layout):
    folder, name = golden / "chatglm2_tiny", f"prefix_{prefix}_{layout}"
    case, model = load_file(folder / f"{name}.safetensors"), recorded_model(folder, prefix)
    recorded = json.loads((folder / "cases.json").read_text())[name]
    loss, logits = run(model, case)
    assert relative_error(logits, case["logits"]) < TOLERANCE
    assert loss.item() == pytest.approx(recorded["loss"], rel=TOLERANCE)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, case[f"grad.{key}"]) < TOLERANCE


def test_official_training_run(cuda, golden, tiny, tiny_rows):  # noqa: F811
    """Ten steps, held to what tests/training asks of the CPU's kernels."""
    loss_error, prefix_error = follow(golden, tiny, tiny_rows, "hf", False, optim="adamw_hf")
    assert loss_error <= 5e-6
    assert prefix_error <= 1e-4


def test_half_on_turing(cuda, golden):
    """As near to float64 as the official code, as tests/model/test_golden.py has it, by products
    of Turing's tensor cores, and with the loss scale that half needs."""
    folder = golden / "chatglm2_tiny"
    case = load_file(folder / "lowp_fp16.safetensors")
    weights = load_file(folder / "weights.safetensors")
    rounded = {name: weight.half() for name, weight in weights.items()}
    exact = recorded_model(folder, "noproj", torch.float64, weights=rounded)
    with glmkern.backend("reference"):
        _, exact_logits = run(exact, case)
    model, machine = recorded_model(folder, "noproj", torch.float16), Machine(library())
    with machine.code_version(75), machine.counting() as counted:
        loss, logits = model(case["input_ids"], None, None, case["labels"])
        (loss * 1024).backward()
    (gradient,) = (x.grad / 1024 for x in model.parameters() if x.requires_grad)
    (exact_gradient,) = (x.grad for x in exact.parameters() if x.requires_grad)
    official = case["grad.transformer.prefix_encoder.embedding.weight"]
    for ours, theirs, true in (
        (logits.detach(), case["logits"], exact_logits),
        (gradient, official, exact_gradient),
    ):
        error, allowed = ((x.double() - true).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 1.25 * allowed
    assert any(name.startswith("attend_mma_kernel<Sm75") for name in counted)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import glmkern
from glmkern import cli
status = cli.main(sys.argv[1:])
rows = glmkern.backends("cpu").rows
assert all("not installed" in why for (_, name), why in rows.items() if name == "triton")
sys.exit(status)
"""


def test_commands_without_triton(shared, tmp_path):
    """GLMKERN_BACKEND=cuda trains and answers, as the CPU's kernels do."""
    base = write_base(tmp_path / "base", shared / "data" / "tokenizer")
    lines = (shared / "data" / "advertisegen" / "train.json").read_text().split("\n")[:4]
    (tmp_path / "rows.json").write_text("\n".join(lines))
    common = {
        "train_file": tmp_path / "rows.json",
        "test_file": tmp_path / "rows.json",
        "prompt_column": "content",
        "response_column": "summary",
        "model_name_or_path": base,
        "overwrite_output_dir": True,
        "max_source_length": 16,
        "max_target_length": 8,
        "pre_seq_len": 4,
        "quantization_bit": 4,
        "disable_tqdm": True,
    }
    training = {
        "do_train": True,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "learning_rate": "2e-2",
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
    }
    losses, answers = {}, {}
    with available(CUDA):
        for backend in ("cpu", "cuda"):
            out = tmp_path / backend
            answering = {"do_predict": True, "predict_with_generate": True}
            answering |= {"ptuning_checkpoint": out / "checkpoint-3"}
            for flags in (training, answering):
                run_without_triton(backend, command(common | flags | {"output_dir": out}))
            log = (out / "trainer_log.jsonl").read_text().splitlines()
            losses[backend] = [x["loss"] for x in map(json.loads, log) if "loss" in x]
            answers[backend] = (out / "generated_predictions.txt").read_text()
    assert len(losses["cuda"]) == 3
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert answers["cuda"] == answers["cpu"]


def run_without_triton(backend, argv):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, *argv],
        cwd=REPOSITORY,
        env=os.environ | {"GLMKERN_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
