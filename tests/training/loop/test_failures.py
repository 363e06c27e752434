"""What a stop says: step, rows, the first layer that is not finite, the last good checkpoint."""

import re

import pytest
import torch

from glmkern.errors import TrainingError
from glmkern.training.loop.failures import locate_gradient_failure
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.model.models import small_model
from tests.training.children import random_rows
from tests.training.stand_in import arguments


def stop_after(steps: int, poison, tmp_path, dtype=torch.float32, projection=False, **flags) -> str:
    """The message of a run whose model is poisoned after `steps` steps."""
    model = small_model({"num_layers": 4}, dtype=dtype, projection=projection)
    trainer = Trainer(
        model,
        random_rows(9, 12),
        arguments(
            max_steps=6, save_steps=2, tokens_per_pack="0", per_device_train_batch_size=3, **flags
        ),
        folder=RunFolder(tmp_path),
        hooks=Hooks(on_step=lambda step: step == steps and poison(model)),
        row_names=[f"line {i}" for i in range(9)],
    )
    if steps == 0:
        poison(model)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    message = str(error.value)
    assert "\n" not in message
    assert re.match(
        rf"step {steps + 1}: the (loss|gradient) .* \(rows line \d, line \d, line "
        r"\d\);",
        message,
    )
    return message


def set_nan(module: str, name: str = "weight"):
    def poison(model):
        getattr(model.get_submodule(module), name).data.view(-1)[1] = float("nan")

    return poison


@pytest.mark.parametrize(
    "module, part, before",
    [
        ("transformer.encoder.layers.0.input_layernorm", "layer 1 of 4", "the embedding"),
        ("transformer.encoder.layers.2.self_attention.dense", "layer 3 of 4", "layer 2 of 4"),
        ("transformer.encoder.final_layernorm", "the final norm", "layer 4 of 4"),
        ("transformer.prefix_encoder.embedding", "the prefix", None),
    ],
)
def test_the_first_layer_that_is_not_finite(tmp_path, module, part, before):
    message = stop_after(3, set_nan(module), tmp_path)
    assert "the loss is nan" in message
    assert f"the first values that are not finite come from {part}" in message
    if before is not None:
        largest = float(
            re.search(rf"from {part}, after {before} with values up to (\S+);", message)[1]
        )
        assert 0 < largest < 1e4
    assert f"last good checkpoint: {tmp_path}/checkpoint-2; lower --learning_rate" in message


def test_logits(tmp_path):
    message = stop_after(0, set_nan("transformer.output_layer"), tmp_path)
    assert (
        "the first values that are not finite are the logits, after the final norm with values "
        "up to "
    ) in message
    assert "last good checkpoint: none yet; " in message


def test_every_token_of_the_embedding(tmp_path):
    def poison(model):
        model.transformer.embedding.word_embeddings.weight.fill_(float("inf"))

    assert "come from the embedding, after the prefix with" in stop_after(1, poison, tmp_path)


def test_activations_beyond_float16(tmp_path):
    def poison(model):
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight.mul_(1e4)
        model.transformer.encoder.layers[1].mlp.dense_h_to_4h.weight.mul_(100)

    message = stop_after(2, poison, tmp_path, dtype=torch.float16)
    assert "come from layer 2 of 4, after layer 1 of 4 with values up to" in message
    assert "--model_dtype bfloat16 or float32" in message


@pytest.mark.parametrize("projection, name", [(False, "embedding.weight"), (True, "trans.2.bias")])
def test_the_layer_of_the_gradient(projection, name):
    model = small_model({"num_layers": 4}, projection=projection)
    parameter = dict(model.prefix_encoder.named_parameters())[name]
    assert locate_gradient_failure(model) == ""
    parameter.grad = torch.zeros_like(parameter)
    assert locate_gradient_failure(model) == ""
    columns = parameter.shape[-1] // 4
    parameter.grad.view(-1, 4 * columns)[-1, columns] = float("inf")
    assert locate_gradient_failure(model).endswith("that is not finite is that of layer 2 of 4")
    parameter.grad.view(-1, 4 * columns)[0, 3 * columns - 1] = float("nan")
    assert locate_gradient_failure(model).endswith("that is not finite is that of layer 3 of 4")


def test_a_gradient_that_overflows_names_its_layer(tmp_path):
    def poison(model):
        def steepen(module, arguments, output):
            """The third layer's keys get an infinite gradient, and its values none that is."""
            key = output[2][0]
            key.register_hook(lambda gradient: gradient + float("inf"))

        model.prefix_encoder.register_forward_hook(steepen)

    message = stop_after(1, poison, tmp_path)
    assert "the gradient is not finite" in message
    assert "the first gradient that is not finite is that of layer 3 of 4; last good" in message
