"""The settings of a forward and backward pass, as one value; nothing here imports torch."""

from dataclasses import dataclass

RECOMPUTE = ("none", "mlp", "layer")


@dataclass(frozen=True)
class Computation:
    """How a model computes its loss and gradient.

    prefix_dropout: probability of dropping an element of the prefix, in training mode.
    recompute: "none", "mlp" or "layer": what the backward pass computes again to save memory.
    label_smoothing: of the loss; see ops.linear_cross_entropy.

    Raises ValueError for an unknown `recompute`.
    """

    prefix_dropout: float = 0.1
    recompute: str = "none"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise ValueError(
                f"recompute must be one of {', '.join(RECOMPUTE)}, not {self.recompute!r}"
            )
