"""The whole model on a GPU, a training step and a text, against the same model on the CPU."""

import pytest
import torch

import glmkern
from bench.oracles import relative_error
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.model.packing import unpad
from tests.model.models import EVEN, SMALL, padded_batch, random_weights

TOLERANCE = 1e-5


def step_and_text(model: ChatGLM, batch: dict, prompts: torch.Tensor) -> list[torch.Tensor]:
    """Loss and the prefix's gradient, with dropout, and greedy ids; all on the CPU."""
    packed, _ = unpad(**batch)
    loss = model.train().loss(packed, dropout_offset=6, seed=3)
    (gradient,) = torch.autograd.grad(loss, model.prefix_encoder.embedding.weight)
    ids = model.eval().generate(prompts, max_new_tokens=9, eos_token_id=[])
    return [x.detach().cpu() for x in (loss, gradient, ids)]


@pytest.mark.parametrize("offload", [False, True], ids=["on-gpu", "offloaded"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_equals_the_cpu(bits, offload):
    config = ChatGLMConfig.from_dict(SMALL | EVEN)
    weights = random_weights(config)
    batch = padded_batch([7, 1, 12], config.padded_vocab_size, "right")
    prompts, prefix = torch.randint(1, 150, (2, 4)), torch.randn(5, config.kv_size)
    results = []
    for device in ("cpu", "cuda"):
        model = ChatGLM(config, pre_seq_len=5, offload_embedding=offload)
        model.load_base(weights.items(), torch.float32, device)
        with torch.no_grad():
            model.prefix_encoder.embedding.weight.copy_(prefix)
        if bits:
            model.quantize(bits)
            model.transformer.output_layer.quantize_(8)
        with glmkern.backend("reference" if device == "cpu" else "triton"):
            results.append(step_and_text(model, batch, prompts))
    (loss, gradient, ids), (gpu_loss, gpu_gradient, gpu_ids) = results
    assert relative_error(gpu_loss, loss) < TOLERANCE
    assert relative_error(gpu_gradient, gradient) < TOLERANCE
    assert torch.equal(gpu_ids, ids)
