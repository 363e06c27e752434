"""mapped=True: the processes of a machine share the pages of the base's files."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glmkern import ChatGLM
from glmkern.checkpoint import quantize_stream
from glmkern.model.modules import FrozenLinear
from tests.checkpoint.conftest import LAYOUTS

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def files_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The file whose mapping holds each tensor; of the process itself, "" or "[heap]"."""
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(each, 16) for each in span.split("-"))
        mappings.append((start, end, path[0] if path else ""))
    return {
        name: next(path for start, end, path in mappings if start <= tensor.data_ptr() < end)
        for name, tensor in tensors.items()
    }


def large(model: ChatGLM) -> dict[str, torch.Tensor]:
    found = {"embedding": model.transformer.embedding.word_embeddings.weight}
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            found[name] = module.packed if module.weight is None else module.weight
    return found


@needs_proc
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["float32", "float16", "4 bits"])
def test_weights_stay_in_their_files(store, state, config, monkeypatch, layout, kind):
    config = replace(config, ffn_hidden_size=14)
    shapes = {"dense_h_to_4h.weight": (28, 20), "dense_4h_to_h.weight": (20, 14)}
    for name in state:
        for end, shape in shapes.items():
            if name.endswith(end):
                state[name] = torch.randn(shape)
    if kind != "float32":
        state = {name: tensor.half() for name, tensor in state.items()}
    if kind == "4 bits":
        state = dict(quantize_stream(state.items(), 4))
        config = replace(config, quantization_bit=4)
    folder = store(state, layout)
    config.save(folder)
    loaded = {
        mapped: ChatGLM.from_pretrained(folder, "cpu", pre_seq_len=3, mapped=mapped)
        for mapped in (False, True)
    }
    loaded[True].prefix_encoder.load_state_dict(loaded[False].prefix_encoder.state_dict())
    assert not any(str(folder) in file for file in files_of(large(loaded[False])).values())
    for name, file in files_of(large(loaded[True])).items():
        assert str(folder) in file, name
    ids = torch.randint(config.padded_vocab_size, (2, 9))
    results = [model.eval()(ids, labels=ids) for model in loaded.values()]
    assert torch.equal(results[0].logits, results[1].logits)
    gradients = []
    for model, result in zip(loaded.values(), results, strict=True):
        result.loss.backward()
        gradients.append(model.prefix_encoder.embedding.weight.grad)
    assert torch.equal(*gradients)


@needs_proc
def test_what_must_be_converted_is_copied(store, state):
    folder = store(state, "single_safetensors")
    model = ChatGLM.from_pretrained(folder, "cpu", dtype=torch.bfloat16, mapped=True)
    assert {tensor.dtype for tensor in large(model).values()} == {torch.bfloat16}
    assert not any(str(folder) in file for file in files_of(large(model)).values())
