"""Device, precision, base and prefix from the flags, as a run and a plan take them."""

import pytest
import torch

from glmkern.checkpoint import write_prefix
from glmkern.errors import InputError
from glmkern.training.flags.arguments import Arguments, build
from glmkern.training.run import run
from glmkern.training.setup import prepare
from tests.official import prefix, write_base


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), shared / "data" / "tokenizer")


@pytest.fixture
def flags(base, tmp_path) -> dict[str, object]:
    return {"model_name_or_path": str(base), "no_cuda": True, "output_dir": str(tmp_path / "out")}


def arguments(flags, **changes) -> Arguments:
    return build({**flags, **changes})


def test_the_configuration_of_base_and_prefix(flags, base):
    args = arguments(flags, pre_seq_len=7, quantization_bit=4, bf16=True)
    setup = prepare(args)
    assert (setup.device, setup.dtype, setup.base) == (torch.device("cpu"), torch.bfloat16, base)
    assert setup.config.pre_seq_len is None and setup.config.quantization_bit == 0
    tuned = setup.tuned_config
    assert (tuned.pre_seq_len, tuned.prefix_projection, tuned.quantization_bit) == (7, False, 4)
    assert setup.arguments == args


@pytest.mark.parametrize("given", [None, 5])
def test_a_checkpoint_gives_the_length_of_its_prefix(flags, tmp_path, given):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_prefix(folder, {"embedding.weight": torch.randn(3, 16)})
    args = arguments(flags, ptuning_checkpoint=str(folder), pre_seq_len=given)
    assert prepare(args).arguments.model.pre_seq_len == (given or 3)


def test_another_device_and_the_tokens_of_a_pack(flags):
    setup = prepare(arguments(flags), torch.device("cuda"))
    assert (setup.device.type, setup.dtype) == ("cuda", torch.float16)
    changed = setup.with_tokens_per_pack("300")
    assert changed.arguments.training.tokens_per_pack == "300"
    assert setup.arguments.training.tokens_per_pack == "auto"


def test_turing_has_no_bfloat16(flags, monkeypatch):
    monkeypatch.setattr("glmkern.training.setup.capability", lambda device: (7, 5))
    gpu = torch.device("cuda", 0)
    assert prepare(arguments(flags, fp16=True), gpu).dtype == torch.float16
    for change in ({"bf16": True}, {"model_dtype": "bfloat16"}):
        with pytest.raises(InputError, match="sm_80 or newer, and this one is sm_75: pass --fp16"):
            prepare(arguments(flags, **change), gpu)
        assert prepare(arguments(flags, **change), torch.device("cuda")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"model_name_or_path": "missing/base"}, "missing/base"),
        ({"ptuning_checkpoint": "missing"}, "there is no prefix checkpoint missing"),
    ],
)
def test_what_is_not_there(flags, changes, words):
    with pytest.raises(InputError, match=words):
        prepare(arguments(flags, **changes))


def test_a_run_needs_no_forecast(flags, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text('{"q": "你好", "a": "好"}\n' * 3)
    training = {
        "do_train": True,
        "train_file": str(rows),
        "prompt_column": "q",
        "response_column": "a",
        "pre_seq_len": 2,
        "max_steps": 2,
        "save_steps": 2,
        "learning_rate": 0.1,
        "disable_tqdm": True,
    }
    assert run(arguments(flags, **training))["train_loss"] > 0
    assert prefix(tmp_path / "out" / "checkpoint-2").shape == (2, 16)
    assert "predicted" not in capsys.readouterr().out
