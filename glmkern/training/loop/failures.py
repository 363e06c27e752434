"""Why a step failed: the first layer whose numbers are not finite, in words."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmkern.model.packing import PackedBatch

LAYERS = "transformer.encoder.layers."
# The trained parameters whose columns are the layers' keys and values, in order.
PREFIX_COLUMNS = (
    "transformer.prefix_encoder.trans.2.bias",
    "transformer.prefix_encoder.embedding.weight",
)


class StepFailure(Exception):
    """A step that cannot be taken.

    Attributes:
        what: "the loss is nan".
        rows: indices of the rows that were computed.
        cure: what the user may do.
        where: the layer it comes from, or "".
        everywhere: whether every rank fails in the same way, as the gradient is that of all.
    """

    def __init__(
        self, what: str, rows: list[int], cure: str, where: str = "", everywhere: bool = False
    ):
        super().__init__(what)
        self.what, self.rows, self.cure = what, rows, cure
        self.where, self.everywhere = where, everywhere


class _Output(NamedTuple):
    """What a part of the model returned."""

    part: str
    finite: bool
    largest: float


@torch.no_grad()
def locate_loss_failure(
    model: nn.Module, batch: PackedBatch, dropout_offset: int, seed: int
) -> str:
    """Computes the loss of `batch` again, watching what each part of the model returns."""
    with _watched(model) as outputs, suppress(torch.OutOfMemoryError):
        model.loss(batch, dropout_offset=dropout_offset, seed=seed)
    before = ""
    for output in outputs:
        if not output.finite:
            return f"the first values that are not finite come from {output.part}{before}"
        before = f", after {output.part} with values up to {output.largest:.3g}"
    return f"the first values that are not finite are the logits{before}" if outputs else ""


def locate_gradient_failure(model: nn.Module) -> str:
    """The last layer, and so the first of the backward pass, whose prefix has a gradient that is
    not finite."""
    named = dict(model.named_parameters())
    gradient = next((named[name].grad for name in PREFIX_COLUMNS if name in named), None)
    if gradient is None:
        return ""
    layers = model.config.num_layers
    finite = torch.isfinite(gradient).reshape(-1, layers, gradient.shape[-1] // layers)
    failing = (~finite.all(-1).all(0)).nonzero().flatten().tolist()
    if not failing:
        return ""
    return (
        "backwards, the first gradient that is not finite is that of layer "
        f"{failing[-1] + 1} of {layers}"
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Output]]:
    """Collects the outputs of the model's parts in the order of computation."""
    outputs: list[_Output] = []

    def watch(part: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = list(_tensors(output))
            finite = all(bool(torch.isfinite(each).all()) for each in tensors)
            outputs.append(_Output(part, finite, max(float(each.abs().max()) for each in tensors)))

        return hook

    hooks = [
        module.register_forward_hook(watch(part))
        for name, module in model.named_modules()
        if (part := _part(name, model))
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _part(name: str, model: nn.Module) -> str | None:
    """What a message calls the module `name`; None for parts of a layer and what contains all."""
    if name.startswith(LAYERS) and name.removeprefix(LAYERS).isdecimal():
        return f"layer {int(name.removeprefix(LAYERS)) + 1} of {model.config.num_layers}"
    return {
        "transformer.prefix_encoder": "the prefix",
        "transformer.embedding.word_embeddings": "the embedding",
        "transformer.encoder.final_layernorm": "the final norm",
    }.get(name)


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors of a tensor, or of nested tuples and lists of them."""
    if isinstance(output, Tensor):
        yield output
    else:
        for each in output:
            yield from _tensors(each)
