"""What is kept and computed in which precision, and the log lines that say so."""

from dataclasses import dataclass

import torch

from glmkern.model.config import ChatGLMConfig
from glmkern.model.modules import kept_dtype
from glmkern.training.loop.loss_scale import LossScale
from glmkern.training.setup import Setup


@dataclass(frozen=True)
class Precision:
    """Names of dtypes, such as "float16".

    activations: of activations, norms and biases.
    weights: of embedding, output layer and linears that are not quantised.
    scales: of the scales of quantised linears.
    rope: of the table of rotary angles.
    """

    activations: str
    weights: str
    scales: str = "float16"
    rope: str = "float32"

    @classmethod
    def of_setup(cls, setup: Setup) -> "Precision":
        """Of the model that the setup loads."""
        rope_precision = setup.arguments.model.rope_precision
        return cls.of(setup.config, setup.dtype, setup.device, rope_precision)

    @classmethod
    def of(
        cls, config: ChatGLMConfig, dtype: torch.dtype, device: torch.device, rope_precision: str
    ) -> "Precision":
        """Of a model that is loaded in `dtype` from a folder with this configuration."""
        stored = torch.empty(0, dtype=config.dtype, device="meta")
        activations = _name(dtype)
        return cls(
            activations,
            _name(kept_dtype(stored, dtype, device)),
            _name(config.dtype),
            activations if rope_precision == "model" else "float32",
        )

    def lines(self, bits: int) -> list[str]:
        """Two lines for the start of a run; `bits` of a quantised base, or 0."""
        linears = f"{bits}-bit codes with {self.scales} scales" if bits else self.weights
        scaling = "no loss scale"
        if self.activations == "float16":
            scaling = f"loss scale {LossScale().value:g}, halved where the gradient overflows"
        return [
            f"precision: linears {linears}, embedding and output layer {self.weights}, activations "
            f"{self.activations}, rotary angles {self.rope}",
            "precision: prefix, its gradient and the optimiser float32; sums in products, norms, "
            f"softmax and loss float32; {scaling}",
        ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
